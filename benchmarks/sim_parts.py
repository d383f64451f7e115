"""The parts of `benchmarks.bench_sim`: each runs its simulations and returns rows, and a table of them in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers import dynosim
from benchmarks.simulations import (
    Row,
    add_held,
    by_rate,
    held_text,
    percent,
    run_all,
    run_each,
    simulate,
    spread,
    table,
)  # fmt: skip

GRIDS = Path(__file__).parents[1] / "tests" / "sim" / "data"
TITLES = {"70b-h200-tp4": "Llama-3.1-70B TP4", "8b-h200-tp1": "Llama-3.1-8B TP1"}
Found = tuple[list[Row], str]
PEER_LAYOUTS = ("8M", "6P2D", "4P4D")
SLACK = ("--placement", "slo", "--prefill-policy", "slack")


@dataclass(frozen=True, slots=True)
class Setup:
    """What all parts are given."""

    trace: Path
    peer: str | None = None  #: a Python that has DynoSim
    most: int | None = None  #: the trace's first requests alone
    jobs: int = 1  #: simulations at once

    def flags(self, layout: str, *more: str, most: int | None = None) -> list[str]:
        """Returns: those of a simulation of the trace, or of its first so many requests."""
        kept = min((n for n in (most, self.most) if n is not None), default=None)
        return [
            *("--trace", str(self.trace), "--layout", layout, *more),
            *(() if kept is None else ("--max-requests", str(kept))),
        ]

    def on_grid(self, profile: str, layout: str, *more: str, most: int | None = None) -> list[str]:
        """Returns: those of one with measured step times."""
        return self.flags(layout, "--latency", str(GRIDS), "--profile", profile, *more, most=most)


def _both(
    setup: Setup, label: str, settings: Sequence[tuple[str, float]], ours: Sequence[str], theirs: str
) -> list[Row]:
    """Serve the trace by our scheduling and by DynoSim's. Returns: a row a setting: `ours`, and `dynosim` by layout.

    Args:
        settings: profiles and rates.
        ours: layout and further flags.
        theirs: the router.
    """
    layouts = (PEER_LAYOUTS if theirs == "kv_router" else PEER_LAYOUTS[:1]) if setup.peer else ()
    calls = []
    for profile, rate in settings:
        calls.append(partial(simulate, [*setup.on_grid(profile, *ours), "--rate", str(rate)]))
        given = (setup.peer or "", setup.trace, setup.most, GRIDS, profile, rate)
        calls += [partial(dynosim.replay, *given, layout, theirs) for layout in layouts]
    runs = iter(run_all(label, calls, setup.jobs))
    return [
        {"profile": profile, "rate": rate, "ours": next(runs), "dynosim": {layout: next(runs) for layout in layouts}}
        for profile, rate in settings
    ]


def peer(setup: Setup) -> Found:
    """Our scheduling beside DynoSim's KV-aware router in each of its layouts."""
    settings = (("70b-h200-tp4", 3.4), ("70b-h200-tp4", 6.8), ("8b-h200-tp1", 3.4), ("8b-h200-tp1", 10.2))
    rows = _both(setup, "peer", settings, ("auto:8",), "kv_router")
    head = ["", "req/s", "auto:8", "TTFT p50 / p90 / p99 s", "TPOT p50 / p90 / p99 ms"]
    head += [f"DynoSim {layout}" for layout in rows[0]["dynosim"]]
    cells = [
        [
            *(TITLES[row["profile"]], f"{row['rate']:g}", f"{percent(row['ours']['slo_attainment'], 2)} %"),
            *(spread(row["ours"]["ttft_s"], 2), spread(row["ours"]["tpot_ms"], 1)),
            *(f"{percent(run['slo_attainment'])} %" for run in row["dynosim"].values()),
        ]
        for row in rows
    ]  # fmt: skip
    return rows, table(head, cells)


