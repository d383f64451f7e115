"""Flips go to the side under pressure, never take its last instance, keep their distance, and never go back under a constant load."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_pd.clock import VirtualClock
from fastdeploy_pd.core.elastic import Demand, ElasticOptions, Flip, InstanceLoad, decide

OPTIONS = ElasticOptions()
PREFILL = InstanceLoad("p", can_prefill=True, can_decode=False)
DECODE = InstanceLoad("d", can_prefill=False, can_decode=True, num_seats=8)
MIXED = InstanceLoad("m", can_prefill=True, can_decode=True, num_seats=8)


def loads(num_prefill: int, num_decode: int, num_mixed: int = 0) -> list[InstanceLoad]:
    kinds = ((PREFILL, num_prefill), (DECODE, num_decode), (MIXED, num_mixed))
    return [replace(kind, instance_id=f"{kind.instance_id}{n}") for kind, count in kinds for n in range(count)]


demands = st.builds(Demand, st.floats(0, 20), st.floats(0, 20))
clusters = st.builds(loads, st.integers(0, 6), st.integers(0, 6), st.integers(0, 2))


@pytest.mark.parametrize(
    ("demand", "cluster", "flip"),
    [
        (Demand(1.5, 0.2), loads(1, 2), Flip("d0", "prefill")),
        (Demand(0.1, 3.0), loads(2, 1), Flip("p0", "decode")),
        (Demand(0.5, 0.5), loads(1, 2), None),
        (Demand(9.0, 0.0), loads(1, 1, 2), None),  # the last one of its side
        (Demand(9.0, 0.0), loads(0, 2), Flip("d0", "prefill")),
        (Demand(2.0, 2.0), loads(1, 2), None),  # both are under pressure: nothing would help
        (Demand(5.0, 2.4), loads(1, 3), Flip("d0", "prefill")),  # both again, one of them far more
        (Demand(5.0, 2.4), loads(2, 2), None),
    ],
)
def test_who_helps(demand: Demand, cluster: list[InstanceLoad], flip: Flip | None) -> None:
    assert decide(demand, cluster, OPTIONS) == flip


def test_the_idlest_that_may_go_goes() -> None:
    busy, idle, fixed = (
        replace(DECODE, instance_id=i, num_decodes=n, is_movable=i != "c") for i, n in (("a", 5), ("b", 1), ("c", 0))
    )
    assert decide(Demand(3.0, 0.7), [PREFILL, busy, idle, fixed], OPTIONS) == Flip("b", "prefill")
    assert decide(Demand(3.0, 0.7), [PREFILL, fixed, replace(fixed, instance_id="e")], OPTIONS) is None


def test_demand_is_what_there_is_on_average() -> None:
    cluster = [
        replace(PREFILL, prefill_s=0.2),
        replace(PREFILL, prefill_s=3.0, kv_usage=0.9),  # its blocks are those of orders
        replace(DECODE, num_decodes=4, kv_usage=0.75, num_queued=2),
        replace(MIXED, prefill_s=9.0, num_decodes=8),  # no side's
    ]
    assert Demand().averaged(cluster, 1e9, OPTIONS) == Demand(4.0, 1.0)
    part = Demand().averaged(cluster, OPTIONS.window_s, OPTIONS)
    assert 0.6 < part.decode < 0.65
    assert part.averaged([], 0.0, OPTIONS) == part


@given(demands, clusters)
def test_never_the_last_and_only_to_the_side_under_pressure(demand: Demand, cluster: list[InstanceLoad]) -> None:
    flip = decide(demand, cluster, OPTIONS)
    if flip is None:
        return
    kinds = Counter(m.instance_id[0] for m in cluster)
    giver, needy, needed = ("d", "p", demand.prefill) if flip.role == "prefill" else ("p", "d", demand.decode)
    assert flip.instance_id[0] == giver and kinds[giver] >= 2
    assert needed / max(1, kinds[needy]) > OPTIONS.high


@given(demands, clusters, st.floats(0, OPTIONS.cooldown_s, exclude_max=True))
def test_not_so_soon_after_another(demand: Demand, cluster: list[InstanceLoad], age_s: float) -> None:
    flipped = replace(MIXED, instance_id="flipped", flip_age_s=age_s)
    assert decide(demand, [*cluster, flipped], OPTIONS) is None
    rested = replace(flipped, flip_age_s=OPTIONS.cooldown_s)
    assert decide(demand, [*cluster, rested], OPTIONS) == decide(demand, cluster, OPTIONS)


@dataclass
class Topic:
    """Instances over which a constant load is spread evenly, on a virtual clock."""

    prefill_s: float  #: of the whole topic
    num_decodes: int
    members: list[InstanceLoad]

    def seen(self) -> list[InstanceLoad]:
        prefills = [m for m in self.members if m.can_prefill]
        decodes = [m for m in self.members if m.can_decode]
        return [
            replace(
                m,
                prefill_s=self.prefill_s / len(prefills or decodes) if m.can_prefill or not prefills else 0.0,
                num_decodes=0,
                num_queued=0,
                kv_usage=self.num_decodes / m.num_seats / len(decodes) if m.can_decode else 0.0,
            )
            for m in self.members
        ]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 30), st.integers(0, 80), st.integers(0, 6), st.integers(1, 6))
def test_a_constant_load_moves_instances_one_way_and_then_none(
    prefill_s: float, num_decodes: int, num_prefill: int, num_decode: int
) -> None:
    topic, clock, demand = Topic(prefill_s, num_decodes, loads(num_prefill, num_decode)), VirtualClock(), Demand()
    flips: list[tuple[float, str]] = []
    flipped_s: dict[str, float] = {}
    while clock.now_s() < 1200:
        clock.advance_to(clock.now_s() + 1.0)
        now_s = clock.now_s()
        seen = [
            replace(m, flip_age_s=now_s - flipped_s[m.instance_id] if m.instance_id in flipped_s else None)
            for m in topic.seen()
        ]
        demand = demand.averaged(seen, 1.0, OPTIONS)
        flip = decide(demand, seen, OPTIONS)
        if flip is not None:
            flips.append((now_s, flip.role))
            flipped_s[flip.instance_id] = now_s
            topic.members = [
                replace(m, can_prefill=flip.role == "prefill", can_decode=flip.role == "decode")
                if m.instance_id == flip.instance_id
                else m
                for m in topic.members
            ]
    assert len({role for _, role in flips}) <= 1, flips
    assert all(b - a >= OPTIONS.cooldown_s for (a, _), (b, _) in itertools.pairwise(flips))
    assert len(flips) < num_prefill + num_decode
    assert not flips or flips[-1][0] < 600, "it came to rest"
