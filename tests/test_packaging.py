"""The base install draws in neither torch nor CUDA, and the scripts are sound."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_base_install_lists_no_torch_and_no_cuda(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", str(report),
        "-r", str(ROOT / "requirements.txt"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=280)
    names = {re.sub(r"[-_.]+", "-", i["metadata"]["name"]).lower() for i in json.loads(report.read_text())["install"]}
    assert {"redis", "paddlepaddle", "fastapi", "uvicorn", "pyzmq", "numpy", "pydantic"} <= names
    assert not {n for n in names if n == "torch" or n.startswith(("nvidia", "cuda", "triton"))}


def test_shell_scripts_parse() -> None:
    for path in (*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"):
        shell = "bash" if "bash" in path.read_text().splitlines()[0] else "sh"
        subprocess.run([shell, "-n", str(path)], check=True)


def test_the_demo_model_is_small_and_whole() -> None:
    files = {p.name: p.stat().st_size for p in (ROOT / "fastdeploy_pd" / "demo_model").iterdir()}
    assert files["model.safetensors"] <= 12_000_000
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)


def test_the_training_script_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo_model" / "train.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert "held-out" in done.stdout
    assert (tmp_path / "model.safetensors").exists()