def agreement(setup: Setup) -> Found:
    """Our simulator beside DynoSim when both schedule alike."""
    settings = (("70b-h200-tp4", 3.4), ("70b-h200-tp4", 6.8), ("8b-h200-tp1", 6.8), ("8b-h200-tp1", 10.2))
    alike = ("8M", "--placement", "round-robin", "--latency-model", "dynosim")
    rows = _both(setup, "agreement", settings, alike, "round_robin")
    cells = []
    for row in rows:
        runs = [*row["dynosim"].values(), row["ours"]]
        columns = (
            [f"{percent(run['slo_attainment'])} %" for run in runs],
            [spread(run["ttft_s"], 2) for run in runs],
            [spread(run["tpot_ms"], 1) for run in runs],
        )
        cells.append([TITLES[row["profile"]], f"{row['rate']:g}", *map(", ".join, columns)])
    who = "DynoSim, ours" if setup.peer else "ours"
    parts = (f"attainment: {who}", f"TTFT p50 / p90 / p99 s: {who}", f"TPOT p50 / p90 / p99 ms: {who}")
    return rows, table(["", "req/s", *parts], cells)


#: InternLM2.5-20B, TP 2, on A100s; docs/simulator.md says where each number is from
TROPICALS = (
    *("--no-prefix-caching", "--num-blocks", "7600", "--kv-bytes-per-token", "196608", "--kv-gb-per-s", "200"),
    *("--prefill-coefficients", "1.45e-9,1.01e-4,0.012", "--decode-coefficients", "6.1e-8,4.9e-5,0.0149"),
)
#: layout, placement, tokens a step, requests
SCHEDULERS = (
    ("auto:4", "slo", 4096, 800), ("auto:4", "slo", 2048, 800), ("auto:4", "slo", 4096, 3000),
    ("3P1D", "tropical", 2048, 800), ("3P1D", "tropical", 4096, 800), ("3P1D", "tropical", 4096, 3000),
    ("3P1D", "tropical-decode-first", 2048, 800), ("2P2D", "tropical", 2048, 800),
    ("4M", "vllm-chunked", 2048, 800), ("3P1D", "distserve", 2048, 800), ("2P2D", "distserve", 2048, 800),
)  # fmt: skip
TROPICALS_RATES = (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6)


def tropical(setup: Setup) -> Found:
    """Ours beside published schedulers in the setting of Tropical's paper."""
    named = {
        f"{layout} {placement} {tokens} {most}": setup.flags(
            layout, "--placement", placement, "--max-num-batched-tokens", str(tokens), *TROPICALS, most=most
        )
        for layout, placement, tokens, most in SCHEDULERS
    }
    rows = by_rate("tropical", named, TROPICALS_RATES, setup.jobs)
    add_held("tropical: up to which rate", named, rows, setup.jobs)
    held = {}  # ours, by tokens and requests
    for row, (layout, placement, tokens, most) in zip(rows, SCHEDULERS, strict=True):
        row |= {"layout": layout, "placement": placement, "step_tokens": tokens, "requests": most}
        if layout.startswith("auto"):
            held[tokens, most] = row["held"]
    cells = []
    for row in rows:
        ours, its = held[row["step_tokens"], row["requests"]], row["held"]
        row["ours_by_it"] = ours / its if ours and its and row["placement"] != "slo" else None
        name = f"`{row['layout']}`" if row["placement"] == "slo" else f"`{row['placement']}`, {row['layout']}"
        ratio = f"{row['ours_by_it']:.2f}" if row["ours_by_it"] else ""
        shares = map(percent, row["shares"])
        cells.append([name, f"{row['step_tokens']}", f"{row['requests']}", *shares, held_text(row), ratio])
    rates = [f"{rate:g}" for rate in TROPICALS_RATES]
    return rows, table(["req/s", "tokens a step", "requests", *rates, "90 % up to", "ours / it"], cells)


#: about what `auto:8` can hold
FULL_RATES = {"70b-h200-tp4": 9.0, "8b-h200-tp1": 22.0}
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
BALANCED = 4  # of the splits: with less prefill, and nobody else to help, hardly any prompt is in time
SPLITS = tuple(f"{num}P{8 - num}D" for num in range(7, 0, -1))
FIRST_REQUESTS = 3000


