"""Latencies that a hand can check, nothing lost, no block too many, the same bytes, and what another simulator says."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_pd.core.multiplexing import Multiplexing
from fastdeploy_pd.core.placement import NO_SLO, Candidate, FewestTokens, Placement, PlacementPolicy, RoundRobin
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Slo as RequestSlo
from fastdeploy_pd.sim.cluster import Cluster, ClusterOptions, Record
from fastdeploy_pd.sim.latency import Curve, Latency, read
from fastdeploy_pd.sim.report import Slo, report
from fastdeploy_pd.sim.trace import Offered, at_rate, load

DATA = Path(__file__).parent / "data"
TRACE = Path(__file__).parents[2] / "benchmarks" / "data" / "mooncake_conversation.jsonl.gz"

#: a prompt of n tokens takes 5 + n / 10 ms, a token for each of B sequences 10 + B ms
PLAIN = Latency(lambda n: 5 + n / 10, lambda num: Curve([(0, 10 + num), (1000, 10 + num)]))


def serve(offered: list[Offered], kinds: str, **options: Any) -> list[Record]:
    cluster = Cluster(
        ClusterOptions(kinds, **{"num_blocks": 1000, "block_size": 16, **options}),
        PLAIN,
        RoundRobin(),
        random.Random(0),
    )
    records = cluster.run(offered)
    assert all(i.scheduler.pool.counts().held == 0 for i in cluster.instances)
    return records


def times_ms(record: Record) -> tuple[float, ...]:
    """Returns: when its prompt began, its first and its last token came."""
    assert record.started_s is not None and record.first_token_s is not None and record.end_s is not None
    return tuple(round(1e3 * t, 6) for t in (record.started_s, record.first_token_s, record.end_s))


THREE = [Offered(0, 0.0, 100, 3), Offered(1, 0.005, 200, 2), Offered(2, 1.0, 50, 1)]


def test_three_requests_on_one_instance() -> None:
    first, second, third = serve(THREE, "M")
    assert times_ms(first) == (0, 15, 15 + 36 + 12), (
        "a token beside the second's prompt (11 + 25), one beside its token"
    )
    assert times_ms(second) == (15, 15 + 36, 15 + 36 + 12)
    assert times_ms(third) == (1000, 1010, 1010)
    assert first.prefill_id is None and first.decode_id == "M0"


@pytest.mark.parametrize(
    ("bytes_per_s", "there_ms"),
    [
        (1e9, 15 + 1),  # 7 blocks of 16 tokens of 10^5 bytes leave in 11.2 ms, while they are computed
        (1e8, 112 + 1),
    ],
)
def test_three_requests_handed_over(bytes_per_s: float, there_ms: float) -> None:
    link = {"kv_bytes_per_token": 10**5, "link_bytes_per_s": bytes_per_s, "link_latency_s": 1e-3}
    first, _, third = serve([THREE[0], Offered(1, 0.5, 200, 2), THREE[2]], "PD", **link)
    assert times_ms(first) == (0, 15, there_ms + 2 * 11), "the first token does not wait for the wire"
    assert times_ms(third)[:2] == (1000, 1010)
    assert third.end_s is not None and third.end_s > third.first_token_s, "it ends where its blocks are"
    assert (first.prefill_id, first.decode_id) == ("P0", "D1")


def test_decode_reserves_before_prefill_begins() -> None:
    first, second, _ = serve(THREE, "PD", num_blocks=16, kv_bytes_per_token=1, link_latency_s=1e-3)
    assert times_ms(first) == (0, 15, 16 + 2 * 11)
    assert times_ms(second)[:2] == (38, 38 + 25), "its 13 blocks were free when the first one ended"


def test_what_a_prompt_shares_is_not_computed_again() -> None:
    alike = [Offered(n, n * 1.0, 600, 2, (4, 5)) for n in range(2)]
    first, second = serve(alike, "M")
    assert (first.num_cached, second.num_cached) == (0, 592), "the last block is computed: its logits are needed"
    assert times_ms(second)[1] == pytest.approx(1000 + 5 + 60 - 59.2)
    first, second = serve(alike, "PD", kv_bytes_per_token=10**6, link_bytes_per_s=1e9, link_latency_s=0.0)
    assert times_ms(second)[2] == pytest.approx(1000 + 16 + 11), "only the block that decode lacks is sent"
    assert [r.num_cached for r in serve(alike, "M", enable_prefix_caching=False)] == [0, 0]


def test_what_does_not_fit_is_refused() -> None:
    records = serve([Offered(0, 0.0, 159, 1), Offered(1, 0.1, 160, 1)], "M", num_blocks=10)
    assert [r.is_refused for r in records] == [False, True]
    found = report(records, (), PLAIN, Slo())
    assert (found["finished"], found["refused"], found["slo_attainment"]) == (1, 1, 0.5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kinds": "PP"}, "at least one instance that decodes"),
        ({"block_size": 48}, "--block-size is 48; it must divide 512"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be above 0"),
        ({"link_latency_s": -1e-3}, "link_latency_s is -0.001; it must be 0 or more"),
        ({"kv_bytes_per_token": 0}, "--kv-bytes-per-token must be given"),
        (
            {"max_num_batched_tokens": 512, "max_lone_prompt_tokens": 100},
            r"--max-lone-prompt-tokens is 100; it must be 0 or at least --max-num-batched-tokens \(512\)",
        ),
    ],
)
def test_wrong_options_are_named(change: dict[str, Any], text: str) -> None:
    options = ClusterOptions(**{"kinds": "PD", "num_blocks": 10, "kv_bytes_per_token": 1, **change})
    with pytest.raises(ConfigError, match=text):
        Cluster(options, PLAIN, RoundRobin(), random.Random(0))


class Watchful(FewestTokens):
    """Sees to it that the loads it is told are those of the schedulers, and of prompts also what is computed just now."""

    cluster: Cluster
    num_busy = 0

    def place(
        self,
        num_tokens: int,
        candidates: Collection[Candidate],
        rng: random.Random,
        slo: RequestSlo = NO_SLO,
        age_s: float = 0.0,
    ) -> Placement | None:
        told = [c.outstanding_tokens for c in candidates]
        left = [i.scheduler.outstanding_tokens() for i in self.cluster.instances]
        assert all(0 <= t - n <= 8192 for t, n in zip(told, left, strict=True))  # the default of tokens a step
        self.num_busy += told != left
        return super().place(num_tokens, candidates, rng, slo, age_s)


def test_placement_knows_the_loads() -> None:
    policy = Watchful()
    options = ClusterOptions("MMM", 3000, max_num_seqs=4)
    policy.cluster = Cluster(options, read(DATA, "70b-h200-tp4"), policy, random.Random(0))
    policy.cluster.run(at_rate(load(TRACE)[:100], 2.0))
    assert policy.num_busy > 20


class Narrow(Multiplexing):
    """Counts the candidates that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.chosen: set[str] = set()

    def place(
        self,
        num_tokens: int,
        candidates: Collection[Candidate],
        rng: random.Random,
        slo: RequestSlo = NO_SLO,
        age_s: float = 0.0,
    ) -> Placement | None:
        self.most = max(self.most, len(candidates))
        found = super().place(num_tokens, candidates, rng, slo, age_s)
        assert found is not None
        self.chosen |= {found.decode_id, found.prefill_id or found.decode_id}
        return found


