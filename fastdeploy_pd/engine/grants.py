"""Blocks of ours that a peer may fill once: an instance that computes a prompt, or one that has a part of it in its cache.

A grant opens an epoch for its blocks and goes to the peer as an order: again until the peer knows it, asked after from then on. It ends by
the peer's hand-over and the last byte, both here and of the same checksums, or it fails, however that comes. Once its owner hears
of either no write lands in the blocks any more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from fastdeploy_pd.cluster.messages import (
    CancelOrder,
    FetchOrder,
    HandOver,
    HandOverAck,
    OrderAccepted,
    OrderEnded,
    OrderQuery,
    Peer,
    PrefillOrder,
)
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.request import Request
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, TransferEvent


@dataclass(slots=True)
class Failure:
    """Why a grant ended without its blocks."""

    reason: str
    code: str  #: one of a few words
    num_held_blocks: int = 0  #: of a fetch of more: so many of its first blocks the peer has


class GrantOwner(Protocol):
    """Who wanted the blocks. Any of these calls may open other grants."""

    def order(self, grant: Grant, now_s: float) -> PrefillOrder | FetchOrder:
        """Returns: what is sent to the peer."""
        ...

    def handed(self, grant: Grant, now_s: float) -> None:
        """The peer has written everything; bytes may be under way still."""
        ...

    def arrived(self, grant: Grant, hand_over: HandOver, now_s: float) -> None:
        """The blocks are here and right."""
        ...

    def failed(self, grant: Grant, failure: Failure, now_s: float) -> None:
        """The blocks don't come."""
        ...


@dataclass(slots=True, eq=False)
class Grant:
    """The right to write into some blocks once."""

    grant_id: str
    nonce: int
    owner: GrantOwner
    request: Request
    peer_id: str
    first_block: int  #: table position of the first one
    block_ids: list[int]
    is_fetch: bool  #: of blocks that the peer has; else it computes them
    ordered_s: float
    last_sent_s: float
    is_accepted: bool = False
    hand_over: HandOver | None = None
    gives_up_s: float = math.inf
    arrived: EpochArrived | None = None


class Grants:
    """All open grants of one engine."""

    def __init__(self, context: EngineContext) -> None:
        self.context = context
        self.by_id: dict[str, Grant] = {}

    def open(
        self, owner: GrantOwner, request: Request, peer: Peer, num_blocks: int | None, now_s: float, *, is_fetch: bool
    ) -> Grant:
        """Give a peer the request's first num_blocks blocks that are not computed; None: all of them."""
        context, local = self.context, request.local
        first = local.num_computed_tokens // context.scheduler.pool.block_size
        block_ids = local.block_table[first : None if num_blocks is None else first + num_blocks]
        grant = Grant(
            context.new_id(), context.new_nonce(), owner, request, peer.instance_id, first, block_ids, is_fetch, now_s, now_s
        )  # fmt: skip
        if is_fetch:
            grant.gives_up_s = now_s + context.options.fetch_s
        self.by_id[grant.grant_id] = grant
        for transfer in context.transfers.values():
            transfer.open_epoch(grant.grant_id, grant.block_ids, grant.nonce)
        context.outbox.connect(peer)
        context.outbox.send(grant.peer_id, owner.order(grant, now_s))
        return grant

    def cancel(self, grant: Grant) -> None:
        """Nobody wants these blocks: the owner hears no more of them, and nothing lands in them."""
        self._close(grant)
        self.context.outbox.send(grant.peer_id, CancelOrder(grant.grant_id))

    def on_accepted(self, message: OrderAccepted, now_s: float) -> None:
        """The peer knows the order."""
        grant = self.by_id.get(message.grant_id)
        if grant is not None:
            grant.is_accepted, grant.last_sent_s = True, now_s

    def on_ended(self, message: OrderEnded, now_s: float) -> None:
        """The peer will not hand this one over."""
        grant = self.by_id.get(message.grant_id)
        if grant is not None:
            failure = Failure(f"prefill: {message.reason}", "prefill_failed", message.num_held_blocks)
            self._fail(grant, failure, now_s)

    def on_hand_over(self, sender_id: str, message: HandOver, now_s: float) -> None:
        """The peer says that everything was written."""
        grant = self.by_id.get(message.grant_id)
        if grant is None:
            self.context.outbox.send(sender_id, HandOverAck(message.grant_id, is_good=False))
            return
        if grant.hand_over is None:
            num_tokens = 0 if message.chunk is None else len(message.chunk.token_ids)
            if num_tokens != (0 if grant.is_fetch else 1) or message.backend not in self.context.transfers:
                other = Failure("a hand-over of another kind than was ordered", "prefill_failed")
                self._fail(grant, other, now_s)
                return
            grant.hand_over = message
            grant.gives_up_s = min(grant.gives_up_s, now_s + self.context.options.arrival_s)
            grant.owner.handed(grant, now_s)
        self._try_to_end(grant, now_s)

    def on_peer_lost(self, peer_id: str, now_s: float) -> None:
        """An instance is gone, and what it was to fill does not come."""
        for grant in list(self.by_id.values()):
            if grant.peer_id == peer_id and grant.grant_id in self.by_id:
                self._fail(grant, Failure("the prefill instance was lost", "prefill_lost"), now_s)

    def on_transfer(self, event: TransferEvent, now_s: float) -> None:
        """An epoch of ours arrived or failed."""
        grant = self.by_id.get(event.epoch)
        if grant is None:
            return
        if isinstance(event, EpochArrived):
            grant.arrived = event
            self._try_to_end(grant, now_s)
        elif isinstance(event, EpochFailed):
            self._fail(grant, Failure(f"transfer failed: {event.reason}", "transfer_failed"), now_s)

    def tick(self, now_s: float) -> None:
        """Resend, ask, give up."""
        options, outbox = self.context.options, self.context.outbox
        for grant in list(self.by_id.values()):
            if grant.grant_id not in self.by_id:
                continue  # ended with another
            if now_s >= grant.gives_up_s:
                self._fail(grant, Failure("the blocks did not arrive", "transfer_timeout"), now_s)
            elif grant.hand_over is not None:
                continue
            elif not grant.is_accepted and now_s - grant.last_sent_s >= options.resend_s:
                grant.last_sent_s = now_s
                outbox.send(grant.peer_id, grant.owner.order(grant, now_s))
            elif grant.is_accepted and now_s - grant.last_sent_s >= options.query_s:
                grant.last_sent_s = now_s
                outbox.send(grant.peer_id, OrderQuery(grant.grant_id))

    # inside

    def _try_to_end(self, grant: Grant, now_s: float) -> None:
        """Once both the hand-over and the last byte are here: compare checksums."""
        if grant.hand_over is None or grant.arrived is None:
            return
        if grant.hand_over.digests != grant.arrived.digests:
            self._fail(grant, Failure("checksums of the KV blocks differ", "checksum_mismatch"), now_s)
            return
        self._close(grant)
        self.context.outbox.send(grant.peer_id, HandOverAck(grant.grant_id, is_good=True))
        grant.owner.arrived(grant, grant.hand_over, now_s)

    def _fail(self, grant: Grant, failure: Failure, now_s: float) -> None:
        self.cancel(grant)  # also where the peer says that it ended: its order may come there once more, late
        grant.owner.failed(grant, failure, now_s)

    def _close(self, grant: Grant) -> None:
        self.context.revoke(grant.grant_id)
        del self.by_id[grant.grant_id]
