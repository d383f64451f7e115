"""The operations in PyTorch, on CPU or a GPU, in float32, bfloat16 or float16."""

# Torch has types in part.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as functional

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.ops.base import AttentionPlan, DecodeGroup, PromptSpan, head_rows, signed_tables, tile_rows
from fastdeploy_pd.model.ops.composed import ComposedOps, to_float32
from fastdeploy_pd.model.ops.environment import no_gpu
from fastdeploy_pd.model.weights import DummyTensor, RawTensor
from rdma_comm.cuda.driver import CudaUnavailable, driver

COMPUTE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_TYPES = {**COMPUTE_TYPES, "float8_e4m3": torch.float8_e4m3fn}
QUERY_ROWS = 128
GROUP_TIMEOUT_S = 60.0  # a rank that does not come to a sum for so long has failed


@dataclass(slots=True)
class _Rows:
    keys: torch.Tensor  #: rows of a layer seen as heads of blocks, in attention's order
    values: torch.Tensor


@dataclass(slots=True)
class _Group:
    q_rows: torch.Tensor
    mask: torch.Tensor  #: [num_sequences, 1, 1, num_slots] added to the scores
    rows: _Rows


@dataclass(slots=True)
class _Plan:
    block_ids: torch.Tensor
    offsets: torch.Tensor
    fresh_blocks: torch.Tensor
    spans: list[tuple[PromptSpan, _Rows]]
    groups: list[_Group]


