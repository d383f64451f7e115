"""The runner on a GPU: steps are queued, their outputs come later, and a next step takes its tokens where they were chosen."""

# Torch has types in part.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.model.device_sampler import Draw
from fastdeploy_pd.model.graphs import DecodeGraphs, graph_sizes
from fastdeploy_pd.model.kernels.chain import compiling
from fastdeploy_pd.model.kernels.choice import NO_TOKEN, likeliest
from fastdeploy_pd.model.layer_graphs import LayerGraphs
from fastdeploy_pd.model.ops.base import StepInputs
from fastdeploy_pd.model.ops.cuda import FEWEST_FOR_CUDNN, NOWHERE, CudaOps, CudaStep, row_counts, usual_rows
from fastdeploy_pd.model.parallel import Chore, Rank, chore_step, integers
from fastdeploy_pd.model.runner import ModelRunner, OnLayer, StepOutput, attention_plan, step_output
from fastdeploy_pd.model.sampler import can_draw
from fastdeploy_pd.request import Request, SamplingParams

# Of a step that is no graph; to queue all takes 10 ms or more, and messages and transfers wait meanwhile.
LAYERS_AT_ONCE = 4
MOST_KERNELS_AHEAD = 700  # queued and not ended: the device takes about a thousand, then queueing waits for it
KERNELS_A_LAYER = 14  # about, ...
KERNELS_BESIDE_A_GRAPH = 6  # ... less where the rest is a graph, ...
KERNELS_A_WHOLE_PROMPT = 2  # ... and for each prompt of cuDNN's its attention and a copy
# At most, at once: each hand-over wakes threads, which take the GIL from the one that queues layers. The last ones go by fewer: what is
# left when a prompt is computed, its first decode step waits for.
LAYERS_HANDED_OVER = 8
LAST_LAYERS = 4  # of a step that is no graph: while the device computes them, the next step is prepared
LONG_PROMPT = 600  # tokens, of those that cuDNN attends to
EAGER_SIZES = 64  # graphs of up to so many sequences are captured at start, 30 ms each
# More than a decode graph takes, of what is free on rank 0, whose logits need most: a rank that fails in the middle of it ends them all.
CAPTURE_BYTES = 1 << 29
LONGEST_PREPARED = 8192  # tokens of prompts in a step; what is first met with more costs 10 to 200 ms then

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class DeviceStep:
    """See engine/context.py."""

    sequences: Sequence[ScheduledSequence]
    errors: dict[int, FastDeployPDError]  #: by index
    tokens: torch.Tensor  #: [samples] int32, pinned: becomes what was chosen on the device
    logits: dict[int, torch.Tensor]  #: [rows, vocab_size] float32, pinned: by index, of those that the CPU looks at
    end: torch.cuda.Event
    on_layer: Callable[[int], None] | None = None
    advance: Callable[[], None] = lambda: None  #: queues some of what is not queued yet, of this step or one beside it
    is_queued: bool = True  #: wholly
    num_kernels: int = KERNELS_A_LAYER  #: of a layer, about
    #: of layers that were not handed over yet: (event, last one of a group)
    layers: deque[tuple[torch.cuda.Event, int]] = field(default_factory=deque)
    fault: FastDeployPDError | None = None  #: why none of it goes on; what was queued still runs

    def poll(self) -> bool:
        """Hand over layers that are done. Returns: whether all is."""
        self.advance()
        while self.layers and self.layers[0][0].query():
            self._hand_over()
        is_done = self.is_queued and not self.layers and self.end.query()
        if is_done and self.fault is not None:
            raise self.fault
        return is_done

    def outputs(self) -> list[StepOutput]:
        """One output a sequence; waits for them."""
        while not self.is_queued:
            self.advance()
        while self.layers:
            self.layers[0][0].synchronize()
            self._hand_over()
        self.end.synchronize()
        if self.fault is not None:
            raise self.fault
        outputs, tokens, row = [], self.tokens.tolist(), 0
        for index, sequence in enumerate(self.sequences):
            token_id = None
            if sequence.needs_sample:
                token_id = tokens[row]
                row += 1
            outputs.append(self._output(index, sequence, token_id))
        return outputs

    def _output(self, index: int, sequence: ScheduledSequence, token_id: int | None) -> StepOutput:
        if index in self.errors:
            return StepOutput(error=self.errors[index])
        if index in self.logits:
            try:
                return step_output(sequence, self.logits[index].numpy())
            except FastDeployPDError as error:
                return StepOutput(error=error)
        if token_id == NO_TOKEN:
            name = sequence.request.request_id
            message = f"request {name}: the largest logit is no finite number; no token can be chosen"
            return StepOutput(error=FastDeployPDError(message, code="bad_logits"))
        return StepOutput(token_id)

    def _hand_over(self) -> None:
        _, layer = self.layers.popleft()
        if self.on_layer is not None:
            self.on_layer(layer)


