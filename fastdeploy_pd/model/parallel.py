"""Tensor parallelism: which part of a model a rank has, and how rank 0 tells the others what to compute.

A rank has whole heads of Q, K and V and some columns of gate and up, so what follows them (attention, swiglu) needs nobody else; of
output and down it has the matching columns of inputs, and the ranks' sums are added up behind both. Embedding and norms are whole
on every rank; the head is on rank 0 alone, which alone computes logits and samples. The residual and the output's bias enter the sum
on rank 0. Source: Shoeybi et al., Megatron-LM (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.checkpoint import ModelConfig
from fastdeploy_pd.request import Request


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes that compute a model together."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it samples, and adds what only one may add."""
        return self.index == 0

    def num_of(self, count: int) -> int:
        """Returns: how many of `count` heads it has: at least one."""
        return max(1, count // self.count)

    def part(self, count: int, size: int = 1) -> slice:
        """Its part of a dimension of `count` heads with `size` elements each; as core/layout.py: shard deals out KV heads."""
        first = self.index * count // self.count
        return slice(first * size, (first + self.num_of(count)) * size)

    def check(self, config: ModelConfig, ops_name: str) -> None:
        """Raises: ConfigError: the model cannot be dealt out to so many ranks; says the numbers. Or not with this backend."""
        if self.count > 1 and ops_name != "torch":
            raise ConfigError(
                f"--tensor-parallel-size is {self.count}; with --ops {ops_name} it must be 1 (torch computes on several ranks)"
            )
        for name, count in (
            ("num_attention_heads", config.num_heads),
            ("intermediate_size", config.intermediate_size),
        ):
            if count % self.count:
                raise ConfigError(
                    f"--tensor-parallel-size is {self.count}; it must divide this model's {name} ({count})"
                )
        if config.num_kv_heads % self.count and self.count % config.num_kv_heads:
            raise ConfigError(
                f"--tensor-parallel-size is {self.count}; it must divide this model's num_key_value_heads "
                f"({config.num_kv_heads}) or be a multiple of it"
            )


class Chore(msgspec.Struct, array_like=True):
    """What makes later steps start without delay."""

    what: str
    """compile: kernels for up to `count` sequences; capture: decode graphs for so many; rows: what steps of so many rows load;
    room: find out whether all ranks have memory for a layer of so many rows; layers: graphs of what such steps have between attentions."""
    count: int


class ToldStep(msgspec.Struct, array_like=True):
    """What rank 0 tells the others of a step."""

    token_ids: bytes  #: [n] int64
    sources: bytes  #: [n] int64, see StepInputs; or nothing
    spans: list[tuple[int, int]]  #: start and stop of each sequence
    tables: list[
        tuple[int, list[int]]
    ]  #: of each: which sequence of the last step it continues, or -1; the blocks that are new
    num_sampled: int  #: sequences whose next token is chosen
    is_decode: bool  #: each has one new token, and the next is chosen
    is_watched: bool  #: something waits for its layers
    chore: Chore | None = None  #: no step


_TOLD = msgspec.msgpack.Decoder(ToldStep)


class Teller:
    """Rank 0's side: a block table that only grows is sent once, then what is new in it."""

    def __init__(self) -> None:
        self._last: dict[
            int, tuple[list[int], int, int]
        ] = {}  # by id() of a table: it, its length, its place in the step

    def tell(
        self,
        sequences: Sequence[ScheduledSequence],
        token_ids: np.ndarray,
        sources: np.ndarray | None = None,
        num_sampled: int = 0,
        is_decode: bool = False,
        is_watched: bool = False,
    ) -> bytes:
        """Returns: a ToldStep, encoded."""
        last, self._last = self._last, {}
        tables: list[tuple[int, list[int]]] = []
        for place, sequence in enumerate(sequences):
            table = sequence.request.local.block_table
            _, num_known, known_place = last.get(id(table), (None, 0, -1))
            tables.append((known_place, table[num_known:]))
            self._last[id(table)] = table, len(table), place
        spans = [(s.start, s.stop) for s in sequences]
        given = b"" if sources is None else sources.tobytes()
        told = ToldStep(token_ids.tobytes(), given, spans, tables, num_sampled, is_decode, is_watched)
        return msgspec.msgpack.encode(told)


class Listener:
    """The other ranks' side."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def hear(self, data: bytes) -> tuple[ToldStep, list[ScheduledSequence]]:
        """Returns: the step, its sequences, of which block tables alone are known. Raises: msgspec.MsgspecError: it is no step."""
        told = _TOLD.decode(data)
        requests = []
        for place, blocks in told.tables:
            request = Request("", []) if place < 0 else self._requests[place]
            request.local.block_table.extend(blocks)
            requests.append(request)
        self._requests = requests
        return told, [ScheduledSequence(r, *span) for r, span in zip(requests, told.spans, strict=True)]


def chore_step(chore: Chore) -> bytes:
    """Returns: an encoded ToldStep that tells of a chore."""
    return msgspec.msgpack.encode(ToldStep(b"", b"", [], [], 0, False, False, chore))


def integers(data: bytes) -> np.ndarray:
    """Returns: [n] int64, writable."""
    return np.frombuffer(bytearray(data), np.int64)
