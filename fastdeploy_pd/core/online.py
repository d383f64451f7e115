"""Refines a predictor by the steps that an engine runs.

The coefficients of T and of D are estimated by recursive least squares on relative errors. Old steps are forgotten only where new ones say
something about the same: while an instance runs batches of one size, what it knew of others stays as it was. Stalls don't count
for much, because an observation far from the prediction is taken for one at a bounded distance; a machine that has become twice as
slow is believed after some tens of steps.
Source: forgetting as in R. Kulhavy, Restricted exponential forgetting in real-time identification, Automatica 23 (1987).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.core.predictor import Predictor

FORGETTING = 0.98  #: of what is known in an observation's direction, what stays
FARTHEST = 1.5  #: ratio of observed and predicted; what is further away counts as this far
MOST_FAR = 5  #: so many in a row on one side are; with the next one it is the machine that has changed
LEAST_STEPS = 8  #: observations that a formula known from nothing else needs before it is used
SHORTEST_S, LONGEST_S = 1e-6, 1e3  #: of a step that is believed
#: before anything is known: a size at which each term may take as long as SPREAD times the first step, alone
PREFILL_SIZES = (8192.0**2, 256.0, 1.0)
DECODE_SIZES = (65_536.0, 16.0, 1.0)
SPREAD = 3.0
SPREAD_OF_PROFILE = 0.3
SPREAD_OF_CHANGE = 1.0
NOISE = 0.05  #: of steps' times, relative: how much SPREAD weighs against it
LEAST_DOUBT = 1e-9  #: variance of a prediction, relative; less is lost to rounding
Triple = tuple[float, float, float]


@dataclass(slots=True)  # not frozen: there is one a step
class Observation:
    """How far a step was from its prediction."""

    kind: str  #: what most of it was: "prefill" or "decode"
    relative_error: float  #: absolute difference / duration of the step


class Formula:
    """Three coefficients >= 0 of a sum of three terms, and how sure they are."""

    __slots__ = ("_covariance", "_free", "_num_far", "_side", "_sizes", "_spread", "coefficients", "num_observed")

    def __init__(self, sizes: Triple, start: Triple | None) -> None:
        """
        Args:
            sizes: see PREFILL_SIZES.
            start: coefficients measured before.
        """
        self.coefficients: Triple = start or (0.0, 0.0, 0.0)
        self._free = self.coefficients  #: what they would be if they could be negative
        self.num_observed = LEAST_STEPS if start else 0
        self._sizes = sizes
        self._spread = SPREAD_OF_PROFILE if start else SPREAD
        self._side = self._num_far = (
            0  #: on which side of the prediction the last steps were too far away, and how many
        )
        self._covariance: tuple[float, ...] | None = None  #: upper triangle, row by row

    @property
    def is_known(self) -> bool:
        """Whether its predictions are worth something."""
        return self.num_observed >= LEAST_STEPS

    def value(self, terms: Triple) -> float:
        """Returns: seconds, >= 0."""
        (a, b, c), (x, y, z) = self.coefficients, terms
        return a * x + b * y + c * z

    def observe(self, terms: Triple, other_s: float, step_s: float) -> None:
        """Learn from a step.

        Args:
            terms: what the coefficients are multiplied with; not all zero.
            other_s: predicted seconds of what else the step did.
            step_s: what it took.
        """
        predicted_s = max(self.value(terms) + other_s, SHORTEST_S)
        if self.is_known:
            side = (step_s > predicted_s * FARTHEST) - (step_s < predicted_s / FARTHEST)
            self._num_far = self._num_far + 1 if side and side == self._side else abs(side)
            self._side = side
            if self._num_far <= MOST_FAR:
                step_s = min(max(step_s, predicted_s / FARTHEST), predicted_s * FARTHEST)
            else:  # what it was sure of does not hold any more
                self._covariance, self._spread, self._num_far = None, SPREAD_OF_CHANGE, 0
        scale_s = max(step_s, predicted_s)
        x, y, z = terms[0] / scale_s, terms[1] / scale_s, terms[2] / scale_s
        p = self._covariance or self._begin(terms, step_s)
        for _ in range(2):
            gx, gy, gz = p[0] * x + p[1] * y + p[2] * z, p[1] * x + p[3] * y + p[4] * z, p[2] * x + p[4] * y + p[5] * z
            doubt = gx * x + gy * y + gz * z
            if LEAST_DOUBT < doubt < 1 / LEAST_DOUBT:
                break
            p = self._begin(terms, step_s)  # rounding has eaten it up
        a, b, c = self._free
        error = max(step_s - other_s, 0.0) / scale_s - (a * x + b * y + c * z)
        gain = error / (1 + doubt)
        shrink = (FORGETTING * doubt - (1 - FORGETTING)) / (FORGETTING * doubt * (1 + doubt))
        p = self._covariance = (
            p[0] - shrink * gx * gx, p[1] - shrink * gx * gy, p[2] - shrink * gx * gz,
            p[3] - shrink * gy * gy, p[4] - shrink * gy * gz, p[5] - shrink * gz * gz,
        )  # fmt: skip
        a, b, c = a + gx * gain, b + gy * gain, c + gz * gain
        self._free = (a, b, c)
        self.coefficients = (a, b, c) if a >= 0 and b >= 0 and c >= 0 else _nonnegative(self._free, p)
        self.num_observed += 1

    def _begin(self, terms: Triple, step_s: float) -> tuple[float, ...]:
        """Returns: the covariance of who has seen no step."""
        self._free = self.coefficients
        sizes = zip(terms, self._sizes, strict=True)
        x, y, z = ((self._spread / NOISE * step_s / max(term, size)) ** 2 for term, size in sizes)
        return (x, 0.0, 0.0, y, 0.0, z)


def _nonnegative(values: Triple, covariance: tuple[float, ...]) -> Triple:
    """Returns: the likeliest values that are not negative, for normally distributed ones of which one at least is negative.

    Some are set to 0 and take the others along. It is the right choice of them where the rest is not negative and each was held up by
    its bound (Karush, Kuhn and Tucker).
    """
    p, q, r, s, u, v = covariance
    rows = ((p, q, r), (q, s, u), (r, u, v))
    for i in range(3):
        if values[i] < 0 < rows[i][i]:
            pull = values[i] / rows[i][i]
            x, y, z = (0.0 if k == i else values[k] - pull * rows[k][i] for k in range(3))
            if x >= 0 and y >= 0 and z >= 0:
                return x, y, z
    is_zero_best = True  # if nothing is gained by raising any one from 0
    for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        determinant = rows[i][i] * rows[j][j] - rows[i][j] ** 2
        if determinant > 0:
            pull_i = (rows[j][j] * values[i] - rows[i][j] * values[j]) / determinant
            pull_j = (rows[i][i] * values[j] - rows[i][j] * values[i]) / determinant
            left = values[k] - pull_i * rows[k][i] - pull_j * rows[k][j]
            is_zero_best = is_zero_best and left <= 0
            if pull_i <= 0 and pull_j <= 0 <= left:
                return left if k == 0 else 0.0, left if k == 1 else 0.0, left if k == 2 else 0.0
        else:  # rounding
            is_zero_best = False
    if is_zero_best:
        return 0.0, 0.0, 0.0
    return max(values[0], 0.0), max(values[1], 0.0), max(values[2], 0.0)


def terms(sequences: Sequence[ScheduledSequence]) -> tuple[Triple, Triple]:
    """Returns: what a step's sequences are in T's terms, prompts' parts, and in D's, single tokens."""
    stops = [s.stop for s in sequences]
    squares, num_tokens, num_sequences, kv_tokens = 0, 0, len(stops), sum(stops)
    if kv_tokens - sum([s.start for s in sequences]) != num_sequences:  # not single tokens alone
        for sequence in sequences:
            start, stop = sequence.start, sequence.stop
            if stop - start != 1:
                squares += stop * stop - start * start
                num_tokens += stop - start
                num_sequences -= 1
                kv_tokens -= stop
    return (squares, num_tokens, 1.0), (kv_tokens, num_sequences, 1.0)


class OnlinePredictor:
    """The predictor of an engine: what was measured before, if anything, and every step since."""

    def __init__(self, start: Predictor | None = None) -> None:
        self._prefill = Formula(PREFILL_SIZES, start.prefill if start is not None and start.knows_prefill else None)
        self._decode = Formula(DECODE_SIZES, start.decode if start is not None and start.knows_decode else None)
        self.current: Predictor | None = start  #: None: nothing is known; a formula that is not known is all zero

    def step_s(self, sequences: Sequence[ScheduledSequence]) -> float:
        """Returns: seconds that a step takes, as far as that is known; what is not counts as nothing."""
        parts, tokens = terms(sequences)
        prefill_s = self._prefill.value(parts) if parts[1] and self._prefill.is_known else 0.0
        return prefill_s + (self._decode.value(tokens) if tokens[1] and self._decode.is_known else 0.0)

    def observe(self, sequences: Sequence[ScheduledSequence], step_s: float) -> Observation | None:
        """Learn from a step.

        One that computes prompts' parts and single tokens teaches the formula that predicts the larger part of it; the other's
        part is taken off.

        Args:
            sequences: what it computed.
            step_s: what it took, not counting the time it waited for the step before.
        Returns: how far the prediction was off; None if there was none, or step_s is not believed.
        """
        if not sequences or not SHORTEST_S < step_s < LONGEST_S:
            return None
        prefill, decode = self._prefill, self._decode
        parts, tokens = terms(sequences)
        num_tokens, num_sequences = parts[1], tokens[1]
        prefill_s = prefill.value(parts) if num_tokens else 0.0
        decode_s = decode.value(tokens) if num_sequences else 0.0
        is_known = (prefill.is_known or not num_tokens) and (decode.is_known or not num_sequences)
        is_prefill = prefill_s > decode_s
        if not num_tokens or not num_sequences:
            is_prefill = num_tokens > 0
        elif not is_known:
            if not prefill.is_known and not decode.is_known:
                return None
            is_prefill = decode.is_known
        if is_prefill:
            prefill.observe(parts, decode_s, step_s)
        else:
            decode.observe(tokens, prefill_s, step_s)
        if prefill.is_known or decode.is_known:
            zero = (0.0, 0.0, 0.0)
            self.current = Predictor(
                prefill.coefficients if prefill.is_known else zero, decode.coefficients if decode.is_known else zero
            )
        if not is_known:
            return None
        return Observation("prefill" if is_prefill else "decode", abs(prefill_s + decode_s - step_s) / step_s)
