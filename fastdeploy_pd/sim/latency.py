"""How long a step takes: measured grids, interpolated, or formulas fitted to them.

A prompt of n tokens alone takes T(n); a chunk of it takes what T grows by, and the part of T that no token explains is paid once a
step. Generating one token for each of B sequences with K tokens of KV between them takes D(B, K). A step that does both takes the sum,
which charges its reading of the weights twice and so is a little too long.
Source: T quadratic and D linear as in DistServe and Tropical; the batch term of D halves the error on measured grids.
"""

from __future__ import annotations

import csv
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from fastdeploy_pd.core.predictor import Predictor, fit
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim.fields import json_object, number, numbers, reason, whole

MODELS = ("grid", "formula", "dynosim")
MOST_S = 1e6  #: a coefficient

#: profile -> (tokens that an instance's pool holds, KV bytes a token)
KNOWN_POOLS = {"70b-h200-tp4": (64 * 17_000, 327_680), "8b-h200-tp1": (64 * 12_800, 131_072)}


class Curve:
    """A piecewise linear function; its first and last pieces go on for ever."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        """
        Args:
            points: [>= 2] (x, y), x rising.
        """
        self.xs = [x for x, _ in points]
        self._ys = [y for _, y in points]
        self._slopes = [(d - b) / (c - a) for (a, b), (c, d) in pairwise(points)]

    def __call__(self, x: float) -> float:
        """Returns: its value at x."""
        index = bisect_right(self.xs, x, 1, len(self.xs) - 1) - 1
        return self._ys[index] + (x - self.xs[index]) * self._slopes[index]

    def sums(self, total: float, x: float, step: float, count: int) -> list[float]:
        """Returns: [count] `total` plus the values at x, x + step, ..., in thousandths, added one by one; step is positive."""
        found, last = [], len(self.xs) - 2
        index = bisect_right(self.xs, x, 1, last + 1) - 1
        x0, y0, slope, limit = self.xs[index], self._ys[index], self._slopes[index], self.xs[index + 1]
        for _ in range(count):
            if x >= limit and index < last:
                index = bisect_right(self.xs, x, 1, last + 1) - 1
                x0, y0, slope, limit = self.xs[index], self._ys[index], self._slopes[index], self.xs[index + 1]
            total += (y0 + (x - x0) * slope) / 1e3
            found.append(total)
            x += step
        return found


@dataclass
class Latency:
    """The time of steps on one kind of instance."""

    prefill_ms: Callable[[float], float]  #: T(n)
    make_decode: Callable[[int], Curve]  #: number of sequences -> milliseconds by their KV tokens
    is_like_dynosim: bool = (
        False  #: a chunk costs T(its tokens), whatever it follows; a prompt's last chunk decodes too
    )
    _decodes: dict[int, Curve] = field(default_factory=dict)

    def decode_curve(self, num_sequences: int) -> Curve:
        """Returns: D of so many sequences: milliseconds by their KV tokens in sum."""
        curve = self._decodes.get(num_sequences)
        if curve is None:
            curve = self._decodes[num_sequences] = self.make_decode(num_sequences)
        return curve

    def alone_s(self, num_tokens: int) -> float:
        """Returns: seconds of a prompt's prefill in an empty cluster."""
        return self.prefill_ms(num_tokens) / 1e3

    def predictor(self) -> Predictor:
        """Returns: the formulas that fit these times best; what an instance would have learnt."""
        prefills = [(n, self.alone_s(n)) for n in (64 << i for i in range(12))]
        decodes = [
            (num, num * context, self.decode_curve(num)(num * context) / 1e3)
            for num in (1, 4, 16, 64, 128)
            for context in (256, 1024, 4096, 16384, 65536)
            if num * context <= 2_000_000
        ]
        return fit(prefills, decodes)

    def step_s(self, chunks: Sequence[tuple[int, int, bool]], num_decodes: int, kv_tokens: int) -> float:
        """Seconds of one step.

        Args:
            chunks: of prompts: (start, stop, whether it is the prompt's last).
            num_decodes: sequences that compute one token.
            kv_tokens: these sequences' tokens in sum.
        """
        milliseconds = 0.0
        if chunks and self.is_like_dynosim:
            milliseconds = self.prefill_ms(sum(stop - start for start, stop, _ in chunks))
            num_decodes += sum(is_last for _, _, is_last in chunks)
            kv_tokens += sum(stop for _, stop, is_last in chunks if is_last)
        elif chunks:
            fixed = self.prefill_ms(0)
            milliseconds = max(fixed, 0.0) + sum(
                [self.prefill_ms(stop) - (self.prefill_ms(start) if start else fixed) for start, stop, _ in chunks]
            )
        if num_decodes:
            milliseconds += self.decode_curve(num_decodes)(kv_tokens)
        return milliseconds / 1e3


