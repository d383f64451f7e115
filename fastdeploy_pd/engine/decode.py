"""Decode's side: takes requests, reserves blocks, orders prefills, verifies what arrives, generates, answers front ends.

A served attempt is QUEUED (no room yet) -> ORDERED (blocks held, prefill at work) -> LOCAL (in the scheduler) -> OVER. Without a
prefill instance it goes to LOCAL at once, and so it does when the prefix cache leaves little to compute. Where a peer holds more of the
prompt than we do, the attempt is FETCHING before: it orders cached blocks as it orders a prefill, and goes on without them if they don't come.
Blocks of an ordered attempt are released only after its epoch was revoked, i.e. when no
write can land in them any more; received blocks enter the prefix cache only after their checksums were compared.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fastdeploy_pd.cluster.messages import (
    Abort,
    CancelOrder,
    FetchOrder,
    HandOver,
    HandOverAck,
    OrderAccepted,
    OrderEnded,
    OrderQuery,
    Peer,
    PrefillOrder,
    Progress,
    Query,
    Refused,
    Reserve,
    Reserved,
    Tokens,
    Unknown,
)
from fastdeploy_pd.core.fetch import FetchRule
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.errors import InvalidRequest
from fastdeploy_pd.request import Phase, Request, TokenChunk
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, TransferEvent


class ServedState(enum.Enum):
    """Where a served attempt is."""

    QUEUED = "queued"
    FETCHING = "fetching"
    ORDERED = "ordered"
    LOCAL = "local"
    OVER = "over"


@dataclass(slots=True)
class Grant:
    """The right to write into some blocks once, given to one prefill instance, or to a peer that has them in its cache."""

    grant_id: str
    nonce: int
    prefill_id: str
    first_block: int
    block_ids: list[int]
    ordered_s: float
    last_sent_s: float
    is_fetch: bool = False
    is_accepted: bool = False
    hand_over: HandOver | None = None
    handed_s: float = 0.0
    arrived: EpochArrived | None = None


@dataclass(slots=True, eq=False)
class Served:
    """One attempt at a request and everything it has emitted."""

    request: Request
    front_end_id: str
    prefill: Peer | None
    received_s: float
    holder: Peer | None = None  #: whom to ask for cached blocks; None: nobody, or not again
    num_held_tokens: int = 0  #: of the first ones, how many it has
    state: ServedState = ServedState.QUEUED
    grant: Grant | None = None
    chunks: list[TokenChunk] = field(default_factory=list)
    answer: Refused | None = None  #: why it ended without tokens; repeated if the front end asks again
    over_s: float = 0.0
    stage_s: tuple[tuple[str, float], ...] = ()  # of its hand-over; goes out with the first chunk, like num_kv_bytes
    num_kv_bytes: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """Names the attempt."""
        return self.request.request_id, self.request.attempt


class DecodeSide:
    """All attempts served by one engine."""

    def __init__(self, context: EngineContext) -> None:
        self.context = context
        self.served: OrderedDict[tuple[str, int], Served] = OrderedDict()
        self.queued: deque[Served] = deque()
        self._by_grant: dict[str, Served] = {}
        self._by_request: dict[int, Served] = {}  # by id() of the request in the scheduler
        self._over: deque[Served] = deque()
        self._aborted: OrderedDict[str, int] = OrderedDict()  # request_id -> highest attempt that was aborted
        self._fetch_rule = FetchRule(context.options.min_fetch_tokens)

    @property
    def num_ordered(self) -> int:
        """Attempts that wait for a prefill instance."""
        return len(self._by_grant)

    def outstanding_tokens(self) -> int:
        """Returns: tokens of attempts that are not in the scheduler yet; their streams will run here."""
        return sum(s.request.num_tokens for s in self.queued) + len(self._by_grant)

    def active(self) -> Iterable[Served]:
        """Returns: attempts that are not over."""
        return [s for s in self.served.values() if s.state is not ServedState.OVER]

    # from front ends

    def on_reserve(self, sender_id: str, message: Reserve, now_s: float) -> None:
        """Take a request, refuse it, or repeat what was answered before."""
        outbox = self.context.outbox
        request_id, attempt = str(message.request.get("request_id", "")), int(message.request.get("attempt", 1))
        known = self.served.get((request_id, attempt))
        if known is not None:
            self._answer_again(known)
            return
        if self._aborted.get(request_id, 0) >= attempt:
            outbox.send(sender_id, Unknown(request_id, attempt))
            return
        try:
            request = Request.from_wire(message.request, now_s)
            self._check_fits(request)
        except InvalidRequest as error:
            outbox.send(sender_id, Refused(request_id, attempt, error.message, error.code or "invalid", is_final=True))
            return
        if self._is_full(request):
            outbox.send(sender_id, Refused(request_id, attempt, "the queue is full", "overloaded", retry_after_s=1.0))
            return
        self._supersede(request_id, attempt, now_s)
        request.advance(Phase.PLACED, now_s)
        served = Served(request, request.front_end_id or sender_id, message.prefill, now_s)
        if self.context.options.min_fetch_tokens:
            served.holder, served.num_held_tokens = message.holder, message.num_held_tokens
        self.served[served.key] = served
        if message.prefill is None and served.holder is None:
            request.advance(Phase.RESERVED, now_s)
            self._serve_locally(served)
            self.context.outbox.send(served.front_end_id, Reserved(*served.key))
        else:
            self.queued.append(served)
            self.admit_queued(now_s)

    def on_abort(self, message: Abort, now_s: float) -> None:
        """End this attempt and all earlier ones; an attempt that comes late is not begun."""
        self._aborted[message.request_id] = max(message.attempt, self._aborted.get(message.request_id, 0))
        self._aborted.move_to_end(message.request_id)
        while len(self._aborted) > self.context.options.max_records:
            self._aborted.popitem(last=False)
        self._supersede(message.request_id, message.attempt + 1, now_s)

    def on_query(self, sender_id: str, message: Query) -> None:
        """Send what the front end lacks."""
        served = self.served.get((message.request_id, message.attempt))
        if served is None:
            self.context.outbox.send(sender_id, Unknown(message.request_id, message.attempt))
            return
        if served.answer is not None:
            self.context.outbox.send(sender_id, served.answer)
            return
        if served.state is ServedState.OVER and not any(c.finish_reason or c.error for c in served.chunks):
            # Aborted (its front end was silent for too long, and is back): this attempt yields nothing more.
            self.context.outbox.send(sender_id, Unknown(message.request_id, message.attempt))
            return
        missing = tuple(c for c in served.chunks if c.index + len(c.token_ids) > message.next_index or c.finish_reason)
        if missing:
            self.context.outbox.send(sender_id, Tokens(missing))
        self.context.outbox.send(sender_id, Progress(*served.key, served.request.phase.value))

    def on_front_end_lost(self, front_end_id: str, now_s: float) -> None:
        """Nobody waits for these requests any more."""
        for served in self.active():
            if served.front_end_id == front_end_id:
                self._end(served, Phase.ABORTED, now_s)

    # from prefill instances

    def on_accepted(self, message: OrderAccepted, now_s: float) -> None:
        """Prefill knows the order."""
        served = self._by_grant.get(message.grant_id)
        if served is not None and served.grant is not None:
            served.grant.is_accepted = True
            served.grant.last_sent_s = now_s

    def on_order_ended(self, message: OrderEnded, now_s: float) -> None:
        """Prefill will not hand this one over."""
        served = self._by_grant.get(message.grant_id)
        if served is None or served.grant is None:
            return
        if served.grant.is_fetch and message.num_held_blocks > 0:
            block_size = self.context.scheduler.pool.block_size
            num_held_tokens = (served.grant.first_block + message.num_held_blocks) * block_size
            if num_held_tokens < served.num_held_tokens:  # it gets less each time, so this ends
                served.num_held_tokens = num_held_tokens
                self._close(served, served.grant)
                self._begin(served, now_s)
                return
        self._give_up(served, f"prefill: {message.reason}", "prefill_failed", now_s)

    def on_hand_over(self, sender_id: str, message: HandOver, now_s: float) -> None:
        """Prefill says that everything was written; go on if everything has arrived."""
        served = self._by_grant.get(message.grant_id)
        if served is None or served.grant is None:
            self.context.outbox.send(sender_id, HandOverAck(message.grant_id, is_good=False))
            return
        if served.grant.hand_over is None:
            if (message.chunk is None) is not served.grant.is_fetch:
                self._give_up(served, "a hand-over of another kind than was ordered", "prefill_failed", now_s)
                return
            served.grant.hand_over, served.grant.handed_s = message, now_s
            if not served.grant.is_fetch:
                served.request.advance(Phase.TRANSFERRING, now_s)
        self._try_take_over(served, now_s)

    def on_peer_lost(self, prefill_id: str, now_s: float) -> None:
        """A prefill instance is gone: its open orders fail."""
        for served in list(self._by_grant.values()):
            if served.grant is not None and served.grant.prefill_id == prefill_id:
                self._give_up(served, "the prefill instance was lost", "prefill_lost", now_s)

    def on_transfer(self, event: TransferEvent, now_s: float) -> None:
        """An epoch of ours arrived or failed."""
        served = self._by_grant.get(event.epoch)
        if served is None or served.grant is None:
            return
        if isinstance(event, EpochArrived):
            served.grant.arrived = event
            self._try_take_over(served, now_s)
        elif isinstance(event, EpochFailed):
            self._give_up(served, f"transfer failed: {event.reason}", "transfer_failed", now_s)

    # the step

    def admit_queued(self, now_s: float) -> None:
        """Reserve blocks for queued attempts, in order, as far as there is room."""
        scheduler = self.context.scheduler
        while self.queued:
            served = self.queued[0]
            if not scheduler.reserve(served.request, num_spare_blocks=len(scheduler.running)):
                is_alone = scheduler.is_idle and not self._by_grant
                if not is_alone or not scheduler.reserve(served.request):
                    return
            self.queued.popleft()
            served.request.advance(Phase.RESERVED, now_s)
            self.context.outbox.send(served.front_end_id, Reserved(*served.key))
            self._begin(served, now_s)

    def on_token(self, request: Request, chunk: TokenChunk, now_s: float) -> None:
        """A token was sampled for one of ours: emit it, and end the request if it says so."""
        served = self._by_request[id(request)]
        if request.phase is Phase.PREFILLING:
            request.advance(Phase.DECODING, now_s)
        if served.stage_s:
            chunk = replace(chunk, stage_s=served.stage_s, num_kv_bytes=served.num_kv_bytes)
            served.stage_s = ()
        served.chunks.append(chunk)
        self.context.outbox.emit(served.front_end_id, chunk)
        if chunk.finish_reason is not None:
            self._end(served, Phase.FINISHED, now_s)

    def on_error(self, request: Request, chunk: TokenChunk, now_s: float) -> None:
        """The engine could not compute this request; no other instance would."""
        served = self._by_request[id(request)]
        served.chunks.append(chunk)
        self.context.outbox.emit(served.front_end_id, chunk)
        self._end(served, Phase.FAILED, now_s)

    def tick(self, now_s: float) -> None:
        """Resend, ask, give up, forget."""
        options = self.context.options
        for served in list(self._by_grant.values()):
            self._tick_grant(served, now_s)
        self.admit_queued(now_s)
        while self._over and (
            now_s - self._over[0].over_s >= options.record_s or len(self._over) > options.max_records
        ):
            served = self._over.popleft()
            self.served.pop(served.key, None)

    # inside

    def _tick_grant(self, served: Served, now_s: float) -> None:
        grant, options = served.grant, self.context.options
        if grant is None:
            return
        if grant.is_fetch and now_s - grant.ordered_s >= options.fetch_s:
            self._give_up(served, "the blocks did not arrive", "transfer_timeout", now_s)
        elif grant.hand_over is not None:
            if now_s - grant.handed_s >= options.arrival_s:
                self._give_up(served, "the blocks did not arrive", "transfer_timeout", now_s)
        elif not grant.is_accepted and now_s - grant.last_sent_s >= options.resend_s:
            self._send_order(served, grant, now_s)
        elif grant.is_accepted and now_s - grant.last_sent_s >= options.query_s:
            grant.last_sent_s = now_s
            self.context.outbox.send(grant.prefill_id, OrderQuery(grant.grant_id))

    def _check_fits(self, request: Request) -> None:
        scheduler = self.context.scheduler
        limit = min(scheduler.options.max_model_len, scheduler.pool.num_blocks * scheduler.pool.block_size)
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if request.num_tokens >= limit:
            raise InvalidRequest(
                f"{request.num_tokens} tokens do not fit this instance's {limit}", code="context_length_exceeded"
            )

    def _is_full(self, request: Request) -> bool:
        options, scheduler = self.context.options, self.context.scheduler
        num_requests = len(self.queued) + len(self._by_grant) + len(scheduler.waiting)
        num_tokens = self.outstanding_tokens() + scheduler.outstanding_tokens() + request.num_tokens
        return num_requests >= options.max_queued_requests or num_tokens > options.max_queued_tokens

    def _supersede(self, request_id: str, attempt: int, now_s: float) -> None:
        """End every earlier attempt at a request."""
        for number in range(attempt - 1, 0, -1):
            served = self.served.get((request_id, number))
            if served is not None and served.state is not ServedState.OVER:
                self._end(served, Phase.ABORTED, now_s)

    def _serve_locally(self, served: Served) -> None:
        served.state = ServedState.LOCAL
        self._by_request[id(served.request)] = served
        self.context.scheduler.add(served.request)

    def _begin(self, served: Served, now_s: float) -> None:
        """Blocks are held: have those filled that a peer has, then compute the rest here or have it computed."""
        num_blocks = self._num_blocks_to_fetch(served)
        if num_blocks and served.holder is not None:
            self._order(served, served.holder, num_blocks, now_s)
            return
        local = served.request.local
        num_left = served.request.num_tokens - local.num_computed_tokens
        is_short = local.num_computed_tokens > 0 and num_left <= self.context.options.local_prefill_tokens
        if served.prefill is None or is_short:
            self._serve_locally(served)
        else:
            served.request.advance(Phase.PREFILLING, now_s)
            self._order(served, served.prefill, None, now_s)

    def _num_blocks_to_fetch(self, served: Served) -> int:
        """Returns: how many blocks, after those that are cached here, are sooner fetched from the holder than computed."""
        request, scheduler, options = served.request, self.context.scheduler, self.context.options
        if served.holder is None or served.holder.instance_id == self.context.instance_id:
            return 0
        block_size, start = scheduler.pool.block_size, request.local.num_computed_tokens
        num_held = min(served.num_held_tokens, request.num_tokens - 1) // block_size
        stop = min(num_held, len(request.local.block_hashes)) * block_size
        if served.prefill is not None and request.num_tokens - stop > options.local_prefill_tokens:
            return 0  # the prefill instance needs these tokens' KV itself
        num_blocks = (stop - start) // block_size
        is_sooner = self._fetch_rule.is_sooner(served.holder.instance_id, num_blocks, start, stop, scheduler.predictor)
        return num_blocks if is_sooner else 0

    def _order(self, served: Served, peer: Peer, num_blocks: int | None, now_s: float) -> None:
        """Open an epoch for the first blocks that are not computed (None: all of them) and give the peer the grant."""
        local = served.request.local
        first = local.num_computed_tokens // self.context.scheduler.pool.block_size
        block_ids = local.block_table[first : None if num_blocks is None else first + num_blocks]
        grant = Grant(self.context.new_id(), self.context.new_nonce(), peer.instance_id, first, block_ids, now_s, now_s)
        grant.is_fetch = num_blocks is not None
        served.grant, served.state = grant, ServedState.FETCHING if grant.is_fetch else ServedState.ORDERED
        self._by_grant[grant.grant_id] = served
        for transfer in self.context.transfers.values():
            transfer.open_epoch(grant.grant_id, grant.block_ids, grant.nonce)
        self.context.outbox.connect(peer)
        self._send_order(served, grant, now_s)

    def _send_order(self, served: Served, grant: Grant, now_s: float) -> None:
        grant.last_sent_s = now_s
        block_ids, decode_id = tuple(grant.block_ids), self.context.instance_id
        transfers = {name: transfer.descriptor() for name, transfer in self.context.transfers.items()}
        first, request = grant.first_block, served.request
        if grant.is_fetch:
            hashes = tuple(request.local.block_hashes[first : first + len(block_ids)])
            fetch = FetchOrder(grant.grant_id, grant.nonce, hashes, block_ids, decode_id, transfers)
            self.context.outbox.send(grant.prefill_id, fetch)
            return
        wire = request.to_wire(now_s)
        order = PrefillOrder(grant.grant_id, grant.nonce, wire, first, block_ids, decode_id, transfers)
        self.context.outbox.send(grant.prefill_id, order)

    def _try_take_over(self, served: Served, now_s: float) -> None:
        """Once both the hand-over and the last byte are here: compare checksums and go on from the second token."""
        grant = served.grant
        if grant is None or grant.hand_over is None or grant.arrived is None:
            return
        hand_over = grant.hand_over
        if hand_over.digests != grant.arrived.digests:
            self._give_up(served, "checksums of the KV blocks differ", "checksum_mismatch", now_s)
            return
        self._close(served, grant)
        self.context.outbox.send(grant.prefill_id, HandOverAck(grant.grant_id, is_good=True))
        if hand_over.chunk is None:
            self._use_fetched(served, grant, hand_over, now_s)
            return
        told, seconds = dict(hand_over.stage_s), now_s - grant.ordered_s
        stages = {
            "reserve": grant.ordered_s - served.received_s,
            **told,
            "hand_over": seconds,
            "overhead": max(0.0, seconds - told.get("queue", 0.0) - told.get("prefill", 0.0)),
        }
        self.context.observer.handover(stages, hand_over.num_bytes, hand_over.backend)
        served.stage_s, served.num_kv_bytes = tuple(stages.items()), hand_over.num_bytes
        self._go_on(served, hand_over.chunk, now_s)

    def _close(self, served: Served, grant: Grant) -> None:
        """A grant is over: nothing lands in its blocks any more."""
        self.context.revoke(grant.grant_id)
        del self._by_grant[grant.grant_id]
        served.grant = None

    def _use_fetched(self, served: Served, grant: Grant, hand_over: HandOver, now_s: float) -> None:
        """A peer's blocks are here and right: compute what comes after them."""
        local, block_size = served.request.local, self.context.scheduler.pool.block_size
        num_blocks, seconds = len(grant.block_ids), now_s - grant.ordered_s
        self._fetch_rule.observe(grant.prefill_id, num_blocks, dict(hand_over.stage_s).get("wire", 0.0), seconds)
        self.context.observer.fetched(num_blocks * block_size, hand_over.num_bytes, seconds)
        local.num_computed_tokens = (grant.first_block + num_blocks) * block_size
        local.num_cached_tokens = local.num_computed_tokens
        self.context.scheduler.make_findable(served.request, local.num_computed_tokens)
        served.holder = None
        self._begin(served, now_s)

    def _give_up_fetch(self, served: Served, grant: Grant, code: str, now_s: float) -> None:
        """The peer's blocks don't come: go on without them."""
        self.context.observer.fetch_failed(code)
        self._close(served, grant)
        self.context.outbox.send(grant.prefill_id, CancelOrder(grant.grant_id))
        served.holder = None
        self._begin(served, now_s)

    def _go_on(self, served: Served, chunk: TokenChunk, now_s: float) -> None:
        """The prompt's KV is here and right: continue after prefill's token."""
        request = served.request
        request.local.num_computed_tokens = request.num_tokens
        self.context.scheduler.make_findable(request, request.num_tokens)
        request.output_token_ids.extend(chunk.token_ids)
        request.advance(Phase.DECODING, now_s)
        served.chunks.append(chunk)
        served.state = ServedState.LOCAL
        if chunk.finish_reason is not None:
            self.context.scheduler.release_blocks(request)
            self._end(served, Phase.FINISHED, now_s)
            return
        self._by_request[id(request)] = served
        self.context.scheduler.add(request)

    def _give_up(self, served: Served, reason: str, code: str, now_s: float) -> None:
        """A hand-over failed: free everything and let the front end place the request again. A fetch is not missed."""
        if served.grant is not None and served.grant.is_fetch:
            self._give_up_fetch(served, served.grant, code, now_s)
            return
        self.context.observer.handover_failed(code)
        served.answer = Refused(*served.key, reason, code)
        self.context.outbox.send(served.front_end_id, served.answer)
        self._end(served, Phase.FAILED, now_s)

    def _end(self, served: Served, phase: Phase, now_s: float) -> None:
        """The attempt is over: fence, release, remember."""
        request = served.request
        if served.state is ServedState.QUEUED and served in self.queued:
            self.queued.remove(served)
        grant = served.grant
        if grant is not None and self._by_grant.pop(grant.grant_id, None) is not None:
            self.context.revoke(grant.grant_id)
            self.context.scheduler.release_blocks(request)
            self.context.outbox.send(grant.prefill_id, CancelOrder(grant.grant_id))
        self._by_request.pop(id(request), None)
        self.context.scheduler.remove(request)
        if not request.is_done:
            request.advance(phase, now_s)
        served.state, served.over_s = ServedState.OVER, now_s
        self._over.append(served)

    def _answer_again(self, served: Served) -> None:
        if served.answer is not None:
            self.context.outbox.send(served.front_end_id, served.answer)
        elif served.state is not ServedState.QUEUED:
            self.context.outbox.send(served.front_end_id, Reserved(*served.key))
