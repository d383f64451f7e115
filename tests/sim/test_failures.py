"""Instances die, requests go on: none is lost, none is served twice, and what a hand can check is as the cluster would do it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_pd.core.multiplexing import Multiplexing
from fastdeploy_pd.core.placement import FewestTokens, PlacementPolicy, RoundRobin
from fastdeploy_pd.engine.frontend import FrontEndOptions
from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim.cluster import Cluster, ClusterOptions, Record
from fastdeploy_pd.sim.failures import (
    DETECTION_S,
    MAX_LOST_INSTANCES,
    PLACEMENT_TIMEOUT_S,
    Failure,
    Failures,
    check,
    parse,
)
from fastdeploy_pd.sim.latency import Curve, Latency
from fastdeploy_pd.sim.report import Slo, report
from fastdeploy_pd.sim.trace import Offered

#: a prompt of n tokens takes 5 + n / 10 ms, a token for each of B sequences 10 + B ms
PLAIN = Latency(lambda n: 5 + n / 10, lambda num: Curve([(0, 10 + num), (1000, 10 + num)]))
DATA = Path(__file__).parent / "data"
TRACE = Path(__file__).parents[2] / "benchmarks" / "data" / "mooncake_conversation.jsonl.gz"
LINK = {"kv_bytes_per_token": 10**5, "link_bytes_per_s": 1e8, "link_latency_s": 1e-3}


def serve(
    offered: list[Offered],
    kinds: str,
    *dead: Failure,
    policy: PlacementPolicy | None = None,
    max_leap: int = 64,
    **options: Any,
) -> tuple[list[Record], Failures, dict[str, Any]]:
    options = {"num_blocks": 1000, "block_size": 16, **options}
    cluster = Cluster(ClusterOptions(kinds, **options), PLAIN, policy or RoundRobin(), random.Random(0), max_leap)
    failures = Failures(cluster, dead)
    records = cluster.run(offered)
    assert [r.offered for r in records] == offered and all(r.end_s is not None for r in records)
    for instance in cluster.instances:
        assert instance.scheduler.pool.counts().held == 0 and instance.scheduler.is_idle
    return records, failures, report(records, cluster.instances, PLAIN, Slo())


def times_ms(record: Record) -> tuple[float, ...]:
    assert record.first_token_s is not None and record.end_s is not None
    return tuple(round(1e3 * t, 6) for t in (record.first_token_s, record.end_s))


ONE = [Offered(0, 0.0, 100, 5)]


def test_a_stream_goes_on_elsewhere_with_the_tokens_that_its_client_has() -> None:
    """15 ms, then tokens at 26 and 37; death at 40: 103 tokens are computed at the other one, two tokens more follow."""
    (record,), failures, _ = serve(ONE, "MM", Failure(0.040, 0))
    assert times_ms(record) == (15, 40 + 2 + (5 + 10.3) + 11)
    assert (record.decode_id, record.num_lost) == ("M1", 1)
    assert failures.rows() == [{"instance": "M0", "at": 0.040, "until": None, "moved": 1}]


def test_a_prompt_begins_anew() -> None:
    (record,), _, _ = serve(ONE, "MM", Failure(0.010, 0))
    assert times_ms(record) == (10 + 2 + 15, 27 + 4 * 11)


@pytest.mark.parametrize(
    ("at_ms", "first_ms", "there_ms", "num_left"),
    [
        (10, 12 + 15, 12 + 112 + 1, 4),  # while it computes
        (50, 15, 52 + 112 + 1, 3),  # the client has the first token; what the link still holds is lost
        (111, 15, 113 + 112 + 1, 3),
        (112.5, 15, 112 + 1, 4),  # all has left
    ],
)
def test_prefill_dies(at_ms: float, first_ms: float, there_ms: float, num_left: int) -> None:
    """A prompt's 7 blocks take 112 ms on the link, from when its computation begins."""
    (record,), failures, _ = serve(ONE, "PPD", Failure(at_ms / 1e3, 0), **LINK)
    is_lost = at_ms < 112
    assert times_ms(record) == (first_ms, pytest.approx(there_ms + num_left * 11))
    assert (record.prefill_id, record.decode_id) == ("P1" if is_lost else "P0", "D2")
    assert failures.rows()[0]["moved"] == is_lost


