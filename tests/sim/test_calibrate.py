"""What real engines' requests took is what simulated ones take; coefficients are found in times alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim.calibrate import SPLITS, Measured, calibrate, compare, load, replay, solve
from fastdeploy_pd.sim.cluster import ClusterOptions
from fastdeploy_pd.sim.trace import Offered

DATA = Path(__file__).parent / "data"

#: log -> (KV blocks, most sequences, what `fastdeploy-pd calibrate` found in its requests 0, 2, 4, ...)
RUNS = {
    "vllm_rtx4090_llama_3_1_8b": (2588, 256, Predictor((9.99e-10, 1.04e-4, 0.0138), (6.12e-8, 1.26e-4, 0.0167))),
    "vllm_rtxpro6000_llama_3_1_8b": (30_000, 128, Predictor((2.28e-9, 1.85e-5, 0.0397), (7.11e-8, 5.39e-5, 0.00862))),
    "vllm_rtxpro6000x2_qwen3_32b": (30_000, 128, Predictor((1.35e-8, 1.2e-4, 0.0489), (1.3e-7, 8.89e-5, 0.0292))),
}


@pytest.mark.parametrize("name", RUNS)
def test_like_vllm(name: str) -> None:
    """Mean TTFT within 10 %, mean TPOT within 5 %, and no percentile far from it, for requests that nothing was fitted to."""
    num_blocks, max_num_seqs, predictor = RUNS[name]
    measured = load(DATA / f"{name}.jsonl.gz")
    options = ClusterOptions(
        "M", num_blocks, 16, max_num_seqs=max_num_seqs, max_num_batched_tokens=2048, enable_prefix_caching=False
    )
    records = replay(measured, predictor, options)
    found = compare(measured[1::2], records[1::2])
    assert abs(found["ttft_s"]["error"]["mean"]) < 0.10
    assert abs(found["tpot_s"]["error"]["mean"]) < 0.05
    for metric in found.values():
        assert all(abs(metric["error"][p]) < 0.15 for p in ("p50", "p90", "p99")), metric["error"]


def simulated(predictor: Predictor, options: ClusterOptions) -> list[Measured]:
    """Returns: a log of requests that a simulated engine has served."""
    rng = random.Random(3)
    offered = [Offered(n, 0.25 * n, rng.randint(50, 3000), rng.randint(5, 80)) for n in range(60)]
    unknown = [Measured(o, 0.0, 0.0) for o in offered]
    records = replay(unknown, predictor, options)
    return [Measured(r.offered, r.first_token_s or 0.0, r.end_s or 0.0) for r in records]


@pytest.mark.parametrize(("fit_to", "kinds"), [*((split, "M") for split in SPLITS), ("alternate", "PD")])
def test_coefficients_are_found_again(fit_to: str, kinds: str) -> None:
    truth = Predictor((1e-9, 6e-5, 0.004), (2e-7, 3e-4, 0.015))
    options = ClusterOptions(kinds, 4000, 16, 2048, max_num_batched_tokens=2048, enable_prefix_caching=False)
    found = calibrate(simulated(truth, options), options, fit_to)
    assert found["judged_requests"] == 30
    assert abs(found["judged"]["ttft_s"]["error"]["mean"]) < 0.10
    assert abs(found["judged"]["tpot_s"]["error"]["mean"]) < 0.05
    a, b, c = found["prefill"]
    d, e, f = found["decode"]
    assert a * 2000**2 + b * 2000 + c == pytest.approx(1e-9 * 2000**2 + 6e-5 * 2000 + 0.004, rel=0.1)
    assert d * 8000 + e * 8 + f == pytest.approx(2e-7 * 8000 + 3e-4 * 8 + 0.015, rel=0.1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it writes is what `simulate --latency` reads."""
    options = ClusterOptions("M", 4000, 16, max_num_batched_tokens=2048, enable_prefix_caching=False)
    log, out = tmp_path / "log.jsonl", tmp_path / "profile.json"
    rows = [
        {"input_toks": m.offered.num_input, "output_toks": m.offered.num_output, "arrival_time": 1e9 + m.offered.arrival_s,
         "queued_ts": 500 + m.offered.arrival_s + 0.001 * n, "first_token_ts": 500 + m.first_token_s,
         "last_token_ts": 500 + m.last_token_s}
        for n, m in enumerate(simulated(Predictor((0, 1e-4, 0.01), (1e-8, 1e-4, 0.01)), options)[:20])
    ]  # fmt: skip
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(log)[7].ttft_s == pytest.approx(rows[7]["first_token_ts"] - 500 - 0.25 * 7, abs=1e-6)
    assert main(["calibrate", "--requests", str(log), "--num-blocks", "4000", "--json", str(out)]) == 0
    assert "TTFT error" in capsys.readouterr().out
    flags = ["--trace", "synthetic", "--rate", "1", "--num-prompts", "5", "--layout", "1M", "--num-blocks", "4000"]
    assert main(["simulate", *flags, "--latency", str(out)]) == 0
    assert main(["calibrate", "--requests", str(log), "--num-blocks", "4000", "--layout", "1P"]) == 2
    assert "at least one instance that decodes" in capsys.readouterr().err
    assert main(["calibrate", "--requests", str(log), "--num-blocks", "4"]) == 2
    assert "--num-blocks is 4; a request of" in capsys.readouterr().err


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    row = {
        "input_toks": 5,
        "output_toks": 2,
        "arrival_time": 0,
        "queued_ts": 0,
        "first_token_ts": 1,
        "last_token_ts": 2,
    }
    for lines, text in (
        ([row], "has 1 requests; at least 10"),
        ([row, {}], "line 2 has no arrival_time"),
        ([{**row, "first_token_ts": 3}], "line 1 has queued_ts 0.0, first_token_ts 3.0"),
        ([{**row, "arrival_time": None}], "line 1 has no arrival_time"),
    ):
        path = tmp_path / "log.jsonl"
        path.write_text("".join(json.dumps(x) + "\n" for x in lines))
        with pytest.raises(ConfigError, match=text):
            load(path)


def test_linear_equations() -> None:
    assert solve([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 5.0]], [6.0, 10.0, 17.0]) == pytest.approx([1, 2, 3])
