"""The sending side's record of an epoch, and how long it waits for a peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.transfer.epochs import Sums

if TYPE_CHECKING:
    from fastdeploy_pd.transfer.stream import PeerConnections


LEAST_BYTES_PER_S = 1 << 20  # who is slower keeps blocks from others for hours


class Pace:
    """How long a peer may take for what it owes: silence costs patience, each byte earns some of it back.

    A leaky bucket (ITU-T I.371) of seconds: never more than at the start, so that a fast past buys no silence, and a peer that takes a
    byte now and then is as little use as one that takes none. n bytes are there after `patience_s + n / LEAST_BYTES_PER_S` at the latest.
    """

    def __init__(self, patience_s: float) -> None:
        self._most_s = self._left_s = patience_s

    def has_patience(self, waited_s: float, num_bytes: int) -> bool:
        """
        Args:
            waited_s, num_bytes: since the last call: while something was owed, and what of it was taken.
        Returns: whether to go on with the peer.
        """
        self._left_s = min(self._most_s, self._left_s - waited_s + num_bytes / LEAST_BYTES_PER_S)
        return self._left_s > 0


@dataclass(slots=True)
class Outgoing:
    """One epoch on the sending side."""

    epoch: str
    nonce: int
    peer: PeerConnections
    remote: list[int]
    layout: KVLayout  #: of the pool, cut as the epoch's blocks are
    pairs: list[tuple[Sequence[int], Sequence[int]]] = field(
        default_factory=list
    )  # (remote, local) of layer 0's writes
    num_queued: int = 0  # bytes
    num_done: int = 0  # bytes that are gone (tcp) or taken (shm)
    is_end_sent: bool = False  # the receiver was told that no more follows
    is_over: bool = False
    start_s: float = 0.0
    num_readers: int = 0  # threads that are sending from its blocks this instant
    lists: tuple[Sequence[int], Sequence[int]] = ((), ())  # (remote, local) of the last write, and ...
    packed: tuple[bytes, bytes] = (b"", b"")  # ... the same for the wire: all layers have the same
    failure: str = ""  # to be told when the last of them is done
    sums: Sums = field(default_factory=Sums)  # where the backend computes checksums as it goes
    num_sent: int = 0  # bytes that the receiver was told of; it owes us notices of those that are not done ...
    owed_since_s: float = 0.0  # ... since then

    def local_blocks(self) -> list[int]:
        """Returns: the sender's blocks in the order of `remote`."""
        local_of: dict[int, int] = {}
        for remote, local in self.pairs:
            local_of.update(zip(remote, local, strict=True))
        return [local_of[block_id] for block_id in self.remote]
