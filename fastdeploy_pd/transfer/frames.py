"""What ends of StreamTransfer say to each other, as length-prefixed MessagePack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
import numpy as np

from fastdeploy_pd.errors import TransferError
from fastdeploy_pd.transfer.layout import ID_BYTES, unpack_ids


class WriteFrame(msgspec.Struct, tag="w", array_like=True):
    """Announces the same blocks of one or more layers; with tcp their bytes follow, layer by layer."""

    epoch: str
    nonce: int
    layers: list[int]  #: the same blocks in each
    remote: bytes  #: block ids, as pack_ids makes them
    local: bytes
    block_bytes: int  #: of each in a layer

    @property
    def num_blocks(self) -> int:
        """How many it writes, counted in each layer."""
        return len(self.layers) * (len(self.remote) // ID_BYTES)

    @property
    def num_bytes(self) -> int:
        """How many bytes it writes."""
        return self.num_blocks * self.block_bytes

    def has_blocks_of(self, other: WriteFrame) -> bool:
        """Whether both write the same blocks from the same blocks."""
        return msgspec.structs.replace(self, layers=other.layers) == other

    def after(self, last: WriteFrame | None) -> WriteFrame | RepeatFrame:
        """Returns: what tells a receiver of it that has heard `last`."""
        if last is not None and self.has_blocks_of(last):
            return RepeatFrame(self.layers)
        return self

    def cut(self, most_blocks: int, num_parts: int) -> Iterator[WriteFrame]:
        """
        Args:
            most_blocks: of a frame, counted in each layer; num_parts: frames that layers are spread over if they are as many.
        Yields: frames that write the same together, each with lists of its own: the sender joins what waits.
        """
        most_bytes = max(1, most_blocks) * ID_BYTES
        at_once = max(1, min(most_bytes // max(1, len(self.remote)), -(-len(self.layers) // num_parts)))
        for number in range(0, len(self.layers), at_once):
            for first in range(0, len(self.remote), most_bytes):
                layers, part = self.layers[number : number + at_once], slice(first, first + most_bytes)
                yield WriteFrame(self.epoch, self.nonce, layers, self.remote[part], self.local[part], self.block_bytes)

    def pairs(self, num_source_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            num_source_blocks: of the sender's pool.
        Returns: ([n] blocks of the sender's pool, [n] of the receiver's).
        Raises: TransferError: they are not equally many, or there is none of that number.
        """
        source, target = unpack_ids(self.local), unpack_ids(self.remote)
        if len(source) != len(target):
            raise TransferError("source and target blocks differ in number")
        if not len(source) or not self.layers:
            raise TransferError("a write without blocks")
        if not 0 <= source.min() <= source.max() < num_source_blocks:
            raise TransferError(f"blocks {source.min()} to {source.max()} are not all in the peer's pool")
        return source, target


class RepeatFrame(msgspec.Struct, tag="r", array_like=True):
    """Write the blocks of this connection's last WriteFrame in other layers."""

    layers: list[int]


class EndFrame(msgspec.Struct, tag="e", array_like=True):
    """No more writes of the epoch follow; so many bytes were written in all."""

    epoch: str
    nonce: int
    num_bytes: int


class Notice(msgspec.Struct, array_like=True):
    """Receiver to sender: bytes taken, or why the epoch is refused."""

    epoch: str
    num_bytes: Annotated[int, msgspec.Meta(ge=0)]
    refusal: str
