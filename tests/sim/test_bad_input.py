"""`simulate`, `plan`, `calibrate` and `plot` with what is wrong: one line that names it, status 2."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.entrypoints.sim_plots import load
from fastdeploy_pd.errors import ConfigError

PROFILE = '{"prefill": [0, 1e-4, 0.01], "decode": [0, 1e-4, 0.01]}'
DEEP = "[" * 100_000
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
RAW = re.compile(r"\w(Error|Exception)\b|Errno|<class|invalid literal|could not convert")  # Python's, not a sentence


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
    assert len(lines) == 1 and lines[0].startswith("error: ") and not RAW.search(lines[0]), lines
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
        ("x.jsonl", row(0) + row(float("nan")), "line 2 has timestamp NaN; it must be a finite number"),
        ("x.jsonl", row(0) + row(float("inf")), "line 2 has timestamp inf; it must be a finite number"),
        ("x.jsonl", row(0) + row(10**400), "line 2 has timestamp 1000000"),
        (
            "x.jsonl",
            row(0) + row(1, hash_ids=[10**40]),
            "line 2 has wrong hash_ids; they must be a list of whole numbers",
        ),
        ("x.jsonl", row(0, hash_ids=None), "line 1 has no hash_ids"),
        ("x.jsonl", row(0) + '{"timestamp": 1}', "line 2 has no input_length"),
        (
            "x.jsonl",
            row(0, output_length="many"),
            'line 1 has output_length "many"; it must be a whole number of at least 0',
        ),
        ("x.jsonl", row(0, hash_ids=[1, 2]), "line 1 has 2 hash_ids for 100 tokens; it must be one for each 512"),
        ("x.jsonl", row(0) + "\n", "line 2 is not JSON: Expecting value at column 1"),
        ("x.jsonl", "[1]", "line 1 is not a JSON object"),
        ("x.jsonl", DEEP, "line 1 is nested too deeply"),
        ("x.csv", AZURE + "2023-11-16 18:15:46,ten,5\n", 'line 2 has ContextTokens "ten"; it must be a whole number'),
        ("x.csv", AZURE + "2023-11-16 18:15:46,10\n", "line 2 has no GeneratedTokens"),
        ("x.csv", AZURE + "today,10,5\n", "line 2 has TIMESTAMP 'today'; it must be a time, as in 2023-11-16"),
        ("x.csv", "a,b\n1,2\n", "line 2 has no TIMESTAMP"),
        ("x.csv", AZURE + "9" * 200_000, "cannot be read: field larger"),
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
        (["--layout", "99999999999M"], "--layout 99999999999M: it must have at most 100000 instances"),
        (["--layout", "60000P60000D"], "--layout 60000P60000D: it must have at most 100000 instances"),
        (["--layout", "auto:1000000"], "it must have at most 100000 instances"),
        (["--layout", "9" * 5000 + "M"], "it must have at most 100000 instances"),
        (["--repeat", "0"], "--repeat is 0; it must be a whole number from 1 to 1e15"),
        (["--repeat", "1000000000000"], "20000000000000 requests need about 12000000 GB of memory, and "),
        (
            ["--trace", "synthetic", "--rate", "1", "--num-prompts", "1000000000"],
            "1000000000 requests need about 600 GB",
        ),
        (["--rate", "inf"], "--rate is inf; it must be above 0"),
        (["--rate", "1e-320"], "--rate is 1e-320; it must be above 0"),
        (["--kv-latency-ms", "inf"], "--kv-latency-ms is inf; it must be from 0 to 1e9"),
        (["--kv-bytes-per-token", "-1"], "--kv-bytes-per-token is -1; it must be a whole number from 1"),
        (["--block-size", "0"], "--block-size is 0; it must be a whole number from 1"),
        (["--trace", "synthetic", "--rate", "1", "--num-prompts", "1"], "--num-prompts is 1; it must be at least 2"),
        (["--trace", "synthetic", "--rate", "1", "--burstiness", "nan"], "--burstiness is nan; it must be above 0"),
        (["--trace", "synthetic", "--rate", "1", "--burstiness", "inf"], "--burstiness is inf; it must be above 0"),
        (["--json", "no/out.json"], "--json no/out.json cannot be written: no is not there; it must be a file in a"),
        (["--json", __file__ + "/out.json"], f"/out.json cannot be written: {__file__} is no directory; it must be"),
        (
            ["--json", "/"],
            "--json / cannot be written: it is a directory; it must be a file in a directory that is there",
        ),
        (
            ["--num-prompts", "1000"],
            "--num-prompts is 1000, which only --trace synthetic has a use for; with --trace ",
        ),
        (["--burstiness", "0.5"], "--burstiness is 0.5, which only --trace synthetic has a use for"),
        (["--random-range-ratio", "0"], "--random-range-ratio is 0.0, which only"),
    ],
)
def test_flags(flags: list[str], text: str, simulation: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert text in refused(capsys, *simulation, *flags)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (DEEP, 'is not a profile, JSON with "prefill": [a, b, c] and "decode": [d, e, f]: it is nested too deeply'),
        ("no", "it is not JSON: Expecting value at column 1"),
        ("{}", "it has no prefill"),
        ('{"predictor": {"prefill": [1, 2, 3]}}', "it has no decode"),
        ('{"prefill": ["a"], "decode": [0, 0, 1]}', 'it has prefill ["a"]; it must be a list of finite numbers'),
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
        (
            "10,nan\n20,2\n",
            "1,10,1\n1,20,2\n2,10,1\n2,20,2\n",
            'line 2 has prefill_ms "nan"; it must be a finite number',
        ),
        ("10,1\n20\n", "", "is not a grid of isl, prefill_ms: line 3 has no prefill_ms"),
        ("10,1\n20,long\n", "", 'line 3 has prefill_ms "long"; it must be a finite number'),
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
        (call(arrival_time=float("nan")), "line 1 has arrival_time NaN; it must be a finite number"),
        (call(last_token_ts=float("inf")), "line 1 has last_token_ts inf; it must be a finite number"),
        (
            call(last_token_ts=5.5),
            "line 1 has queued_ts 5.0, first_token_ts 6.0, last_token_ts 5.5; none must be before",
        ),
        (call(input_toks=1.7), "line 1 has input_toks 1.7; it must be a whole number of at least 1"),
        (call(arrival_time=None), "line 1 has no arrival_time"),
        (DEEP, "line 1 is nested too deeply"),
    ):
        path.write_text(line + call() * 12)
        told = refused(capsys, "calibrate", "--num-blocks", "100", "--requests", path)
        assert f"--requests {path} {text}" in told
    told = refused(capsys, "calibrate", "--num-blocks", "100", "--requests", path, "--kv-latency-ms", "inf")
    assert "--kv-latency-ms is inf; it must be from 0 to 1e9" in told
    told = refused(capsys, "calibrate", "--num-blocks", "100", "--requests", path, "--json", tmp_path / "no" / "x")
    assert "x cannot be written" in told, "said before the search"


def test_requests_of_one_token_have_no_time_between_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(call(output_toks=1, last_token_ts=6.0) * 10)
    assert main(["calibrate", "--num-blocks", "100", "--requests", str(path)]) == 0
    assert "TPOT error                     -" in capsys.readouterr().out


def test_plan(simulation: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--gpus", "1", *simulation[1:-2], "--kv-bytes-per-token", "9"]
    for more, text in (
        (["--rate", "inf"], "--rate is inf; it must be above 0"),
        (["--kv-latency-ms", "nan"], "--kv-latency-ms is nan; it must be from 0 to 1e9"),
        (["--json", "no/out.json"], "--json no/out.json cannot be written: no is not there"),
        (["--random-input-len", "9"], "--random-input-len is 9, which only --trace synthetic has a use for"),
    ):
        assert text in refused(capsys, *flags, *more)


def test_a_place_that_may_not_be_written_to(
    simulation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.json").write_text("")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs tests may write everywhere, perhaps
    told = refused(capsys, *simulation, "--json", tmp_path / "old.json")
    assert "old.json cannot be written: it may not be written to; it must be a file" in told
    told = refused(capsys, *simulation, "--json", tmp_path / "new.json")
    assert f"new.json cannot be written: {tmp_path} may not be written to; it must be a file" in told
    told = refused(capsys, "plot", "no report", "--out", tmp_path / "a" / "b")
    assert f"b cannot be written: {tmp_path} may not be written to; it must be a directory" in told


def test_a_file_that_fails_after_all(simulation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("x" * 300)
    assert main([*simulation, "--json", str(path)]) == 2
    assert capsys.readouterr().err == f"error: --json {path} cannot be written: File name too long\n"


def test_where_pictures_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        told = refused(capsys, "plot", "no report", "--out", out)
        assert told.startswith(f"error: --out {out} cannot be written: {file} is no directory; it must be a directory")


def test_reports(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {f"{name}_attainment": 1.0 for name in ("slo", "ttft", "tpot")}
    whole = {"rate": 1.0, **numbers, "queue_s": {"p50": 0.1, "p90": None}, "flags": {"layout": "1M", "placement": "x"}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(whole))
    assert load([path])[0].name == "1M x"
    bad: list[tuple[dict[str, Any], str]] = [
        ({"rate": "1"}, "has rate '1'; it must be a number"),
        ({"slo_attainment": None}, "has no slo_attainment"),
        ({"queue_s": {}}, "has no p50"),
        ({"queue_s": 1}, "has a queue_s that is no JSON object"),
        ({"flags": {}}, "has no layout"),
        ({"rate": float("nan")}, "has rate NaN; it must be a finite number"),
        ({"requests": [{}]}, "has no ttft_s"),
        ({"requests": [1]}, "has requests that are no JSON objects"),
        ({"runs": []}, "has no runs"),
        ({"runs": [1]}, "has a run that is no JSON object"),
    ]
    for text, said in (*((json.dumps(whole | c), said) for c, said in bad), (DEEP, "is nested too deeply")):
        path.write_text(text)
        with pytest.raises(ConfigError) as told:
            load([path])
        assert told.value.message == f"{path} is not a report of `simulate --json`: it {said}"
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read: No such file or directory"):
        load([tmp_path / "nowhere.json"])
