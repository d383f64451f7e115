"""The benchmarks run, and compute what they say they compute."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    bench_engine,
    bench_ipc,
    bench_pd,
    bench_placement,
    bench_staging,
    bench_transfer,
    child,
    engine_cases,
)
from benchmarks.bench_pd import fastest, judge
from benchmarks.checks import ended
from benchmarks.client import Received, ask
from benchmarks.engine_cases import CASES, Case, complete, figures, parser, table
from benchmarks.peers import dynosim, vllm_engine
from benchmarks.peers.vllm_proxy import REMOTE_DECODE, Proxy
from benchmarks.peers.vllm_server import Server
from benchmarks.sim_parts import GRIDS, PARTS, Setup, below_best
from benchmarks.simulations import held_rate, held_text, simulate
from benchmarks.trace import NUM_REQUESTS, arrivals, load
from benchmarks.virtual import MAX_MODEL_LEN, Setting
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim import latency
from tests.transfer.gpu import has_gpu

ROOT = Path(__file__).parent.parent
MODEL = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024, "eos_token_id": 1,
}  # fmt: skip


def write_model(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


SAMPLE = ROOT / "benchmarks" / "data" / "mooncake_conversation.jsonl.gz"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_rates_of_an_engine() -> None:
    rates = figures(Case("", 4, 100, 11), 0.5, 1.5)
    assert (rates["prefill_tok_s"], rates["decode_tok_s"], rates["step_ms"]) == (800, 40, 100)
    fast, slow = (
        {
            "engine": name,
            "version": "1",
            "ready_s": s,
            "cases": {"b1": figures(CASES["b1"], s, 3 * s)},
            "alone_ms": {"9": s},
        }
        for name, s in (("fast", 1.0), ("slow", 2.0))
    )
    ratios = [line.split("|")[-2].strip() for line in table(fast, slow).splitlines()[2:]]
    assert ratios == ["2.00"] * 5


def test_the_engine_is_timed(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.bench_engine", "--model", str(write_model(tmp_path / "tiny")), "--device", "cpu"]
    command += ["--ops", "torch", "--dtype", "float32", "--max-model-len", "600", "--scale", "0.06", "--repeats", "1"]
    command += ["--alone", "5,90", "--json", str(tmp_path / "out.json"), "--", "--num-gpu-blocks-override", "200"]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["cases"]) == list(CASES) and result["ready_s"] > 0
    assert all(row["prefill_tok_s"] > 0 for row in result["cases"].values())
    assert list(result["alone_ms"]) == ["5", "90"] and min(result["alone_ms"].values()) > 0
    refused = python(*command[:-3], "--scale", "1", "--cases", "long")
    assert refused.returncode == 2 and "long needs 8064 tokens; --max-model-len is 600" in refused.stderr


def test_what_an_engine_is_timed_with_fits_the_model_and_the_device(tmp_path: Path) -> None:
    def completed(device: str, *flags: str) -> tuple[str, int]:
        args = parser("").parse_args(["--cases", "b1", "--scale", "0.1", *flags])
        complete(args, device)
        return args.dtype, args.max_model_len

    tiny = str(write_model(tmp_path / "tiny"))
    assert completed("cpu", "--model", tiny) == ("float32", 1024)
    assert completed("cuda", "--model", tiny) == ("bfloat16", 1024)
    assert completed("cuda", "--model", "demo") == ("bfloat16", 4096)
    assert completed("cpu", "--model", tiny, "--max-model-len", "300", "--dtype", "bfloat16") == ("bfloat16", 300)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a benchmark says that ends with status 2 before it has started anything, on a machine without a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(bench_pd, "run_layout", lambda *_: pytest.fail("a layout was started"))
    monkeypatch.setattr(bench_engine, "build_engine", lambda *_: pytest.fail("an engine was built"))
    monkeypatch.setattr(child, "start", lambda *_: pytest.fail("a process was started"))

    def run(main: Callable[[list[str]], int], *flags: str) -> str:
        assert ended(lambda: main(list(flags))) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1
        return told.err.removeprefix("error: ").strip()

    return run


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--layouts", "ours-1p1d,foo"], "--layouts: 'foo' is not allowed; it must be names joined by commas, of ours-1p1d, "),
        (["--rates", "0"], "--rates: '0' is not allowed; it must be numbers above 0"),
        (["--rates", "1,abc"], "--rates: '1,abc' is not allowed; it must be numbers above 0"),
        (["--rates", "nan"], "--rates: 'nan' is not allowed; it must be numbers above 0"),
        (["--gpus", "1,1", "--device", "cuda"], "--gpus: '1,1' is not allowed; it must name two GPUs, as in 0,1"),
        (["--requests", "0"], "--requests: '0' is not allowed; it must be an integer from 2 to 300"),
        (["--scale", "0"], "--scale: '0' is not allowed; it must be a number above 0, "),
        (["--scale", "1"], "--max-model-len is 4096; prompts of 7000 tokens need 7002: it must be as much, or --scale, "),
        (["--model", "/nope"], "--model: '/nope' is not a directory; give a Hugging Face checkpoint directory, or `demo`"),
        (["--json", "/nope/out.json"], "--json /nope/out.json cannot be written: /nope is not there; "),
        (["--reference", "/nope"], "--reference: /nope cannot be read: No such file or directory"),
        (["--join", "/nope"], "--join: /nope cannot be read: No such file or directory"),
        (["--", "--nonsense"], "there is no flag --nonsense"),
        (["--device", "cuda"], "--device cuda with --gpus 0,1 needs 2 GPUs, and there is no NVIDIA driver or GPU here: "),
    ],
)  # fmt: skip
def test_what_the_benchmark_of_pairs_refuses(flags: list[str], text: str, refused: Callable[..., str]) -> None:
    if "--device" in flags[:1] and has_gpu():
        pytest.skip("there is a GPU here")
    assert refused(bench_pd.main, "--device", "cpu", "--scale", "0.1", *flags).startswith(text)


@pytest.mark.parametrize("main", [bench_engine.main, vllm_engine.main])
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--scale", "0"], "--scale: '0' is not allowed; it must be a number above 0, "),
        (["--scale", "-1"], "--scale: '-1' is not allowed"),
        (["--scale", "nan"], "--scale: 'nan' is not allowed"),
        (["--repeats", "0"], "--repeats: '0' is not allowed; it must be an integer from 1 to "),
        (["--alone", "9,0"], "--alone: '0' is not allowed; it must be an integer from 1 to "),
        (["--alone", "9,4096"], "--alone: 4096 is not allowed; it must be below --max-model-len, 4096"),
        (["--cases", "b1,b2"], "--cases: 'b2' is not allowed; it must be names joined by commas, of b1, b8, "),
        (["--json", "/nope/out.json"], "--json /nope/out.json cannot be written: /nope is not there; "),
        (["--model", "/nope"], "--model: '/nope' is not a directory; "),
        (["--scale", "1"], "case long needs 8064 tokens; --max-model-len is 4096: it must be as much, or --scale, "),
    ],
)
def test_what_the_benchmarks_of_engines_refuse(
    main: Callable[[list[str]], int], flags: list[str], text: str, refused: Callable[..., str]
) -> None:
    assert refused(main, "--model", "demo", "--scale", "0.1", *flags).startswith(text)


def test_what_other_benchmarks_refuse(refused: Callable[..., str]) -> None:
    assert refused(bench_transfer.main, "--rounds", "0").startswith(
        "--rounds: '0' is not allowed; it must be an integer"
    )
    assert "--json /nope/a cannot be written" in refused(bench_transfer.main, "--json", "/nope/a")
    assert "--chunk-kib is 100; it must be a multiple" in refused(bench_staging.main, "--chunk-kib", "100")
    for main in (bench_ipc.main, bench_staging.main):
        assert "needs 2 GPUs, and there is no NVIDIA driver or GPU here: " in refused(main)


def test_broken_models_and_reports_are_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    broken, model = tmp_path / "broken.json", write_model(tmp_path / "tiny")
    (model / "config.json").write_text('{"vocab_size": 0}')
    for main in (bench_pd.main, bench_engine.main):
        said = f"--model: {model}/config.json has vocab_size 0; it must be a whole number of at least 1"
        assert refused(main, "--model", str(model), "--device", "cpu") == said
    for text, why in (("[]", "is not a JSON object"), ("{", "is not JSON: "), ("{}", "")):
        broken.write_text(text)
        for flag in ("--join", "--reference"):
            said = refused(bench_pd.main, flag, str(broken))
            assert said.startswith(f"{flag}: {broken} {why or 'is no report of this benchmark, of its --json: '}")
        said = refused(engine_cases.main, str(broken), str(broken))
        assert said.startswith(f"OURS: {broken} {why or 'has no engine; it must be what bench_engine or '}")
    report = {"engine": "a", "version": "1", "model": "m", "dtype": "d", "scale": 1, "cases": {"b1": {"step_ms": 1}}}
    for more, why in (({}, "no prefill_tok_s"), ({"cases": {}, "alone_ms": []}, "an alone_ms that is no object")):
        broken.write_text(json.dumps({**report, **more}))
        assert f"OURS: {broken} has {why}; " in refused(engine_cases.main, str(broken), str(broken))


def test_runs_are_joined(tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, scale: float, length: int) -> str:
        row = {"num_input": 9, "ttft_ms": 1.0, "tpot_ms": 1.0, "e2e_ms": 9.0}
        run = {"rate": 1, "seconds": 2.0, "requests": [row, None], "itl_ms": {"p50": 1.0}, "errors": []}
        layout = {"title": name, "ready_s": 1, "unloaded_ttft_ms": {length: 2.0}, "runs": [run]}
        facts = {"model": "m", "scale": scale, "max_model_len": 99, "max_num_batched_tokens": 9}
        (tmp_path / name).write_text(json.dumps({**facts, "layouts": {name: layout}}))
        return str(tmp_path / name)

    one, out = write("one", 1, 64), tmp_path / "out.json"
    assert bench_pd.main(["--join", f"{one},{write('two', 1, 64)}", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["layouts"]["two"]["runs"][0]["slo_attainment"] == 0.5
    assert bench_pd.read_reference(out) == {64: 2.0}
    capsys.readouterr()
    assert "scale is 1, 2" in refused(bench_pd.main, "--join", f"{one},{write('two', 2, 64)}")
    assert "prompts of different lengths" in refused(bench_pd.main, "--join", f"{one},{write('two', 1, 32)}")


SECOND = """
import os, sys, time
from benchmarks import child

