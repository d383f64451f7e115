"""Decode's side: takes requests, reserves blocks, orders prefills, verifies what arrives, generates, answers front ends.

A served attempt is QUEUED (no room yet) -> ORDERED (blocks held, prefill at work) -> LOCAL (in the scheduler) -> OVER. Without a
prefill instance it goes to LOCAL at once, and so it does when the prefix cache leaves little to compute. Where a peer holds more of the
prompt than we do, the attempt may be FETCHING before (`engine/fetches.py`). Blocks that a peer may write into are released only after
their grant was closed (`engine/grants.py`); received ones enter the prefix cache only after their checksums were compared.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fastdeploy_pd.cluster.messages import (
    Abort,
    HandOver,
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
from fastdeploy_pd.core.order import num_left
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.engine.fetches import Fetches, Held
from fastdeploy_pd.engine.grants import Failure, Grant, Grants
from fastdeploy_pd.errors import InvalidRequest
from fastdeploy_pd.request import Phase, Request, TokenChunk


class ServedState(enum.Enum):
    """Where a served attempt is."""

    QUEUED = "queued"
    FETCHING = "fetching"
    ORDERED = "ordered"
    LOCAL = "local"
    OVER = "over"


@dataclass(slots=True, eq=False)
class Served:
    """One attempt at a request and everything it has emitted."""

    request: Request
    front_end_id: str
    prefill: Peer | None
    received_s: float
    holder: Peer | None = None  #: who has cached blocks of it; None: nobody, or not worth asking again
    num_held_tokens: int = 0  #: of the first ones, how many it has
    state: ServedState = ServedState.QUEUED
    grant: Grant | None = None
    chunks: list[TokenChunk] = field(default_factory=list)
    answer: Refused | None = None  #: why it ended without tokens; repeated if the front end asks again
    over_s: float = 0.0
    stage_s: tuple[tuple[str, float], ...] = ()  # of its hand-over; goes out with the first chunk, like num_kv_bytes
    num_kv_bytes: int = 0
    computed_by: str = ""  #: the prefill instance whose KV it goes on from

    @property
    def key(self) -> tuple[str, int]:
        """Names the attempt."""
        return self.request.request_id, self.request.attempt


def num_outstanding(served: Served) -> int:
    """Returns: tokens of an attempt that are to be computed here, as far as is known, and 1 at least, for the stream that it becomes."""
    return 1 if served.state is ServedState.ORDERED else max(1, num_left(served.request))


class DecodeSide:
    """All attempts served by one engine."""

    def __init__(self, context: EngineContext, grants: Grants, fetches: Fetches) -> None:
        self.context = context
        self._grants, self._fetches = grants, fetches
        self.served: OrderedDict[tuple[str, int], Served] = OrderedDict()
        self.queued: deque[Served] = deque()
        self._away: dict[int, Served] = {}  # by id() of the request: a peer fills blocks of it
        self._by_request: dict[int, Served] = {}  # by id() of the request in the scheduler
        self._over: deque[Served] = deque()
        self._generated: OrderedDict[tuple[str, str], int] = OrderedDict()  # tokens by prefill instance and tenant
        self._aborted: OrderedDict[str, int] = OrderedDict()  # request_id -> highest attempt that was aborted
        self._num_outstanding: int | None = None  # tokens, of all that is here; None: to be counted
        self._is_over_count = False  # what has ended since is counted there too

    @property
    def num_ordered(self) -> int:
        """Attempts that wait for a peer."""
        return len(self._away)

    @property
    def num_ordered_tokens(self) -> int:
        """Tokens of theirs."""
        return sum(s.request.num_tokens for s in self._away.values())

    def outstanding_tokens(self) -> int:
        """Returns: tokens of attempts that are not in the scheduler yet: what is to be computed, and one for each ordered stream."""
        return sum(num_outstanding(s) for s in (*self.queued, *self._away.values()))

    def count_again(self) -> None:
        """Steps change what is outstanding. Of a burst of requests between two of them each is not to count all."""
        self._num_outstanding = None

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
        if self._num_outstanding is not None:
            self._num_outstanding += num_outstanding(served)

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

    # the step

    def admit_queued(self, now_s: float) -> None:
        """Reserve blocks for queued attempts, in order, as far as there is room beside what waits in the scheduler."""
        scheduler = self.context.scheduler
        while self.queued:
            served = self.queued[0]
            if not scheduler.reserve(served.request, scheduler.num_wanted_blocks()):
                is_alone = scheduler.is_idle and not self._away
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
        if served.computed_by:
            self._count_generated(served.computed_by, request.tenant, len(chunk.token_ids))
        if chunk.finish_reason is not None:
            self._end(served, Phase.FINISHED, now_s)

    def on_error(self, request: Request, chunk: TokenChunk, now_s: float) -> None:
        """The engine could not compute this request; no other instance would."""
        served = self._by_request[id(request)]
        served.chunks.append(chunk)
        self.context.outbox.emit(served.front_end_id, chunk)
        self._end(served, Phase.FAILED, now_s)

    def tick(self, now_s: float) -> None:
        """Take what there is room for by now; forget."""
        options = self.context.options
        self.admit_queued(now_s)
        while self._over and (
            now_s - self._over[0].over_s >= options.record_s or len(self._over) > options.max_records
        ):
            served = self._over.popleft()
            self.served.pop(served.key, None)

    # inside

    def _count_generated(self, prefill_id: str, tenant: str, num_tokens: int) -> None:
        """Remember, for the next order, what followed prompts that a prefill instance has computed."""
        key = prefill_id, tenant
        self._generated[key] = self._generated.get(key, 0) + num_tokens
        self._generated.move_to_end(key)
        while len(self._generated) > self.context.options.max_records:
            self._generated.popitem(last=False)

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
        num_requests = len(self.queued) + len(self._away) + len(scheduler.waiting)
        if num_requests >= options.max_queued_requests:
            return True
        most = options.max_queued_tokens - request.num_tokens
        if self._num_outstanding is None or (self._is_over_count and self._num_outstanding > most):
            self._num_outstanding = self.outstanding_tokens() + scheduler.outstanding_tokens()
            self._is_over_count = False
        return self._num_outstanding > most

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
        request = served.request
        if served.holder is not None:
            most_left = math.inf if served.prefill is None else self.context.options.local_prefill_tokens
            held = Held(served.holder, served.num_held_tokens, most_left)
            if self._fetches.begin(request, held, lambda then_s: self._on_fetched(served, then_s), now_s):
                served.state, self._away[id(request)] = ServedState.FETCHING, served
                return
        self._compute(served, now_s)

    def _on_fetched(self, served: Served, now_s: float) -> None:
        """What the peer had is here, or won't come."""
        del self._away[id(served.request)]
        served.holder = None
        self._compute(served, now_s)

    def _compute(self, served: Served, now_s: float) -> None:
        """Compute what is left of the prompt, or order it."""
        request, prefill = served.request, served.prefill
        num_here = request.local.num_computed_tokens
        is_short = num_here > 0 and request.num_tokens - num_here <= self.context.options.local_prefill_tokens
        if prefill is None or is_short:
            self._serve_locally(served)
            return
        request.advance(Phase.PREFILLING, now_s)
        served.state, self._away[id(request)] = ServedState.ORDERED, served
        served.grant = self._grants.open(self, request, prefill, None, now_s, is_fetch=False)

    # of GrantOwner, for ordered prompts

    def order(self, grant: Grant, now_s: float) -> PrefillOrder:
        """See GrantOwner."""
        block_ids, decode_id = tuple(grant.block_ids), self.context.instance_id
        transfers = {name: transfer.descriptor() for name, transfer in self.context.transfers.items()}
        wire, served = grant.request.to_wire(now_s), self._away[id(grant.request)]
        return PrefillOrder(
            grant.grant_id,
            grant.nonce,
            wire,
            grant.first_block,
            block_ids,
            decode_id,
            transfers,
            served.holder,
            served.num_held_tokens,
            self._generated.get((grant.peer_id, grant.request.tenant), 0),
        )

    def handed(self, grant: Grant, now_s: float) -> None:
        """See GrantOwner."""
        grant.request.advance(Phase.TRANSFERRING, now_s)

    def arrived(self, grant: Grant, hand_over: HandOver, now_s: float) -> None:
        """See GrantOwner: go on from the second token."""
        served = self._away.pop(id(grant.request))
        served.grant, served.computed_by = None, grant.peer_id
        if hand_over.chunk is None:
            raise ValueError(f"grant {grant.grant_id} came without a token")
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

    def failed(self, grant: Grant, failure: Failure, now_s: float) -> None:
        """See GrantOwner: free everything and let the front end place the request again."""
        served = self._away.pop(id(grant.request))
        served.grant = None
        self.context.scheduler.release_blocks(served.request)
        self.context.observer.handover_failed(failure.code)
        served.answer = Refused(*served.key, failure.reason, failure.code)
        self.context.outbox.send(served.front_end_id, served.answer)
        self._end(served, Phase.FAILED, now_s)

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

    def _end(self, served: Served, phase: Phase, now_s: float) -> None:
        """The attempt is over: fence, release, remember."""
        request = served.request
        if served.state is ServedState.QUEUED and served in self.queued:
            self.queued.remove(served)
        if self._away.pop(id(request), None) is not None:
            if not self._fetches.cancel(request) and served.grant is not None:
                self._grants.cancel(served.grant)
            self.context.scheduler.release_blocks(request)
        self._by_request.pop(id(request), None)
        self.context.scheduler.remove(request)
        if not request.is_done:
            request.advance(phase, now_s)
        served.state, served.over_s = ServedState.OVER, now_s
        self._over.append(served)
        self._is_over_count = True

    def _answer_again(self, served: Served) -> None:
        if served.answer is not None:
            self.context.outbox.send(served.front_end_id, served.answer)
        elif served.state is not ServedState.QUEUED:
            self.context.outbox.send(served.front_end_id, Reserved(*served.key))
