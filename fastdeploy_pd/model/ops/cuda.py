"""The operations on an NVIDIA GPU: cuBLAS and cuDNN through PyTorch, and kernels of our own for what lies between."""

# Torch has types in part, Triton none.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdeploy_pd.core.layout import ITEM_BYTES, KVLayout
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.kernels import attention, heads, linear, rows
from fastdeploy_pd.model.ops.base import DecodeGroup, PromptSpan, StepInputs
from fastdeploy_pd.model.ops.sums import SmallSums
from fastdeploy_pd.model.ops.torch import TorchOps, indexable
from fastdeploy_pd.model.weights import DummyTensor, RawTensor
from rdma_comm.cuda.driver import release_gil
from rdma_comm.errors import RdmaError

PADDING = 128  # cuDNN sees prompts in multiples of it: it builds a plan for each length it meets, 30 ms each
ROW_STEP = 16  # rows of a step, and of logits, come in multiples of it, but for one, ...
MANY_ROW_STEPS = 512  # ... or, above this, of PADDING: products take as long for fewer
FEWEST_FOR_CUDNN = 512  # tokens of a whole prompt; below, one launch for all prompts beats one each
NOWHERE = -1
# Above both, cuBLAS adds products more slowly to the very matrix that it writes (Llama-3-8B's down: 1.55, else, with a copy, 1.39 ms).
MANY_ROWS, LONG_PRODUCT = 4096, 8192
MOST_KEY_BYTES = 65536  # of a block's K of one head: attention has two such and two of V in a processor's shared memory
ALIGNMENT = 32  # of lists and of tables' rows, in entries: kernels are compiled for aligned ones, and again for others
LARGEST_BATCH = 8  # of equal prompts, in powers of two: plans again

_log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # weights are only read


@dataclass(slots=True)
class CudaStep:
    """A step's inputs on the device, int32 throughout."""

    token_ids: torch.Tensor  #: [n]
    positions: torch.Tensor  #: [n]
    slots: torch.Tensor  #: [n], see kernels.heads
    num_rows: int  #: those after it are padding
    num_logits: int = 0  #: m
    logit_rows: torch.Tensor | None = None  #: [m] and padding; None: all
    sources: torch.Tensor | None = None  #: [n], see StepInputs
    single_rows: torch.Tensor | None = None  #: [s] rows of sequences with one new token
    tables: torch.Tensor | None = None  #: [s, any]
    lengths: torch.Tensor | None = None  #: [s]
    splits: int = 1
    tiles: torch.Tensor | None = None  #: of other prompts, see kernels.attention
    tile_tables: torch.Tensor | None = None
    whole: Sequence[tuple[int, int, int]] = ()  #: first row, prompts, tokens each: computed from their first token on


