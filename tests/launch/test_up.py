"""What `fastdeploy-pd up` refuses before it starts anything, and what it says of a first question that fails."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.engine import build
from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.errors import ConfigError, FastDeployPDError
from fastdeploy_pd.launch import up
from fastdeploy_pd.launch.local import LocalCluster, LocalInstance
from tests.entrypoints.test_operate import answer, server


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--splitwise-role", "decode"], "use --prefill, --decode and --mixed of `up`"),
        (["--splitwise_role=decode"], "use --prefill, --decode and --mixed of `up`"),
        (
            ["--port", "8000"],
            "use --port of `up`, before the `--`: the first instance's, as in: fastdeploy-pd up --port",
        ),
        (["--scheduler-topic", "x"], "use --scheduler-topic of `up`"),
        (["--scheduler-host", "10.0.0.1"], "use --redis-url of `up`"),
        (["--scheduler-password", "x"], "use FD_SCHEDULER_PASSWORD, or --redis-url of `up`"),
        (["--max-num-seqs", "4", "--pd-comm-port", "2334"], "2 instances would ask for the same port"),
        (["--frobnicate"], "there is no flag --frobnicate"),
        (["--elastic-cooldown", "0"], "--elastic-cooldown: '0' is not allowed"),
        (["--prefill-policy", "nope"], "--prefill-policy is 'nope'; there are fcfs, sjf, ljf, edf, slack"),
        (["--placement", "nope"], "--placement is 'nope'; there are fewest-tokens, "),
        (["--cache-transfer-protocol", "tcp,nope"], "--cache-transfer-protocol names 'nope'; there are ipc, "),
        (["--max-model-len", "9999"], "--max-model-len is 9999; this model's config.json allows"),
        (
            ["--no-enable-chunked-prefill"],
            "--max-num-batched-tokens is 2048; without chunked prefill it must be at least",
        ),
        (
            ["--tensor-parallel-size", "5"],
            "--tensor-parallel-size is 5; it must divide this model's num_attention_heads",
        ),
        (["--host", "192.0.2.1"], "--host is '192.0.2.1'; it must be an address of this machine"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_flags_that_up_sets_are_refused_with_its_own(
    flags: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "--", *flags]) == 2
    told = capsys.readouterr()
    assert text in told.err and told.out == "", "nothing may have been started"


def test_every_role_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(build, "check", lambda config: asked.append(config.cluster.splitwise_role))
    up.check_instances([], "t", ["prefill", "decode", "decode", "mixed"])
    assert asked == ["prefill", "decode", "mixed"]


def test_one_instance_may_have_any_port() -> None:
    up.check_flags(["--metrics-port", "9100"], 1)


def test_more_than_this_machine_holds_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--prefill", "100000"]) == 2
    told = capsys.readouterr().err
    assert "ask for 100001 instances; this machine has room for " in told
    assert f"{len(os.sched_getaffinity(0))} cores" in told and "GiB of free memory" in told and "--force" in told


def test_room_goes_by_the_weights_too(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(1 << 43)  # a hole: no memory holds it
    config = InstanceConfig.from_args([], {})
    up.check_room(1, config)
    large = dataclasses.replace(config, model=dataclasses.replace(config.model, model=str(tmp_path)))
    up.check_room(1, large)  # a single one says itself what it lacks
    with pytest.raises(ConfigError, match=r"room for 1: .* free memory for 0 \(8192.75 GiB each"):
        up.check_room(2, large)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            answer({"error": {"message": "an internal error"}}, "500 Internal"),
            "answered with HTTP 500 by {}: an internal",
        ),
        (answer(b"<html>", "502 Bad"), "answered with HTTP 502 by {}: <html>"),
        (answer(b'data: {"error": {"message": "no capacity"}}\n\n'), "the first answer broke off: no capacity"),
        (b"", "is not answered by {}: "),
    ],
)
def test_a_first_question_that_fails_is_a_sentence(data: bytes, text: str, tmp_path: Path) -> None:
    with server([data]) as address, subprocess.Popen([sys.executable, "-c", ""]) as process:
        facts: dict[str, object] = {"http": f"http://{address}"}
        instance = LocalInstance("mixed-0", "mixed", process, tmp_path, tmp_path, facts)
        with pytest.raises(FastDeployPDError) as error:
            up.ask(instance, "demo", "Hello", "")
    assert text.format(f"http://{address}/v1/chat/completions") in error.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:4444/0", "redis://127.0.0.1:4444"),
        ("redis://:hidden@10.0.0.1:6379/2", "redis://10.0.0.1:6379/2"),
        ("rediss://me:hidden@h?password=hidden&db=1", "rediss://me@h?db=1"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert up.without_password(url) == shown


BAD = ["--num-gpu-blocks-override", "1", "--ops", "reference"]


def start_in_vain(cluster: LocalCluster) -> str:
    with cluster, pytest.raises(ConfigError) as error:
        cluster.start(["mixed"])
    return error.value.message


def test_an_instance_that_refuses_to_start_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path / "logs"))
    for _ in range(2):  # the second time its files are there already
        told = start_in_vain(LocalCluster(None, flags=BAD))
        assert told.startswith("mixed-0 ended with status 2:\n") and told.count("gives 1 KV blocks") == 1
        assert f"{tmp_path}/logs/mixed-0/output.log:" in told
    assert (tmp_path / "logs/mixed-0/output.log").read_text().count("gives 1 KV blocks") == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"FD_LOG_DIR is '.*/file', where no log can be written: File exists"):
        LocalCluster(None)


def test_without_a_place_for_logs_they_are_kept_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_LOG_DIR", raising=False)
    cluster = LocalCluster(None, flags=BAD)
    start_in_vain(cluster)
    assert not cluster.log_dir.exists()


def test_up_that_fails_keeps_and_names_the_logs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", "up", "--once", "--prefill", "0", "--", *BAD]
    env = {k: v for k, v in os.environ.items() if k != "FD_LOG_DIR"} | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    (logs,) = tmp_path.iterdir()
    assert done.returncode == 2 and f"logs: {logs}/INSTANCE/" in done.stdout and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"the logs are kept in {logs}"
    assert "gives 1 KV blocks" in (logs / "decode-0" / "output.log").read_text()
    assert [p.name for p in logs.iterdir()] == ["decode-0"]