def read(directory: Path, profile: str, model: str = "grid") -> Latency:
    """Read a profile: NAME_prefill.csv (isl,prefill_ms), NAME_decode.csv (batch,context,itl_ms), and for formulas a line of *fits.txt.

    Args:
        profile: words joined by "-", all of which stand in NAME, as in 70b-h200-tp4.
        model: grid; formula: a n^2 + b n + c and KV tokens, sequences and 1; dynosim: what DynoSim makes of the same grids.
    Raises: ConfigError: no profile or several fit the words, or a file is wrong.
    """
    names = sorted(p.name.removesuffix("_prefill.csv") for p in directory.glob("*_prefill.csv"))
    words = set(profile.lower().split("-"))
    found = [n for n in names if words <= set(re.split("[-_]", n.lower()))]
    if len(found) != 1:
        raise ConfigError(
            f"--profile {profile} fits {len(found)} of the profiles in {directory}; there are {', '.join(names) or 'none'}"
        )
    if model == "formula":
        quadratic, linear = _read_fits(directory, found[0])
        return _formula(quadratic, linear)
    prefill = _read_grid(directory / f"{found[0]}_prefill.csv", ("isl", "prefill_ms"))
    curve = _curve([(n, ms) for n, ms in prefill], directory / f"{found[0]}_prefill.csv")
    if model == "dynosim":
        _, linear = _read_fits(directory, found[0])
        return Latency(curve, lambda num: _line(linear, num), is_like_dynosim=True)
    rows: dict[int, list[tuple[float, float]]] = {}
    path = directory / f"{found[0]}_decode.csv"
    for batch, context, ms in _read_grid(path, ("batch", "context", "itl_ms")):
        rows.setdefault(int(batch), []).append((context, ms))
    if len(rows) < 2:
        raise ConfigError(f"{path} has {len(rows)} batch sizes; a grid needs 2")
    batches = sorted((batch, _curve(points, path)) for batch, points in rows.items())
    return Latency(curve, lambda num: _between(batches, num))


