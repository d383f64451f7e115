"""The benchmarks run, and compute what they say they compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.engine_cases import CASES, Case, figures, table

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


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_rates_of_an_engine() -> None:
    rates = figures(Case("", 4, 100, 11), 0.5, 1.5)
    assert (rates["prefill_tok_s"], rates["decode_tok_s"], rates["step_ms"]) == (800, 40, 100)
    fast, slow = (
        {"engine": name, "version": "1", "ready_s": s, "cases": {"b1": figures(CASES["b1"], s, 3 * s)}}
        for name, s in (("fast", 1.0), ("slow", 2.0))
    )
    ratios = [line.split("|")[-2].strip() for line in table(fast, slow).splitlines()[2:]]
    assert ratios == ["2.00"] * 4


def test_the_engine_is_timed(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.bench_engine", "--model", str(write_model(tmp_path / "tiny")), "--device", "cpu"]
    command += ["--ops", "torch", "--dtype", "float32", "--max-model-len", "600", "--scale", "0.06", "--repeats", "1"]
    done = python(*command, "--json", str(tmp_path / "out.json"), "--", "--num-gpu-blocks-override", "200")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["cases"]) == list(CASES) and result["ready_s"] > 0
    assert all(row["prefill_tok_s"] > 0 for row in result["cases"].values())
    assert (
        "long needs 8064 tokens; --max-model-len is 600" in python(*command, "--scale", "1", "--cases", "long").stderr
    )
