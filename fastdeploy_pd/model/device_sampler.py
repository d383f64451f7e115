"""From rows of logits to tokens on the device: what `sampler.draw` does, for many rows at once and without waiting for them."""

# Torch has types in part.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastdeploy_pd.model.kernels import draw
from fastdeploy_pd.model.ops.torch import sent
from fastdeploy_pd.request import Request


class Draw:
    """The draws of a step: their parameters are read and sent at once, the logits may come later."""

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        """
        Args:
            requests: a row of logits each. Pending tokens count as output. What is drawn for one without `can_draw` is no token of its.
        """
        self._places = [place for place, request in enumerate(requests) if request.sampling.temperature > 0.0]
        if not self._places:
            return
        numbers = np.empty((len(self._places), draw.NUM_PARAMETERS), np.int64)
        drawing = [requests[place] for place in self._places]
        samplings = [request.sampling for request in drawing]
        numbers[:, draw.PLACE] = self._places
        numbers[:, draw.SEED] = [s.seed for s in samplings]
        numbers[:, draw.POSITION] = [r.num_tokens - len(r.prompt_token_ids) for r in drawing]
        numbers[:, draw.TOP_K] = [min(s.top_k, vocab_size) or vocab_size for s in samplings]
        numbers.view(np.float64)[:, draw.TEMPERATURE : draw.MIN_P + 1] = [
            (s.temperature, s.top_p, s.min_p) for s in samplings
        ]
        self._parameters = sent(torch.from_numpy(numbers), device)

    def apply(self, logits: torch.Tensor, chosen: torch.Tensor, rows: np.ndarray) -> None:
        """Replace the likeliest tokens where a request wants to draw.

        Args:
            logits: [any, vocab_size].
            chosen: [>= m] int32, the likeliest of each request; below 0 it stays, as there is none.
            rows: [m], which row of logits is each request's.
        """
        if self._places:
            own = sent(torch.from_numpy(rows[self._places].astype(np.int32)), logits.device)
            draw.draw(logits, own, self._parameters, chosen)
