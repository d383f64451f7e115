"""Tensor parallelism: which part of a model a rank has, and how rank 0 tells the others what to compute.

A rank has whole heads of Q, K and V and some columns of gate and up, so what follows them (attention, swiglu) needs nobody else; of
output and down it has the matching columns of inputs, and the ranks' sums are added up behind both. Embedding and norms are whole
on every rank; the head is on rank 0 alone, which alone computes logits and samples. The residual and the output's bias enter the sum
on rank 0. Source: Shoeybi et al., Megatron-LM (2019).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.checkpoint import ModelConfig
from fastdeploy_pd.model.ops.base import StepInputs

NO_ROWS = np.zeros(0, np.int64)


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


def encode_step(inputs: StepInputs, is_watched: bool) -> bytes:
    """What another rank needs of a step: all but the rows of logits.

    Args:
        is_watched: something waits for its layers.
    """
    return msgspec.msgpack.encode((replace(inputs, logit_rows=NO_ROWS), is_watched), enc_hook=_encode)


def decode_step(data: bytes) -> tuple[StepInputs, bool]:
    """Returns: what `encode_step` was given. Raises: msgspec.MsgspecError: it is no step."""
    return _STEP.decode(data)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.int64:
        return value.shape, value.tobytes()
    raise NotImplementedError(f"a step has no {type(value).__name__}")


def _decode(kind: type, value: Any) -> Any:
    shape, data = value
    return np.frombuffer(bytearray(data), np.int64).reshape(shape)


_STEP = msgspec.msgpack.Decoder(tuple[StepInputs, bool], dec_hook=_decode)
