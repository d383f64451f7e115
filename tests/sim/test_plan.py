"""The planner finds what trying everything finds, in fewer simulations; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.sim.cluster import ClusterOptions
from fastdeploy_pd.sim.latency import from_coefficients
from fastdeploy_pd.sim.plan import (
    Candidate,
    Kind,
    Planner,
    candidates_of,
    highest_between,
    prefill_works,
    printable,
    rate_text,
)
from fastdeploy_pd.sim.report import Slo
from fastdeploy_pd.sim.trace import Offered, at_rate, load

DATA = Path(__file__).parent / "data"
TRACE = Path(__file__).parents[2] / "benchmarks" / "data" / "mooncake_conversation.jsonl.gz"
TIMES = from_coefficients((1.45e-9, 1.01e-4, 0.012), (6.1e-8, 4.9e-5, 0.0149))
SMALL, LARGE = Kind("small", 1, TIMES, 7600, 196_608), Kind("large", 2, TIMES, 7600, 196_608)


POLICIES = [("fewest-tokens", "fcfs"), ("tropical", "fcfs")]


def test_candidates() -> None:
    found = candidates_of([SMALL, LARGE], 3, POLICIES, [2048])
    assert [(c.kind.name, c.name, c.placement, c.gpus) for c in found] == [
        ("small", "1M", "fewest-tokens", 1),
        ("small", "2M", "fewest-tokens", 2),
        ("small", "1P1D", "fewest-tokens", 2),
        ("small", "1P1D", "tropical", 2),
        ("small", "3M", "fewest-tokens", 3),
        ("small", "1P2D", "fewest-tokens", 3),
        ("small", "1P2D", "tropical", 3),
        ("small", "2P1D", "fewest-tokens", 3),
        ("small", "2P1D", "tropical", 3),
        ("large", "1M", "fewest-tokens", 2),
    ]


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_the_cheapest_that_meets_the_goal(rate: float) -> None:
    offered = at_rate(load(TRACE)[:200], rate)
    planner = Planner(offered, Slo(), 0.9, ClusterOptions("M", 0, enable_prefix_caching=False))
    candidates = candidates_of([SMALL], 3, POLICIES, [2048])
    best = planner.search(candidates, lambda c: None)
    assert best is not None
    all_of_them = [planner.serve(c, offered) for c in candidates]
    fewest = min(r.candidate.gpus for r in all_of_them if r.attainment >= 0.9)
    assert best.candidate.gpus == fewest and best.num_requests == len(offered)
    assert best.attainment >= max(r.attainment for r in all_of_them if r.candidate.gpus == fewest) - 0.02
    assert not any(c.gpus > fewest for c in planner.results), "what costs more is not tried"


def test_what_arithmetic_leaves_out_fails() -> None:
    offered = at_rate(load(TRACE), 4.0)
    planner = Planner(offered, Slo(), 0.9, ClusterOptions("M", 0))
    candidates = candidates_of([SMALL], 3, POLICIES[:1], [2048])
    left_out = [c for c in candidates if not planner._is_possible(c)]
    assert 0 < len(left_out) < len(candidates)
    for candidate in left_out:
        assert planner.serve(candidate, offered).attainment < 0.9


def test_prefill_work_with_an_endless_cache() -> None:
    offered = [Offered(0, 0.0, 1000, 1, (1, 2)), Offered(1, 1.0, 1500, 1, (1, 2, 3)), Offered(2, 2.0, 1024, 1, (1, 2))]
    works = list(prefill_works(offered, TIMES, finds_prefixes=True))
    assert works[0] == pytest.approx(TIMES.alone_s(1000))
    assert works[1] == pytest.approx(TIMES.step_s([(1024, 1500, True)], 0, 0))
    assert works[2] == pytest.approx(TIMES.step_s([(1023, 1024, True)], 0, 0)), "the last token is computed"
    assert list(prefill_works(offered, TIMES, finds_prefixes=False))[1] == pytest.approx(TIMES.alone_s(1500))


def test_the_highest_rate() -> None:
    """The goal is met there and missed a little above."""
    offered = at_rate(load(TRACE)[:120], 0.3)
    planner = Planner(offered, Slo(), 0.9, ClusterOptions("M", 0))
    candidate = Candidate(SMALL, "MM", "fewest-tokens", "fcfs", 2048)
    rate = planner.highest_rate(candidate, lambda c: None)
    assert rate > 0.3
    assert planner.serve(candidate, at_rate(offered, rate)).attainment >= 0.9
    assert planner.serve(candidate, at_rate(offered, rate * 1.021)).attainment < 0.9
    assert float(rate_text(rate)) == rate, "who takes the printed rate gets what was simulated"


def test_rates_are_printed_as_they_are() -> None:
    cases = [(17.341031510998384, 17.34), (1.029, 1.02), (17.34, 17.34), (0.3125, 0.312), (0.0004567, 0.000456)]
    for rate, found in cases:
        assert printable(rate) == printable(printable(rate)) == found == float(rate_text(found))
    assert [rate_text(r) for r in (13.000000000000002, 13.0061234, 3.0)] == ["13.00", "13.0061", "3.00"]
    assert highest_between(lambda rate: rate < 16.6, 16.25, 32.5, 0.02, printable) == 16.42


FLAGS = ["plan", "--latency", str(DATA), "--profile", "70b-h200-tp4", "--trace", str(TRACE)]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    flags = [*FLAGS, "--rate", "0.8", "--max-requests", "100", "--max-num-batched-tokens", "8192", "--json", str(out)]
    assert main([*flags, "--gpus", "11"]) == 0
    found = json.loads(out.read_text())
    best = found["best"]
    assert (best["gpus"], best["slo_attainment"] >= 0.9, best["requests"]) == (4, True, 100), "an instance takes four"
    assert best["highest_rate"] >= found["rate"] == pytest.approx(0.8)
    told = capsys.readouterr().out
    assert f"best: --layout {best['layout']} --placement slo" in told
    assert f"holds the goal up to {best['highest_rate']:.3g} requests/s" in told
    assert main([*flags, "--gpus", "4", "--rate", "3"]) == 1
    assert "nothing meets the goal at 3.00 requests/s" in capsys.readouterr().out
    assert json.loads(out.read_text())["best"] is None


def test_published_placements_are_tried_in_their_own_order(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    flags = [*FLAGS, "--gpus", "8", "--rate", "0.5", "--max-requests", "40", "--max-num-batched-tokens", "8192"]
    assert main([*flags, "--placement", "distserve", "--goal", "0.5", "--json", str(out)]) == 0
    best = json.loads(out.read_text())["best"]
    assert (best["layout"], best["placement"], best["prefill_policy"]) == ("1P1D", "distserve", "fcfs")
    main(
        [*flags, "--placement", "vllm-chunked,slo", "--prefill-policy", "slack,sjf", "--goal", "1", "--json", str(out)]
    )
    found = json.loads(out.read_text())
    tried = [*([found["best"]] if found["best"] else []), *found["others"]]
    orders = sorted((c["placement"], c["prefill_policy"]) for c in tried if c["layout"] == "1M")
    assert orders == [("slo", "sjf"), ("slo", "slack"), ("vllm-chunked", "fcfs")]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--gpus", "3"], "--gpus is 3; the smallest instance takes 4, and"),
        (["--gpus", "0"], "--gpus is 0; it must be a whole number from 1"),
        (["--gpus", "100000"], "to try; it must be 895 at most, for 50000"),
        (["--gpus", "8", "--goal", "1.5"], "--goal is 1.5; it must be above 0 and at most 1"),
        (["--gpus", "8", "--placement", "best"], "--placement is 'best'; there are fewest-tokens, round-robin, slo; simulated only: distserve"),
        (["--gpus", "8", "--prefill-policy", "fcfs,x"], "--prefill-policy is 'x'; there are fcfs, sjf"),
        (["--gpus", "8", "--num-blocks", "10,20"], "--num-blocks is 10,20; it must be 1 numbers, one for each of 70b-h"),
        (["--gpus", "8", "--max-num-batched-tokens", "2k"], "--max-num-batched-tokens is '2k'; it must be whole numbers"),
        (["--gpus", "8", "--profile", "h200-tp4"], "--num-blocks and --kv-bytes-per-token must be given for h200-tp4"),
        (["--gpus", "8", "--profile", ""], "--profile must be given with --latency"),
    ],
)  # fmt: skip
def test_wrong_flags_are_named(flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, *flags]) == 2
    assert text in capsys.readouterr().err