def second(pipe, way):
    pipe.send("up")
    pipe.recv()
    if way == "raises":
        raise OSError("out of\\nmemory")
    if way == "stays":
        time.sleep(60)
    if way == "dies":
        os._exit(7)

def main():
    pipe, process = child.start(second, sys.argv[1])
    pipe.recv()
    pipe.send("go")
    if sys.argv[1] == "stays":
        return 0
    if sys.argv[2] == "listens" and sys.argv[1] != "ends":
        pipe.recv()
    process.join()
    time.sleep(0.2 if sys.argv[1] == "ends" else 60)
    return 0

if __name__ == "__main__":
    sys.exit(child.watched(main))
"""


@pytest.mark.parametrize("parent", ["listens", "waits for something else"])
@pytest.mark.parametrize(
    ("way", "said"), [("raises", "OSError: out of memory"), ("dies", "exit status 7"), ("ends", ""), ("stays", "")]
)
def test_who_waits_for_a_process_that_is_gone_ends(way: str, said: str, parent: str, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(SECOND)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(tmp_path / "two.py"), way, parent]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == ((2, f"error: second has ended: {said}\n") if said else (0, ""))


def test_a_stream_is_read_whatever_pieces_it_comes_in() -> None:
    texts = [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b'21\r\ndata: {"choices":[{"text":"a"}]}\n\n\r\n',
        b'data: {"choices":[{"text":"b"}]}\n\n',
        b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\ndata: [DONE]\n\n',
    ]
    answer = Received(1.0, [(2.0 + n, text) for n, text in enumerate(texts)]).answer()
    assert (answer.ttft_s, answer.tpot_s, answer.e2e_s, answer.num_tokens) == (2.0, 1.0, 3.0, 2)
    data = b"".join(texts)
    second = data.index(b'"b"')
    split = Received(1.0, [(5.0, data[:second]), (9.0, data[second:])]).answer()
    assert split.event_s == [5.0, 9.0] and not split.error
    assert Received(1.0, [(2.0, data[:-10])]).answer().error == "the stream broke off"
    failed = [(2.0, b'HTTP/1.1 429 No\r\n\r\n{"error":{"message":"full"}}')]
    assert "429" in Received(1.0, failed).answer().error and "full" in Received(1.0, failed).answer().error


def test_the_trace() -> None:
    requests = load(300, 8192)
    assert len(requests) == NUM_REQUESTS
    with pytest.raises(ConfigError, match="--requests is 301; it must be a whole number from 2 to 300"):
        load(NUM_REQUESTS + 1, 8192)
    assert max(r.num_input for r in requests) == 7000 and max(r.num_input + r.num_output for r in requests) == 8192
    assert requests[0].prompt(1000, "a")[:512] == requests[1].prompt(1000, "a")[:512] != requests[0].prompt(1000, "b")
    assert requests[0].prompt(1000, "a")[512:700] != requests[1].prompt(1000, "a")[512:700]
    assert all(len(r.prompt(1000, "a")) == r.num_input for r in requests[:20])
    assert arrivals(requests, 4)[-1] == pytest.approx(299 / 4)
    small = load(20, 200, 0.01)
    assert all(len(r.prompt(9, "")) == r.num_input <= 70 and r.num_output >= 2 for r in small)
    said = r"--max-model-len is 4096; prompts of 7000 tokens need 7002: .* --scale, which is 1, 0\.5848 at most"
    with pytest.raises(ConfigError, match=said):
        load(300, 4096)
    assert max(r.num_input + r.num_output for r in load(300, 4096, 0.5848)) == 4096


def test_attainment() -> None:
    reference = fastest([{100: 10.0, 300: 40.0}, {100: 20.0, 300: 30.0}])
    assert reference == {100: 10.0, 300: 30.0}
    rows = [(200, 99.0, 99.0), (200, 101.0, 1.0), (200, 1.0, 101.0)]  # 20 ms unloaded: 100 ms are allowed
    requests = [{"num_input": n, "ttft_ms": ttft, "tpot_ms": tpot, "e2e_ms": 1.0} for n, ttft, tpot in rows]
    run: dict[str, Any] = {"requests": [*requests, None], "seconds": 0.5}
    judge(run, reference)
    assert (run["slo_attainment"], run["goodput_req_s"], run["failed"]) == (0.25, 2.0, 1)
    assert run["ttft_ms"] == {"p50": 99.0, "p90": 101.0, "p99": 101.0}


def test_the_proxy_asks_prefill_then_decode() -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    params = {"do_remote_prefill": True, "remote_block_ids": [3], "remote_host": "h", "remote_port": 1}
    events = (
        b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[],"usage":{"completion_tokens":7}}\n\ndata: [DONE]\n\n'
    )
    answers = [json.dumps({"kv_transfer_params": params}).encode(), events]

    def server(answer: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.split(": ") for line in head.split("\r\n")[1:-2])
            body = await reader.readexactly(int(headers["Content-Length"]))
            asked.append((headers["X-Request-Id"], json.loads(body)))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + answer)
            await writer.drain()
            writer.close()

        return serve

    async def run() -> int:
        async with AsyncExitStack() as stack:
            urls = []
            for handler in [*map(server, answers), None]:
                listening = await asyncio.start_server(handler or Proxy(*urls).serve, "127.0.0.1", 0)
                await stack.enter_async_context(listening)
                urls.append(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
            return (await ask(urls[-1], "m", [1, 2], 7)).num_tokens

    assert asyncio.run(run()) == 7
    (first_id, prefill), (second_id, decode) = asked
    assert first_id == second_id and prefill["prompt"] == decode["prompt"] == [1, 2]
    assert prefill["kv_transfer_params"] == REMOTE_DECODE and decode["kv_transfer_params"] == params
    assert (prefill["max_tokens"], prefill["stream"], "stream_options" in prefill) == (1, False, False)
    assert (decode["max_tokens"], decode["stream"]) == (7, True)


def test_a_server_is_started_and_ended() -> None:
    command = [sys.executable, "-m", "benchmarks.peers.vllm_proxy", "--prefill", "http://127.0.0.1:1", "--decode", ""]
    with Server(command) as server:
        server.wait_ready()
    with pytest.raises(OSError):
        urllib.request.urlopen(server.url + "/health", timeout=5)
    with (
        pytest.raises(RuntimeError, match="No module named nowhere"),
        Server([sys.executable, "-m", "nowhere"]) as gone,
    ):
        gone.wait_ready()


@pytest.mark.slow
def test_a_pair_under_the_trace(tmp_path: Path) -> None:
    model = ["--model", str(write_model(tmp_path / "tiny")), "--load-format", "dummy", "--device", "cpu"]
    small = ["--scale", "0.02", "--requests", "8", "--rates", "8", "--max-num-batched-tokens", "512"]
    out = ["--layouts", "ours-1p1d,vllm-1p1d", "--json", str(tmp_path / "out.json")]
    done = python(
        "-m", "benchmarks.bench_pd", *model, *small, *out, "--", "--num-gpu-blocks-override", "200", "--ops", "torch"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vllm-1p1d: skipped: vLLM is measured on GPUs alone" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    (run,) = result["layouts"]["ours-1p1d"]["runs"]
    assert (run["failed"], run["handover"]["count"], len(run["requests"])) == (0, 8, 8)
    assert run["handover"]["bytes"] > 0 and run["handover"]["overhead_ms"] > 0
    assert sorted(map(int, result["reference_ttft_ms"])) == [2, 10, 20, 41, 82, 140]


@pytest.mark.parametrize("layout", ["2mixed", "1p1d"])
def test_placement_by_slo_with_reports_that_are_late(layout: str) -> None:
    """Front ends hear of a prompt up to a step too late, and place by what must have become of it since."""
    requests = load(300, MAX_MODEL_LEN)
    setting = Setting(layout, max_num_batched_tokens=8192)
    shares = [bench_placement.measure(setting, requests, rate)["in time %"] for rate in (5, 8, 10)]
    assert sum(shares) >= 291.5  # two mixed ones have 293.4, and 289.7 with what was last reported; a pair 294.7


def test_the_benchmark_of_placement_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--layouts", "2mixed", "--placements", "fewest-tokens", "--requests", "20", "--rates", "5"]
    out = tmp_path / "rows.json"
    assert bench_placement.main([*flags, "--max-num-batched-tokens", "4096", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["in time %"] > 80 and row["step tokens"] == 4096
    assert "| 2mixed | fewest-tokens | 4096 | 8192 | 5.0 |" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part_of_the_simulators_benchmark_runs(tmp_path: Path) -> None:
    out, few = tmp_path / "out.json", ("--max-requests", "6", "--jobs", "2")
    done = python("-m", "benchmarks.bench_sim", *few, "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert list(found) == [name for name in PARTS if name != "large"]
    assert [line[3:] for line in done.stdout.splitlines() if line.startswith("## ")] == list(found)
    assert all(row["ours"]["offered"] == 6 and not row["dynosim"] for row in found["peer"] + found["agreement"])
    assert {row["placement"] for row in found["tropical"]} >= {"slo", "tropical", "distserve", "vllm-chunked"}
    for row in found["tropical"] + found["static"]:
        assert len(row["shares"]) == len(row["rates"]) and all(0 <= share <= 1 for share in row["shares"])
    assert all(row["cpu_s"] > 0 and row["most_bytes"] > 1e6 for row in found["speed"])
    assert "`auto:8` is nowhere below the best static layout." in done.stdout


def test_what_the_simulators_benchmark_refuses() -> None:
    assert (
        "there is no peers; there are peer, agreement" in python("-m", "benchmarks.bench_sim", "--only", "peers").stderr
    )
    gone = python("-m", "benchmarks.bench_sim", "--only", "speed", "--trace", "nowhere")
    assert gone.returncode == 1 and "nowhere cannot be read" in gone.stderr and "Traceback" not in gone.stderr
    for flags, text in (
        (("--jobs", "0"), "--jobs is 0; it must be a whole number from 1"),
        (("--max-requests", "0"), "--max-requests is 0; it must be a whole number from 1"),
        (("--json", "nowhere/out.json"), "--json nowhere/out.json cannot be written"),
    ):
        wrong = python("-m", "benchmarks.bench_sim", "--only", "speed", *flags)
        assert wrong.returncode == 2 and text in wrong.stderr and "Traceback" not in wrong.stderr
    assert "--peer nowhere is no program" in python("-m", "benchmarks.bench_sim", "--peer", "nowhere").stderr


def test_the_rate_up_to_which_most_are_in_time() -> None:
    flags = Setup(SAMPLE).on_grid("70b-h200-tp4", "2M", most=60)
    rates = [0.5, 8.0]
    shares = [simulate([*flags, "--rate", str(rate)])["slo_attainment"] for rate in rates]
    row = {"rates": rates, "shares": shares}
    assert shares[0] >= 0.9 > shares[1]
    row["held"] = held = held_rate(flags, row)
    assert held is not None and held_text(row) == f"{held:.2f}"
    assert simulate([*flags, "--rate", str(held)])["slo_attainment"] >= 0.9
    assert simulate([*flags, "--rate", str(held * 1.005)])["slo_attainment"] < 0.9
    for shares, text in (([0.95, 0.9], "> 8"), ([0.85, 0.2], "< 0.5")):
        row = {"rates": rates, "shares": shares}
        row["held"] = held_rate(flags, row)
        assert row["held"] is None and held_text(row) == text


def test_where_ours_is_below_the_best_static_layout() -> None:
    names = ("auto:8", "7P1D", "6P2D")
    columns = ([1.0, 0.91, 0.5], [1.0, 0.92, 0.4], [0.9, 0.93, 0.49])
    rows = [{"name": name, "rates": [1, 2, 3], "shares": shares} for name, shares in zip(names, columns, strict=True)]
    assert below_best(rows) == ["2 req/s, 91.00 % beside 93.00 % of 6P2D"]


def test_dynosims_rows_are_judged_as_ours_are() -> None:
    times = latency.read(GRIDS, "8b-h200-tp1")
    alone_ms = times.prefill_ms(1000)

    def row(ttft_x: float, tpot_ms: float, num_output: int, status: str = "completed") -> dict[str, Any]:
        first_ms = ttft_x * alone_ms
        last_ms = first_ms + tpot_ms * (num_output - 1)
        return {
            "terminal_status": status, "input_length": 1000, "output_length": num_output, "ttft_ms": first_ms,
            "first_token_ms": first_ms, "last_token_ms": last_ms,
        }  # fmt: skip

    rows = [row(4.9, 99, 11), row(5.1, 9, 11), row(1, 101, 11), row(1, 0, 1), row(1, 1, 11, "failed")]
    found = dynosim.judge(rows, times)
    assert found["slo_attainment"] == 2 / 5
    assert found["tpot_ms"]["p50"] == pytest.approx(99), "one token has no TPOT"
    assert found["ttft_s"]["p99"] == pytest.approx(5.1 * alone_ms / 1e3, rel=0.01)
