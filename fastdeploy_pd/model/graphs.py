"""Decode steps as CUDA graphs: one launch for a whole step, in a few sizes, each captured when it is first needed."""

# Torch has types in part.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.model.decoder import Decoder
from fastdeploy_pd.model.kernels.choice import likeliest
from fastdeploy_pd.model.ops.cuda import ALIGNMENT, NOWHERE, CudaOps, CudaStep

FIELDS = ("token_ids", "sources", "positions", "slots", "lengths")
T = TypeVar("T")
NUM_STAGES = 3  # host buffers in turn: one is filled while the device may still copy from those of the steps in flight


def graph_sizes(most: int) -> list[int]:
    """Returns: rising numbers of rows to capture; up to `most`, which is one of them."""
    sizes = [1, 2, 4, 8, 16, *range(24, 65, 8), *range(80, 257, 16), *range(288, max(most, 288) + 1, 32)]
    return [*(s for s in sizes if s < most), most]


@dataclass(slots=True)
class _Stage:
    """A host buffer, and whose tables lie in it."""

    host: torch.Tensor
    fields: np.ndarray  #: [len(FIELDS), most]
    tables: np.ndarray  #: [most, max_blocks]
    is_free: torch.cuda.Event
    owners: list[Any]  #: of each row: the block table that is written there, and how much of it
    counts: list[int]