def test_decode_dies_with_a_prompt_under_way() -> None:
    """Prefill's first computation is for nothing but its prefix cache, which the second finds: 96 of 100 tokens."""
    offered = [Offered(0, 0.0, 600, 5, (7, 8))]
    (record,), _, found = serve(offered, "PDD", Failure(0.070, 1), kv_bytes_per_token=1)
    assert (record.prefill_id, record.decode_id, record.num_lost) == ("P0", "D2", 1)
    assert times_ms(record)[0] == 65, "the client had it"
    assert found["instances"][0]["tokens"] == 600 + (601 - 592)


def test_a_prefix_cache_is_gone_with_its_instance() -> None:
    offered = [Offered(n, float(n), 600, 2, (4, 5)) for n in range(4)]
    records, failures, _ = serve(offered, "M", Failure(1.5, 0, 0.1))
    assert [r.num_cached for r in records] == [0, 592, 0, 592]
    assert failures.rows() == [{"instance": "M0", "at": 1.5, "until": 1.6, "moved": 0}]


def test_who_finds_nobody_waits_and_fails_after_a_while() -> None:
    options = FrontEndOptions()
    assert (PLACEMENT_TIMEOUT_S, MAX_LOST_INSTANCES) == (options.placement_timeout_s, options.max_lost_instances)
    offered = [*ONE, Offered(1, 1.0, 100, 1)]
    (first, second), _, found = serve(offered, "PD", Failure(0.030, 1, 20.0), **LINK)
    assert (first.is_failed, second.is_failed) == (False, False)
    assert times_ms(first)[0] == 15 and first.end_s is not None and 20.03 < first.end_s < 20.4
    assert second.first_token_s is not None and second.first_token_s > 20.03
    (first, second), _, found = serve(offered, "PD", Failure(0.030, 1), **LINK)
    assert (first.end_s, second.end_s) == (0.030 + DETECTION_S + PLACEMENT_TIMEOUT_S, 31.0)
    assert (found["finished"], found["slo_attainment"], found["requests"][0]["status"]) == (0, 0.0, "failed")


def test_a_request_that_sees_many_die_fails() -> None:
    offered = [Offered(0, 0.0, 100, 1000)]
    (record,), failures, _ = serve(offered, "MM", *(Failure(n + 1.0, n % 2, 0.5) for n in range(8)))
    assert record.is_failed and record.end_s == MAX_LOST_INSTANCES
    assert [f["moved"] for f in failures.rows()] == [1] * MAX_LOST_INSTANCES + [0, 0]


def test_one_that_waits_for_room_is_placed_again_when_it_would_have_been_ordered() -> None:
    """Decode has room for one prompt; the other's prefill instance dies meanwhile, and is back before there is room."""
    offered = [Offered(0, 0.0, 100, 30), Offered(1, 0.001, 150, 2)]
    records, failures, _ = serve(offered, "PPD", Failure(0.010, 1, 0.1), num_blocks=16, kv_bytes_per_token=1)
    assert records[0].num_lost == 0 and records[0].end_s is not None
    assert records[1].num_lost == 1 and records[1].started_s is not None
    assert records[1].started_s >= records[0].end_s + DETECTION_S
    assert failures.rows()[0]["moved"] == 1


KINDS = st.sampled_from(["MM", "PD", "PPDD", "PDM", "M", "P" * 9 + "D" * 20])
REQUESTS = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=14).map(
    lambda rows: [Offered(n, at_s, *sizes) for n, (at_s, *sizes) in enumerate(sorted(rows))]
)
DEATHS = st.lists(st.tuples(st.floats(0, 4), st.integers(0, 28), st.none() | st.floats(0.001, 5)), max_size=8)
POLICIES = st.sampled_from(
    [(RoundRobin, {}), (FewestTokens, {}), (Multiplexing, {"ttft_x": 5.0, "tpot_s": 0.04, "is_predicted": True})]
)


