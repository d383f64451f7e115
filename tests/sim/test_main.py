"""The command: the same flags, the same bytes; what is wrong is said with its flag."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_pd.clock import VirtualClock
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.engine.profile import VERSION, Conditions, Profile
from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim.main import parse_layout
from fastdeploy_pd.sim.progress import Progress
from fastdeploy_pd.sim.report import summary

DATA = Path(__file__).parent / "data"
TRACE = Path(__file__).parents[2] / "benchmarks" / "data" / "mooncake_conversation.jsonl.gz"
FLAGS = ["simulate", "--latency", str(DATA), "--profile", "70b-h200-tp4"]


def test_the_same_seed_is_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--trace", str(TRACE), "--max-requests", "120", "--layout", "2P2D1M", "--rate", "4"]
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.json"
        assert main([*flags, "--seed", str(seed), "--per-request", "--json", str(out)]) == 0
        found.append(out.read_bytes())
    assert found[0] == found[1]
    result = json.loads(found[0])
    rows = result["requests"]
    assert rows != json.loads(found[2])["requests"], "placement tosses coins"
    assert [r["number"] for r in rows] == list(range(120))
    assert result["rate"] == pytest.approx(4)
    assert result["slo_attainment"] == sum(r["meets_ttft"] and r["meets_tpot"] for r in rows) / 120
    assert {r["prefill_id"] for r in rows} == {"P0", "P1", None}
    assert {r["decode_id"] for r in rows} == {"D2", "D3", "M4"}
    assert "SLO attainment" in capsys.readouterr().out


def test_tight_and_loose_objectives(tmp_path: Path) -> None:
    found = []
    for x, ms in ((0.5, 100), (5, 100), (1e9, 1e9)):
        out = tmp_path / "out.json"
        flags = [*FLAGS, "--trace", "synthetic", "--rate", "3", "--num-prompts", "80", "--layout", "1M"]
        assert main([*flags, "--slo-ttft-x", str(x), "--slo-tpot-ms", str(ms), "--json", str(out)]) == 0
        found.append(json.loads(out.read_text()))
        assert "requests" not in found[-1]
    assert [f["slo_attainment"] for f in found][::2] == [0.0, 1.0]
    assert found[0]["ttft_attainment"] == 0.0 and found[0]["tpot_attainment"] == found[1]["tpot_attainment"]
    assert found[2]["goodput"] == pytest.approx(80 / found[2]["span_s"])


def test_the_first_synthetic_requests_are_the_same_requests(tmp_path: Path) -> None:
    found = []
    for few in ((), ("--max-requests", "20")):
        out = tmp_path / "out.json"
        flags = [*FLAGS, "--trace", "synthetic", "--rate", "3", "--num-prompts", "80", "--layout", "8M", *few]
        assert main([*flags, "--random-range-ratio", "0.5", "--per-request", "--json", str(out)]) == 0
        rows = json.loads(out.read_text())["requests"]
        found.append([(r["number"], r["arrival_s"], r["input_tokens"], r["output_tokens"]) for r in rows])
    assert len(found[0]) == 80 and found[1] == found[0][:20]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--trace", "synthetic", "--layout", "1M"], "--trace synthetic has no rate of its own; give --rate"),
        (
            ["--trace", "synthetic", "--rate", "9", "--layout", "1M", "--per-request"],
            "to the report; give --json, where",
        ),
        (
            ["--trace", str(TRACE), "--layout", "auto"],
            "--layout auto: it must be counts before P, D or M, as in 6P2D or 8M, or auto:8",
        ),
        (["--trace", str(TRACE), "--layout", "3P"], "at least one instance that decodes"),
        (["--trace", str(TRACE), "--layout", "1M", "--rate", "0"], "--rate is 0.0; it must be above 0"),
        (
            ["--trace", "synthetic", "--rate", "99", "--layout", "1M", "--json", "no/out"],
            "--json no/out cannot be written",
        ),
        (["--trace", "nowhere", "--layout", "1M"], "--trace nowhere cannot be read"),
        (
            ["--trace", str(TRACE), "--layout", "1M", "--profile", "70b-sxm"],
            "--num-blocks must be given for --profile 70b-sxm; it is known for 70b-h200-tp4, 8b-h200-tp1\n",
        ),
    ],
)
def test_wrong_flags_are_named(flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, *flags]) == 2
    assert text in capsys.readouterr().err


WORK = [
    "simulate",
    "--trace",
    "synthetic",
    "--rate",
    "3",
    "--num-prompts",
    "30",
    "--layout",
    "1M",
    "--num-blocks",
    "900",
]


def test_step_times_of_a_file_and_of_coefficients(tmp_path: Path) -> None:
    """The same coefficients are the same bytes, whichever way they come; twice as slow is slower."""
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"prefill": [1e-9, 1e-4, 0.005], "decode": [1e-7, 1e-4, 0.01], "device": "any"}))
    measured = tmp_path / "measured.json"
    predictor = Predictor((1e-9, 1e-4, 0.005), (1e-7, 1e-4, 0.01))
    conditions = Conditions("model", "any", "float32", "torch", 1)
    Profile(VERSION, conditions, predictor, [], [], 450, 128, 1000).save(measured)
    found = []
    for number, flags in enumerate(
        (
            ["--latency", str(profile)],
            ["--latency", str(measured)],
            ["--latency-model", "formula", "--prefill-coefficients=1e-9,1e-4,5e-3", "--decode-coefficients=1e-7,1e-4,1e-2"],
            ["--prefill-coefficients=2e-9,2e-4,1e-2", "--decode-coefficients=2e-7,2e-4,2e-2"],
        )
    ):  # fmt: skip
        out = tmp_path / f"{number}.json"
        assert main([*WORK, *flags, "--json", str(out), "--per-request"]) == 0
        found.append(json.loads(out.read_text()))
    assert found[0]["requests"] == found[1]["requests"] == found[2]["requests"]
    first, alone_s = found[0]["requests"][0], 1e-9 * 1024**2 + 1e-4 * 1024 + 0.005
    assert first["ttft_s"] == pytest.approx(alone_s), "the first prompt is alone"
    assert found[3]["tpot_ms"]["p50"] > 1.9 * found[0]["tpot_ms"]["p50"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "--latency must be given, or --prefill-coefficients and --decode-coefficients"),
        (["--latency", "tests"], "--profile must be given with --latency tests, a directory"),
        (["--latency", "nowhere.json"], "--latency nowhere.json cannot be read: No such file or directory"),
        (["--latency", str(DATA / "README.md")], "README.md is not a profile, JSON with"),
        (["--prefill-coefficients", "0,1,2"], "must be given together"),
        (["--prefill-coefficients=1,2", "--decode-coefficients=1,2,3"], "--prefill-coefficients is '1,2'; it must be three"),
        (["--prefill-coefficients=0,0,0", "--decode-coefficients=1,2,3"], "a step takes no time"),
        (["--prefill-coefficients=0,nan,0", "--decode-coefficients=1,2,3"], "prefill is [0.0, nan, 0.0]; it must be three finite"),
        (
            ["--prefill-coefficients=0,1,0", "--decode-coefficients=1,2,3", "--latency-model", "grid"],
            "--latency-model is grid; with --prefill-coefficients it must be formula",
        ),
        (["--latency", "x", "--prefill-coefficients=0,1,0", "--decode-coefficients=1,2,3"], "exclude each other"),
    ],
)  # fmt: skip
def test_wrong_step_times_are_named(flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORK, *flags]) == 2
    assert text in capsys.readouterr().err


def test_a_profile_says_how_large_its_pool_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured, out = tmp_path / "measured.json", tmp_path / "out.json"
    predictor, conditions = Predictor((1e-9, 1e-4, 0.005), (1e-7, 1e-4, 0.01)), Conditions("m", "any", "x", "torch", 1)
    work = ["simulate", "--trace", "synthetic", "--rate", "9", "--num-prompts", "30", "--layout", "1P1D"]
    flags = [*work, "--latency", str(measured), "--json", str(out)]
    found = []
    for pool, more in (((50, 128, 1000), []), ((), ["--num-blocks", "100", "--kv-bytes-per-token", "1000"])):
        Profile(VERSION, conditions, predictor, [], [], *pool).save(measured)
        assert main([*flags, *more]) == 0
        found.append({k: v for k, v in json.loads(out.read_text()).items() if k != "flags"})
    assert found[0] == found[1], "100 blocks of 64 tokens are 50 of 128"
    assert main(flags) == 2
    assert "--num-blocks must be given" in capsys.readouterr().err
    Profile(VERSION, conditions, predictor, [], [], 50, -1, 1000).save(measured)
    assert main(flags) == 2
    assert "measured.json has block_size -1; it must be a whole number of at least 1" in capsys.readouterr().err


def test_several_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run of several is the run alone."""
    flags = [*FLAGS, "--trace", str(TRACE), "--max-requests", "60", "--layout", "2M", "--placement", "vllm-chunked"]
    both, alone = tmp_path / "both.json", tmp_path / "alone.json"
    assert main([*flags, "--rate", "2,0.5", "--json", str(both)]) == 0
    assert "requests/s  attainment" in capsys.readouterr().out
    assert main([*flags, "--rate", "2", "--json", str(alone)]) == 0
    found, one = json.loads(both.read_text()), json.loads(alone.read_text())
    assert found["flags"]["rate"] == [0.5, 2.0] and one.pop("flags")["rate"] == 2.0
    assert found["runs"][1] == one
    assert found["runs"][0]["ttft_s"]["mean"] < one["ttft_s"]["mean"]
    with pytest.raises(SystemExit):
        main([*flags, "--rate", "2,fast"])
    assert "'2,fast' is not allowed; it must be numbers" in capsys.readouterr().err


