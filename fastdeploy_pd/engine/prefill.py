"""Prefill's side of a hand-over: takes orders, computes prompts, writes their blocks away, hands over the first token.

An order (one grant) goes QUEUED -> COMPUTING -> SENDING -> HANDED -> ENDED; where a peer has a part of the prompt's KV that is sooner
fetched than computed it begins as FETCHING. Its grant is spent when the order is first seen: a
repeated order is answered, never executed again, because by then decode's blocks may belong to somebody else. Blocks a transfer
reads are held beside the request's own hold until the transfer says that it reads no more. An order of cached blocks (FetchOrder)
begins as SENDING: there is nothing to compute.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from fastdeploy_pd.cluster.messages import (
    CancelOrder,
    FetchOrder,
    HandOver,
    HandOverAck,
    OrderAccepted,
    OrderEnded,
    OrderQuery,
    PrefillOrder,
)
from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.engine.fetches import Fetches, Held
from fastdeploy_pd.errors import IncompatiblePeer, InvalidRequest
from fastdeploy_pd.request import Phase, Request, TokenChunk
from fastdeploy_pd.transfer.base import EpochFailed, EpochSent, Transfer, TransferEvent
from fastdeploy_pd.transfer.select import Choice, Selection

SPARE_FRACTION = 4  # of the pool: a fetch begins only if a part like this stays free


class OrderState(enum.Enum):
    """Where an order is."""

    FETCHING = "fetching"  #: not in the scheduler yet
    QUEUED = "queued"
    COMPUTING = "computing"
    SENDING = "sending"
    HANDED = "handed"  #: hand-over sent, not acknowledged
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Order:
    """One grant and what has become of it."""

    message: PrefillOrder | FetchOrder
    request: Request | None  #: None: blocks of the prefix cache were ordered
    backend: str
    transfer: Transfer
    received_s: float
    first_block: int = 0  #: table position of the first block ordered
    state: OrderState = OrderState.QUEUED
    num_sent_blocks: int = 0  #: table positions below are written (or in decode's cache)
    pinned: list[int] = field(default_factory=list)  #: blocks held for the transfer
    chunk: TokenChunk | None = None
    hand_over: HandOver | None = None
    last_sent_s: float = 0.0
    started_s: float | None = None
    computed_s: float = 0.0
    ended_s: float = 0.0
    end_reason: str = ""
    was_cancelled: bool = False

    @property
    def grant_id(self) -> str:
        """The grant's name, and the transfer's epoch."""
        return self.message.grant_id


class PrefillSide:
    """All orders of one engine."""

    def __init__(self, context: EngineContext, fetches: Fetches) -> None:
        self.context = context
        self._fetches = fetches
        self.orders: OrderedDict[str, Order] = OrderedDict()
        self.order_of: dict[int, Order] = {}  # by id() of the request: two attempts have the same request_id
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._selection = Selection(context.backends)
        self._stuck_since_s = 0.0  # nothing has run, and orders have waited

    @property
    def num_active(self) -> int:
        """Orders that are not over."""
        return sum(1 for order in self.orders.values() if order.state is not OrderState.ENDED)

    def outstanding_tokens(self) -> int:
        """Returns: tokens of orders that are not in the scheduler yet."""
        return sum(
            o.request.num_tokens - o.request.local.num_computed_tokens
            for o in self.order_of.values()
            if o.request is not None and o.state is OrderState.FETCHING
        )

    def owns(self, request: Request) -> bool:
        """Whether a scheduled request belongs to an order."""
        return id(request) in self.order_of

    # messages

    def on_order(self, message: PrefillOrder | FetchOrder, now_s: float) -> None:
        """Queue a new order, or send the blocks it asks for; answer a repeated one."""
        if message.grant_id in self._refused:
            self._end_unknown(message.decode_id, message.grant_id, self._refused[message.grant_id])
            return
        order = self.orders.get(message.grant_id)
        if order is None:
            order = (
                self._send_cached(message, now_s) if isinstance(message, FetchOrder) else self._accept(message, now_s)
            )
            if order is None:
                return
        self._answer(order, now_s)

    def on_query(self, sender_id: str, message: OrderQuery, now_s: float) -> None:
        """Say what has become of an order."""
        order = self.orders.get(message.grant_id)
        if order is None:
            reason = self._refused.get(message.grant_id, "unknown grant")
            self._end_unknown(sender_id, message.grant_id, reason)
            return
        self._answer(order, now_s)

    def on_cancel(self, sender_id: str, message: CancelOrder, now_s: float) -> None:
        """Stop an order; a grant that was never seen is spent, so that its order does nothing when it comes late."""
        order = self.orders.get(message.grant_id)
        if order is None:
            self._refuse(message.grant_id, "cancelled")
            self._end_unknown(sender_id, message.grant_id, "cancelled")
            return
        order.was_cancelled = True
        self._end(order, "cancelled", now_s)

    def on_ack(self, message: HandOverAck, now_s: float) -> None:
        """Decode has taken the hand-over."""
        order = self.orders.get(message.grant_id)
        if order is not None and order.state is OrderState.HANDED:
            order.state, order.ended_s, order.end_reason = OrderState.ENDED, now_s, "handed over"

    def on_peer_lost(self, peer_id: str, now_s: float) -> None:
        """A decode instance is gone: nobody wants its orders."""
        for order in list(self.orders.values()):
            if order.message.decode_id == peer_id and order.state is not OrderState.ENDED:
                self._end(order, "decode lost", now_s)

    # the step

    def layer_hook(self, batch: Batch) -> Callable[[int], None] | None:
        """What the runner calls when layers of this batch are done: write the blocks that are complete in them.

        Returns: None if no sequence of the batch belongs to an order.
        """
        writes: list[tuple[Order, list[int], list[int]]] = []
        for sequence in batch.sequences:
            order = self.order_of.get(id(sequence.request))
            if order is None or order.state is OrderState.ENDED:
                continue
            self._start(order)
            stop = self._num_complete_blocks(sequence.request, sequence.stop)
            if stop > order.num_sent_blocks:
                first = order.first_block
                local = sequence.request.local.block_table[order.num_sent_blocks : stop]
                remote = list(order.message.block_ids[order.num_sent_blocks - first : stop - first])
                self._pin(order, local)
                writes.append((order, local, remote))
                order.num_sent_blocks = stop
        if not writes:
            return None

        num_written = 0  # layers

        def write_layers(layer: int) -> None:
            nonlocal num_written
            layers, num_written = range(num_written, layer + 1), layer + 1
            for order, local, remote in writes:
                order.transfer.write(order.grant_id, layers, local, remote)

        return write_layers

    def on_scheduled(self, batch: Batch, now_s: float) -> None:
        """Stamp the orders whose computing begins with this batch."""
        for sequence in batch.sequences:
            order = self.order_of.get(id(sequence.request))
            if order is not None and order.started_s is None:
                order.started_s = now_s

    def on_token(self, request: Request, chunk: TokenChunk, now_s: float) -> None:
        """The prompt is computed and its first output token sampled: give it to the front end, end the epoch."""
        order = self.order_of.pop(id(request))
        order.chunk, order.computed_s = chunk, now_s
        self.context.outbox.emit(request.front_end_id, chunk)
        request.advance(Phase.TRANSFERRING, now_s)
        order.state = OrderState.SENDING
        order.transfer.finish(order.grant_id)
        self.context.scheduler.remove(request)

    def on_error(self, request: Request, chunk: TokenChunk, now_s: float) -> None:
        """The engine could not compute this order's request; no other instance would, so the front end is told at once."""
        self.context.outbox.emit(request.front_end_id, chunk)
        self._end(self.order_of[id(request)], chunk.error, now_s)

    def on_transfer(self, event: TransferEvent, now_s: float) -> None:
        """An epoch of ours was sent or failed."""
        order = self.orders.get(event.epoch)
        if order is None:
            return
        if isinstance(event, EpochSent):
            self._unpin(order)
            if order.state is OrderState.SENDING:
                self._hand_over(order, event, now_s)
        elif isinstance(event, EpochFailed):
            self._unpin(order)
            if order.state is not OrderState.ENDED:
                self._selection.failed(order.message.decode_id, order.backend, event.reason, now_s)
                self._end(order, f"transfer failed: {event.reason}", now_s)

    def tick(self, now_s: float) -> None:
        """Send unacknowledged hand-overs again; forget what ended long ago."""
        options = self.context.options
        self._end_stuck(now_s)
        for order in self.orders.values():
            if order.state is OrderState.HANDED and now_s - order.last_sent_s >= options.resend_s:
                self._answer(order, now_s)
            if order.state is OrderState.HANDED and now_s - order.computed_s >= options.record_s:
                order.state, order.ended_s, order.end_reason = OrderState.ENDED, now_s, "not acknowledged"
        while self.orders:
            oldest = next(iter(self.orders.values()))
            if oldest.state is not OrderState.ENDED or oldest.pinned:
                break
            if now_s - oldest.ended_s < options.record_s and len(self.orders) <= options.max_records:
                break
            # Its grant stays spent: decode asks no longer, but a late copy of the order may still be under way.
            self._refuse(oldest.grant_id, oldest.end_reason)
            del self.orders[oldest.grant_id]

    # inside

    def _end_stuck(self, now_s: float) -> None:
        """Give an order up where nothing is computed for lack of blocks: attempts may hold them that wait for a peer where it is the same."""
        scheduler = self.context.scheduler
        waiting = [o for r in scheduler.waiting if (o := self.order_of.get(id(r)))] if not scheduler.running else []
        if not waiting:
            self._stuck_since_s = now_s
        elif now_s - self._stuck_since_s >= self.context.options.stuck_s:
            self._stuck_since_s = now_s
            self._end(waiting[-1], "no blocks came free", now_s)

    def _accept(self, message: PrefillOrder, now_s: float) -> Order | None:
        scheduler = self.context.scheduler
        try:
            request = Request.from_wire(message.request, now_s)
            choice = self._choose(message, now_s)
            num_blocks = scheduler.pool.num_blocks_for(request.num_tokens)
            is_inside = 0 <= message.first_block <= num_blocks <= scheduler.pool.num_blocks
            if not is_inside or len(message.block_ids) != num_blocks - message.first_block:
                raise InvalidRequest(
                    f"{len(message.block_ids)} blocks from {message.first_block} on were ordered for {request.num_tokens} tokens"
                )
            # The first token would seem to be the last one; decode may take longer sequences.
            goes_on = request.sampling.max_tokens - len(request.output_token_ids) > 1
            if request.num_tokens + goes_on >= scheduler.options.max_model_len:
                raise InvalidRequest(f"{request.num_tokens} tokens, of at most {scheduler.options.max_model_len} here")
        except (InvalidRequest, IncompatiblePeer) as error:
            self._refuse(message.grant_id, error.message)
            self._end_unknown(message.decode_id, message.grant_id, error.message)
            return None
        if choice.passed_over:
            self.context.observer.fell_back(message.decode_id, choice.name, choice.passed_over)
        request.advance(Phase.PLACED, now_s)
        request.advance(Phase.RESERVED, now_s)
        request.local.is_preemptible, request.local.ends_with_next_token = False, True
        first = message.first_block
        order = Order(message, request, choice.name, choice.transfer, now_s, first, num_sent_blocks=first)
        self.orders[message.grant_id] = order
        self.order_of[id(request)] = order
        scheduler.count_elsewhere(message.decode_id, request.tenant, message.num_generated)
        if not self._fetch(order, request, message, now_s):
            scheduler.add(request)
        return order

    def _fetch(self, order: Order, request: Request, message: PrefillOrder, now_s: float) -> bool:
        """Returns: whether a part of the prompt's KV is on its way from a peer."""
        scheduler = self.context.scheduler
        if message.holder is None or not self.context.options.min_fetch_tokens:
            return False
        held = Held(message.holder, message.num_held_tokens)
        if not self._fetches.num_blocks(request, scheduler.num_matching_tokens(request), held):
            return False
        if not scheduler.reserve(
            request, max(scheduler.num_wanted_blocks(), scheduler.pool.num_blocks // SPARE_FRACTION)
        ):
            return False  # what is to be computed before it needs the room

        def go_on(_: float) -> None:
            order.state = OrderState.QUEUED
            scheduler.add(request)

        if self._fetches.begin(request, held, go_on, now_s):
            order.state = OrderState.FETCHING
            return True
        return False

    def _choose(self, message: PrefillOrder | FetchOrder, now_s: float) -> Choice:
        """Returns: the pair's backend. Raises: IncompatiblePeer: none fits, of which the observer is told."""
        try:
            return self._selection.choose(message.decode_id, message.transfers, now_s)
        except IncompatiblePeer as error:
            self.context.observer.no_backend(message.decode_id, error.message)
            raise

    def _send_cached(self, message: FetchOrder, now_s: float) -> Order | None:
        """Send all the blocks that are asked for, or say how many there are."""
        found = self.context.scheduler.pool.find_prefix(message.block_hashes)
        try:
            choice = self._choose(message, now_s)
            if not found or len(message.block_ids) != len(message.block_hashes) or self.context.num_layers < 1:
                raise InvalidRequest(f"{len(found)} of the blocks are here, for {len(message.block_ids)} blocks")
        except (InvalidRequest, IncompatiblePeer) as error:
            self._refuse(message.grant_id, error.message)
            self._end_unknown(message.decode_id, message.grant_id, error.message)
            return None
        if len(found) < len(message.block_ids):
            reason = f"{len(found)} of {len(message.block_ids)} blocks are here"
            self._refuse(message.grant_id, reason)
            self.context.outbox.send(
                message.decode_id, OrderEnded(message.grant_id, reason, num_held_blocks=len(found))
            )
            return None
        order = Order(message, None, choice.name, choice.transfer, now_s, started_s=now_s, computed_s=now_s)
        self.orders[message.grant_id] = order
        self._pin(order, found)
        self._start(order)
        order.state = OrderState.SENDING
        order.transfer.write(order.grant_id, range(self.context.num_layers), found, list(message.block_ids))
        order.transfer.finish(order.grant_id)
        return order

    def _start(self, order: Order) -> None:
        if order.state is OrderState.QUEUED:
            message = order.message
            order.state = OrderState.COMPUTING
            order.transfer.start(message.grant_id, message.nonce, message.transfers[order.backend], message.block_ids)

    def _num_complete_blocks(self, request: Request, stop: int) -> int:
        """Table positions that hold their final content once positions below `stop` are computed."""
        pool = self.context.scheduler.pool
        if stop == request.num_tokens:
            return pool.num_blocks_for(stop)
        return stop // pool.block_size

    def _answer(self, order: Order, now_s: float) -> None:
        order.last_sent_s = now_s
        decode_id = order.message.decode_id
        if order.state is OrderState.ENDED and order.hand_over is None:
            self.context.outbox.send(decode_id, OrderEnded(order.grant_id, order.end_reason, order.was_cancelled))
        elif order.hand_over is not None:
            self.context.outbox.send(decode_id, order.hand_over)
        else:
            self.context.outbox.send(decode_id, OrderAccepted(order.grant_id))

    def _hand_over(self, order: Order, sent: EpochSent, now_s: float) -> None:
        if order.chunk is None and order.request is not None:
            raise ValueError(f"grant {order.grant_id} was sent before it was computed")
        started_s = order.started_s if order.started_s is not None else order.received_s
        stages = (
            ("queue", started_s - order.received_s),
            ("prefill", order.computed_s - started_s),
            ("wire", sent.wire_s),
            ("drain", now_s - order.computed_s),
        )
        order.hand_over = HandOver(order.grant_id, order.chunk, sent.digests, sent.num_bytes, order.backend, stages)
        if order.request is not None:
            order.request.advance(Phase.FINISHED, now_s)
        order.state = OrderState.HANDED
        self._answer(order, now_s)

    def _end(self, order: Order, reason: str, now_s: float) -> None:
        if order.state is OrderState.ENDED:
            self._answer(order, now_s)
            return
        request = order.request
        if request is not None and self.order_of.pop(id(request), None) is not None:
            if self._fetches.cancel(request):
                self.context.scheduler.release_blocks(request)
            self.context.scheduler.remove(request)
        if order.state in (OrderState.COMPUTING, OrderState.SENDING):
            order.transfer.cancel(order.grant_id)
        if request is not None and not request.is_done:
            request.advance(Phase.ABORTED if order.was_cancelled else Phase.FAILED, now_s)
        order.hand_over = None
        order.state, order.ended_s, order.end_reason = OrderState.ENDED, now_s, reason
        self._answer(order, now_s)

    def _refuse(self, grant_id: str, reason: str) -> None:
        self._refused[grant_id] = reason
        while len(self._refused) > self.context.options.max_records:
            self._refused.popitem(last=False)

    def _end_unknown(self, decode_id: str, grant_id: str, reason: str) -> None:
        self.context.outbox.send(decode_id, OrderEnded(grant_id, reason, reason == "cancelled"))

    def _pin(self, order: Order, block_ids: list[int]) -> None:
        self.context.scheduler.pool.hold(block_ids)
        order.pinned.extend(block_ids)

    def _unpin(self, order: Order) -> None:
        self.context.scheduler.pool.release(order.pinned)
        order.pinned = []
