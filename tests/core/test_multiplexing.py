"""Placement by what would become of everybody's SLO."""

from __future__ import annotations

import random
from dataclasses import replace

from fastdeploy_pd.core.multiplexing import Multiplexing, estimate, stream_share
from fastdeploy_pd.core.placement import Added, Candidate, Load, Placement
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.request import Slo

PREDICTOR = Predictor((0.0, 1e-4, 0.0), (0.0, 0.0, 0.02))
SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def candidate(name: str, roles: str = "M", cached: int = 0, **load: object) -> Candidate:
    facts = Load(**{"predictor": PREDICTOR, "num_free_tokens": 100_000, **load})  # type: ignore[arg-type]
    return Candidate(name, roles in "PM", roles in "DM", 0, cached, facts)


def place(*candidates: Candidate, num_tokens: int = 2000, slo: Slo = SLO, age_s: float = 0.0) -> set[Placement | None]:
    return {Multiplexing().place(num_tokens, candidates, random.Random(s), slo, age_s) for s in range(20)}


def test_equals_take_turns_and_who_cannot_serve_is_not_asked() -> None:
    assert place(candidate("a"), candidate("b")) == {Placement(None, "a"), Placement(None, "b")}
    assert place() == place(candidate("p", "P")) == {None}
    assert place(candidate("p", "P"), candidate("d", "D", prompts=((9.0, 0.5),))) == {Placement("p", "d")}


def test_a_cached_prefix_is_followed_until_its_holder_is_too_busy() -> None:
    assert place(candidate("a", cached=1500), candidate("b")) == {Placement(None, "a")}
    waits = ((0.5, 0.4),)
    assert place(candidate("a", cached=1500, prompts=waits), candidate("b")) == {Placement(None, "b")}
    # ... but not where the other one would make a first token late
    assert place(candidate("a", cached=1500, prompts=waits), candidate("b", busy_s=0.95)) == {Placement(None, "a")}


def test_nobody_is_made_late_if_it_can_be_helped() -> None:
    tight = candidate("a", prompts=((0.25, 0.2),))
    assert place(tight, candidate("b", prompts=((5.0, 0.5),)), slo=Slo(0.22, 0.1)) == {Placement(None, "b")}


def test_a_decode_instance_with_time_to_spare_computes_prompts() -> None:
    busy = candidate("p", "P", prompts=((0.95, 0.9),))
    assert place(busy, candidate("d", "D", num_streams=5)) == {Placement(None, "d")}
    assert round(stream_share(candidate("d", "D", num_streams=5), SLO), 9) == 0.2
    tight = Slo(ttft_s=1.0, tpot_s=0.021)  # its streams need 95 % of the time
    assert place(busy, candidate("d", "D", num_streams=5), slo=tight) == {Placement("p", "d")}


def test_who_has_computed_no_prompt_yet_is_taken_to_be_as_slow_as_the_slowest() -> None:
    busy = candidate("p", "P", prompts=((0.95, 0.9),))
    new = candidate("d", "D", num_streams=5, predictor=Predictor((0.0, 0.0, 0.0), PREDICTOR.decode))
    assert place(busy, new) == {Placement(None, "d")}
    slow = candidate("q", "P", predictor=Predictor((0.0, 6e-4, 0.0), PREDICTOR.decode))
    assert place(busy, new, slow) == {
        Placement("p", "d")
    }  # 1.2 s anywhere but at p: late there as well, but after less time
    nobody = candidate("p", "P", predictor=new.load.predictor)
    assert place(nobody, new) == {Placement("p", "d")}


def test_no_room_counts_as_late() -> None:
    assert place(candidate("a", num_free_tokens=1000), candidate("b", busy_s=0.5)) == {Placement(None, "b")}


def test_who_has_no_seat_free_counts_as_late() -> None:
    full = candidate("a", "D", num_streams=8, stream_tokens=8000, num_seats=0)
    assert place(full, candidate("p", "P", busy_s=0.4), candidate("d", "D", num_streams=7, busy_s=0.5)) == {
        Placement("p", "d")
    }
    assert place(candidate("a", num_seats=0), candidate("b", busy_s=0.5)) == {Placement(None, "b")}


def test_without_a_tpot_slo_decode_is_chosen_by_its_load_all_the_same() -> None:
    prefill, slo = candidate("p", "P"), Slo(ttft_s=1.0)
    predictor = Predictor((0.0, 1e-4, 0.0), (1e-6, 0.0, 0.02))
    idle, busy = (candidate(n, "D", predictor=predictor, stream_tokens=t) for n, t in (("idle", 100), ("busy", 10_000)))
    assert place(prefill, busy, idle, slo=slo) == {Placement("p", "idle")}
    no_room = candidate("idle", "D", predictor=predictor, num_free_tokens=1000)
    assert place(prefill, busy, no_room, slo=slo) == {Placement("p", "busy")}


def test_streams_placed_since_a_report_are_no_secret() -> None:
    """Else all prompts between two reports would go to one decode instance."""
    predictor = Predictor((0.0, 1e-4, 0.0), (1e-6, 0.0, 0.02))
    facts = [candidate("p", "P")] + [candidate(f"d{n}", "D", predictor=predictor, stream_tokens=n) for n in range(4)]
    added: dict[str, list[Added]] = {c.instance_id: [] for c in facts}
    for _ in range(40):
        seen = [replace(c, load=c.load.forecast(0.0, added[c.instance_id])) for c in facts if c.load]
        placement = Multiplexing().place(2000, seen, random.Random(0), Slo(ttft_s=100.0))
        assert placement is not None
        added[placement.decode_id].append(Added(0.0, 100.0, 0.2 if placement.prefill_id is None else 0.0, 2000))
        if placement.prefill_id is not None:
            added[placement.prefill_id].append(Added(0.0, 100.0, 0.2, 2000))
    counts = [len(added[f"d{n}"]) for n in range(4)]
    assert sum(counts) == 40 and max(counts) - min(counts) <= 3
    ordered = facts[1].load.after(0.0, added["d0"][:1]) if facts[1].load else None
    assert ordered is not None and (ordered.num_ordered, ordered.ordered_tokens, ordered.num_seats) == (1, 2000, 0)


def test_who_is_due_soon_is_not_placed_behind_a_prompt_that_has_begun() -> None:
    """An idle instance begins at once what it is given, and a step that runs lets nobody in."""
    given = [Added(0.0, 5.0, 0.5, 5000)]
    idle, streams = candidate("a", most_step_s=0.6), candidate("b", busy_s=0.05)
    assert idle.load is not None and streams.load is not None
    assert place(replace(idle, load=idle.load.after(0.01, given)), streams, num_tokens=500, slo=Slo(0.2)) == {
        Placement(None, "a")
    }, "as if it could be overtaken"
    busy = replace(idle, load=idle.load.forecast(0.01, given))
    assert place(busy, streams, num_tokens=500, slo=Slo(0.2)) == {Placement(None, "b")}


def test_age_is_counted() -> None:
    new = estimate(candidate("a", busy_s=0.3), 2000, 1.0, SLO)
    old = estimate(candidate("a", busy_s=0.3), 2000, 0.4, SLO)
    assert (new.num_lost, old.num_lost) == (0, 1)


def test_without_a_predictor_tokens_decide() -> None:
    heavy = Candidate("a", True, True, 10_000)
    assert place(heavy, candidate("b")) == {Placement(None, "b")}
