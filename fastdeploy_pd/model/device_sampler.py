"""From rows of logits to tokens on the device: what `sampler.draw` does, for many rows at once and without waiting for them."""

# Torch has types in part.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastdeploy_pd.model.ops.torch import sent
from fastdeploy_pd.model.sampler import uniform
from fastdeploy_pd.request import Request, SamplingParams


def can_draw(sampling: SamplingParams) -> bool:
    """Whether the next token depends on the logits and the parameters alone, and nothing else is asked for."""
    return (
        sampling.logprobs is None
        and sampling.prompt_logprobs is None
        and sampling.repetition_penalty == 1.0
        and not (sampling.presence_penalty or sampling.frequency_penalty)
        and not (sampling.logit_bias or sampling.min_tokens)
    )


class Draw:
    """The draws of a step: their parameters are read and sent at once, the logits may come later."""

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        """
        Args:
            requests: a row of logits each; those with a temperature have can_draw. Pending tokens count as output.
        """
        drawing = [row for row, request in enumerate(requests) if request.sampling.temperature > 0.0]
        ranked = [row for row in drawing if _needs_ranks(requests[row].sampling, vocab_size)]
        self._groups: list[tuple[np.ndarray, torch.Tensor, bool]] = []
        for rows, is_ranked in (([row for row in drawing if row not in set(ranked)], False), (ranked, True)):
            if rows:
                parameters = [_parameters(requests[row], vocab_size) for row in rows]
                given = torch.tensor(parameters, dtype=torch.float64)
                self._groups.append((np.array(rows), sent(given, device), is_ranked))

    def apply(self, logits: torch.Tensor, chosen: torch.Tensor, rows: np.ndarray) -> None:
        """Replace the likeliest tokens where a request wants to draw.

        Args:
            logits: [any, vocab_size].
            chosen: [>= m] int32, the likeliest of each request; below 0 it stays, as there is none.
            rows: [m], which row of logits is each request's.
        """
        for places, parameters, is_ranked in self._groups:
            index, row = (sent(torch.from_numpy(numbers), logits.device) for numbers in (places, rows[places]))
            tokens = _draw(logits[row].float(), parameters, is_ranked)
            chosen[index] = torch.where(chosen[index] < 0, chosen[index], tokens.int())


def _needs_ranks(sampling: SamplingParams, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


def _parameters(request: Request, vocab_size: int) -> tuple[float, ...]:
    sampling = request.sampling
    position = request.num_tokens - len(request.prompt_token_ids)
    top_k = sampling.top_k if sampling.top_k > 0 else vocab_size
    return sampling.temperature, top_k, sampling.top_p, sampling.min_p, uniform(sampling.seed, position)


def _draw(logits: torch.Tensor, parameters: torch.Tensor, is_ranked: bool) -> torch.Tensor:
    """[m, vocab_size] and _parameters of each -> [m] token ids. Ranked: the likeliest first, of equal ones the lowest id."""
    temperature, top_k, top_p, min_p, number = (column[:, None] for column in parameters.unbind(1))
    order = None
    if is_ranked:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
    weights = ((logits.double() - logits.max(dim=-1, keepdim=True).values) / temperature).exp()
    if is_ranked:
        rank = torch.arange(weights.shape[1], device=weights.device)[None, :]
        weights = weights.where(rank < top_k, 0.0)
        cumulative = weights.cumsum(dim=-1)
        num_kept = torch.searchsorted(cumulative, top_p * cumulative[:, -1:]) + 1
        weights = weights.where((rank < num_kept) | (top_p >= 1.0), 0.0)
    weights = weights.where(weights >= min_p, 0.0)  # relative to the likeliest, whose weight is 1
    cumulative = weights.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
    last = (weights > 0).int().cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # if rounding puts the number past the end
    place = torch.minimum(place, last)
    return (place if order is None else order.gather(1, place))[:, 0]
