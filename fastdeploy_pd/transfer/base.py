"""The transfer contract: how KV blocks of one pool get into another, whatever the wire.

One `Transfer` a backend and process. All calls come from the engine's thread and none of them blocks; work happens in the
backend's own threads (or in hardware), and its results are fetched with `poll`. Who owns the blocks meanwhile:

decode  open_epoch(epoch, block_ids, nonce)   from now on writes of this epoch, and of no other, may land in these blocks
prefill start(epoch, nonce, peer descriptor)  connects if need be; refusals arrive as EpochFailed
prefill write(epoch, layers, local, remote)   any number of times; local blocks are pinned until EpochSent or EpochFailed
prefill finish(epoch)                         -> EpochSent(digests): everything is written, no local block is read any more
decode                                        -> EpochArrived(digests): recomputed over what has landed in the blocks
decode  revoke(epoch)                         when it returns, no write of this epoch lands any more; blocks may be reused
prefill cancel(epoch)                         -> EpochFailed: nothing of it is read or sent any more

Where pools are ranks' shards that differ, both sides cut their blocks into `parts` of equal bytes (core/layout.py: share_heads) and give
the numbers of parts wherever it says block ids: one epoch a pair of ranks. ranks.py makes one transfer out of an instance's ranks'. It
opens an epoch for whole blocks, as decode does not know how many ranks prefill has; the name of what a rank then writes says which part
of the epoch it is, and the receiving end opens it when the first frame comes (epochs.py).

Every (epoch, layer, block) is written once; a block's layers are written in rising order. A digest is the pool's (xxh3_64 in
host memory, a sum of mixed words on a GPU), seeded with the epoch's nonce, over one block's bytes in all layers, layer 0 first;
digests come in the order of the epoch's block_ids. Decode decodes only what has equal digests from both sides, so a byte that was
lost, changed or left over from another epoch is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TRANSFER_VERSION = 4
CLOSED = "the epoch is closed"  #: by decode, whatever its reasons: no fault of the backend's


@dataclass(frozen=True, slots=True)
class EpochArrived:
    """Decode's side: the last write of the epoch has landed."""

    epoch: str
    digests: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class EpochSent:
    """Prefill's side: every write is on its way and no local block is needed any more."""

    epoch: str
    digests: tuple[int, ...]
    num_bytes: int
    wire_s: float  #: seconds from the first write to the last


@dataclass(frozen=True, slots=True)
class EpochFailed:
    """Either side: the epoch is over without success."""

    epoch: str
    reason: str


TransferEvent = EpochArrived | EpochSent | EpochFailed


class Transfer(Protocol):
    """One backend. See the module's docstring for the order of calls and for who owns the blocks."""

    name: str

    def descriptor(self) -> dict[str, Any]:
        """Returns: plain values that let a peer reach this end and check that both fit (address, version, fingerprint, layout)."""
        ...

    def reaches(self, peer: dict[str, Any]) -> str:
        """Whether this end can talk to that one, from the descriptors alone.

        Returns: "" if so, else the reason, naming the field and both values.
        """
        ...

    def open_epoch(self, epoch: str, block_ids: Sequence[int], nonce: int, parts: int = 1) -> None:
        """Let writes of this epoch land in these local blocks.

        Args:
            parts: that each of our blocks is cut into; block_ids count them.
        Raises: ValueError: the epoch was opened before; blocks can't be cut so.
        """
        ...

    def revoke(self, epoch: str) -> None:
        """Let no further write of this epoch land; waits only for a copy in progress (microseconds). Idempotent."""
        ...

    def start(
        self, epoch: str, nonce: int, peer: dict[str, Any], remote_block_ids: Sequence[int], parts: int = 1
    ) -> None:
        """Begin to send.

        Args:
            remote_block_ids: all blocks this epoch will write, in digest order.
            parts: that each of our own blocks is cut into; local block ids count them. The peer's ids count its own parts.
        Raises: ValueError: blocks can't be cut so.
        """
        ...

    def write(
        self, epoch: str, layers: Sequence[int], local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """Queue one or more layers, in rising order, of some blocks. An epoch that has failed meanwhile is ignored.

        The lists must not change afterwards.
        """
        ...

    def finish(self, epoch: str) -> None:
        """No more writes will be queued."""
        ...

    def cancel(self, epoch: str) -> None:
        """Stop sending. Answered by EpochFailed (or by EpochSent, if it was complete)."""
        ...

    def poll(self) -> list[TransferEvent]:
        """Returns: what has happened since the last call, in order."""
        ...

    def close(self) -> None:
        """End all epochs, threads and connections. Idempotent."""
        ...
