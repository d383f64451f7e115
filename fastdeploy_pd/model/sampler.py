"""From a row of logits to a token. NumPy alone, so every backend samples the same.

The random number of a token is a function of (seed, position) and of nothing else: whoever continues a request, on whatever
instance and in whatever batch, draws what the first instance would have drawn.
Source: counter-based generators: Salmon et al., SC 2011 (Philox).
"""

from __future__ import annotations

import numpy as np

from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.request import Request, SamplingParams, TokenLogprobs

MASKED = np.float32(-np.inf)
FEW = 1024  # of so many likeliest tokens top_p rarely needs more; sorting a whole vocabulary takes 20 ms


def uniform(seed: int, position: int) -> float:
    """Returns: a number in [0, 1) that depends on (seed, position) alone.

    The generator's raw words are used, whose values NumPy fixes for good; those of its distributions may change.
    """
    key = np.array([seed & (2**64 - 1), 0], dtype=np.uint64)
    return float(np.random.Philox(key=key, counter=[position, 0, 0, 0]).random_raw() >> 11) * 2.0**-53


def can_draw(sampling: SamplingParams) -> bool:
    """Whether the next token depends on the logits, the parameters and its position alone, and nothing else is asked for."""
    return (
        sampling.logprobs is None
        and sampling.prompt_logprobs is None
        and sampling.repetition_penalty == 1.0
        and not (sampling.presence_penalty or sampling.frequency_penalty)
        and not (sampling.logit_bias or sampling.min_tokens)
    )


def sample(logits: np.ndarray, request: Request) -> int:
    """The next token of a request.

    Args:
        logits: [vocab_size] float32, not changed.
        request: its sampling parameters, prompt and output so far.
    Returns: token id; the lowest of equal ones when greedy.
    Raises: FastDeployPDError: the logits are not numbers, or every token is banned; no token would be right.
    """
    sampling = request.sampling
    adjusted = adjust(logits, request)
    best = int(adjusted.argmax())  # NaN counts as largest
    if not np.isfinite(adjusted[best]):
        raise FastDeployPDError(
            f"request {request.request_id}: the largest logit is {adjusted[best]}; no token can be chosen",
            code="bad_logits",
        )
    if sampling.temperature == 0.0:
        return best
    return draw(adjusted, sampling, uniform(sampling.seed, len(request.output_token_ids)))


def adjust(logits: np.ndarray, request: Request) -> np.ndarray:
    """Logits after penalties, bias and the ban on ending too early; the very array if nothing applies."""
    sampling = request.sampling
    output = request.output_token_ids
    is_banned = len(output) < sampling.min_tokens
    has_penalty = sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
    if not (is_banned or has_penalty or sampling.logit_bias):
        return logits
    adjusted = logits.copy()
    if has_penalty:
        _penalise(adjusted, request)
    for token_id, bias in sampling.logit_bias.items():
        if 0 <= token_id < len(adjusted):
            adjusted[token_id] += bias
    if is_banned:
        ending = [t for t in (*request.eos_token_ids, *sampling.stop_token_ids) if 0 <= t < len(adjusted)]
        adjusted[ending] = MASKED
    return adjusted


def _penalise(logits: np.ndarray, request: Request) -> None:
    """Repetition over prompt and output, presence and frequency over the output, in place."""
    sampling, output = request.sampling, request.output_token_ids
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(request.prompt_token_ids + output, dtype=np.int64))
        values = logits[seen]
        penalty = np.float32(sampling.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * counts
        logits[ids] -= penalties.astype(np.float32)


def draw(logits: np.ndarray, sampling: SamplingParams, number: float) -> int:
    """Draw from the distribution that temperature, top_k, top_p and min_p leave, in this order.

    Args:
        logits: [vocab_size] float32, the largest finite.
        number: in [0, 1): where in the cumulative distribution to look.
    Returns: token id.
    """
    kept = likeliest(logits, sampling.top_k) if 0 < sampling.top_k < len(logits) else np.arange(len(logits))
    weights = logits[kept].astype(np.float64)
    weights -= weights.max()
    weights /= sampling.temperature
    np.exp(weights, out=weights)
    if sampling.top_p < 1.0:
        nucleus = _nucleus(weights, sampling.top_p)
        kept, weights = kept[nucleus], weights[nucleus]
    if sampling.min_p > 0.0:
        is_kept = weights >= sampling.min_p  # relative to the likeliest, whose weight is 1
        kept, weights = kept[is_kept], weights[is_kept]
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    return int(kept[min(index, len(kept) - 1)])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the fewest likeliest entries that hold top_p of the sum; at least one, likeliest first."""
    wanted = top_p * weights.sum()
    order = likeliest(weights, min(FEW, len(weights)))
    cumulative = np.cumsum(weights[order])
    if cumulative[-1] < wanted and len(order) < len(weights):
        order = likeliest(weights, len(weights))
        cumulative = np.cumsum(weights[order])
    return order[: int(np.searchsorted(cumulative, wanted)) + 1]


def likeliest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns: [count] indices of the largest values, largest first; of equal ones the lowest index first, also at the edge."""
    if count < len(values):
        edge = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > edge)
        chosen = np.concatenate([above, np.flatnonzero(values == edge)[: count - len(above)]])
    else:
        chosen = np.arange(len(values))
    return chosen[np.lexsort((chosen, -values[chosen]))]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns: [vocab_size] float64 natural log-probabilities."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    return values


def token_logprobs(logits: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities under the model's own distribution, before temperature and penalties.

    Args:
        logits: [vocab_size] float32.
        num_top: how many of the likeliest tokens to name.
    """
    logprobs = log_softmax(logits)
    top = likeliest(logits, min(num_top, len(logits))) if num_top else ()
    return TokenLogprobs(token_id, float(logprobs[token_id]), tuple((int(i), float(logprobs[i])) for i in top))
