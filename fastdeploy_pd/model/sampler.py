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


def uniform(seed: int, position: int) -> float:
    """Returns: a number in [0, 1) that depends on (seed, position) alone."""
    key = [seed & (2**64 - 1), 0]
    return float(np.random.Generator(np.random.Philox(key=key, counter=[position, 0, 0, 0])).random())


def sample(logits: np.ndarray, request: Request) -> int:
    """The next token of a request.

    Args:
        logits: [vocab_size] float32, not changed.
        request: its sampling parameters, prompt and output so far.
    Returns: token id; the lowest of equal ones when greedy.
    Raises: FastDeployPDError: the logits are not numbers; no token would be right.
    """
    sampling = request.sampling
    adjusted = adjust(logits, request)
    best = int(adjusted.argmax())
    if not np.isfinite(adjusted[best]):
        raise FastDeployPDError(
            f"the model's logits for request {request.request_id} are not finite", code="bad_logits"
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
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(request.prompt_token_ids + output, dtype=np.int64))
        values = adjusted[seen]
        penalty = np.float32(sampling.repetition_penalty)
        adjusted[seen] = np.where(values > 0, values / penalty, values * penalty)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        adjusted[ids] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * counts
    for token_id, bias in sampling.logit_bias.items():
        if 0 <= token_id < len(adjusted):
            adjusted[token_id] += bias
    if is_banned:
        ending = [t for t in (*request.eos_token_ids, *sampling.stop_token_ids) if 0 <= t < len(adjusted)]
        adjusted[ending] = MASKED
    return adjusted


def draw(logits: np.ndarray, sampling: SamplingParams, number: float) -> int:
    """Draw from the distribution that temperature, top_k, top_p and min_p leave.

    Args:
        logits: [vocab_size] float32.
        number: in [0, 1): where in the cumulative distribution to look.
    Returns: token id.
    """
    num_kept = len(logits) if sampling.top_k == 0 else min(sampling.top_k, len(logits))
    if num_kept < len(logits):
        candidates = np.argpartition(-logits, num_kept - 1)[:num_kept]
        # Equal logits at the edge must not depend on how partitioning happens to order them.
        edge = logits[candidates].min()
        above, equal = np.flatnonzero(logits > edge), np.flatnonzero(logits == edge)
        candidates = np.concatenate([above, equal[: num_kept - len(above)]])
    else:
        candidates = np.arange(len(logits))
    order = candidates[np.lexsort((candidates, -logits[candidates]))]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    keep = np.cumsum(probabilities) - probabilities < sampling.top_p
    keep &= probabilities >= sampling.min_p * probabilities[0]
    keep[0] = True
    cumulative = np.cumsum(np.where(keep, probabilities, 0.0))
    index = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    return int(order[min(index, int(np.flatnonzero(keep)[-1]))])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns: [vocab_size] float64 natural log-probabilities."""
    values = logits.astype(np.float64)
    values -= values.max()
    return values - np.log(np.exp(values).sum())


def token_logprobs(logits: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities under the model's own distribution, before temperature and penalties.

    Args:
        logits: [vocab_size] float32.
        num_top: how many of the likeliest tokens to name.
    """
    logprobs = log_softmax(logits)
    top: list[tuple[int, float]] = []
    if num_top:
        candidates = np.argpartition(-logprobs, min(num_top, len(logprobs)) - 1)[:num_top]
        order = candidates[np.lexsort((candidates, -logprobs[candidates]))]
        top = [(int(i), float(logprobs[i])) for i in order]
    return TokenLogprobs(token_id, float(logprobs[token_id]), tuple(top))
