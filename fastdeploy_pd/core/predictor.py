"""How long a prefill or a decode step takes on an instance, by two formulas fitted to measured times.

A prompt of n tokens takes T(n) = a n^2 + b n + c seconds; what is left of one whose first m tokens have their KV (computed in earlier
chunks, or found in the prefix cache) takes T(n) - T(m). A step that generates one token for each of B sequences with K tokens of KV
between them takes D(B, K) = d K + e B + f. A step that does both takes the sum.
Source: T is DistServe's and Tropical's; Tropical's D has no term in B, which halves the error on measured grids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from fastdeploy_pd.errors import ConfigError

MANY_TOKENS = 2**31  # where a token costs nothing


@dataclass(frozen=True, slots=True)
class Predictor:
    """The coefficients of T and D, in seconds."""

    prefill: tuple[float, float, float]  #: a, b, c
    decode: tuple[float, float, float]  #: d (KV token), e (sequence), f

    @property
    def knows_prefill(self) -> bool:
        """Whether T was measured; if not, all of its coefficients are 0."""
        return any(self.prefill)

    @property
    def knows_decode(self) -> bool:
        """Whether D was measured."""
        return any(self.decode)

    def prefill_s(self, num_tokens: int, num_computed: int = 0) -> float:
        """Returns: seconds that the tokens from num_computed to num_tokens of a prompt take, alone and in one piece."""
        a, b, c = self.prefill
        seconds = (a * (num_tokens + num_computed) + b) * (num_tokens - num_computed) + (c if c > 0 else 0.0)
        return seconds if seconds > 0 else 0.0

    def tokens_within(self, seconds: float, num_computed: int) -> int:
        """Returns: how many tokens of a prompt, after its first num_computed, can be computed in so long; 0 or more."""
        a, b, c = self.prefill
        b, left_s = b + 2 * a * num_computed, seconds - max(c, 0.0)
        if left_s <= 0:
            return 0
        per_token_s = (b + math.sqrt(max(0.0, b * b + 4 * a * left_s))) / 2
        return int(left_s / per_token_s) if per_token_s > 0 else MANY_TOKENS

    def decode_s(self, num_sequences: int, kv_tokens: int) -> float:
        """Returns: seconds of a step that computes one token for each of num_sequences, kv_tokens being their tokens in sum."""
        d, e, f = self.decode
        return max(0.0, d * kv_tokens + e * num_sequences + f)


def fit(
    prefills: Sequence[tuple[int, float]],
    decodes: Sequence[tuple[int, int, float]],
    chunks: Sequence[tuple[int, int, float]] = (),
) -> Predictor:
    """Fit both formulas, each sample's relative error counting alike; no coefficient is negative.

    Args:
        prefills: (tokens, seconds) of whole prompts, of at least three lengths (with the chunks').
        decodes: (sequences, KV tokens in sum, seconds), at least three that are not proportional to each other.
        chunks: (tokens, tokens computed before, seconds) of prompts' later parts.
    Raises: ConfigError: the samples don't determine the coefficients.
    """
    parts = [*((n, 0, s) for n, s in prefills), *chunks]
    prefill = _least_squares([((float(n * n - m * m), float(n - m), 1.0), s) for n, m, s in parts], "prefill")
    decode = _least_squares([((float(kv), float(num), 1.0), s) for num, kv, s in decodes], "decode")
    return Predictor(prefill, decode)


def _least_squares(
    samples: Sequence[tuple[tuple[float, float, float], float]], name: str
) -> tuple[float, float, float]:
    """Returns: the three coefficients >= 0 that minimise the sum of squared relative errors (normal equations, scaled columns)."""
    scale = [max((abs(x[i]) for x, _ in samples), default=0.0) or 1.0 for i in range(3)]
    rows = [[x[i] / scale[i] / y for i in range(3)] for x, y in samples if y > 0]
    if _solve(rows, (0, 1, 2)) is None:
        raise ConfigError(f"{len(samples)} {name} samples don't determine three coefficients")
    best, least = (0.0, 0.0, 0.0), math.inf
    # At most three of them: the best of all choices of which are zero is found by looking at each.
    for used in (u for size in (3, 2, 1) for u in combinations(range(3), size)):
        found = _solve(rows, used)
        if found is None or min(found) < 0:
            continue
        error = sum((sum(row[i] * v for i, v in zip(used, found, strict=True)) - 1) ** 2 for row in rows)
        if error < least:
            by_index = dict(zip(used, found, strict=True))
            a, b, c = (by_index.get(i, 0.0) / scale[i] for i in range(3))
            best, least = (a, b, c), error
    return best


def _solve(rows: Sequence[Sequence[float]], used: Sequence[int]) -> list[float] | None:
    """Returns: what the columns used are multiplied with so that each row comes closest to 1; None if that is not determined."""
    size = range(len(used))
    matrix = [[sum(x[i] * x[j] for x in rows) for j in used] + [sum(x[i] for x in rows)] for i in used]
    largest = max(abs(v) for row in matrix for v in row)
    for i in size:
        pivot = max(range(i, len(used)), key=lambda r: abs(matrix[r][i]))
        if abs(matrix[pivot][i]) <= 1e-12 * largest:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for r in size:
            if r != i:
                factor = matrix[r][i] / matrix[i][i]
                matrix[r] = [u - factor * v for u, v in zip(matrix[r], matrix[i], strict=True)]
    return [matrix[i][-1] / matrix[i][i] for i in size]