def static(setup: Setup) -> Found:
    """Eight instances whose work the SLOs decide beside every way to fix it."""
    ways: dict[str, tuple[str, ...]] = {"auto:8": ("auto:8",)}
    ways |= {f"{layout}, slo and slack": (layout, *SLACK) for layout in SPLITS}
    ways |= {f"{layout}, fewest tokens, fcfs": (layout,) for layout in ("8M", *SPLITS[:BALANCED])}
    rows: list[Row] = []
    texts, below = [], []
    for profile, full in FULL_RATES.items():
        rates = [full * load for load in LOADS]
        named = {name: setup.on_grid(profile, *way, most=FIRST_REQUESTS) for name, way in ways.items()}
        found = by_rate(f"static {profile}", named, rates, setup.jobs)
        add_held(f"static {profile}: up to which rate", named, found[:1], setup.jobs)
        cells = [
            [f"`{row['name']}`" if row is found[0] else row["name"], *map(percent, row["shares"])] for row in found
        ]
        held = f"`auto:8` holds 90 % up to {held_text(found[0])} req/s."
        texts.append(f"{TITLES[profile]}\n\n{table(['req/s', *(f'{rate:g}' for rate in rates)], cells)}\n\n{held}")
        below += [f"{TITLES[profile]} at {text}" for text in below_best(found)]
        rows += [{"profile": profile, **row} for row in found]
    verdict = f"below the best static layout: {'; '.join(below)}" if below else "nowhere below the best static layout"
    return rows, "\n\n".join([*texts, f"`auto:8` is {verdict}."])


def below_best(rows: Sequence[Row]) -> list[str]:
    """Returns: a text for each rate at which the first row has fewer requests in time than the best of the others."""
    first, *others = rows
    texts = []
    for n, (rate, share) in enumerate(zip(first["rates"], first["shares"], strict=True)):
        best = max(others, key=lambda row: row["shares"][n])
        if share < best["shares"][n]:
            shares = f"{percent(share, 2)} % beside {percent(best['shares'][n], 2)} %"
            texts.append(f"{rate:g} req/s, {shares} of {best['name']}")
    return texts


SPEED_HEAD = ("", "req/s", "blocks", "in time", "CPU s", "wall s", "x real time (CPU)", "GB")


def speed(setup: Setup) -> Found:
    """How fast eight instances are simulated, one simulation at a time."""
    settings = [
        (profile, layout, rate, block)
        for profile, layout, rate, blocks in (
            ("70b-h200-tp4", "8M", 3.4, (64,)), ("70b-h200-tp4", "8M", 6.8, (64, 512)),
            ("70b-h200-tp4", "6P2D", 3.4, (64,)), ("70b-h200-tp4", "6P2D", 6.8, (64, 512)),
            ("8b-h200-tp1", "8M", 10.2, (64,)),
        )
        for block in blocks
    ]  # fmt: skip
    return _measure(setup, settings)


def large(setup: Setup) -> Found:
    """How fast 10,000 instances are, which serve the trace 84 times over."""
    return _measure(setup, [("70b-h200-tp4", "10000M", 8500.0, 512)], "--repeat", "84")


def _measure(setup: Setup, settings: Sequence[tuple[str, str, float, int]], *more: str) -> Found:
    calls = [
        partial(
            simulate,
            [*setup.on_grid(profile, layout, *SLACK, *more), "--rate", str(rate), "--block-size", str(block)],
        )
        for profile, layout, rate, block in settings
    ]
    rows, cells = [], []
    for (profile, layout, rate, block), run in zip(settings, run_each(calls), strict=True):
        rows.append({"profile": profile, "layout": layout, "rate": rate, "block_size": block, **run})
        speed = run["span_s"] / run["cpu_s"]
        cells.append([
            *(f"{TITLES[profile]}, {layout}, {run['offered']} requests", f"{rate:g}", f"{block}"),
            *(f"{percent(run['slo_attainment'], 2)} %", f"{run['cpu_s']:.1f}", f"{run['wall_s']:.1f}"),
            *(f"{speed:.0f}" if speed >= 10 else f"{speed:.2f}", f"{run['most_bytes'] / 1e9:.2f}"),
        ])  # fmt: skip
    return rows, table(SPEED_HEAD, cells)


PARTS = {
    "peer": peer, "agreement": agreement, "tropical": tropical, "static": static, "speed": speed, "large": large,
}  # fmt: skip