def test_one_token_has_no_tpot(tmp_path: Path) -> None:
    """It is left out of rows, mean and percentiles; whether the objective is met does not change."""
    trace, out = tmp_path / "t.csv", tmp_path / "out.json"
    rows = [f"2024-05-10 00:00:{n:02}.5+00:00,900,{tokens}" for n, tokens in enumerate([1, 1, 1, 1, 40])]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    flags = [*FLAGS, "--trace", str(trace), "--layout", "1P1D", "--per-request", "--json", str(out)]
    for most_ms, met in (("100", 5), ("0.5", 0)):  # the first token's hand-over takes 1 ms
        assert main([*flags, "--slo-tpot-ms", most_ms]) == 0
        found = json.loads(out.read_text())
        tpots = [r["tpot_ms"] for r in found["requests"]]
        assert tpots[:4] == [None] * 4 and found["tpot_ms"] == pytest.approx(dict.fromkeys(found["tpot_ms"], tpots[4]))
        assert found["tpot_attainment"] == met / 5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_who_is_refused_is_told_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    flags = [*FLAGS, "--trace", str(TRACE), "--layout", "1M", "--max-requests", "20", "--json", str(out)]
    for num_blocks, is_warned in ((10, True), (100, False)):
        assert main([*flags, "--num-blocks", str(num_blocks)]) == 0
        found, told = json.loads(out.read_text()), capsys.readouterr()
        assert found["refused"] and (found["finished"] == 0) == is_warned
        why = f"a prompt must be shorter than the {64 * num_blocks} tokens that --num-blocks {num_blocks} of --block-size 64 hold"
        assert found["refused_because"].startswith(why) and f"refused: {why}" in told.out
        assert (f"warning: no request was served: {why}" in told.err) == is_warned
    assert main(flags) == 0
    assert "refused_because" not in json.loads(out.read_text())