@pytest.mark.parametrize(("kinds", "most"), [("M" * 16, 16), ("M" * 60, 16), ("P" * 40 + "D" * 20, 32)])
def test_placement_looks_at_a_few(kinds: str, most: int) -> None:
    """And finds prefixes all the same."""
    policy, latency = Narrow(), read(DATA, "70b-h200-tp4")
    options = ClusterOptions(kinds, 2125, 512, kv_bytes_per_token=1, **SLO)
    cluster = Cluster(options, latency, policy, random.Random(0))
    records = cluster.run(at_rate(load(TRACE)[:300], 30.0))
    assert most - 8 <= policy.most <= most
    assert len(policy.chosen) > len(kinds) * 0.6
    assert sum(r.num_cached for r in records) > 1.2 * 512 * len(records), "more than what all begin with"


def replay(kinds: str, rate: float, policy: PlacementPolicy, model: str, **options: Any) -> dict[str, Any]:
    """Replay the trace with few blocks or many; check what must hold of any run."""
    max_leap, num_requests = options.pop("max_leap", 64), options.pop("num_requests", 300)
    latency = read(DATA, "70b-h200-tp4", model)
    cluster = Cluster(
        ClusterOptions(kinds, **{"num_blocks": 17_000, "kv_bytes_per_token": 327_680, **options}),
        latency, policy, random.Random(0), max_leap,
    )  # fmt: skip
    offered = at_rate(load(TRACE)[:num_requests], rate)
    records = cluster.run(offered)
    assert [r.offered for r in records] == offered
    for record in records:
        if not record.is_refused:
            assert None not in (record.started_s, record.first_token_s, record.end_s)
            assert record.offered.arrival_s <= record.started_s < record.first_token_s <= record.end_s
    for instance in cluster.instances:
        assert instance.scheduler.pool.counts().held == 0
        assert instance.max_held_blocks <= cluster.options.num_blocks
        assert instance.scheduler.is_idle
    return {**report(records, cluster.instances, latency, Slo()), "free_blocks": free_blocks(cluster)}