class DeviceRunner(ModelRunner):
    """See `ModelRunner`."""

    depth = 2

    def __init__(
        self,
        directory: Path,
        ops_name: str,
        dtype: str,
        num_threads: int | None,
        device: str,
        rank: Rank | None = None,
    ) -> None:
        """See ModelRunner. Raises: ModelLoadError, ConfigError."""
        super().__init__(directory, ops_name, dtype, num_threads, device, rank)
        assert isinstance(self.decoder.ops, CudaOps)
        self._ops = self.decoder.ops
        self._sample_of: dict[Request, int] = {}  # row of ops.sampled that has a request's newest token
        self._unqueued: deque[tuple[DeviceStep, Iterator[None]]] = deque()  # and what queues more of it
        # Ends of layers that are queued, oldest first, and their kernels.
        self._ahead: deque[tuple[torch.cuda.Event, int]] = deque()
        self._num_kernels_ahead = 0  # the sum of these
        self._chores: deque[Chore] = deque()
        self._computes_rows = self._captures_layers = True  # ahead of time, until it fails here; other ranks go on
        self._has_room = True  # all ranks have, for the rows of the last chore that asked
        self._step_bytes = 0  # that a layer of the most rows takes, as far as all ranks have had them

    def attach(self, pool: Any, layout: KVLayout, max_num_seqs: int = 8, max_model_len: int | None = None) -> None:
        """See ModelRunner."""
        super().attach(pool, layout, max_num_seqs, max_model_len)
        self._max_model_len = max_model_len or self.config.max_position_embeddings
        max_blocks = -(-self._max_model_len // layout.block_size)
        self._ops.sampled = torch.zeros(max_num_seqs, dtype=torch.int32, device=self._ops.device)
        self._graphs = DecodeGraphs(self.decoder, self.caches, max_num_seqs, max_blocks, layout.block_size)
        self._layer_graphs = LayerGraphs(self.decoder, self.caches, usual_rows(LONGEST_PREPARED + max_num_seqs))

    def warm_up(self, pool: BlockPool, can_decode: bool, most_tokens: int, most_alone: int) -> int:
        """See ModelRunner. Compiles kernels; captures graphs for up to EAGER_SIZES sequences. Raises: FastDeployPDError: memory lacks."""
        try:
            return self._warm_up(pool, can_decode, most_tokens, most_alone)
        except torch.OutOfMemoryError as error:
            raise self._lacks_memory(error, "while the first steps were prepared") from error

    def _warm_up(self, pool: BlockPool, can_decode: bool, most_tokens: int, most_alone: int) -> int:
        longest = min(LONG_PROMPT, pool.num_free * pool.block_size // 2, self._max_model_len)
        most = min(len(self._ops.sampled), pool.num_free)  # sequences
        self._see_to(Chore("compile", EAGER_SIZES))
        for lengths in ([longest], [min(20, longest), 1][:most]):
            self._compute_for_nobody(pool, lengths)
        if can_decode:
            self._see_to(Chore("capture", EAGER_SIZES))
            self._chores += [Chore("capture", n) for n in graph_sizes(len(self._ops.sampled)) if n > EAGER_SIZES]
        most_alone = self._with_room(most_tokens, most_alone)
        most_rows = min(
            max(most_alone, most_tokens + len(self._ops.sampled)), LONGEST_PREPARED + len(self._ops.sampled)
        )
        # The most rows first: what the others need fits where they lay.
        counts = row_counts(most_rows)
        self._chores += [Chore("rows", n) for n in counts]
        self._chores += [Chore("layers", n) for n in counts if n <= self._layer_graphs.most_rows]
        return most_alone

    def _with_room(self, most_tokens: int, most_alone: int) -> int:
        """Returns: most_alone, or for how many tokens more than most_tokens all ranks have memory, as a layer of so many shows."""
        self._see_to(Chore("room", usual_rows(min(most_tokens, LONGEST_PREPARED) + len(self._ops.sampled))))
        if not self._has_room:
            message = (
                "a step of %d tokens may lack GPU memory: lower --gpu-memory-utilization or --max-num-batched-tokens"
            )
            _log.warning(message, most_tokens)
        most_alone = wanted = max(most_tokens, min(most_alone, self._max_model_len))
        while most_alone > most_tokens:
            self._see_to(Chore("room", usual_rows(most_alone)))
            if self._has_room:
                break
            most_alone = max(most_tokens, most_alone // 2)
        if most_alone < wanted:
            _log.warning("a prompt that is alone has at most %d tokens in a step: memory lacks for more", most_alone)
        return most_alone

    def _find_room(self, num_rows: int) -> None:
        """Compute a layer of so many rows; if all ranks can, what that takes is left to steps from now on."""
        used = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        has_room = True
        try:
            self._compute_rows(num_rows)
        except RuntimeError as error:  # memory lacks, or cuDNN has no plan
            has_room = False
            _log.info("%d rows in a step: %s", num_rows, str(error).splitlines()[0])
        peak = torch.cuda.max_memory_allocated() - used
        if not has_room:
            torch.cuda.empty_cache()
        flag = torch.full((1,), float(has_room), device=self._ops.device)
        self._has_room = self._ops.all_reduce(flag).item() == self.rank.count
        if self._has_room:
            self._step_bytes = max(self._step_bytes, peak)

    def prepare_more(self) -> bool:
        """See engine/context.py: graphs for more sequences, what cuBLAS and cuDNN load and plan for each number of tokens, and graphs
        of small steps."""
        if not self._chores:
            return False
        chore = self._chores.popleft()
        if chore.what == "capture" and not self._can_spare():
            self._chores = deque(c for c in self._chores if c.what != "capture")
            _log.warning(
                "larger decode graphs come when they are needed: %d MiB of GPU memory are free",
                self._free_bytes() >> 20,
            )
            return True
        try:
            self._see_to(chore)
        except torch.OutOfMemoryError as error:
            self._out_of_memory(error)  # of a graph, with sums of ranks
            self._do_without(str(error))
        return True

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._ops.device)[0]

    def _can_spare(self) -> bool:
        """Returns: whether a graph may take memory: what steps need must not become graphs'."""
        least = self._step_bytes + CAPTURE_BYTES
        if self._free_bytes() < least:
            torch.cuda.empty_cache()
        return self._free_bytes() >= least

    def _see_to(self, chore: Chore) -> None:
        """Do a chore on all ranks."""
        if self.rank.count > 1:
            self.announce(chore_step(chore), None)
        self._do(chore)

    def _do(self, chore: Chore) -> None:
        match chore.what:
            case "compile":
                self._compile(chore.count)
            case "capture":
                self._graphs.capture(chore.count)
            case "room":
                self._find_room(chore.count)
            case "rows" if self._computes_rows:
                try:
                    self._compute_rows(chore.count)
                except RuntimeError as error:  # memory lacks, or cuDNN has no plan: each rank for itself
                    self._do_without(str(error))
            case "layers" if self._captures_layers:
                self._capture_layers(chore.count)

    def _do_without(self, why: str) -> None:
        self._chores = deque(c for c in self._chores if c.what == "layers")  # which look at what is free themselves
        self._computes_rows = False
        _log.warning("what is not prepared yet comes when it is needed: %s", why.splitlines()[0])

    def _capture_layers(self, num_rows: int) -> None:
        """Each rank for itself: no graph has a sum of NCCL's in it."""
        try:
            if not self._can_spare():
                raise torch.OutOfMemoryError(f"{self._free_bytes() >> 20} MiB of GPU memory are free")
            self._layer_graphs.capture(num_rows)
        except RuntimeError as error:  # drivers and libraries have their own for a lack of memory
            self._captures_layers = False
            _log.warning("steps of few tokens take longer than with graphs: %s", str(error).splitlines()[0])

    def _compile(self, most_sequences: int) -> None:
        """Have the kernels of decode steps of up to so many, and of prompts, compiled."""
        prompt = Request("", [0] * 2, SamplingParams(temperature=1.0))
        prompt.local.block_table = [0]
        batch = Batch([ScheduledSequence(prompt, 0, 2)], self.layout.block_size)
        with compiling():  # what takes longest first
            prepared = self._prepare(batch, np.zeros(2, np.int64), np.full(2, NOWHERE), [])
            self.decoder.run_layer(0, self._ops.embedding(self.decoder.embedding, prepared), prepared, self.caches[0])
            self._graphs.compile(most_sequences)
            self._compute_rows(FEWEST_FOR_CUDNN)
            if self.rank.is_first:
                logits = torch.empty(1, self.config.vocab_size, dtype=self._ops.dtype, device=self._ops.device)
                Draw([prompt], self.config.vocab_size, logits.device).apply(logits, self._ops.sampled, np.zeros(1, int))

    def _compute_rows(self, num_rows: int) -> None:
        """Queue a layer of so many rows and, if so many tokens can be chosen, their logits: the first of each size takes long."""
        step = self._ops.step_for_nobody(num_rows)
        with self._ops.running(), self._ops.alone():
            x = self.decoder.run_layer(0, self._ops.embedding(self.decoder.embedding, step), step, self.caches[0])
            if num_rows <= usual_rows(len(self._ops.sampled)) and self.rank.is_first:
                self.decoder.run_head(x, step)

    def samples_on_device(self, request: Request) -> bool:
        """Whether a request's next token can be computed before the CPU knows its last one."""
        return can_draw(request.sampling)

    def launch(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> DeviceStep:  # type: ignore[override]
        """Queue a batch; see engine/context.py."""
        try:
            return self._launch(batch, on_layer)
        except torch.OutOfMemoryError as error:  # before anything of it was queued
            raise self._out_of_memory(error) from error

    def _launch(self, batch: Batch, on_layer: Callable[[int], None] | None) -> DeviceStep:
        sequences = batch.sequences
        token_ids = np.array([t for s in sequences for t in s.token_ids], dtype=np.int64)
        errors = self._unknown_tokens(batch, token_ids)
        last_rows = np.cumsum([s.num_tokens for s in sequences]) - 1
        sources = np.full(len(token_ids), NOWHERE, np.int64)
        for row, sequence in zip(last_rows, sequences, strict=True):
            if sequence.num_pending:
                sources[row] = self._sample_of[sequence.request]
        is_decode = on_layer is None and all(
            s.stop - s.start == 1 and s.needs_sample and s.request.sampling.prompt_logprobs is None for s in sequences
        )
        sampled = [index for index, s in enumerate(sequences) if s.needs_sample]
        draw = Draw([sequences[index].request for index in sampled], self.config.vocab_size, self._ops.device)
        if self.rank.count > 1:
            data = self._teller.tell(sequences, token_ids, sources, len(sampled), is_decode, on_layer is not None)
            on_layer = self.announce(data, on_layer)
        sample_of = {sequences[index].request: row for row, index in enumerate(sampled)}
        tokens = torch.empty(len(sampled), dtype=torch.int32, pin_memory=True)
        step = DeviceStep(sequences, errors, tokens, {}, torch.cuda.Event(), on_layer, self._advance)
        if is_decode:
            while self._unqueued:
                self._queue_layers()
            logits = self._graphs.run(sequences, token_ids, sources)
            self._sample_of = sample_of
            try:
                self._end(step, logits, np.arange(len(sequences) + 1), sampled, draw)
            except torch.OutOfMemoryError as error:  # of the draws: the graph runs, and its blocks are written
                self._give_up(step, error)
            return step
        rows = self._logit_rows(batch)
        first = np.cumsum([0, *(len(wanted) for wanted in rows)])
        prepared = self._prepare(batch, token_ids, sources, [r for wanted in rows for r in wanted])
        step.is_queued, self._sample_of = False, sample_of
        has_graphs = self._layer_graphs.has(len(prepared.token_ids))
        step.num_kernels = KERNELS_BESIDE_A_GRAPH if has_graphs else KERNELS_A_LAYER
        step.num_kernels += KERNELS_A_WHOLE_PROMPT * len(prepared.whole)
        layers = step.layers if on_layer is not None else None

        def work() -> Iterator[None]:
            logits = yield from self._layers(prepared, int(first[-1]), layers)
            if logits is not None and sampled:
                likeliest(self._ops.rows(logits, first[1:][sampled] - 1), self._ops.sampled)
            self._end(step, logits, first, sampled, draw)

        self._unqueued.append((step, work()))
        self._advance()
        return step

    def follow(self, data: bytes, on_layer: OnLayer) -> DeviceStep | None:  # type: ignore[override]
        """See ModelRunner. Queued only; the tokens chosen come from the first rank, on the device."""
        told, sequences = self._listener.hear(data)
        if told.chore:
            self._do(told.chore)
            return None
        token_ids, sources = integers(told.token_ids), integers(told.sources)
        step = DeviceStep([], {}, torch.empty(0, dtype=torch.int32), {}, torch.cuda.Event(), on_layer)
        if told.is_decode:
            self._graphs.run(sequences, token_ids, sources)
        else:
            prepared = self._prepare(Batch(sequences, self.layout.block_size), token_ids, sources, [])
            with self._ops.running():
                for _ in self._layers(prepared, 0, step.layers if told.is_watched else None):
                    pass
        if told.num_sampled:
            self._ops.broadcast(self._ops.sampled)
        step.end.record()
        return step if told.is_watched else None

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> list[StepOutput]:
        """See ModelRunner."""
        return self.launch(batch, on_layer).outputs()

    def _prepare(self, batch: Batch, token_ids: np.ndarray, sources: np.ndarray, rows: list[int]) -> CudaStep:
        """Send what any batch but one of single tokens needs."""
        positions = np.concatenate([np.arange(s.start, s.stop, dtype=np.int64) for s in batch.sequences])
        inputs = StepInputs(
            token_ids,
            positions,
            np.array(rows, dtype=np.int64),
            attention_plan(batch.sequences, self.layout.block_size),
            sources if (sources != NOWHERE).any() else None,
        )
        return self._ops.prepare(inputs)

    def _layers(
        self, prepared: CudaStep, num_rows: int, marks: deque[tuple[torch.cuda.Event, int]] | None
    ) -> Generator[None, None, torch.Tensor | None]:
        """Queue a layer each time. Returns: [num_rows, vocab_size] logits.

        Args:
            marks: gets events of K and V, of the last layer of each group.
        """

        def queued(layer: int) -> None:
            if marks is not None and ends_group(layer, len(self.caches)):
                marks.append((torch.cuda.Event(), layer))
                marks[-1][0].record()

        if self._layer_graphs.has(len(prepared.token_ids)):
            x = yield from self._layer_graphs.run(prepared, queued)
        else:
            x = self._ops.embedding(self.decoder.embedding, prepared)
            for index, cache in enumerate(self.caches):
                x = self.decoder.run_layer(index, x, prepared, cache, queued)
                yield
        return self.decoder.run_head(x, prepared) if num_rows else None

    @property
    def is_nearly_done(self) -> bool:
        """See engine/context.py. Graphs end soon."""
        return self.is_queued and len(self._ahead) <= LAST_LAYERS

    @property
    def is_queued(self) -> bool:
        """See engine/context.py."""
        return not self._unqueued

    @property
    def can_advance(self) -> bool:
        """See engine/context.py."""
        return not self.is_queued and self._num_kernels_ahead < MOST_KERNELS_AHEAD

    def _advance(self) -> None:
        """Queue some layers of the oldest step that is not wholly queued, unless the device has enough to do."""
        while self._ahead and self._ahead[0][0].query():
            self._num_kernels_ahead -= self._ahead.popleft()[1]
        if self.can_advance:
            self._queue_layers()

    def _queue_layers(self) -> None:
        """Queue LAYERS_AT_ONCE of the oldest step that is not wholly queued."""
        with self._ops.running():
            for _ in range(LAYERS_AT_ONCE):
                if not self._unqueued:
                    return
                step, work = self._unqueued[0]
                try:
                    step.is_queued = next(work, self) is self
                except torch.OutOfMemoryError as error:
                    self._give_up(step, error)
                end = torch.cuda.Event()
                end.record()
                self._ahead.append((end, step.num_kernels))
                self._num_kernels_ahead += step.num_kernels
                if step.is_queued:
                    self._unqueued.popleft()

    def _give_up(self, step: DeviceStep, error: torch.OutOfMemoryError) -> None:
        """Nothing of a step is queued any more."""
        step.fault, step.is_queued = self._out_of_memory(error), True
        step.end.record()

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> FastDeployPDError:
        """Returns: what to say. Raises: the error, where other ranks compute the step: their sums would meet those of the next one."""
        if self.rank.count > 1:
            raise error
        return self._lacks_memory(error, "in a step")

    def _lacks_memory(self, error: torch.OutOfMemoryError, when: str) -> FastDeployPDError:
        free, total = torch.cuda.mem_get_info(self._ops.device)
        torch.cuda.empty_cache()
        return FastDeployPDError(
            f"out of GPU memory ({free >> 20} of {total >> 20} MiB are free) {when}: lower --gpu-memory-utilization or "
            f"--max-num-batched-tokens and --max-lone-prompt-tokens ({str(error).splitlines()[0]})",
            code="out_of_memory",
        )

    def _end(
        self, step: DeviceStep, logits: torch.Tensor | None, first: np.ndarray, sampled: list[int], draw: Draw
    ) -> None:
        """Queue the choice of tokens, beyond the likeliest, and the way to the CPU of all that it wants.

        Args:
            logits: [first[-1], vocab_size]; sequence i has the rows from first[i] to first[i + 1].
            sampled: sequences whose next token is chosen, by index.
        """
        if logits is not None and sampled:
            draw.apply(logits, self._ops.sampled, first[1:][sampled] - 1)
            self._ops.broadcast(self._ops.sampled)
        if logits is not None:
            step.logits.update(self._kept(step.sequences, logits, first))
        step.tokens.copy_(self._ops.sampled[: len(sampled)], non_blocking=True)
        step.end.record()

    def _kept(
        self, sequences: Sequence[ScheduledSequence], logits: torch.Tensor, first: np.ndarray
    ) -> dict[int, torch.Tensor]:
        """Queue the way to the CPU of logits that it looks at. Returns: by index of the sequence, see DeviceStep."""
        kept = {}
        for index, sequence in enumerate(sequences):
            if first[index] < first[index + 1] and not sequence.request.local.samples_on_device:
                rows = logits[first[index] : first[index + 1]].float()
                kept[index] = torch.empty(rows.shape, dtype=torch.float32, pin_memory=True)
                kept[index].copy_(rows, non_blocking=True)
        return kept


def ends_group(layer: int, num_layers: int) -> bool:
    """Whether a layer is the last one of those that are handed over together."""
    num_left = num_layers - layer - 1
    return not (layer + 1) % LAYERS_HANDED_OVER or num_left in (0, 1, 2, 4)