class TorchOps(ComposedOps):
    """See `base.Ops`."""

    name = "torch"

    def __init__(self, dtype: str, num_threads: int, device: str = "cpu") -> None:
        """
        Args:
            device: as torch names it.
        Raises: ConfigError: dtype is not one it computes in, or there is no such device.
        """
        if dtype not in COMPUTE_TYPES:
            raise ConfigError(f"--dtype is {dtype!r}; with --ops torch it must be one of {', '.join(COMPUTE_TYPES)}")
        self.dtype = COMPUTE_TYPES[dtype]
        torch.set_num_threads(num_threads)
        self.device = find_device(device)
        self._ranks: Any = None

    def join(self, path: Path, rank: int, num_ranks: int) -> None:
        """Become one of several ranks. Returns when all have.

        Args:
            path: of a file that the ranks find each other by, the same for all; made by the first.
        Raises: RuntimeError: they do not come together within GROUP_TIMEOUT_S.
        """
        timeout = timedelta(seconds=GROUP_TIMEOUT_S)
        store = dist.FileStore(str(path), num_ranks)  # type: ignore[attr-defined]  # not in __all__
        store.set_timeout(timeout)
        self._store = store
        options: Any
        if self.device.type == "cpu":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # its stub calls it Options
            options._devices, options._threads = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")], 1
            options._timeout = timeout
            self._ranks = dist.ProcessGroupGloo(store, rank, num_ranks, options)
        else:
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast hangs where the fabric is not set up for it
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._ranks = dist.ProcessGroupNCCL(store, rank, num_ranks, options)
        # NCCL connects with the first sum, which must not be inside a captured graph
        found = self.all_reduce(torch.ones(1, device=self.device)).item()
        if found != num_ranks:
            raise RuntimeError(f"{num_ranks} ranks add up to {found}")

    def broadcast(self, x: torch.Tensor) -> None:
        """Put the first rank's x into every rank's, queued like the rest."""
        if self._ranks is not None:
            self._ranks.broadcast([x]).wait()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See base."""
        if self._ranks is not None:
            self._ranks.allreduce([x]).wait()  # of NCCL's: the stream waits, not we
        return x

    def weight(self, *parts: RawTensor | DummyTensor | np.ndarray) -> torch.Tensor:
        """See base."""
        return torch.tensor(to_float32(*parts), dtype=self.dtype, device=self.device)

    def cache(self, pool: Any, layout: KVLayout) -> list[torch.Tensor]:
        """See base."""
        if layout.dtype not in KV_TYPES:
            raise ConfigError(f"KV dtype is {layout.dtype!r}; with --ops torch it must be one of {', '.join(KV_TYPES)}")
        self._layout = layout
        shape = (layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        memory = torch.from_numpy(pool) if isinstance(pool, np.ndarray) else torch.as_tensor(pool, device=self.device)
        return list(memory.view(KV_TYPES[layout.dtype]).view(shape))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return sent(torch.from_numpy(array), self.device)

    def plan(self, plan: AttentionPlan) -> _Plan:
        """See composed."""
        return _Plan(
            self._to_device(plan.block_ids),
            self._to_device(plan.offsets),
            self._to_device(plan.fresh_blocks),
            [(span, self._rows(span.block_ids)) for span in plan.spans],
            [self._group(group) for group in plan.groups],
        )

    def _rows(self, block_ids: np.ndarray) -> _Rows:
        keys, values = head_rows(block_ids, self._layout.num_kv_heads)
        return _Rows(self._to_device(keys.reshape(-1)), self._to_device(values.reshape(-1)))

    def _group(self, group: DecodeGroup) -> _Group:
        num_slots = group.tables.shape[1] * self._layout.block_size
        is_past = torch.arange(num_slots, device=self.device)[None, :] >= self._to_device(group.lengths)[:, None]
        mask = torch.zeros(is_past.shape, dtype=self.dtype, device=self.device).masked_fill_(is_past, float("-inf"))
        return _Group(self._to_device(group.rows), mask[:, None, None, :], self._rows(group.tables))

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See composed."""
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See composed."""
        return functional.rms_norm(x, (x.shape[-1],), None, eps) * weight

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See composed."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def heads(self, x: torch.Tensor, head_dim: int) -> torch.Tensor:
        """See composed."""
        return x.view(x.shape[0], -1, head_dim)

    def split_heads(self, x: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
        """See composed."""
        return list(x.split(sizes, dim=1))

    def rotation(self, angles: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """See composed."""
        cos, sin = (self._to_device(t).to(self.dtype)[:, None, :] for t in signed_tables(angles))
        return cos, sin

    def rotary(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """See composed."""
        cos, sin = rotation
        first, second = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin)

    def rows(self, table: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        """See composed."""
        return table[self._to_device(indices)]

    def write_kv(self, cache: torch.Tensor, plan: _Plan, k: torch.Tensor, v: torch.Tensor) -> None:
        """See composed."""
        stored = indexable(cache)
        if len(plan.fresh_blocks):
            stored[plan.fresh_blocks] = 0
        for index, x in enumerate((k, v)):
            stored[plan.block_ids, index, :, plan.offsets] = indexable(rounded(x, cache.dtype))

    def attend(self, q: torch.Tensor, cache: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """See composed."""
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=self.device)
        for span, rows in plan.spans:
            self._attend_prompt(q, cache, span, rows, out)
        for group in plan.groups:
            out[group.q_rows] = self._attend_group(q[group.q_rows], cache, group)
        return out

    def _keys_values(self, cache: torch.Tensor, rows: _Rows, shape: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        heads_of_blocks = indexable(cache).view(-1, cache.shape[3] * cache.shape[4])
        keys, values = (
            heads_of_blocks.index_select(0, index).view(cache.dtype).view(shape).to(self.dtype)
            for index in (rows.keys, rows.values)
        )
        return keys, values

    def _attend_prompt(
        self, q: torch.Tensor, cache: torch.Tensor, span: PromptSpan, rows: _Rows, out: torch.Tensor
    ) -> None:
        num_kv_heads, head_dim, num_heads = cache.shape[2], q.shape[2], q.shape[1]
        keys, values = self._keys_values(cache, rows, [num_kv_heads, 1, -1, head_dim])
        step = tile_rows(num_heads, span.start + span.num_tokens, QUERY_ROWS)
        for first in range(0, span.num_tokens, step):
            last = min(first + step, span.num_tokens)
            tile = slice(span.row + first, span.row + last)
            seen = span.start + last  # the causal mask makes everything after it invisible
            grouped = q[tile].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
            visible = (
                torch.arange(seen, device=self.device)[None, :]
                <= torch.arange(span.start + first, seen, device=self.device)[:, None]
            )
            shape = (num_kv_heads, grouped.shape[1], seen, head_dim)
            attended = functional.scaled_dot_product_attention(
                grouped, keys[:, :, :seen].expand(shape), values[:, :, :seen].expand(shape), attn_mask=visible
            )
            out[tile] = attended.permute(2, 0, 1, 3).reshape(last - first, -1)

    def _attend_group(self, q: torch.Tensor, cache: torch.Tensor, group: _Group) -> torch.Tensor:
        num_sequences, num_heads, head_dim = q.shape
        num_kv_heads = cache.shape[2]
        keys, values = self._keys_values(cache, group.rows, [num_sequences, num_kv_heads, -1, head_dim])
        grouped = (q * head_dim**-0.5).view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = grouped @ keys.transpose(-1, -2) + group.mask
        return (scores.softmax(dim=-1) @ values).reshape(num_sequences, -1)

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        """See base."""
        return x.float().cpu().numpy()


def sent(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns: a copy on the device, or numbers themselves where that is the CPU; nobody waits for it."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def indexable(x: torch.Tensor) -> torch.Tensor:
    """Returns: x itself, or, of types of a byte, which torch does not index, its bytes."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns: x as a cache of this type keeps it; what fp8 has no number for becomes its largest, NaN stays NaN."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def find_device(name: str) -> torch.device:
    """Returns: the device that a flag names. Raises: ConfigError: torch cannot use it here; says why."""
    if name != "cpu" and not torch.cuda.is_available():
        try:
            driver()  # first: without one no other torch helps
        except CudaUnavailable as error:
            raise no_gpu(name, error) from error
        reason = (
            f"this torch ({torch.__version__}) was built without CUDA: "
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
            if torch.version.cuda is None
            else "it finds no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
        raise ConfigError(f"--device is {name!r}; torch cannot use one here: {reason}")
    return torch.device(name) if name == "cpu" else torch.device(name, torch.cuda.current_device())