def free_blocks(cluster: Cluster) -> list[list[int]]:
    """Returns: each idle instance's blocks in the order in which they would be taken."""
    return [i.scheduler.pool.allocate(i.scheduler.pool.num_blocks) for i in cluster.instances]


SLO = {"ttft_x": 5.0, "tpot_s": 0.04, "is_predicted": True}
CASES = [
    ("MM", 1.5, FewestTokens, "grid", {}),
    ("PDD", 0.8, FewestTokens, "grid", {"num_blocks": 3000}),
    ("PPDM", 2.0, FewestTokens, "formula", {"num_blocks": 1800, "max_num_seqs": 6}),
    ("M", 0.6, RoundRobin, "dynosim", {"num_blocks": 1800}),
    ("PD", 0.8, RoundRobin, "grid", {"max_num_seqs": 3}),
    ("MM", 1.9, Multiplexing, "grid", {**SLO, "prefill_policy": "slack"}),
    ("PDMM", 2.6, Multiplexing, "formula", {**SLO, "prefill_policy": "slack", "num_blocks": 1800}),
    (
        "MM",
        4.0,
        Multiplexing,
        "grid",
        {**SLO, "prefill_policy": "slack", "num_blocks": 3000},
    ),  # lost prompts lose blocks
    (
        "MM",
        1.5,
        Multiplexing,
        "grid",
        {**SLO, "prefill_policy": "edf", "max_num_seqs": 5, "max_num_batched_tokens": 900},
    ),
]


def test_steps_at_once_are_steps_one_by_one() -> None:
    """And nothing is lost in layouts of all kinds, with queues, refusals and preemptions."""
    num_preemptions = num_refused = 0
    for kinds, rate, policy, model, options in CASES:
        found = [
            json.dumps(replay(kinds, rate, policy(), model, max_leap=max_leap, num_requests=150, **options))
            for max_leap in (1, 7, 64)
        ]
        assert found[0] == found[1] == found[2], (kinds, options)
        result = json.loads(found[0])
        assert result["finished"] + result["refused"] == result["offered"] == 150
        num_preemptions += sum(i["preemptions"] for i in result["instances"])
        num_refused += result["refused"]
    assert num_preemptions > 0 and num_refused > 0


@pytest.mark.parametrize(
    ("kinds", "num_blocks", "offered"),
    [
        ("M", 40, [Offered(0, 0.0, 61, 60), Offered(1, 0.0, 90, 60), Offered(2, 0.3, 70, 99)]),
        ("M", 12, [Offered(0, 0.0, 60, 60), Offered(1, 0.0, 60, 60)]),  # they grow until one must go
        # what the second has reserved, for as long as 3 s on the link, is what the first lacks
        ("PD", 16, [Offered(0, 0.0, 60, 100), Offered(1, 1.5, 150, 9)]),
    ],
)
def test_blocks_are_taken_in_the_same_order(kinds: str, num_blocks: int, offered: list[Offered]) -> None:
    found = []
    for max_leap in (1, 5, 64):
        options = ClusterOptions(kinds, num_blocks, 16, kv_bytes_per_token=10**9)
        cluster = Cluster(options, PLAIN, RoundRobin(), random.Random(0), max_leap)
        rows = report(cluster.run(offered), cluster.instances, PLAIN, Slo())
        found.append((rows, free_blocks(cluster)))
    assert found[0] == found[1] == found[2]
    assert (found[0][0]["instances"][-1]["preemptions"] > 0) == (num_blocks < 40)


@pytest.mark.parametrize(
    ("kinds", "rate", "attainment", "ttft_s", "tpot_ms"),
    [
        ("M", 0.4, 0.857, (1.00, 3.73), (20.8, 47.6)),
        ("M", 0.85, 0.310, (5.45, 14.03), (96.2, 240.6)),
        ("MM", 0.85, 0.907, (0.85, 3.88), (20.0, 36.5)),
        ("MM", 1.7, 0.517, (2.82, 9.44), (59.9, 169.5)),
    ],
)
def test_dynosim_says_the_same(
    kinds: str, rate: float, attainment: float, ttft_s: tuple[float, float], tpot_ms: tuple[float, float]
) -> None:
    """Figures of ai-dynamo 1.4.2 (`dynamo.replay`, aggregated, round robin) for this trace and these grids; p50 and p90."""
    found = replay(kinds, rate, RoundRobin(), "dynosim")
    assert found["slo_attainment"] == pytest.approx(attainment, abs=0.01)
    assert (found["ttft_s"]["p50"], found["ttft_s"]["p90"]) == pytest.approx(ttft_s, rel=0.03)
    assert (found["tpot_ms"]["p50"], found["tpot_ms"]["p90"]) == pytest.approx(tpot_ms, rel=0.03)
