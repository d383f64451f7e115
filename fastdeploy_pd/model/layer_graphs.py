"""What lies between the attentions of a small step, as CUDA graphs.

Queueing a layer kernel by kernel takes the CPU longer than so few rows take the device. Attention depends on the step's sequences
and is queued as ever, so layers are handed over one by one as ever; what lies between two of them depends on the number of rows alone.
Steps are queued one after the other, none between another's layers: they share all memory that they compute in.
"""

# Torch has types in part.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch

from fastdeploy_pd.model.decoder import Decoder
from fastdeploy_pd.model.graphs import Captures
from fastdeploy_pd.model.ops.cuda import NOWHERE, CudaOps, CudaStep

# Of a layer: above, the device computes one for longer than the CPU takes to queue it. 1,024 rows of Llama-3-8B, 14,000 of Qwen3-0.6B.
MOST_PRODUCTS = 224e9
INPUTS = ("token_ids", "positions", "slots", "sources")


@dataclass(slots=True)
class _Piece:
    """From behind a layer's attention to before the next one's."""

    graph: torch.cuda.CUDAGraph
    out: torch.Tensor  #: Q, K and V of the next layer; the last piece's: the hidden states


class LayerGraphs:
    """Runs steps of the numbers of rows that were captured."""

    def __init__(self, decoder: Decoder, caches: Sequence[torch.Tensor], most_rows: int) -> None:
        """
        Args:
            caches: a layer's blocks each.
            most_rows: of any step.
        """
        assert isinstance(decoder.ops, CudaOps)
        layer = decoder.layers[0]
        num_weights = sum(matrix.numel() for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down))
        self.most_rows = min(most_rows, int(MOST_PRODUCTS / num_weights))  #: of steps that are worth a graph
        self._decoder, self._ops, self._caches = decoder, decoder.ops, caches
        self._captures = Captures()
        self._pieces: dict[int, list[_Piece]] = {}  # by number of rows
        self._inputs = {n: torch.zeros(self.most_rows, dtype=torch.int32, device=self._ops.device) for n in INPUTS}
        num_in = layer.output.shape[1]  # of what follows attention
        self._attended = torch.zeros(self.most_rows, num_in, dtype=self._ops.dtype, device=self._ops.device)

    def has(self, num_rows: int) -> bool:
        """Returns: whether steps of so many rows can be run."""
        return num_rows in self._pieces

    def run(self, step: CudaStep, on_layer: Callable[[int], None]) -> Generator[None, None, torch.Tensor]:
        """Queue a layer each time.

        Args:
            step: of a number of rows that it `has`.
            on_layer: called when what writes a layer's K and V is queued.
        Returns: [n, hidden] hidden states; what reads them has to be queued before any other step's first layer.
        """
        num_rows = len(step.token_ids)
        for name, field in self._inputs.items():
            given = getattr(step, name)  # sources may not be there
            if given is None:
                field[:num_rows] = NOWHERE
            else:
                field[:num_rows] = given
        *layers, last = self._pieces[num_rows]
        for index, (piece, cache) in enumerate(zip(layers, self._caches, strict=True)):
            piece.graph.replay()
            on_layer(index)
            self._ops.attention(piece.out, cache, step, self._attended[:num_rows])
            yield
        last.graph.replay()
        return last.out

    def capture(self, num_rows: int) -> None:
        """Capture steps of so many rows, unless ranks' sums are NCCL's. Queues behind steps in flight and waits for none.

        Raises: torch.OutOfMemoryError: memory lacks, though what was cached is given back; such steps are queued as ever.
        """
        if not self._ops.adds_up_itself(num_rows * self._decoder.config.hidden_size):
            return  # a rank that fails to capture such a sum would leave the others waiting in it
        self._load(num_rows)
        token_ids, positions, slots, sources = (self._inputs[name][:num_rows] for name in INPUTS)
        step = CudaStep(token_ids, positions, slots, num_rows, sources=sources)
        pieces: list[_Piece] = []
        x: torch.Tensor | None = None
        for index in range(len(self._caches) + 1):
            graph, (x, qkv) = self._captures.try_twice(partial(self._compute, index, x, step))
            # What reads it is queued before the next piece, which may compute where it lies.
            pieces.append(_Piece(graph, _unowned(x if qkv is None else qkv)))
            del qkv
        self._pieces[num_rows] = pieces

    def _load(self, num_rows: int) -> None:
        """Compute two pieces for nobody: kernels, and what cuBLAS computes with on this stream, must not be new in a capture."""
        nothing, nowhere = (
            torch.full((num_rows,), value, dtype=torch.int32, device=self._ops.device) for value in (0, NOWHERE)
        )
        step = CudaStep(nothing, nothing, nowhere, num_rows, sources=nowhere)
        with self._captures.beside(), self._ops.alone():
            self._compute(1, self._compute(0, None, step)[0], step)

    def _compute(self, index: int, x: torch.Tensor | None, step: CudaStep) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queue a piece: from x before layer `index` - 1, of which attention is done, to its successor and Q, K and V, if there are."""
        decoder = self._decoder
        if x is None:
            x = self._ops.embedding(decoder.embedding, step)
        else:
            x = decoder.run_rest(index - 1, x, self._attended[: len(x)])
        is_last = index == len(self._caches)
        return x, None if is_last else decoder.run_projections(index, x, step, self._caches[index])


def _unowned(x: torch.Tensor) -> torch.Tensor:
    """Returns: x, of which the memory may be reused: it stays where it is for as long as a graph needs it."""
    size = x.numel() * x.element_size()
    memory = {"shape": (size,), "typestr": "|u1", "data": (x.data_ptr(), False), "version": 3}
    bytes_of_it = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=memory), device=x.device)
    return bytes_of_it.view(x.dtype).view(x.shape)
