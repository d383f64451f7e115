"""`fastdeploy-pd profile` on this CPU, and what an instance makes of the file."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.engine.profile import conditions_of, load_predictor, profile_path
from fastdeploy_pd.engine.profiler import decode_groups, geometric, prefill_parts
from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.flags import DEMO_MODEL
from fastdeploy_pd.launch.local import LocalCluster
from fastdeploy_pd.model.checkpoint import fingerprint

FLAGS = ["--ops", "torch", "--max-model-len", "600", "--max-num-batched-tokens", "256", "--max-num-seqs", "4"]
FINGERPRINT = fingerprint(DEMO_MODEL)


def profile(*flags: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run the command; its standard error is a terminal's."""
    own, theirs = os.openpty()
    said: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(own, 65536):
                said.append(data)
        except OSError:  # how a terminal ends
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", "profile", *flags],
            env={**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=200, check=False,
        )  # fmt: skip
    finally:
        os.close(theirs)
        reader.join()
        os.close(own)
    done.stderr = b"".join(said).decode()
    return done


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a profile in it."""
    path = tmp_path_factory.mktemp("cache")
    done = profile(*FLAGS, "--repeats", "2", cache=path)
    assert done.returncode == 0, done.stderr
    assert "prefill of 256 tokens after 344" in done.stdout and "decode of 4 sequences, 2400 KV tokens" in done.stdout
    assert "kinds of steps" in done.stderr
    return path


def config_of(cache: Path, *flags: str) -> InstanceConfig:
    return InstanceConfig.from_args([*FLAGS, *flags], {"XDG_CACHE_HOME": str(cache)})


@pytest.fixture
def path(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The profile's file."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = config_of(cache)
    return profile_path(config, conditions_of(config, FINGERPRINT))


def test_an_instance_finds_what_was_measured(cache: Path, path: Path) -> None:
    assert [path] == list((cache / "fastdeploy_pd" / "profiles").iterdir())
    stored = json.loads(path.read_text())
    assert stored["version"] == 1 and stored["conditions"]["fingerprint"] == FINGERPRINT
    predictor = load_predictor(config_of(cache), FINGERPRINT)
    assert predictor is not None
    assert predictor.prefill == tuple(stored["predictor"]["prefill"])
    # The machine is shared: right is what is nearer to the truth than another size would be.
    by_part = {(n, m): s for n, m, s in stored["prefills"]}
    assert by_part[16, 0] < predictor.prefill_s(256) < 4 * by_part[256, 0]
    assert 0 < predictor.decode_s(1, 16) < predictor.decode_s(4, 2400)


def test_a_simulation_takes_the_pool_from_it(path: Path, tmp_path: Path) -> None:
    stored, out = json.loads(path.read_text()), tmp_path / "out.json"
    model = json.loads((Path(DEMO_MODEL) / "config.json").read_text())
    dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    assert stored["kv_bytes_per_token"] == 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * dim * 4
    work = ["--trace", "synthetic", "--rate", "2", "--num-prompts", "9", "--random-input-len", "200"]
    assert main(["simulate", *work, "--latency", str(path), "--layout", "1P1D", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["finished"] == 9
    num_tokens = stored["num_blocks"] * stored["block_size"]
    assert num_tokens >= 4 * 600, "as many sequences of the longest kind as a step has"
    for length, num in ((num_tokens - 1, 9), (num_tokens, 0)):
        words = [
            "simulate",
            *work,
            "--random-input-len",
            str(length),
            "--random-output-len",
            "1",
            "--latency",
            str(path),
        ]
        assert main([*words, "--layout", "1M", "--json", str(out)]) == 0
        assert json.loads(out.read_text())["finished"] == num


def test_other_conditions_have_another_file(cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_predictor(config_of(cache, "--ops", "paddle"), FINGERPRINT) is None
    assert load_predictor(config_of(cache), "another model") is None
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert load_predictor(config_of(cache), FINGERPRINT) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: "{", "truncated"),
        (lambda p: json.dumps({**p, "version": 9}), "its version is 9; it must be 1"),
        (lambda p: json.dumps({**p, "conditions": {**p["conditions"], "dtype": "float16"}}), "dtype is 'float16' there"),
        (lambda p: json.dumps({**p, "predictor": {**p["predictor"], "decode": [0, -1, 0]}}), "coefficient"),
        (lambda p: json.dumps({**p, "decodes": [[1, "x", 2]]}), "Expected `int`, got `str`"),
        (lambda p: json.dumps({**p, "colour": 1}), "unknown field `colour`"),
        (None, "there is no such file"),
    ],
)  # fmt: skip
def test_a_bad_file_is_said_and_not_used(
    change: Any, reason: str, cache: Path, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.json"
    if change is not None:
        bad.write_text(change(json.loads(path.read_text())))
    with caplog.at_level(logging.WARNING):
        assert load_predictor(config_of(cache, "--profile-path", str(bad)), FINGERPRINT) is None
    assert reason in caplog.text and str(bad) in caplog.text
    caplog.clear()
    assert load_predictor(config_of(cache, "--profile-path", str(path)), FINGERPRINT) is not None
    assert not caplog.records


def test_what_cannot_be_read_is_said_and_not_used(
    cache: Path, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for bad, reason in (
        (tmp_path, "it is no file. "),
        (pipe, "it is no file. "),
        (path / "x", "it cannot be read: Not a directory. "),
        (tmp_path / ("x" * 300), "it cannot be read: File name too long. "),
    ):
        caplog.clear()
        assert load_predictor(config_of(cache, "--profile-path", str(bad)), FINGERPRINT) is None
        assert f"the profile {bad} is not used: {reason}" in caplog.text

    def refuse(_path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # whoever runs tests may read everything, perhaps
    for flags in ([], ["--profile-path", str(path)]):
        caplog.clear()
        assert load_predictor(config_of(cache, *flags), FINGERPRINT) is None
        assert f"the profile {path} is not used: it cannot be read: Permission denied. " in caplog.text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--max-num-seqs", "1"], "--max-num-seqs is 1; a profile tells sequences from steps only if it is at least 2"),
        (["--modle", "demo"], "there is no flag --modle; did you mean --model?"),
        (["--max-model-len", "99999"], "--max-model-len is 99999"),
        (["--profile-path", "/"], "--profile-path is '/'; it must be a file, or one that is not there yet"),
        (["--profile-path", "/dev/zero"], "--profile-path is '/dev/zero'; it must be a file"),
        (
            ["--profile-path", "/tmp/no/such/p.json"],
            "--profile-path is '/tmp/no/such/p.json'; its directory must be there",
        ),
        (["--profile-path", f"/tmp/{'x' * 300}/p.json"], "/p.json'; its directory must be there: mkdir -p '/tmp/xx"),
        (["--profile-path", __file__ + "/p.json"], f"{__file__} must be a directory that may be written to"),
    ],
)
def test_wrong_flags(flags: list[str], text: str, tmp_path: Path) -> None:
    done = profile(*flags, cache=tmp_path)
    assert (done.returncode, text in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("longest", [1, 15, 64, 600, 4096, 131_072])
@pytest.mark.parametrize("budget", [1, 256, 8192])
def test_what_is_timed_fits(longest: int, budget: int) -> None:
    parts = prefill_parts(longest, budget)
    assert all(0 <= m < n <= longest and n - m <= budget for n, m in parts)
    assert (min(longest, budget), 0) in parts and len(parts) == len(set(parts)) <= 20
    for most in (2, 8, 512):
        groups = decode_groups(longest, most, -(-longest // 64), 64)
        assert all(1 <= size <= most and 1 <= n <= longest for size, n in groups)
        assert all(size * -(-n // 64) <= -(-longest // 64) for size, n in groups)


def test_geometric() -> None:
    assert geometric(16, 256, 5) == [16, 32, 64, 128, 256]
    assert (geometric(1, 3, 5), geometric(7, 7, 4), geometric(8, 7, 4)) == ([1, 2, 3], [7], [])


def test_an_instance_starts_from_it(cache: Path, path: Path) -> None:
    env = {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    with LocalCluster(None, flags=[*FLAGS, "--slo-ttft-x", "5"], env=env) as cluster:
        instance = cluster.start(["mixed"])[0]
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 16, "ignore_eos": True}
        answer = httpx.post(f"{instance.http_url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        assert f"step times: {path}" in (instance.log_dir / "output.log").read_text()
        counts: list[float] = []
        deadline_s = time.monotonic() + 10
        while sum(counts) < 16 and time.monotonic() < deadline_s:  # a step is measured after its tokens are sent
            lines = httpx.get(f"{instance.http_url}/metrics").text.splitlines()
            counts = [float(line.rsplit(" ", 1)[1]) for line in lines if "predictor_relative_error_count" in line]
    assert sorted(counts) == [1, 15], "the first step of each kind has a prediction already"