def test_logs_get_a_line_now_and_then() -> None:
    clock, file = VirtualClock(), io.StringIO()
    with Progress("counting", 100, file, clock) as progress:
        for n in range(101):
            clock.advance_to(n)
            progress.reach(n)
    assert [line.split("]")[1] for line in file.getvalue().splitlines()] == [
        f" {n} %, {100 - n} s left" for n in (5, 10, 20, 40, 80)
    ]


def test_progress_is_for_terminals() -> None:
    clock, terminal, file = VirtualClock(), Terminal(), io.StringIO()
    with Progress("counting", 200, terminal, clock) as shown, Progress("counting", 200, file, clock) as hidden:
        for n in range(101):
            clock.advance_to(n / 50)
            shown.reach(n)
            hidden.reach(n)
        assert shown.line(2.0) == f"counting [{'#' * 15}{' ' * 15}] 50 %, 2 s left"
        assert terminal.getvalue().count("counting") <= 20, "ten times a second at most"
    assert terminal.getvalue().endswith("\r\x1b[K") and file.getvalue() == ""


def test_layouts() -> None:
    assert parse_layout("2P1d3M") == "PPDMMM"
    for text in ("", "P", "2P 1D", "-1M", "2X"):
        with pytest.raises(ConfigError):
            parse_layout(text)


def test_percentiles_are_numpys() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0]
    found = summary([*values, None])
    assert found["mean"] == pytest.approx(np.mean(values))
    for percent in (50, 90, 99):
        assert found[f"p{percent}"] == pytest.approx(np.percentile(values, percent))
    assert summary([]) == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_a_prompt_that_is_alone_may_have_more_tokens_in_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        *FLAGS,
        "--trace",
        str(TRACE),
        "--max-requests",
        "60",
        "--layout",
        "8M",
        "--rate",
        "0.2",
        "--max-num-batched-tokens",
        "512",
    ]
    said = []
    for more in ([], ["--max-lone-prompt-tokens", "512"], ["--max-lone-prompt-tokens", "16384"]):
        assert main([*flags, *more]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "TTFT" in line or "ttft" in line])
    assert said[0] == said[1] != said[2]
