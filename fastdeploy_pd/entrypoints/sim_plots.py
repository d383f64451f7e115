"""`fastdeploy-pd plot`: pictures of what `simulate --json` has reported, one line a report.

Lines carry their names at their ends; colours are Okabe and Ito's, which colour-blind readers tell apart, markers tell them apart in grey.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.machine import why_not_written_below
from fastdeploy_pd.sim.fields import field, json_object, number, reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
LINE_POINTS = 12  # between names below each other
LATENCIES = (("ttft_s", "TTFT (s)"), ("tpot_ms", "TPOT (ms)"), ("e2e_s", "job completion time (s)"))


BEHIND: Any = {
    "boxstyle": "square,pad=0.1",
    "fc": "white",
    "ec": "none",
    "alpha": 0.8,
}  # names, so that they can be read


@dataclass(frozen=True, slots=True)
class Series:
    """One report: a run a rate."""

    name: str
    runs: list[dict[str, Any]]  #: by rising rate
    colour: str
    marker: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `plot`."""
    add = parser.add_argument
    add(
        "reports",
        nargs="+",
        type=Path,
        metavar="[NAME=]REPORT.json",
        help="of `simulate --json`, --per-request for CDFs",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where NAME.png and NAME.svg go")
    add("--goal", type=float, default=0.9, help="the attainment that is marked (default 0.9)")
    add("--linear-time", action="store_true", help="latencies on a linear axis, not a logarithmic one")


def run(args: argparse.Namespace) -> int:
    """Returns: exit status. Raises: ConfigError: a report cannot be read, nothing can be written, or matplotlib is not installed."""
    check_out(args.out)
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "plot needs matplotlib: pip install 'fastdeploy-pd[plot]', or pip install matplotlib"
        ) from error
    if not 0 < args.goal <= 1:
        raise ConfigError(f"--goal is {args.goal}; it must be above 0 and at most 1")
    matplotlib.use("Agg")
    series = load(args.reports)
    style: Any = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "axes.titlesize": 11, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "lines.linewidth": 1.8,
        "lines.markersize": 5, "svg.hashsalt": "fastdeploy-pd", "figure.dpi": 100, "savefig.dpi": 160, "axes.axisbelow": True,
    }  # fmt: skip
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(style):
            for name, figure in pictures(series, args.goal, args.linear_time):
                for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                    figure.savefig(args.out / f"{name}.{kind}", metadata=metadata)
                sys.stdout.write(f"{args.out / name}.png, .svg\n")
    except OSError as error:
        raise ConfigError(
            f"--out: {error.filename or args.out} cannot be written: {error.strerror or error}"
        ) from error
    return 0


def check_out(folder: Path) -> None:
    """Raises: ConfigError: no picture can be written there, nor a directory made that is not there yet."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if why := why_not_written_below(there):
        raise ConfigError(
            f"--out {folder} cannot be written: {why}; it must be a directory that may be written to, or can be made"
        )


def load(paths: Sequence[Path]) -> list[Series]:
    """Read reports, each perhaps after a name and "=".

    Returns: in the order given; without a name they are called by their layout and placement. Where names repeat, their files' stand behind.
    Raises: ConfigError: one is no report, or a file is given twice under one name.
    """
    found: list[Series] = []
    files: list[Path] = []
    looks = cycle(zip(COLOURS, MARKERS, strict=True))
    for path, (colour, marker) in zip(paths, looks, strict=False):
        name, _, file = str(path).rpartition("=")
        try:
            text = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} {reason(error)}") from error
        try:
            report = json_object(text)
            flags, runs = _object(report, "flags"), report.get("runs", [report])
            if not isinstance(runs, list) or not runs:
                raise ValueError("has no runs")
            for run in runs:
                _check(run)
            name = name or f"{field(flags, 'layout')} {field(flags, 'placement')}"
        except ValueError as error:
            raise ConfigError(f"{file} is not a report of `simulate --json`: it {error}") from error
        found.append(Series(name, sorted(runs, key=lambda r: r["rate"] or 0.0), colour, marker))
        files.append(Path(file))
    return _distinct(found, files)


def _distinct(series: Sequence[Series], files: Sequence[Path]) -> list[Series]:
    """Returns: the same with names that tell them apart, in which TeX sees no formula. Raises: ConfigError: there are none."""
    names = [s.name for s in series]
    for tell in (lambda file: file.name, lambda file: str(Path(*file.parts[-2:])), str):
        often = Counter(names)
        names = [f"{s.name} ({tell(f)})" if often[n] > 1 else n for s, f, n in zip(series, files, names, strict=True)]
    for name, file in zip(names, files, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"{file} is given twice; each must have a name of its own then, as in NAME={file}")
    return [replace(s, name=n.replace("$", r"\$")) for s, n in zip(series, names, strict=True)]


def _object(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Raises: ValueError: there is no object of that name."""
    value = field(found, name)
    if not isinstance(value, dict):
        raise ValueError(f"has a {name} that is no JSON object")
    return value


