"""Turns a `Batch` into tensors, runs the decoder, samples. The only builder of tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import KVLayout, shard
from fastdeploy_pd.errors import ConfigError, FastDeployPDError
from fastdeploy_pd.model.checkpoint import ModelConfig
from fastdeploy_pd.model.decoder import Decoder
from fastdeploy_pd.model.ops.base import AttentionPlan, DecodeGroup, Ops, PromptSpan, StepInputs
from fastdeploy_pd.model.ops.environment import default_num_threads, prepare_environment
from fastdeploy_pd.model.parallel import Listener, Rank, Teller, integers
from fastdeploy_pd.model.sampler import sample, token_logprobs
from fastdeploy_pd.model.weights import Checkpoint
from fastdeploy_pd.request import Request, TokenLogprobs

OPS_NAMES = ("paddle", "torch", "reference")
MIN_GROUP_BLOCKS = 8  # shorter sequences are attended to together: padding costs less than another round of operations
OnLayer = Callable[[int], None]
MAX_GROUP_TOKENS = 65536  # bounds the K and V that are gathered at once


@dataclass(slots=True)
class FinishedStep:
    """A step that was computed when it was launched; see engine/context.py."""

    results: list[StepOutput]

    def poll(self) -> bool:
        """True: the outputs are there."""
        return True

    def outputs(self) -> list[StepOutput]:
        """One output a sequence."""
        return self.results


@dataclass(slots=True)
class StepOutput:
    """What a step yields for one sequence."""

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    error: FastDeployPDError | None = None  #: a token id is not in the vocabulary, or the logits are not numbers


def make_ops(
    name: str, config: ModelConfig, dtype: str = "float32", num_threads: int | None = None, device: str = "cpu"
) -> Ops:
    """Returns: a backend by name. Raises: ConfigError: unknown, not installed, or not for this dtype or device."""
    if name not in OPS_NAMES:
        raise ConfigError(f"--ops is {name!r}; it must be one of {', '.join(OPS_NAMES)}")
    if dtype != "float32" and name != "torch":
        raise ConfigError(
            f"--dtype is {dtype!r}; with --ops {name} it must be float32 (torch computes in bfloat16 and float16 too)"
        )
    num_threads = default_num_threads() if num_threads is None else num_threads
    prepare_environment()
    try:
        if name == "paddle":
            from fastdeploy_pd.model.ops.paddle import PaddleOps

            return PaddleOps(config.num_heads, num_threads)
        if name == "torch":
            if device != "cpu":
                from fastdeploy_pd.model.ops.cuda import CudaOps

                return CudaOps(dtype, num_threads, device)
            from fastdeploy_pd.model.ops.torch import TorchOps

            return TorchOps(dtype, num_threads, device)
    except ImportError as error:
        raise not_installed(name, error) from error
    from fastdeploy_pd.model.ops.reference import ReferenceOps

    return ReferenceOps()


def not_installed(name: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"--ops {name} needs a package that is not installed ({error}): {sys.executable} -m pip install 'fastdeploy-pd[{name}]'"
    )


class ModelRunner:
    """A model, and the KV pool that it works on."""

    depth = 1  #: steps in flight

    def __init__(
        self,
        directory: Path,
        ops_name: str,
        dtype: str = "float32",
        num_threads: int | None = None,
        device: str = "cpu",
        rank: Rank | None = None,
    ) -> None:
        """Load the model, or a rank's part of it; `attach` comes before `execute`.

        Args:
            dtype: compute type of weights and activations.
            num_threads: threads of a product; OMP_NUM_THREADS or half the cores when None.
            rank: of several: the first one's `announce` must tell the others of each step, which they `follow`.
        Raises: ModelLoadError, ConfigError.
        """
        self.config = ModelConfig.from_directory(directory)
        self.rank = rank or Rank()
        self.rank.check(self.config, ops_name)
        num_threads = default_num_threads(self.rank.count) if num_threads is None else num_threads
        #: called with each step, and who is told of its layers, before it is computed; returns who is told instead
        self.announce: Callable[[bytes, OnLayer | None], OnLayer | None] = lambda _, on_layer: on_layer
        self._teller, self._listener = Teller(), Listener()
        ops = make_ops(ops_name, self.config, dtype, num_threads, device)
        self.decoder = Decoder(self.config, Checkpoint(directory), ops, self.rank)

    def attach(self, pool: Any, layout: KVLayout, max_num_seqs: int = 8, max_model_len: int | None = None) -> None:
        """
        Args:
            pool: [layout.pool_bytes] uint8 on the device, shared with the transfer; K and V are written into it in place.
            layout: what `kv_layout` gave for this model; the rank's part of it.
            max_num_seqs: most sequences of a step; a device prepares for them.
            max_model_len: most tokens of a sequence; what the model was made for when None.
        Raises: ConfigError: they do not fit the model or each other.
        """
        expected = self.kv_layout(self.config, layout.num_blocks, layout.block_size, layout.dtype)
        if self.rank.count > 1:
            expected = shard(expected, self.rank.index, self.rank.count)
        if layout != expected:
            raise ConfigError(f"the KV layout does not fit the model: {'; '.join(layout.differences(expected))}")
        if isinstance(pool, np.ndarray) and (pool.dtype != np.uint8 or pool.shape != (layout.pool_bytes,)):
            raise ConfigError(f"the KV pool is {pool.dtype}{list(pool.shape)}; it must be uint8[{layout.pool_bytes}]")
        self.layout = layout
        self.caches = self.decoder.ops.cache(pool, layout)

    def join(self, group: Path) -> None:
        """Find the other ranks, each of which calls this. Returns when all have.

        Args:
            group: a path that is the same for all.
        Raises: ConfigError: they cannot reach each other.
        """
        ops: Any = self.decoder.ops  # of those that compute on several ranks, see __init__
        try:
            ops.join(group, self.rank.index, self.rank.count)
        except RuntimeError as error:
            raise ConfigError(
                f"--tensor-parallel-size is {self.rank.count}; rank {self.rank.index} does not reach the others: {error}"
            ) from error

    @staticmethod
    def kv_layout(config: ModelConfig, num_blocks: int, block_size: int, dtype: str) -> KVLayout:
        """Returns: the pool's layout for a model."""
        return KVLayout(config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_dim, dtype)

    def samples_on_device(self, request: Request) -> bool:
        """Whether a request's next token can be computed before the CPU knows its last one."""
        return False

    def launch(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> FinishedStep:
        """See `execute`. Returns: the step, which has run."""
        return FinishedStep(self.execute(batch, on_layer))

    @property
    def is_nearly_done(self) -> bool:
        """See engine/context.py."""
        return True

    @property
    def is_queued(self) -> bool:
        """See engine/context.py."""
        return True

    @property
    def can_advance(self) -> bool:
        """See engine/context.py."""
        return False

    def warm_up(self, pool: BlockPool, can_decode: bool, most_tokens: int, most_alone: int) -> int:
        """Compute for nobody, in blocks that are free.

        Args:
            can_decode: whether sequences will get more than their first token here at first; a role may change.
            most_tokens: of prompts in a step, streams' aside.
            most_alone: the same of a prompt with nothing beside it.
        Returns: how many a prompt with nothing beside it may have: most_alone, or fewer where memory lacks, but at least most_tokens.
        """
        self._compute_for_nobody(pool, [1])
        return most_alone

    def prepare_more(self) -> bool:
        """See engine/context.py."""
        return False

    def _compute_for_nobody(self, pool: BlockPool, lengths: Sequence[int]) -> None:
        requests = [Request(f"warm-up-{index}", [0] * length) for index, length in enumerate(lengths)]
        for request in requests:
            request.local.block_table = pool.allocate(pool.num_blocks_for(request.num_tokens))
        batch = Batch([ScheduledSequence(r, 0, r.num_tokens) for r in requests], self.layout.block_size)
        self.launch(batch).outputs()
        for request in requests:
            pool.release(request.local.block_table)

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> list[StepOutput]:
        """Compute a batch.

        Args:
            on_layer: see engine/context.py.
        Returns: one output a sequence, in the batch's order. What is wrong with one of them is its own error alone.
        """
        token_ids = np.array([t for s in batch.sequences for t in s.token_ids], dtype=np.int64)
        errors = self._unknown_tokens(batch, token_ids)
        if self.rank.count > 1:
            data = self._teller.tell(batch.sequences, token_ids, is_watched=on_layer is not None)
            on_layer = self.announce(data, on_layer)
        rows = self._logit_rows(batch)
        flat_rows = np.array([r for wanted in rows for r in wanted], dtype=np.int64)
        logits = self.decoder.forward(self._inputs(batch.sequences, token_ids, flat_rows), self.caches, on_layer)
        outputs, first = [], 0
        for index, (sequence, wanted) in enumerate(zip(batch.sequences, rows, strict=True)):
            try:
                if index in errors:
                    raise errors[index]
                outputs.append(step_output(sequence, logits[first : first + len(wanted)]))
            except FastDeployPDError as error:
                outputs.append(StepOutput(error=error))
            first += len(wanted)
        return outputs

    def follow(self, data: bytes, on_layer: OnLayer) -> FinishedStep | None:
        """Compute this rank's part of what the first rank announces.

        Returns: the step, if its layers are watched: its `poll` tells on_layer of them, unless that was done here.
        """
        told, sequences = self._listener.hear(data)
        inputs = self._inputs(sequences, integers(told.token_ids), integers(b""))
        self.decoder.forward(inputs, self.caches, on_layer if told.is_watched else None)
        return FinishedStep([]) if told.is_watched else None

    def _inputs(
        self,
        sequences: Sequence[ScheduledSequence],
        token_ids: np.ndarray,
        rows: np.ndarray,
        sources: np.ndarray | None = None,
    ) -> StepInputs:
        positions = np.concatenate([np.arange(s.start, s.stop, dtype=np.int64) for s in sequences])
        return StepInputs(token_ids, positions, rows, attention_plan(sequences, self.layout.block_size), sources)

    def _unknown_tokens(self, batch: Batch, token_ids: np.ndarray) -> dict[int, FastDeployPDError]:
        """Backends don't look where they read, and an id past the table would be someone else's memory: it becomes 0, in place.

        Returns: what to say of the sequences that had such ids, by index.
        """
        is_unknown = (token_ids < 0) | (token_ids >= self.config.vocab_size)
        if not is_unknown.any():
            return {}
        errors, first = {}, 0
        for index, sequence in enumerate(batch.sequences):
            found = np.flatnonzero(is_unknown[first : first + sequence.num_tokens])
            if len(found):
                errors[index] = FastDeployPDError(
                    f"request {sequence.request.request_id} has token id {token_ids[first + found[0]]}; it must be between "
                    f"0 and {self.config.vocab_size - 1}",
                    code="unknown_token",
                )
            first += sequence.num_tokens
        token_ids[is_unknown] = 0
        return errors

    def _logit_rows(self, batch: Batch) -> list[list[int]]:
        """Rows whose logits are needed: the last where a token is sampled, those before prompt tokens where asked for."""
        rows, first = [], 0
        for sequence in batch.sequences:
            wanted = []
            if sequence.request.sampling.prompt_logprobs is not None:
                wanted = [first + p - 1 - sequence.start for p in _scored_positions(sequence)]
            if sequence.needs_sample:
                wanted.append(first + sequence.num_tokens - 1)
            rows.append(wanted)
            first += sequence.num_tokens
        return rows


def attention_plan(sequences: Sequence[ScheduledSequence], block_size: int) -> AttentionPlan:
    """Where a step's K and V go, and which sequences are attended to one by one or together."""
    num_rows = sum(s.stop - s.start for s in sequences)
    block_ids, offsets = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    fresh_blocks: list[int] = []
    spans: list[PromptSpan] = []
    singles: list[tuple[int, list[int], int]] = []
    row = 0
    for sequence in sequences:
        start, stop = sequence.start, sequence.stop
        blocks = sequence.request.local.block_table[: -(-stop // block_size)]
        if start <= stop // block_size * block_size < stop:
            fresh_blocks.append(blocks[-1])
        if stop - start == 1:
            singles.append((row, blocks, stop))
        else:
            table, places = np.array(blocks, dtype=np.int64), np.arange(start, stop, dtype=np.int64)
            own = slice(row, row + stop - start)
            block_ids[own], offsets[own] = table[places // block_size], places % block_size
            spans.append(PromptSpan(row, stop - start, start, table))
        row += stop - start
    if singles:  # at once: there may be hundreds
        rows = [row for row, _, _ in singles]
        block_ids[rows] = [blocks[-1] for _, blocks, _ in singles]
        offsets[rows] = [(stop - 1) % block_size for _, _, stop in singles]
    return AttentionPlan(
        block_ids, offsets, np.array(fresh_blocks, dtype=np.int64), spans, decode_groups(singles, block_size)
    )


def decode_groups(singles: Sequence[tuple[int, Sequence[int], int]], block_size: int) -> list[DecodeGroup]:
    """Group one-token sequences by length, so that a long one doesn't pad all the others to its own.

    Args:
        singles: (row, [ceil(length / block_size)] block ids, length) each, in rising order of row.
    """
    by_width: dict[int, list[tuple[int, Sequence[int], int]]] = {}
    for single in singles:
        width = max(MIN_GROUP_BLOCKS, 1 << (len(single[1]) - 1).bit_length())
        by_width.setdefault(width, []).append(single)
    groups = []
    for width in sorted(by_width):
        members = by_width[width]
        most = max(1, MAX_GROUP_TOKENS // (width * block_size))
        groups += [_decode_group(members[i : i + most]) for i in range(0, len(members), most)]
    return groups


def _decode_group(members: list[tuple[int, Sequence[int], int]]) -> DecodeGroup:
    width = max(len(table) for _, table, _ in members)
    tables = [[*table, *[table[0]] * (width - len(table))] for _, table, _ in members]
    rows, lengths = ([m[field] for m in members] for field in (0, 2))
    return DecodeGroup(np.array(rows, np.int64), np.array(tables, np.int64), np.array(lengths, np.int64))


def _scored_positions(sequence: ScheduledSequence) -> range:
    """Prompt positions whose log-probability this step's logits give: (start, stop], within the prompt."""
    return range(sequence.start + 1, min(sequence.stop, len(sequence.request.prompt_token_ids) - 1) + 1)


def step_output(sequence: ScheduledSequence, logits: np.ndarray) -> StepOutput:
    """What a sequence asked for, from its rows of logits."""
    request, sampling = sequence.request, sequence.request.sampling
    output = StepOutput()
    if sampling.prompt_logprobs is not None:
        scored: list[TokenLogprobs | None] = [None] if sequence.start == 0 else []
        for row, position in enumerate(_scored_positions(sequence)):
            scored.append(token_logprobs(logits[row], request.prompt_token_ids[position], sampling.prompt_logprobs))
        output.prompt_logprobs = tuple(scored)
    if sequence.needs_sample:
        output.token_id = sample(logits[-1], request)
        if sampling.logprobs is not None:
            output.logprobs = token_logprobs(logits[-1], output.token_id, sampling.logprobs)
    return output
