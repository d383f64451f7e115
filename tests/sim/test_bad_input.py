"""`simulate`, `plan`, `calibrate` and `plot` with what is wrong: one line that names it, status 2."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.entrypoints.sim_plots import load
from fastdeploy_pd.errors import ConfigError

PROFILE = '{"prefill": [0, 1e-4, 0.01], "decode": [0, 1e-4, 0.01]}'
DEEP = "[" * 100_000


def row(timestamp: object, **changes: object) -> str:
    found = {"timestamp": timestamp, "input_length": 100, "output_length": 4, "hash_ids": [1], **changes}
    return json.dumps(found) + "\n"


def call(**changes: object) -> str:
    found = {"input_toks": 9, "output_toks": 5, "arrival_time": 0.0, "queued_ts": 5.0, "first_token_ts": 6.0}
    return json.dumps({**found, "last_token_ts": 7.0, **changes}) + "\n"


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that the command ends with."""
    assert main([str(w) for w in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture
def simulation(tmp_path: Path) -> list[str]:
    (tmp_path / "good.jsonl").write_text("".join(row(100 * n) for n in range(20)))
    (tmp_path / "p.json").write_text(PROFILE)
    flags = ["--trace", tmp_path / "good.jsonl", "--latency", tmp_path / "p.json"]
    return ["simulate", *map(str, flags), "--num-blocks", "1000", "--layout", "1M"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.jsonl", row(0) + row(float("nan")), "line 2: ValueError('timestamp is nan"),
        ("x.jsonl", row(0) + row(float("inf")), "line 2: ValueError('timestamp is inf"),
        ("x.jsonl", row(0) + row(10**400), "line 2: OverflowError"),
        ("x.jsonl", row(0) + row(1, hash_ids=[10**40]), "hash_ids not negative and below 2^63"),
        ("x.jsonl", DEEP, "line 1: RecursionError"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "9" * 200_000, "cannot be read: field larger"),
        ("x.jsonl.gz", row(0), "cannot be read: Not a gzipped file"),
    ],
)
def test_traces(
    name: str, content: str, text: str, simulation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    told = refused(capsys, *simulation, "--trace", path)
    assert f"--trace {path}" in told and text in told


def test_a_damaged_archive(simulation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(gzip.compress("".join(row(n) for n in range(900)).encode()))
    data[20:40] = bytes(b ^ 0xFF for b in data[20:40])
    for path, words in (
        (tmp_path / "x.jsonl.gz", [*simulation, "--trace"]),
        (tmp_path / "y.jsonl.gz", ["calibrate", "--num-blocks", "100", "--requests"]),
    ):
        path.write_bytes(data)
        assert f"{path} cannot be read: Error" in refused(capsys, *words, path)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--layout", "0M"], "--layout 0M: it must have at least one instance that decodes"),
        (["--layout", "auto:0"], "--layout auto:0: it must be counts"),
        (["--layout", "99999999999M"], "--layout 99999999999M: it must be counts"),
        (["--rate", "inf"], "--rate is inf; it must be above 0"),
        (["--rate", "1e-320"], "--rate is 1e-320; it must be above 0"),
        (["--kv-latency-ms", "inf"], "--kv-latency-ms is inf; it must be from 0 to 1e9"),
        (["--kv-bytes-per-token", "-1"], "--kv-bytes-per-token is -1; it must be above 0"),
        (["--block-size", "0"], "--block-size is 0; it must be above 0"),
        (["--trace", "synthetic", "--rate", "1", "--num-prompts", "1"], "--num-prompts is 1; it must be at least 2"),
        (["--trace", "synthetic", "--rate", "1", "--burstiness", "nan"], "--burstiness is nan; it must be above 0"),
        (["--trace", "synthetic", "--rate", "1", "--burstiness", "inf"], "--burstiness is inf; it must be above 0"),
        (["--json", "no/out.json"], "--json no/out.json cannot be written"),
        (["--json", "/"], "--json / cannot be written"),
    ],
)
def test_flags(flags: list[str], text: str, simulation: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert text in refused(capsys, *simulation, *flags)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (DEEP, "is not a profile"),
        ('{"prefill": [0, -1e-4, 0.5], "decode": [0, 0, 1]}', "a step takes no time"),
        ('{"prefill": [0, 1, 1e300], "decode": [0, 0, 1]}', "three finite numbers of seconds, 1e+06 at most"),
    ],
)
def test_profiles(
    content: str, text: str, simulation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    told = refused(capsys, *simulation, "--latency", path)
    assert f"--latency {path}" in told and text in told


@pytest.mark.parametrize(
    ("prefill", "decode", "text"),
    [
        ("10,1\n10,1\n20,2\n", "1,10,1\n1,20,2\n2,10,1\n2,20,2\n", "has points at 10, 10, 20"),
        ("10,nan\n20,2\n", "1,10,1\n1,20,2\n2,10,1\n2,20,2\n", "(10.0, nan) must be finite"),
        ("10,1\n20,2\n", "1,10,1\n2,10,1\n", "has points at 10; two or more"),
        ("10,1\n20,2\n", "1,10,1\n1,20,2\n", "has 1 batch sizes; a grid needs 2"),
        ("10,1\n20,2\n", "1,10,0\n1,20,2\n2,10,1\n", "itl_ms above 0"),
    ],
)
def test_grids(
    prefill: str, decode: str, text: str, simulation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x_prefill.csv").write_text("isl,prefill_ms\n" + prefill)
    (tmp_path / "x_decode.csv").write_text("batch,context,itl_ms\n" + decode)
    told = refused(capsys, *simulation, "--latency", tmp_path, "--profile", "x")
    assert str(tmp_path / "x_") in told and text in told


def test_fits(simulation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x_prefill.csv").write_text("isl,prefill_ms\n1,1\n")
    (tmp_path / "fits.txt").write_text("x quad [1,2] lin(kvtok,bs,1) [x]\n")
    flags = ["--latency", tmp_path, "--profile", "x", "--latency-model", "formula"]
    assert "fits.txt: 'x quad [1,2]" in refused(capsys, *simulation, *flags)


def test_logs_of_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    for line, text in (
        (call(arrival_time=float("nan")), "line 1: ValueError('arrival_time, queued_ts"),
        (call(last_token_ts=float("inf")), "line 1: ValueError('arrival_time, queued_ts"),
        (call(input_toks=1.7), "line 1: TypeError"),
        (DEEP, "line 1: RecursionError"),
    ):
        path.write_text(line + call() * 12)
        told = refused(capsys, "calibrate", "--num-blocks", "100", "--requests", path)
        assert f"--requests {path}, {text}" in told
    told = refused(capsys, "calibrate", "--num-blocks", "100", "--requests", path, "--kv-latency-ms", "inf")
    assert "--kv-latency-ms is inf; it must be from 0 to 1e9" in told
    told = refused(capsys, "calibrate", "--num-blocks", "100", "--requests", path, "--json", tmp_path / "no" / "x")
    assert "x cannot be written" in told, "said before the search"


def test_requests_of_one_token_have_no_time_between_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(call(output_toks=1, last_token_ts=6.0) * 10)
    assert main(["calibrate", "--num-blocks", "100", "--requests", str(path)]) == 0
    assert "TPOT error                  0.0%" in capsys.readouterr().out


def test_plan(simulation: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--gpus", "1", *simulation[1:-2], "--kv-bytes-per-token", "9"]
    for more, text in (
        (["--rate", "inf"], "--rate is inf; it must be above 0"),
        (["--kv-latency-ms", "nan"], "--kv-latency-ms is nan; it must be from 0 to 1e9"),
        (["--json", "no/out.json"], "--json no/out.json cannot be written"),
    ):
        assert text in refused(capsys, *flags, *more)


def test_reports(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {f"{name}_attainment": 1.0 for name in ("slo", "ttft", "tpot")}
    whole = {"rate": 1.0, **numbers, "queue_s": {"p50": 0.1, "p90": None}, "flags": {"layout": "1M", "placement": "x"}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(whole))
    assert load([path])[0].name == "1M x"
    for changes in (
        {"rate": "1"},
        {"slo_attainment": None},
        {"queue_s": {}},
        {"rate": float("nan")},
        {"requests": [{}]},
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(ConfigError, match=r"r\.json is not a report of `simulate --json`"):
            load([path])
    path.write_text(DEEP)
    with pytest.raises(ConfigError, match=r"r\.json is not a report of `simulate --json`: RecursionError"):
        load([path])
