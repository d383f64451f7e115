"""The best are on it, it stays short, nobody is left out for ever, and it costs the same however many there are."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from fastdeploy_pd.core.blocks import extend_hashes
from fastdeploy_pd.core.shortlist import MOST, NUM_HOLDERS, NUM_LEAST, RecentPlacements, Shortlist


def filled(num: int, rng: random.Random, kinds: str = "M") -> tuple[Shortlist, dict[str, int]]:
    """Returns: a shortlist of so many instances, and their loads."""
    loads = {f"{kinds[n % len(kinds)]}{n}": rng.randrange(100_000) for n in range(num)}
    shortlist = Shortlist()
    for instance_id, tokens in loads.items():
        shortlist.put(instance_id, instance_id[0], tokens)
    return shortlist, loads


@pytest.mark.parametrize("num", [1, 2, MOST])
def test_few_are_all_looked_at(num: int) -> None:
    shortlist, loads = filled(num, random.Random(0))
    rng = random.Random(1)
    assert shortlist.choose(("M0",), rng) == list(loads)
    assert rng.random() == random.Random(1).random(), "no coin was tossed"


def test_holders_and_least_loaded_are_on_it_while_loads_change() -> None:
    rng = random.Random(2)
    shortlist, loads = filled(300, rng, "PDM")
    for _ in range(2000):
        changed = rng.choice(list(loads))
        action = rng.random()
        if action < 0.05 and len(loads) > 150:
            shortlist.remove(changed)
            shortlist.remove(changed)
            del loads[changed]
        else:
            loads[changed] = rng.randrange(100_000)
            shortlist.put(changed, changed[0], loads[changed])
        if action < 0.9:
            continue
        holders = [*rng.sample(sorted(loads), 30), "M-that-left"]
        found = shortlist.choose(holders, rng)
        assert len(found) == len(set(found)) and set(found) <= set(loads) and len(shortlist) == len(loads)
        for kind in "PDM":
            of_kind = [i for i in found if i[0] == kind]
            assert NUM_LEAST <= len(of_kind) <= MOST
            assert set([h for h in holders if h in loads and h[0] == kind][:NUM_HOLDERS]) <= set(of_kind)
            least = sorted(t for i, t in loads.items() if i[0] == kind)[:NUM_LEAST]
            assert sorted(loads[i] for i in of_kind)[:NUM_LEAST] == least


def test_nobody_is_starved() -> None:
    """Not even the most loaded; and among equals all come up alike when each choice adds load."""
    rng = random.Random(3)
    shortlist, _ = filled(100, rng)
    seen = Counter(i for _ in range(1000) for i in shortlist.choose((), rng))
    assert len(seen) == 100
    shortlist = Shortlist()
    for n in range(100):
        shortlist.put(f"M{n}", "M", 0)
    placed: Counter[str] = Counter()
    for _ in range(1000):
        chosen = rng.choice(shortlist.choose((), rng)[:NUM_LEAST])
        placed[chosen] += 1
        shortlist.put(chosen, "M", 10 * placed[chosen])
    assert len(placed) == 100 and max(placed.values()) <= 12


def test_an_instance_changes_its_kind() -> None:
    shortlist, _ = filled(40, random.Random(4), "PD")
    shortlist.put("P0", "D", 0)
    assert "P0" in shortlist.choose((), random.Random(0))
    shortlist.put("P0", "P", 10**6)
    found = [shortlist.choose((), random.Random(n)) for n in range(100)]
    assert 0 < sum("P0" in f for f in found) < 100, "by chance alone, among P"


def test_choosing_costs_the_same_with_ten_thousand() -> None:
    seconds = {}
    for num in (100, 10_000):
        rng = random.Random(5)
        shortlist, loads = filled(num, rng)
        ids = list(loads)
        best = float("inf")
        for _ in range(5):
            begun = time.process_time()
            for _ in range(200):
                shortlist.put(rng.choice(ids), "M", rng.randrange(100_000))
                shortlist.choose(ids[:4], rng)
            best = min(best, time.process_time() - begun)
        seconds[num] = best
    assert seconds[10_000] < 3 * seconds[100]


def test_recent_placements_know_who_holds_the_longest_prefix() -> None:
    hashes: list[bytes] = []
    extend_hashes(hashes, range(16 * 40), 16, "")
    recent = RecentPlacements(stride=4, max_prefixes=12)
    assert recent.holders(hashes) == ()
    recent.note(hashes[:20], "a")
    recent.note(hashes[:9], "b")
    assert recent.holders(hashes) == ("a",)
    assert recent.holders(hashes[:11]) == ("b", "a"), "the newest first"
    assert recent.holders(hashes[:3]) == (), "shorter than what is remembered"
    for name in "cdefg":
        recent.note(hashes[:4], name)
    assert recent.holders(hashes[:4]) == ("g", "f", "e", "d")
    other: list[bytes] = []
    extend_hashes(other, range(16 * 40), 16, "another")
    recent.note(other, "z")
    assert recent.holders(hashes[:20]) == ("b", "a"), "the longest prefixes were forgotten first"
    assert recent.holders(other) == ("z",)