class Captures:
    """Takes graphs of which no two ever run at once: each may compute where others, taken before, have what nobody needs any more."""

    def __init__(self) -> None:
        self._side = torch.cuda.Stream()  # of all of them: what one has freed, another stream's could not use
        # The pool that they share, which would be gone with the last graph that uses it, and a graph that keeps it.
        self._memory: Any = None
        self._first: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is queued inside is queued where graphs are captured; behind all before it, and before all after it."""
        self._side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._side)

    def take(self, compute: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """Returns: a graph of what `compute` queues, which is not computed, and what it returns; the ranks' sums are not waited for.

        It waits for no step in flight. torch.cuda.graph would, and give cached memory back, which waits again.
        """
        graph, is_whole = torch.cuda.CUDAGraph(), False
        if self._first is None:  # a capture that failed may have been the pool's only user
            self._memory = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._side):
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                result = compute()
                is_whole = True
            finally:
                with nullcontext() if is_whole else suppress(RuntimeError):
                    graph.capture_end()
        self._first = self._first or graph
        return graph, result

    def try_twice(self, compute: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """`take`, and once more if memory lacks: what is cached is not given back for a graph while that is captured, but before."""
        with suppress(torch.OutOfMemoryError):
            return self.take(compute)
        torch.cuda.empty_cache()
        return self.take(compute)


class DecodeGraphs:
    """Runs steps in which every sequence has one new token."""

    def __init__(self, decoder: Decoder, caches: Sequence[torch.Tensor], most: int, max_blocks: int, block_size: int):
        """
        Args:
            most: sequences in a step.
            max_blocks: blocks of a sequence.
        """
        assert isinstance(decoder.ops, CudaOps)
        self._decoder, self._ops, self._caches = decoder, decoder.ops, caches
        self._block_size = block_size
        self._sizes = graph_sizes(most)
        most, max_blocks = (-(-count // ALIGNMENT) * ALIGNMENT for count in (most, max_blocks))
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = {}
        self._captures = Captures()
        self._device = torch.zeros(most * (len(FIELDS) + max_blocks), dtype=torch.int32, device=self._ops.device)
        fields = self._device[: most * len(FIELDS)].view(len(FIELDS), most)
        self._inputs = dict(zip(FIELDS, fields, strict=True))
        self._inputs["slots"].fill_(NOWHERE)
        self._inputs["sources"].fill_(NOWHERE)
        self._tables = self._device[most * len(FIELDS) :].view(most, max_blocks)
        self._rows = torch.arange(most, dtype=torch.int32, device=self._ops.device)
        self._stages = [self._stage(most, max_blocks) for _ in range(NUM_STAGES)]
        self._turn = 0

    @staticmethod
    def _stage(most: int, max_blocks: int) -> _Stage:
        host = torch.zeros(most * (len(FIELDS) + max_blocks), dtype=torch.int32, pin_memory=True)
        flat, split = host.numpy(), most * len(FIELDS)
        event = torch.cuda.Event()
        event.record()
        return _Stage(
            host, flat[:split].reshape(-1, most), flat[split:].reshape(most, -1), event, [None] * most, [0] * most
        )

    def run(
        self, sequences: Sequence[ScheduledSequence], token_ids: np.ndarray, sources: np.ndarray
    ) -> torch.Tensor | None:
        """Queue a step; the tokens chosen go to ops.sampled.

        Args:
            sequences: one new token each.
            token_ids, sources: [n], see StepInputs; what token_ids is where `sources` names a row does not matter.
        Returns: [n, vocab_size] logits on the device, valid until the next run; None on other ranks than the first.
        """
        count = len(sequences)
        size = next(s for s in self._sizes if s >= count)
        self._send(sequences, token_ids, sources, size)
        self.capture(size, size)
        graph, logits = self._graphs[size]
        graph.replay()
        return None if logits is None else logits[:count]

    def compile(self, most: int) -> None:
        """Queue a layer and a choice of steps of up to `most` sequences; for `chain.compiling`: what they would write is lost."""
        for size in self._sizes:
            if size <= most:
                step = self._step(size)
                x = self._ops.embedding(self._decoder.embedding, step)
                x = self._decoder.run_layer(0, x, step, self._caches[0])
                if self._decoder.rank.is_first:
                    likeliest(self._decoder.run_head(x, step), self._ops.sampled)

    def capture(self, most: int, least: int = 1) -> None:
        """Capture the sizes between that are not captured yet."""
        for size in self._sizes:
            if least <= size <= most and size not in self._graphs:
                self._graphs[size] = self._capture(size)

    def _send(
        self, sequences: Sequence[ScheduledSequence], token_ids: np.ndarray, sources: np.ndarray, size: int
    ) -> None:
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % NUM_STAGES
        stage.is_free.synchronize()
        count = len(sequences)
        tables = [s.request.local.block_table for s in sequences]
        starts = np.fromiter((s.start for s in sequences), np.int32, count)
        for row, table in enumerate(tables):
            if stage.owners[row] is not table or stage.counts[row] != len(table):
                stage.tables[row, : len(table)] = table
                stage.owners[row], stage.counts[row] = table, len(table)
        blocks = stage.tables[np.arange(count), starts // self._block_size]
        fields = stage.fields
        fields[0, :count], fields[1, :count], fields[2, :count] = token_ids, sources, starts
        fields[3, :count], fields[4, :count] = blocks * self._block_size + starts % self._block_size, starts + 1
        fields[:, count:size] = np.array([0, NOWHERE, 0, NOWHERE, 0], np.int32)[:, None]
        used = fields.size + count * stage.tables.shape[1]
        self._device[:used].copy_(stage.host[:used], non_blocking=True)
        stage.is_free.record()
        self._ops.clear_blocks(blocks[starts % self._block_size == 0])

    def _step(self, size: int) -> CudaStep:
        inputs = {name: field[:size] for name, field in self._inputs.items()}
        return CudaStep(
            inputs["token_ids"],
            inputs["positions"],
            inputs["slots"],
            size,
            sources=inputs["sources"],
            single_rows=self._rows[:size],
            tables=self._tables[:size],
            lengths=inputs["lengths"],
            splits=self._ops.splits(size, self._tables.shape[1]),
        )

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor | None]:
        """Queues behind steps in flight and waits for none."""
        kept, sampled = self._device.clone(), self._ops.sampled.clone()
        try:
            # Once outside of the capture: kernels are compiled and handles made. It must not leave anything in the pool.
            self._inputs["slots"].fill_(NOWHERE)
            self._inputs["lengths"].zero_()
            step = self._step(size)
            with self._captures.beside():
                self._compute(step, size)
            return self._captures.try_twice(partial(self._compute, step, size))
        finally:  # also where memory lacks: the tokens of steps in flight are still to be taken
            self._device.copy_(kept)
            self._ops.sampled.copy_(sampled)

    def _compute(self, step: CudaStep, size: int) -> torch.Tensor | None:
        logits = self._decoder.run(step, self._caches, size if self._decoder.rank.is_first else 0)
        if logits is not None:
            likeliest(logits, self._ops.sampled)
        return logits