class CudaOps(TorchOps):
    """See `base.Ops`."""

    num_loaders = 8  # reading a checkpoint and copying it to the device overlap

    def __init__(self, dtype: str, num_threads: int, device: str) -> None:
        """Raises: ConfigError: see TorchOps."""
        super().__init__(dtype, num_threads, device)
        self._num_processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.sampled = torch.zeros(
            0, dtype=torch.int32, device=self.device
        )  #: tokens chosen in the last step, by row of logits
        self._small_sums: SmallSums | None = None
        self._is_alone = False

    def join(self, path: Path, rank: int, num_ranks: int) -> None:
        """See TorchOps."""
        super().join(path, rank, num_ranks)
        release_gil()
        small_sums = None
        try:
            small_sums = SmallSums(self._store, rank, num_ranks, self.dtype, self.device)
        except RdmaError as error:
            _log.warning("small sums of ranks are NCCL's too, which takes longer: %s", error)
        num_able = super().all_reduce(torch.full((1,), float(small_sums is not None), device=self.device)).item()
        self._small_sums = small_sums if num_able == num_ranks else None
        self.all_reduce(
            torch.zeros(ALIGNMENT, dtype=self.dtype, device=self.device)
        )  # its kernel is loaded outside of graphs

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See base."""
        if self._is_alone or (self._small_sums is not None and self._small_sums.add_up(x)):
            return x
        return super().all_reduce(x)

    def adds_up_itself(self, count: int) -> bool:
        """Returns: whether sums of so many elements, where there are any, are none of NCCL's."""
        return self._ranks is None or (self._small_sums is not None and self._small_sums.has_room(count))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing is added up inside: what ranks compute is for nobody, and one may fail where another does not."""
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def weight(self, *parts: RawTensor | DummyTensor | np.ndarray) -> torch.Tensor:
        """See base."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        first = 0
        for part in parts:
            self._fill(out[first : first + part.shape[0]], part)
            first += part.shape[0]
        return out

    def _fill(self, out: torch.Tensor, part: RawTensor | DummyTensor | np.ndarray) -> None:
        if isinstance(part, DummyTensor):
            if part.whole is not None:
                whole = torch.empty(part.whole.shape, dtype=self.dtype, device=self.device)
                self._fill(whole, part.whole)
                out.copy_(whole[part.index])
            elif part.std == 0.0:
                out.fill_(1.0)
            else:
                generator = torch.Generator(self.device).manual_seed(part.seed)
                out.normal_(0.0, part.std, generator=generator)
            return
        array = part if isinstance(part, np.ndarray) else part.array
        host = torch.from_numpy(array)
        out.copy_(host.view(torch.bfloat16) if host.dtype == torch.uint16 else host)

    def cache(self, pool: Any, layout: KVLayout) -> list[torch.Tensor]:
        """See base."""
        if layout.block_size < 16 or layout.block_size & (layout.block_size - 1):
            raise ConfigError(f"--block-size is {layout.block_size}; on a GPU it must be a power of two of at least 16")
        if layout.head_dim < 16 or layout.head_dim & (layout.head_dim - 1):
            raise ConfigError(f"head_dim is {layout.head_dim}; on a GPU it must be a power of two of at least 16")
        item_bytes = max(2, ITEM_BYTES[layout.dtype])  # fp8 becomes what is computed in on its way into the products
        most = MOST_KEY_BYTES // (layout.head_dim * item_bytes)
        if layout.block_size > most:
            raise ConfigError(
                f"--block-size is {layout.block_size}; on a GPU, with head_dim {layout.head_dim} in {layout.dtype}, it must be at most {most}"
            )
        layers = super().cache(pool, layout)
        self._layers = torch.as_strided(
            layers[0], (len(layers), *layers[0].shape), (layout.layer_bytes // layers[0].itemsize, *layers[0].stride())
        )
        self._zero = torch.zeros((), dtype=indexable(self._layers).dtype, device=self.device)
        return layers

    def rope(self, frequencies: np.ndarray, max_positions: int) -> None:
        """See base."""
        places = torch.arange(max_positions, dtype=torch.float64, device=self.device)
        angles = torch.outer(places, torch.from_numpy(frequencies).to(self.device))
        self._rotation = torch.cat([angles.cos(), angles.sin()], dim=1).float()

    def running(self) -> AbstractContextManager[None]:
        """Returns: what a step's operations are queued in; to enter it for each would cost more than they do."""
        # never the memory-efficient one: torch 2.11's is wrong for 64 n + 1 masked rows over keys expanded for several heads
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel(backends, set_priority=True)

    def splits(self, num_sequences: int, max_blocks: int) -> int:
        """Returns: parts that a sequence's attention is split into."""
        return attention.num_splits(num_sequences, self._layout.num_kv_heads, max_blocks, self._num_processors)

    def prepare(self, inputs: StepInputs) -> CudaStep:
        """See base. One copy to the device for all."""
        plan, num_rows = inputs.plan, len(inputs.token_ids)
        whole, tiled = _sort(plan.spans) if self.dtype != torch.float32 else ([], plan.spans)  # cuDNN has no float32
        ends = [first + count * _padded_length(size) for first, count, size in whole]
        num_padding = usual_rows(max([num_rows, *ends])) - num_rows
        num_logits = len(inputs.logit_rows)
        fields: dict[str, np.ndarray] = {
            "token_ids": _padded(inputs.token_ids, num_padding, 0),
            "positions": _padded(inputs.positions, num_padding, 0),
            "slots": _padded(plan.block_ids * self._layout.block_size + plan.offsets, num_padding, NOWHERE),
            "logit_rows": _padded(inputs.logit_rows, usual_rows(num_logits) - num_logits, 0),
        }
        if inputs.sources is not None:
            fields["sources"] = _padded(inputs.sources, num_padding, NOWHERE)
        if plan.groups:
            fields |= _singles(plan.groups)
        if tiled:
            fields["tiles"], fields["tile_tables"] = _tiles(tiled)
        self.clear_blocks(plan.fresh_blocks)
        step = CudaStep(**self._send(fields), num_rows=num_rows, num_logits=num_logits, whole=whole)
        if step.tables is not None:
            step.splits = self.splits(*step.tables.shape)
        return step

    def step_for_nobody(self, num_tokens: int) -> CudaStep:
        """Returns: one whose rows are a prompt that is stored nowhere."""
        nothing = torch.zeros(num_tokens, dtype=torch.int32, device=self.device)
        whole, _ = _sort([PromptSpan(0, num_tokens, 0, np.zeros(0, np.int64))])
        is_cudnn = self.dtype != torch.float32 and num_tokens % PADDING == 0
        return CudaStep(nothing, nothing, nothing + NOWHERE, num_tokens, whole=whole if is_cudnn else ())

    def clear_blocks(self, block_ids: np.ndarray) -> None:
        """Blocks that are begun hold nothing of others, in any layer: who gets them by a transfer reads them whole."""
        if len(block_ids):  # a number of the CPU's in place of a tensor would wait for all that is queued
            indexable(self._layers)[:, self._to_device(block_ids.astype(np.int64))] = self._zero

    def _send(self, fields: dict[str, np.ndarray]) -> dict[str, Any]:
        sizes = [-(-field.size // ALIGNMENT) * ALIGNMENT for field in fields.values()]
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
        flat = host.numpy()
        first = 0
        for field, size in zip(fields.values(), sizes, strict=True):
            flat[first : first + field.size] = field.reshape(-1)
            first += size
        parts = host.to(self.device, non_blocking=True).split(sizes)
        return {
            name: part[: field.size].view(field.shape)
            for (name, field), part in zip(fields.items(), parts, strict=True)
        }

    def embedding(self, table: torch.Tensor, step: CudaStep) -> torch.Tensor:
        """See base."""
        return rows.embedding(table, step.token_ids, step.sources, self.sampled)

    def norm_linear(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See base."""
        if len(x) <= linear.MOST_ROWS:
            return linear.few_rows(x, weight, bias, norm, eps)
        return functional.linear(rows.rms_norm(x, norm, eps), weight, bias)

    def norm_swiglu(self, x: torch.Tensor, norm: torch.Tensor, eps: float, gate_up: torch.Tensor) -> torch.Tensor:
        """See base."""
        if len(x) <= linear.MOST_ROWS:
            return linear.few_rows(x, gate_up, None, norm, eps, is_swiglu=True)
        return rows.swiglu(functional.linear(rows.rms_norm(x, norm, eps), gate_up))

    def linear_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """See base."""
        if len(x) <= linear.MOST_ROWS:
            return linear.few_rows(x, weight, bias, residual=residual)
        if residual is None:
            return functional.linear(x, weight, bias)
        if bias is not None:
            residual += bias
        if len(x) > MANY_ROWS and weight.shape[1] > LONG_PRODUCT:
            return torch.addmm(residual, x, weight.t())
        return torch.addmm(residual, x, weight.t(), out=residual)

    def rotate_and_store(
        self, qkv: torch.Tensor, norm: torch.Tensor | None, eps: float, cache: torch.Tensor, step: CudaStep
    ) -> torch.Tensor:
        """See base. Returns: qkv itself, turned in place."""
        heads.rotate_and_store(qkv, norm, eps, step.positions, step.slots, self._rotation, cache)
        return qkv

    def attention(
        self, q: torch.Tensor, cache: torch.Tensor, step: CudaStep, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See base. Whole prompts want `running`. With `into` the result is there."""
        head_dim, num_kv_heads = self._layout.head_dim, self._layout.num_kv_heads
        num_heads = q.shape[1] // head_dim - 2 * num_kv_heads
        out = into
        if out is None:
            out = torch.empty((len(q), num_heads * head_dim), dtype=q.dtype, device=self.device)
        if step.tables is not None and step.single_rows is not None and step.lengths is not None:
            attention.decode(q, step.single_rows, cache, step.tables, step.lengths, out, step.splits)
        if step.tiles is not None and step.tile_tables is not None:
            attention.prompt(q, step.tiles, cache, step.tile_tables, out)
        for first, num_prompts, num_tokens in step.whole:
            attended = self._attend_whole(q, first, num_prompts, num_tokens)
            if into is None and len(q) == num_prompts * num_tokens:
                return attended.reshape(out.shape)  # as it lies
            out[first : first + num_prompts * num_tokens].view(attended.shape).copy_(attended)
        if len(q) > step.num_rows:
            out[step.num_rows :] = 0  # what padding yields is multiplied by 0 elsewhere: it must be numbers
        return out

    def _attend_whole(self, qkv: torch.Tensor, first: int, num_prompts: int, num_tokens: int) -> torch.Tensor:
        """Prompts without a past, by cuDNN, in one of few lengths: what follows a prompt is masked like any future.

        Returns: [num_prompts, num_tokens, num_heads, head_dim].
        """
        padded = _padded_length(num_tokens)
        head_dim, num_kv_heads = self._layout.head_dim, self._layout.num_kv_heads
        packed = qkv[first : first + num_prompts * padded].view(num_prompts, padded, -1, head_dim).transpose(1, 2)
        q, k, v = packed.split([packed.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attended.transpose(1, 2)[:, :num_tokens]

    def logits(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, head: torch.Tensor, step: CudaStep
    ) -> torch.Tensor:
        """See base."""
        if step.logit_rows is None:
            return functional.linear(rows.rms_norm(x, norm, eps), head)
        return functional.linear(rows.rms_norm(x[step.logit_rows], norm, eps), head)[: step.num_logits]


def _padded_length(num_tokens: int) -> int:
    return -(-num_tokens // PADDING) * PADDING


def usual_rows(num_rows: int) -> int:
    """Returns: the next number that is prepared for, of a step or of its logits: of others cuBLAS may take a kernel that is not
    loaded, which waits for the device. One stays one: a prompt of one token is rounded as a stream is, whose graph has one row."""
    if num_rows == 1:
        return 1
    return _padded_length(num_rows) if num_rows > MANY_ROW_STEPS else -(-num_rows // ROW_STEP) * ROW_STEP


def row_counts(most: int) -> list[int]:
    """Returns: falling numbers of rows that steps of up to `most` rows have."""
    many = range(_padded_length(most), MANY_ROW_STEPS, -PADDING)
    return [*many, *range(min(usual_rows(max(most, 2)), MANY_ROW_STEPS), 0, -ROW_STEP), 1]


def _padded(array: np.ndarray, count: int, value: int) -> np.ndarray:
    return np.concatenate([array, np.full(count, value, array.dtype)]) if count else array


def _sort(spans: list[PromptSpan]) -> tuple[list[tuple[int, int, int]], list[PromptSpan]]:
    """Returns: prompts for cuDNN as (first row, prompts, tokens each), neighbours of one length together; the others."""
    whole: list[tuple[int, int, int]] = []
    others = []
    for span in spans:
        if span.start or span.num_tokens < FEWEST_FOR_CUDNN:
            others.append(span)
            continue
        row, count, num_tokens = whole[-1] if whole else (-1, 0, 0)
        is_next = num_tokens == span.num_tokens and row + count * num_tokens == span.row
        if is_next and num_tokens % PADDING == 0 and count < LARGEST_BATCH:
            whole[-1] = (row, count + 1, num_tokens)
        else:
            whole.append((span.row, 1, span.num_tokens))
    return [piece for group in whole for piece in _powers_of_two(*group)], others


def _powers_of_two(row: int, count: int, num_tokens: int) -> list[tuple[int, int, int]]:
    pieces = []
    while count:
        size = 1 << (count.bit_length() - 1)
        pieces.append((row, size, num_tokens))
        row, count = row + size * num_tokens, count - size
    return pieces


def _singles(groups: list[DecodeGroup]) -> dict[str, np.ndarray]:
    width = max(g.tables.shape[1] for g in groups)
    tables = np.zeros((sum(len(g.rows) for g in groups), -(-width // ALIGNMENT) * ALIGNMENT), np.int64)
    first = 0
    for group in groups:
        tables[first : first + len(group.rows), : group.tables.shape[1]] = group.tables
        first += len(group.rows)
    return {
        "single_rows": np.concatenate([g.rows for g in groups]),
        "tables": tables,
        "lengths": np.concatenate([g.lengths for g in groups]),
    }


def _tiles(spans: list[PromptSpan]) -> tuple[np.ndarray, np.ndarray]:
    """See kernels.attention.prompt. The last tiles of a prompt see most: they go first."""
    tiles, begin = [], 0
    for span in spans:
        for first in range(0, span.num_tokens, attention.TILE_ROWS):
            count = min(attention.TILE_ROWS, span.num_tokens - first)
            tiles.append((span.row + first, count, span.start + first, begin))
        begin += len(span.block_ids)
    tiles.sort(key=lambda tile: -tile[2])
    return np.array(tiles, np.int64), np.concatenate([span.block_ids for span in spans])
