"""One transfer out of several: each rank of an instance has a pool and an end of its own, and the engine sees one.

An epoch is opened on all ends and has arrived when all of it has arrived on each. Between equally many ranks each sends whole blocks to
its like, under the epoch's own name. Otherwise `core/layout.py: share_heads` says which rank sends which parts to which, a name a pair
(`epochs.py`). Checksums of the parts stand one after the other, in the order of the shares: both sides know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastdeploy_pd.config import MAX_RANKS
from fastdeploy_pd.core.layout import KVLayout, Share, shard, share_heads, whole
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, Transfer, TransferEvent
from fastdeploy_pd.transfer.epochs import name_of_part, split_name
from fastdeploy_pd.transfer.handshake import difference

Key = tuple[int, str]  # rank of ours, name
Done = EpochArrived | EpochSent


@dataclass(slots=True)
class _Outgoing:
    shares: dict[Key, Share]
    done: dict[Key, Done] = field(default_factory=dict)
    num_ended: int = 0
    failure: str = ""
    lists: tuple[Sequence[int], Sequence[int]] = ((), ())  # (local, remote) of the last write, and ...
    cut: dict[Key, tuple[Sequence[int], Sequence[int]]] = field(
        default_factory=dict
    )  # ... the same in parts: layers have the same


@dataclass(slots=True)
class _Incoming:
    num_sources: int = 0  # known when the first part has come
    keys: list[Key] = field(default_factory=list)  # of all parts, in order
    done: dict[Key, Done] = field(default_factory=dict)


class RankedTransfer:
    """See transfer/base.py."""

    def __init__(
        self, ends: Sequence[Transfer], layouts: Sequence[KVLayout], settle: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            ends: a rank's each; some of them may be in other processes.
            layouts: of their pools.
            settle: returns when what was said to ends in other processes has been done.
        """
        self.name = ends[0].name
        self._ends, self._layouts, self._settle = list(ends), list(layouts), settle
        self._out: dict[str, _Outgoing] = {}
        self._in: dict[str, _Incoming] = {}

    def descriptor(self) -> dict[str, Any]:
        """See base. With several ranks their descriptors are its "ranks", and its layout is the whole model's."""
        ranks = [end.descriptor() for end in self._ends]
        if len(ranks) == 1:
            return ranks[0]
        facts = {name: ranks[0].get(name) for name in ("backend", "version", "fingerprint")}
        return {**facts, "layout": whole(self._layouts[0]).to_wire(), "ranks": ranks}

    def reaches(self, peer: dict[str, Any]) -> str:
        """See base: whether each rank reaches those it has to send to."""
        if len(self._ends) > 1 or "ranks" in peer:
            reason = difference(self.descriptor(), peer)
            if reason:
                return reason
        try:
            pairs = self._pairs(peer)
        except (KeyError, TypeError, ValueError) as error:
            return f"layout: {error}"
        for share, target in pairs:
            reason = self._ends[share.source_rank].reaches(target)
            if reason:
                return reason if len(pairs) == 1 else f"rank {share.source_rank} to {share.target_rank}: {reason}"
        return ""

    def open_epoch(self, epoch: str, block_ids: Sequence[int], nonce: int, parts: int = 1) -> None:
        """See base; parts are the ends' business."""
        for end in self._ends:
            end.open_epoch(epoch, block_ids, nonce, parts)
        self._settle()
        self._in[epoch] = _Incoming()

    def revoke(self, epoch: str) -> None:
        """See base: when it returns nothing lands on any rank."""
        self._in.pop(epoch, None)
        for end in self._ends:
            end.revoke(epoch)
        self._settle()

    def start(
        self, epoch: str, nonce: int, peer: dict[str, Any], remote_block_ids: Sequence[int], parts: int = 1
    ) -> None:
        """See base; parts are the ends' business."""
        pairs = self._pairs(peer)
        is_equal = len(peer.get("ranks", [peer])) == len(self._ends)
        outgoing = self._out[epoch] = _Outgoing({})
        for share, target in pairs:
            rank = share.source_rank
            name = epoch if is_equal else name_of_part(epoch, len(self._ends), rank, share.target_rank)
            outgoing.shares[rank, name] = share
            self._ends[rank].start(name, nonce, target, share.target_ids(remote_block_ids), share.source_parts)

    def write(
        self, epoch: str, layers: Sequence[int], local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """See base."""
        outgoing = self._out.get(epoch)
        if outgoing is None:
            return
        if outgoing.lists != (local_block_ids, remote_block_ids):
            outgoing.lists = local_block_ids, remote_block_ids
            outgoing.cut = {
                key: (share.source_ids(local_block_ids), share.target_ids(remote_block_ids))
                for key, share in outgoing.shares.items()
            }
        for (rank, name), (local, remote) in outgoing.cut.items():
            self._ends[rank].write(name, layers, local, remote)

    def finish(self, epoch: str) -> None:
        """See base."""
        for rank, name in self._shares_of(epoch):
            self._ends[rank].finish(name)

    def cancel(self, epoch: str) -> None:
        """See base."""
        for rank, name in self._shares_of(epoch):
            self._ends[rank].cancel(name)

    def poll(self) -> list[TransferEvent]:
        """See base."""
        events: list[TransferEvent] = []
        for rank, end in enumerate(self._ends):
            for event in end.poll():
                epoch, num_sources = split_name(event.epoch)
                if epoch in self._out and not isinstance(event, EpochArrived):
                    joined = self._on_sent(epoch, (rank, event.epoch), event)
                elif epoch in self._in:
                    joined = self._on_arrived(epoch, (rank, event.epoch), num_sources or len(self._ends), event)
                else:
                    joined = None  # it has ended: one of its parts failed, or it was revoked
                if joined is not None:
                    events.append(joined)
        return events

    def close(self) -> None:
        """See base."""
        for end in self._ends:
            end.close()

    # inside

    def _pairs(self, peer: dict[str, Any]) -> list[tuple[Share, dict[str, Any]]]:
        """Returns: what to send to which descriptor. Raises: KeyError, TypeError, ValueError: the peer is not one that heads can be shared with."""
        ranks = peer.get("ranks", [peer])
        if not 0 < len(ranks) <= MAX_RANKS:
            raise ValueError(f"{len(ranks)} ranks; there may be 1 to {MAX_RANKS}")
        if len(ranks) == len(self._ends) == 1:
            return [(Share(0, 0, 1, 1, (0,), (0,)), peer)]  # what does not fit is said by the end
        layouts = [KVLayout(**rank["layout"]) for rank in ranks]
        for number, layout in enumerate(layouts):
            expected = replace(whole(self._layouts[0]), num_blocks=layout.num_blocks)
            if len(ranks) > 1:
                expected = shard(expected, number, len(ranks))
            if layout != expected:
                raise ValueError(f"rank {number} of {len(ranks)} has not the heads that it should have")
        shares = share_heads(self._layouts, layouts)
        return [(share, ranks[share.target_rank]) for share in shares]

    def _shares_of(self, epoch: str) -> list[Key]:
        outgoing = self._out.get(epoch)
        return [] if outgoing is None else list(outgoing.shares)

    def _on_sent(self, epoch: str, key: Key, event: TransferEvent) -> TransferEvent | None:
        """Returns: the epoch's end, when no part of it is sent any more."""
        outgoing = self._out[epoch]
        outgoing.num_ended += 1
        if isinstance(event, EpochFailed):
            if not outgoing.failure:
                outgoing.failure = event.reason
                self.cancel(epoch)
        else:
            outgoing.done[key] = event
        if outgoing.num_ended < len(outgoing.shares):
            return None
        del self._out[epoch]
        if outgoing.failure:
            return EpochFailed(epoch, outgoing.failure)
        done = [outgoing.done[key] for key in outgoing.shares]
        wire_s = max(part.wire_s for part in done if isinstance(part, EpochSent))
        return EpochSent(epoch, *_together(done), wire_s)

    def _on_arrived(self, epoch: str, key: Key, num_sources: int, event: TransferEvent) -> TransferEvent | None:
        """Returns: the epoch's end: its first failure, or that everything is here."""
        incoming = self._in[epoch]
        if not incoming.keys:
            incoming.num_sources, incoming.keys = num_sources, self._expected(epoch, num_sources)
        if isinstance(event, EpochFailed) or key not in incoming.keys:
            del self._in[epoch]
            reason = event.reason if isinstance(event, EpochFailed) else f"{event.epoch} is no part of it"
            return EpochFailed(epoch, reason)
        incoming.done[key] = event
        if len(incoming.done) < len(incoming.keys):
            return None
        del self._in[epoch]
        return EpochArrived(epoch, *_together([incoming.done[key] for key in incoming.keys]))

    def _expected(self, epoch: str, num_sources: int) -> list[Key]:
        if num_sources == len(self._ends):
            return [(rank, epoch) for rank in range(num_sources)]
        sources = [shard(whole(self._layouts[0]), rank, num_sources) for rank in range(num_sources)]
        return [
            (s.target_rank, name_of_part(epoch, num_sources, s.source_rank, s.target_rank))
            for s in share_heads(sources, self._layouts)
        ]


def _together(parts: Sequence[Done]) -> tuple[tuple[int, ...], int]:
    """Returns: (checksums, bytes) of all parts."""
    digests = tuple(digest for part in parts for digest in part.digests)
    return digests, sum(part.num_bytes for part in parts)