def read_profile(path: Path) -> Latency:
    """Read what `fastdeploy-pd profile` or `calibrate` has written: JSON with "prefill" [a, b, c] and "decode" [d, e, f], in seconds,
    either at the top or in "predictor".

    Raises: ConfigError: it cannot be read, or has no such fields.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--latency {path} {reason(error)}") from error
    try:
        found = json_object(text)
        inner = found.get("predictor")
        prefill, decode = (numbers(inner if isinstance(inner, dict) else found, name) for name in ("prefill", "decode"))
    except ValueError as error:
        raise ConfigError(
            f'--latency {path} is not a profile, JSON with "prefill": [a, b, c] and "decode": [d, e, f]: it {error}'
        ) from error
    return from_coefficients(prefill, decode, f"--latency {path}")


def pool_of(path: Path | None, profile: str) -> tuple[int, int] | None:
    """Returns: (tokens that an instance's pool holds, KV bytes a token) of a known profile, or as a file of `fastdeploy-pd profile` says;
    None: not known.

    Raises: ConfigError: the file says it wrongly.
    """
    if path is None or not path.is_file():
        return KNOWN_POOLS.get(profile.lower())
    found = json_object(path.read_text())
    if not found.get("num_blocks"):
        return None
    try:
        num_blocks, block_size = whole(found, "num_blocks", 1), whole(found, "block_size", 1)
        return num_blocks * block_size, whole(found, "kv_bytes_per_token", 1)
    except ValueError as error:
        raise ConfigError(f"--latency {path} {error}") from error


def from_coefficients(prefill: Sequence[float], decode: Sequence[float], where: str = "coefficients") -> Latency:
    """Make step times of T(n) = a n^2 + b n + c and D(B, K) = d K + e B + f, in seconds; see `core.predictor`.

    Args:
        prefill, decode: [3] a, b, c and d, e, f.
        where: what an error is about.
    Raises: ConfigError: these are not three finite numbers of sensible size each, or a step could take no time.
    """
    for name, values in (("prefill", prefill), ("decode", decode)):
        if len(values) != 3 or not all(abs(x) <= MOST_S for x in values):
            raise ConfigError(
                f"{where}: {name} is {list(values)}; it must be three finite numbers of seconds, {MOST_S:g} at most"
            )
    (a, b, c), (d, e, f) = ([1e3 * x for x in values] for values in (prefill, decode))
    if a < 0 or a + b < 0 or a + b + max(c, 0.0) <= 0 or d < 0 or e < 0 or d + e + f <= 0:
        raise ConfigError(f"{where}: with prefill {list(prefill)} and decode {list(decode)} a step takes no time")
    return _formula((a, b, c), (d, e, f))


def _formula(prefill: tuple[float, float, float], decode: tuple[float, float, float]) -> Latency:
    a, b, c = prefill
    return Latency(lambda n: (a * n + b) * n + c, lambda num: _line(decode, num))


def _line(coefficients: tuple[float, float, float], num_sequences: int) -> Curve:
    by_token, by_sequence, fixed = coefficients
    start = fixed + by_sequence * num_sequences
    return Curve([(0, start), (1e6, start + by_token * 1e6)])


def _between(batches: Sequence[tuple[int, Curve]], num_sequences: int) -> Curve:
    """Returns: the curve of so many sequences, bilinear between the grid's batch sizes and mean contexts."""
    index = min(max(1, bisect_right(batches, num_sequences, key=lambda b: b[0])), len(batches) - 1)
    (low, below), (high, above) = batches[index - 1], batches[index]
    share = (num_sequences - low) / (high - low)
    contexts = sorted({*below.xs, *above.xs})
    return Curve([(x * num_sequences, below(x) * (1 - share) + above(x) * share) for x in contexts])


def _curve(points: Sequence[tuple[float, float]], path: Path) -> Curve:
    """Raises: ConfigError: there are fewer than two points, or two at one place."""
    places = [x for x, _ in points]
    if len(set(places)) < max(2, len(places)):
        raise ConfigError(
            f"{path} has points at {', '.join(f'{x:g}' for x in places)}; two or more, all different, are needed"
        )
    return Curve(points)


def _read_grid(path: Path, columns: Sequence[str]) -> list[tuple[float, ...]]:
    """Returns: the rows in order, the last column above 0. Raises: ConfigError: there is no such file, or it is no such grid."""
    try:
        with path.open() as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} {reason(error)}") from error
    rows = []
    for place, line in enumerate(lines, 2):
        try:
            rows.append(tuple(number(line, c) for c in columns))
            if min(rows[-1]) < 0 or not rows[-1][-1] > 0:
                raise ValueError(f"has {rows[-1]}; it must not be negative, and {columns[-1]} above 0")
        except ValueError as error:
            raise ConfigError(f"{path} is not a grid of {', '.join(columns)}: line {place} {error}") from error
    rows.sort()
    if len(rows) < 2:
        raise ConfigError(f"{path} has {len(rows)} rows; a grid needs 2")
    return rows


def _read_fits(directory: Path, name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Returns: (a, b, c) of the prefill and (KV token, sequence, 1) of the decode, in milliseconds.

    Raises: ConfigError: no line of the directory's *fits.txt is about this profile.
    """
    number = r"(\[[^\]]*\])"
    for path in sorted(directory.glob("*fits.txt")):
        for line in path.read_text().splitlines():
            match = re.search(rf" quad {number}.* lin\(kvtok,bs,1\) {number}", line)
            if match and name.endswith(line.split()[0]):
                try:
                    (a, b, c), (d, e, f) = (map(float, json.loads(text)) for text in match.groups())
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"{path}: {line!r} must have three numbers behind quad and lin") from error
                return (a, b, c), (d, e, f)
    raise ConfigError(f"{directory} has no *fits.txt with a line about {name}; --latency-model grid needs none")