@settings(deadline=None)
@given(KINDS, REQUESTS, DEATHS, POLICIES, st.sampled_from([25, 40, 1000]), st.sampled_from([1, 10**5]))
def test_nothing_is_lost_and_nothing_is_served_twice(
    kinds: str,
    offered: list[Offered],
    deaths: list[tuple[float, int, float | None]],
    policy: tuple[type[PlacementPolicy], dict[str, Any]],
    num_blocks: int,
    kv_bytes: int,
) -> None:
    """In any layout, with blocks that run out, each request ends once; whether steps are worked out at once changes nothing."""
    up_s: dict[int, float] = {}
    dead: list[Failure] = []
    for at_s, index, down_s in sorted(deaths, key=lambda d: d[:2]):
        if at_s >= up_s.get(index % len(kinds), 0.0):
            dead.append(Failure(at_s, index % len(kinds), down_s))
            up_s[index % len(kinds)] = float("inf") if down_s is None else at_s + down_s
    check(dead)
    make, options = policy
    options = {**options, "num_blocks": num_blocks, **LINK, "kv_bytes_per_token": kv_bytes}
    found = []
    for max_leap in (1, 64):
        records, failures, told = serve(offered, kinds, *dead, policy=make(), max_leap=max_leap, **options)
        found.append(json.dumps([told, failures.rows(), [r.num_lost for r in records]]))
    assert found[0] == found[1]
    assert sum(f["moved"] for f in failures.rows()) == sum(r.num_lost for r in records)
    for record in records:
        assert record.num_lost <= MAX_LOST_INSTANCES
        assert record.is_failed + record.is_refused + (record.first_token_s is not None and not record.is_failed) == 1
        if record.is_failed:
            assert dead and record.end_s is not None
    everybody_stays = all(f.down_s is not None for f in dead)
    if everybody_stays and all(r.num_lost < MAX_LOST_INSTANCES for r in records):
        assert not any(r.is_failed for r in records)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("soon:1", r"--fail soon:1: it must be TIME:INSTANCE or TIME:INSTANCE:SECONDS"),
        ("-1:1", r"it must be TIME:INSTANCE"),
        ("5", r"--fail 5: it must be TIME:INSTANCE"),
        ("5:1:", r"it must be TIME:INSTANCE"),
        ("5:4", r"--fail 5:4: the instance is 4; it must be from 0 to 3"),
        ("5:1:0", r"--fail 5:1:0: SECONDS is 0; it must be above 0"),
        ("5:1:10,14.5:1", r"--fail 14\.5:1: instance 1 is down from 5 until 15; it must be up"),
        ("5:1,14.5:1", r"instance 1 is down from 5 for good; it must be up"),
    ],
)
def test_wrong_failures_are_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse([text], 4)
    assert parse(["5:1:2.5,7.5:1", "0:0"], 4) == [Failure(0, 0), Failure(5, 1, 2.5), Failure(7.5, 1)]


FLAGS = [
    "simulate",
    "--latency",
    str(DATA),
    "--profile",
    "70b-h200-tp4",
    "--trace",
    str(TRACE),
    "--max-requests",
    "400",
]


def simulated(tmp_path: Path, *flags: str) -> tuple[bytes, dict[str, Any]]:
    out = tmp_path / "out.json"
    assert main([*FLAGS, *flags, "--per-request", "--json", str(out)]) == 0
    return out.read_bytes(), json.loads(out.read_bytes())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer are in time after a death, the same bytes come of the same flags, and those who come later are served as if nothing had been."""
    layout = ["--layout", "auto:4", "--rate", "2"]
    dead = [*layout, "--fail", "30:1:20,60:3:10", "--fail", "35:0:8"]
    _, calm = simulated(tmp_path, *layout)
    first, found = simulated(tmp_path, *dead)
    assert "failed for good: 0" in capsys.readouterr().out
    assert first == simulated(tmp_path, *dead)[0]
    assert (found["offered"], found["finished"], found["refused"], found["failed"]) == (300, 300, 0, 0)
    assert [(f["instance"], f["at"], f["until"]) for f in found["failures"]] == [
        ("M1", 30.0, 50.0), ("M0", 35.0, 43.0), ("M3", 60.0, 70.0)
    ]  # fmt: skip
    assert all(f["moved"] > 0 for f in found["failures"])
    assert "failures" not in calm and found["slo_attainment"] < calm["slo_attainment"]

    def late(report: dict[str, Any]) -> float:
        rows = [r for r in report["requests"] if r["arrival_s"] > 90]
        return sum(r["meets_ttft"] and r["meets_tpot"] for r in rows) / len(rows)

    assert late(found) == pytest.approx(late(calm), abs=0.03)


def test_a_failure_when_nobody_comes_any_more_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    """300 requests: 299 s at 1 a second, 149.5 s at 2."""
    flags = [*FLAGS, "--layout", "4M", "--fail", "200:0:5", "--rate", "1,2"]
    assert main(flags) == 0
    said = "--fail 200:0 lies after the last arrival, which is at 149.50 s with --rate 2"
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and said in warnings[0]
    assert main([*flags, "--repeat", "2"]) == 0
    assert "lies after" not in capsys.readouterr().err


def test_published_schedulers_are_simulated_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--layout", "3P1D", "--placement", "tropical", "--fail", "3:1"]) == 2
    assert (
        "--fail goes with a --placement of fewest-tokens, round-robin, slo; it is tropical" in capsys.readouterr().err
    )