def _check(run: Any) -> None:
    """Raises: ValueError: something is missing that is drawn, or is no number."""
    if not isinstance(run, dict):
        raise ValueError("has a run that is no JSON object")
    for name in ("slo_attainment", "ttft_attainment", "tpot_attainment"):
        number(run, name)
    rows = run.get("requests", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("has requests that are no JSON objects")
    drawn = [(run, ("rate",)), (_object(run, "queue_s"), ("p50", "p90"))]
    for found, names in (*drawn, *((row, [key for key, _ in LATENCIES]) for row in rows)):
        for name in names:
            if name not in found:
                raise ValueError(f"has no {name}")
            if found[name] is not None:  # nobody came so far
                if isinstance(found[name], str):
                    raise ValueError(f"has {name} {found[name]!r}; it must be a number")
                number(found, name)


def pictures(series: Sequence[Series], goal: float, is_linear: bool) -> Iterator[tuple[str, Figure]]:
    """Yields: each picture's name and the picture; those that need several rates, or rows a request, only where these are."""
    yield "attainment", attainment(series, goal)
    yield "queueing", queueing(series)
    for rate in sorted({_rate(r) for s in series for r in s.runs}):
        yield f"pareto_{rate:g}", pareto(series, rate, goal)
        if any("requests" in r for _, r in _at_rate(series, rate)):
            yield f"latency_cdf_{rate:g}", latency_cdf(series, rate, is_linear)


def attainment(series: Sequence[Series], goal: float) -> Figure:
    """Returns: share of requests that meet their SLO, by rate."""
    figure, axes = _figure(1)
    left = axes[0]
    ends = []
    for s in series:
        rates, shares = [r["rate"] for r in s.runs], [100 * r["slo_attainment"] for r in s.runs]
        left.plot(rates, shares, color=s.colour, marker=s.marker)
        ends.append((rates[-1], shares[-1], s))
    left.axhline(100 * goal, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    left.annotate(
        f"goal {100 * goal:g} %", (0, 100 * goal), xycoords=("axes fraction", "data"), xytext=(4, -11),
        textcoords="offset points", color=GREY, fontsize=9,
    )  # fmt: skip
    left.set(ylim=(0, 103), xlabel="offered rate (requests/s)", title="Requests that meet TTFT and TPOT (%)")
    _name_ends(left, ends)
    return figure


def queueing(series: Sequence[Series]) -> Figure:
    """Returns: how long prompts wait for their first step, by rate."""
    figure, axes = _figure(2)
    for ax, (key, title) in zip(axes, (("p50", "median"), ("p90", "90th percentile")), strict=True):
        ends = []
        for s in series:
            points = [(r["rate"], r["queue_s"][key]) for r in s.runs if r["queue_s"][key] is not None]
            if points:
                ax.plot(*zip(*points, strict=True), color=s.colour, marker=s.marker)
                ends.append((*points[-1], s))
        ax.set(xlabel="offered rate (requests/s)", title=f"Arrival to the prompt's first step, {title} (s)")
        ax.set_ylim(bottom=0)
        _name_ends(ax, ends)
    return figure


def pareto(series: Sequence[Series], rate: float, goal: float) -> Figure:
    """Returns: TTFT attainment against TPOT attainment at a rate; nobody is better in both than those on the front."""
    figure, axes = _figure(1)
    ax = axes[0]
    points = [(100 * r["ttft_attainment"], 100 * r["tpot_attainment"], s) for s, r in _at_rate(series, rate)]
    front = sorted(
        (x, y) for x, y, _ in points if not any(u >= x and v >= y and (u, v) != (x, y) for u, v, _ in points)
    )
    stairs = [(0.0, front[0][1]), *front, (front[-1][0], 0.0)]
    ax.step(*zip(*stairs, strict=True), where="pre", color="#DDDDDD", linewidth=5, zorder=0)
    for x, y, s in points:
        ax.plot(x, y, color=s.colour, marker=s.marker, markersize=8)
    for line in (ax.axhline, ax.axvline):
        line(100 * goal, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    title = f"Requests that meet TPOT (%), at {rate:g} requests/s; grey: the front"
    ax.set(xlabel="requests that meet TTFT (%)", title=title, xlim=(0, 104), ylim=(0, 104))
    _name_ends(ax, points)
    return figure


def _at_rate(series: Sequence[Series], rate: float) -> list[tuple[Series, dict[str, Any]]]:
    return [(s, r) for s in series for r in s.runs if _rate(r) == rate]


def _rate(run: dict[str, Any]) -> float:
    return float(f"{run['rate'] or 0.0:.3g}")


def latency_cdf(series: Sequence[Series], rate: float, is_linear: bool) -> Figure:
    """Returns: how TTFT, TPOT and job completion time are distributed at a rate."""
    from matplotlib import ticker

    figure, axes = _figure(3)
    for ax, (key, title) in zip(axes, LATENCIES, strict=True):
        drawn = []
        for s, run in _at_rate(series, rate):
            values = sorted(row[key] for row in run.get("requests", ()) if row[key] is not None)
            if values:
                shares = [100 * (n + 1) / len(values) for n in range(len(values))]
                ax.step(values, shares, where="post", color=s.colour)
                drawn.append((values, s))
        _name_curves(ax, drawn)
        ax.set(ylim=(0, 101), xlabel=title)
        if not is_linear:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            if drawn and max(values[-1] for values, _ in drawn) < 10 * min(values[0] for values, _ in drawn):
                ax.xaxis.set_major_locator(ticker.MaxNLocator(4))  # powers of ten are too far apart
                ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes[0].set_title(f"Share of requests below (%), at {rate:g} requests/s")
    return figure


def _figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot

    pyplot.close("all")
    width = 6.4 if num_panels == 1 else 4.6 * num_panels
    figure, axes = pyplot.subplots(1, num_panels, figsize=(width, 3.9), squeeze=False, layout="constrained")
    cast("Any", figure.get_layout_engine()).set(wspace=0.05)  # names end at the next panel's numbers without it
    for ax in axes[0]:
        ax.grid(axis="y", color="#EEEEEE")
    return figure, list(axes[0])


def _name_ends(ax: Axes, ends: Sequence[tuple[float, float, Series]]) -> None:
    """Write each line's name beside its last point; names that would overlap stand below each other."""
    ax.margins(x=0.04)
    figure = cast("Figure", ax.figure)
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    lowest, bottom = math.inf, ax.bbox.y0
    number_below = len(ends)
    for x, y, s in sorted(ends, key=lambda e: -e[1]):
        number_below -= 1
        at = float(ax.transData.transform((x, y))[1])
        lowest = max(min(at, lowest - LINE_POINTS / scale), bottom + number_below * LINE_POINTS / scale)
        shift = (lowest - at) * scale
        ax.annotate(
            s.name, (x, y), xytext=(8, shift), textcoords="offset points", va="center", color=s.colour, fontsize=9,
            annotation_clip=False, bbox=BEHIND,
            arrowprops={"arrowstyle": "-", "color": s.colour, "linewidth": 0.6} if abs(shift) > 4 else None,
        )  # fmt: skip


def _name_curves(ax: Axes, drawn: Sequence[tuple[list[float], Series]]) -> None:
    """Write each distribution's name beside a marker on its curve, each at another height."""
    for n, (values, s) in enumerate(sorted(drawn, key=lambda d: d[0][len(d[0]) // 2])):
        share = 0.88 - 0.66 * n / max(1, len(drawn) - 1)
        at = (values[int(share * (len(values) - 1))], 100 * share)
        ax.plot(*at, color=s.colour, marker=s.marker)
        ax.annotate(
            s.name, at, xytext=(7, 0), textcoords="offset points", va="center", color=s.colour, fontsize=9, bbox=BEHIND
        )
