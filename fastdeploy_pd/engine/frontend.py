"""The front end's side: it owns each request from arrival to its one terminal answer.

It places a request, watches the attempt, orders and deduplicates its tokens by index, and places it again (attempt + 1, with the
tokens so far) when the attempt is refused or its instance is lost. The client's tokens are therefore exactly one sequence, whatever
happens to instances and messages. Like the engine it is a function of (state, messages, time).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastdeploy_pd.cluster.liveness import Liveness
from fastdeploy_pd.cluster.messages import (
    Abort,
    Beat,
    Message,
    Peer,
    Progress,
    Query,
    Refused,
    Reserve,
    Reserved,
    Tokens,
    Unknown,
)
from fastdeploy_pd.core.admission import refusal
from fastdeploy_pd.core.blocks import extend_hashes
from fastdeploy_pd.core.order import due_s
from fastdeploy_pd.core.placement import Added, Candidate, FewestTokens, Load, Placement, PlacementPolicy, RoundRobin
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.prefix_index import PrefixIndex
from fastdeploy_pd.core.shortlist import Shortlist
from fastdeploy_pd.engine.outbox import Outbox
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.engine.tracked import Tracked
from fastdeploy_pd.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    FastDeployPDError,
    InvalidRequest,
    NoCapacity,
    Overloaded,
)
from fastdeploy_pd.request import MAX_SLO_S, FinishReason, Phase, Request, Slo, TokenChunk

MAX_HASHED_BLOCKS = 256  # at a time; well under a millisecond
UNHEARD_S = 1.0  # who has not answered by then may have died just before we came: others of its kind go before it


@dataclass(frozen=True, slots=True)
class Instance:
    """A member of the topic that fits this front end's model."""

    peer: Peer
    can_prefill: bool
    can_decode: bool
    outstanding_tokens: int = 0
    is_draining: bool = False
    block_size: int = 0  #: tokens a block of its prefix cache; 0: unknown, it is not looked up there

    @property
    def instance_id(self) -> str:
        """Its id."""
        return self.peer.instance_id


@dataclass(frozen=True, slots=True)
class FrontEndOptions:
    """Times in seconds, and limits."""

    resend_s: float = 1.0  #: an unanswered Reserve is sent again
    quiet_s: float = 2.0  #: a silent attempt is asked after
    beat_s: float = 1.0
    instance_timeout_s: float = 3.0  #: an instance whose counter stands still is lost
    placement_timeout_s: float = 30.0  #: a request that no instance can take fails
    deadline_s: float = 900.0  #: every request has ended by then
    max_lost_instances: int = 6  #: a request that has seen so many die is suspected of killing them
    slo_ttft_s: float | None = None  #: of requests that say nothing of it
    slo_tpot_s: float | None = None
    slo_ttft_x: float | None = (
        None  #: goes before slo_ttft_s where it is known what a prompt takes: so many times as long
    )


@dataclass(slots=True)  # not frozen, like TokenChunk
class Delivered:
    """New tokens for the client, in order, each once."""

    request_id: str
    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class Failed:
    """The terminal answer is an error."""

    request_id: str
    error: FastDeployPDError


@dataclass(slots=True)
class _View:
    """What this front end knows of an instance."""

    instance: Instance
    reported_tokens: int = 0
    added_tokens: int = 0
    is_lost: bool = False
    counter: int = -1  #: of its last beat
    why_refused: str = ""  #: its link was never established: why
    is_draining: bool = False
    load: Load | None = None
    load_s: float = 0.0  #: when it said so
    added: list[Added] = field(default_factory=list)  #: placed there since
    connected_s: float = 0.0


class FrontEnd:
    """All requests of one API process."""

    def __init__(
        self,
        front_end_id: str,
        rng: random.Random,
        options: FrontEndOptions | None = None,
        policy: PlacementPolicy | None = None,
    ) -> None:
        self.front_end_id = front_end_id
        self.options = options or FrontEndOptions()
        self.policy = policy or FewestTokens()
        self.outbox = Outbox()
        self.prefixes = PrefixIndex()  #: what the instances' prefix caches hold; may be stale, or empty
        self.requests: dict[str, Tracked] = {}
        self.num_retries: dict[str, int] = {}  # by reason
        self._rng = rng
        self._views: dict[str, _View] = {}
        self._shortlist = Shortlist()  # of those that placement may choose
        self._block_size = 0  # that most of them have
        self._events: list[Delivered | Failed] = []
        self._liveness = Liveness(self.options.instance_timeout_s)
        self._counter = 0
        self._next_beat_s = 0.0

    # what the shell sees

    def take_events(self) -> list[Delivered | Failed]:
        """Returns: tokens and errors since the last call, in order."""
        events, self._events = self._events, []
        return events

    def is_serving_possible(self) -> bool:
        """Whether a request submitted now would find an instance."""
        return any(c.can_decode for c in self._candidates(self._views))

    def lack(self) -> str:
        """Returns: which part nobody in the topic plays, and who is there but cannot be reached; empty: nothing is missing."""
        there = [v.instance for v in self._views.values() if not v.is_lost and not v.is_draining]
        if not any(i.can_decode for i in there):
            missing = "there is no decode or mixed instance (yet), so requests wait for one"
        elif not any(i.can_prefill for i in there):
            missing = "there is no prefill or mixed instance (yet), so decode instances compute prompts themselves"
        else:
            return ""
        return "; ".join([missing, *self._refused()])

    def _refused(self) -> list[str]:
        return [f"{i} is there, but {v.why_refused}" for i, v in self._views.items() if v.is_lost and v.why_refused]

    def live_instances(self) -> list[Instance]:
        """Returns: members that are reachable."""
        return [v.instance for v in self._views.values() if not v.is_lost]

    def predictor_of(self, instance_id: str) -> Predictor | None:
        """Returns: what steps take on an instance, as it said last; None if it is not here, or has said nothing."""
        view = self._views.get(instance_id)
        return None if view is None or view.is_lost or view.load is None else view.load.predictor

    # membership

    def set_members(self, members: Iterable[Instance], now_s: float) -> None:
        """Take the newest snapshot. Who left it is not used for new requests; what runs there goes on while its link lives, if there
        ever was one: who has never been heard of had died before, and what was placed there is placed again.
        """
        present = {m.instance_id: m for m in members}
        left = {i: v for i, v in self._views.items() if i not in present}
        for instance_id in left:
            left[instance_id].is_draining = True
            self._list(instance_id)
        for instance_id, member in present.items():
            view = self._views.get(instance_id)
            if view is None:
                self._views[instance_id] = _View(
                    member, member.outstanding_tokens, is_draining=member.is_draining, connected_s=now_s
                )
                self._liveness.seen(instance_id, now_s)
                self.outbox.connect(member.peer)
                self.outbox.send(instance_id, Beat(self._counter))
            else:
                view.instance, view.is_draining = member, member.is_draining
            self._list(instance_id)
        if unheard := {i for i, v in left.items() if v.counter < 0}:
            for tracked in [t for t in self.requests.values() if t.needs(unheard)]:
                self._place_again(tracked, "instance_left", now_s)
        for instance_id in left.keys() - {t.decode_id for t in self.requests.values()} if left else ():
            del self._views[instance_id]
            self._liveness.forget(instance_id)
        sizes = Counter(v.instance.block_size for v in self._views.values() if v.instance.block_size)
        self._block_size = max(sizes, key=lambda size: sizes[size], default=0)

    def peer_lost(self, peer_id: str, now_s: float, why_refused: str = "") -> None:
        """A link ended (why_refused: before it was established) or an instance went silent: what it served is placed again."""
        view = self._views.get(peer_id)
        if view is not None:
            view.is_lost, view.why_refused = True, why_refused
            self._list(peer_id)
        self._liveness.forget(peer_id)
        for tracked in [t for t in self.requests.values() if t.decode_id == peer_id]:
            self._place_after_loss(tracked, "decode_lost", now_s)

    # requests

    def submit(self, request: Request, now_s: float) -> None:
        """Serve a request from now on. Its output_token_ids, if any, are what the client has already."""
        request.front_end_id, request.arrival_s = self.front_end_id, now_s
        request.slo = self._slo_of(request)
        tracked = Tracked(request, now_s)
        self.requests[request.request_id] = tracked
        error = self._refusal(request, now_s)
        if error is None:
            self._place(tracked, now_s)
        else:
            self._fail(tracked, error, now_s)

    def look_up(self, request: Request) -> bool:
        """Hash some more of a request's blocks, as long as an instance holds all that are hashed.

        A long prompt is hashed piece by piece before it is submitted, so that other requests need not wait for all of it.
        Returns: whether there is more to hash.
        """
        block_size, instance_ids = self._prefix_caches()
        hashes, num_blocks = request.local.block_hashes, (request.num_tokens - 1) // max(1, block_size)
        if not instance_ids or request.sampling.prompt_logprobs is not None or len(hashes) >= num_blocks:
            return False
        if hashes and max(self.prefixes.match(hashes, instance_ids).values(), default=0) < len(hashes):
            return False
        stop = min(num_blocks, len(hashes) + min(MAX_HASHED_BLOCKS, max(4, len(hashes))))
        new = request.token_ids(len(hashes) * block_size, stop * block_size)
        extend_hashes(hashes, new, block_size, request.cache_salt)
        return True

    def abort(self, request_id: str, now_s: float) -> None:
        """The client doesn't want it any more. Does nothing if it has ended."""
        tracked = self.requests.pop(request_id, None)
        if tracked is not None:
            self._tell_abort(tracked)
            tracked.request.advance(Phase.ABORTED, now_s)

    def receive(self, sender_id: str, message: Message, now_s: float) -> None:
        """Take one message from an instance."""
        match message:
            case Beat():
                self._on_beat(sender_id, message, now_s)
            case Tokens():
                for chunk in message.chunks:
                    self._on_chunk(chunk, now_s)
            case Reserved():
                tracked = self._current(message.request_id, message.attempt, now_s)
                if tracked is not None and tracked.request.phase is Phase.PLACED:
                    tracked.request.advance(Phase.RESERVED, now_s)
            case Refused():
                self._on_refused(sender_id, message, now_s)
            case Progress():
                self._current(message.request_id, message.attempt, now_s)
            case Unknown():
                tracked = self._current(message.request_id, message.attempt, now_s)
                # Before its first answer an attempt may be unknown because Reserve is still under way: it is resent.
                if tracked is not None and tracked.request.phase is not Phase.PLACED:
                    self._place_again(tracked, "attempt_unknown", now_s)
            case _:
                pass  # engines' messages to each other are none of ours

    def tick(self, now_s: float) -> None:
        """Resend, ask, give up, beat. Call it every few ten milliseconds."""
        for instance_id in self._liveness.lost(now_s):
            self.peer_lost(instance_id, now_s)
        for tracked in list(self.requests.values()):
            self._tick_request(tracked, now_s)
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self.options.beat_s
            self._counter += 1
            for instance_id, view in self._views.items():
                if view.is_lost:
                    self.outbox.connect(view.instance.peer)
                self.outbox.send(instance_id, Beat(self._counter))

    # inside

    def _slo_of(self, request: Request) -> Slo:
        slo, options = request.slo, self.options
        ttft_s = slo.ttft_s or self._default_ttft_s(len(request.prompt_token_ids))
        return replace(slo, ttft_s=ttft_s, tpot_s=slo.tpot_s or options.slo_tpot_s)

    def _refusal(self, request: Request, now_s: float) -> FastDeployPDError | None:
        """Returns: why a request cannot end by its deadline; None if it may, or the client has a part of its answer already."""
        if request.slo.deadline_s is None or request.output_token_ids:
            return None
        candidates = self._candidates(self._views, self._cached_tokens(request), now_s, Load.after)
        return refusal(request, candidates, self.policy)

    def _default_ttft_s(self, num_tokens: int) -> float | None:
        """Returns: the multiple of what a prompt takes on the fastest instance when it is idle, or the fixed time."""
        factor = self.options.slo_ttft_x
        if factor is None:
            return self.options.slo_ttft_s
        known = [p for i, v in self._views.items() if v.instance.can_prefill and (p := self.predictor_of(i))]
        least = min((p.prefill_s(num_tokens) for p in known if p.knows_prefill), default=0.0)
        return min(factor * least, MAX_SLO_S - 1) if least > 0 else self.options.slo_ttft_s

    def _prefix_caches(self) -> tuple[int, list[str]]:
        """Returns: the block size that most instances have, and those of them whose prefix caches are known."""
        size, known = self._block_size, [i for i in self.prefixes.instance_ids() if i in self._views]
        return size, [i for i in known if size and self._views[i].instance.block_size == size]

    def _cached_tokens(self, request: Request) -> dict[str, int]:
        """Returns: how many of a request's first tokens each instance has in its prefix cache, as far as is known."""
        while self.look_up(request):
            pass
        block_size, instance_ids = self._prefix_caches()
        matches = self.prefixes.match(request.local.block_hashes, instance_ids)
        return {i: num_blocks * block_size for i, num_blocks in matches.items()}

    def _list(self, instance_id: str) -> None:
        """Bring the short list up to date with an instance's view."""
        view = self._views.get(instance_id)
        if view is None or view.is_lost or view.is_draining:
            self._shortlist.remove(instance_id)
        else:
            kind = view.instance.can_prefill, view.instance.can_decode
            self._shortlist.put(instance_id, kind, view.reported_tokens + view.added_tokens)

    def _candidates(
        self,
        instance_ids: Iterable[str],
        cached: Mapping[str, int] | None = None,
        now_s: float = 0.0,
        load_at: Callable[[Load, float, Sequence[Added]], Load] | None = None,
    ) -> list[Candidate]:
        """Returns: of these instances those that can be chosen, with what they have to do where it is said how to tell."""
        return [
            Candidate(
                instance_id,
                view.instance.can_prefill,
                view.instance.can_decode,
                view.reported_tokens + view.added_tokens,
                (cached or {}).get(instance_id, 0),
                load_at(view.load, now_s - view.load_s, view.added) if load_at and view.load else None,
            )
            for instance_id in instance_ids
            if not (view := self._views[instance_id]).is_lost and not view.is_draining
        ]

    def _answering(self, candidates: list[Candidate], now_s: float) -> list[Candidate]:
        """Returns: these without those that have not answered yet, where others of their kind have; see UNHEARD_S."""
        views = self._views
        kinds = {(c.can_prefill, c.can_decode) for c in candidates if views[c.instance_id].counter >= 0}

        def is_chosen(c: Candidate) -> bool:
            view = views[c.instance_id]
            is_known = view.counter >= 0 or now_s - view.connected_s < UNHEARD_S
            return is_known or (c.can_prefill, c.can_decode) not in kinds

        return [c for c in candidates if is_chosen(c)]

    def _looked_at(self, tracked: Tracked) -> list[str]:
        """Returns: the few instances that a placement looks at, or, once it has gone wrong somewhere, all others."""
        if tracked.avoid:
            return [i for i in self._views if i not in tracked.avoid]
        holders = sorted((i for i in tracked.cached if tracked.cached[i]), key=lambda i: -tracked.cached[i])
        return self._shortlist.choose(holders, self._rng)

    def _place(self, tracked: Tracked, now_s: float) -> None:
        """Choose instances and ask decode; without one, wait until the placement deadline."""
        request = tracked.request
        cached = tracked.cached = self._cached_tokens(request)
        by_tokens = isinstance(self.policy, FewestTokens | RoundRobin)
        load_at = None if by_tokens else Load.forecast
        candidates = self._answering(self._candidates(self._looked_at(tracked), cached, now_s, load_at), now_s)
        placement = self.policy.place(request.num_tokens, candidates, self._rng, request.slo, now_s - request.arrival_s)
        if placement is None:
            self._on_no_candidate(tracked, now_s)
            return
        tracked.placement, tracked.decode_id, tracked.unplaced_since_s = placement, placement.decode_id, None
        request.advance(Phase.PLACED, now_s)
        for instance_id in placement.instance_ids:
            view, num_cached = self._views[instance_id], cached.get(instance_id, 0)
            view.added_tokens += request.num_tokens - num_cached
            self._list(instance_id)
            if view.load is not None:
                computes = instance_id == (placement.prefill_id or placement.decode_id)
                seconds = view.load.predictor.prefill_s(request.num_tokens, num_cached) if computes else 0.0
                placed_s, due_in_s = now_s - view.load_s, due_s(request) - view.load_s
                view.added.append(Added(placed_s, due_in_s, seconds, request.num_tokens - num_cached))
                if request.priority != view.load.priority:
                    view.load = replace(view.load, priority=None)
                if request.slo.tpot_s is not None:
                    view.load = replace(view.load, step_tokens=0)
        tracked.heard_s = now_s
        self._send_reserve(tracked, now_s)

    def _send_reserve(self, tracked: Tracked, now_s: float) -> None:
        tracked.sent_s = now_s
        placement = tracked.placement
        if placement is None:
            return
        view = self._views.get(placement.prefill_id or "")
        prefill = view.instance.peer if view else None
        holder = self._holder(tracked, placement)
        held = (holder, tracked.cached[holder.instance_id]) if holder else (None, 0)
        self.outbox.send(placement.decode_id, Reserve(tracked.request.to_wire(now_s), prefill, *held))

    def _holder(self, tracked: Tracked, placement: Placement) -> Peer | None:
        """Returns: the instance whose prefix cache has most of a request, if decode's or prefill's has less."""
        cached = tracked.cached
        least = min(cached.get(i, 0) for i in placement.instance_ids)
        # Of those with as much, one that takes part need not be asked.
        for instance_id in sorted(cached, key=lambda i: (-cached[i], i != placement.decode_id, i)):
            view = self._views.get(instance_id)
            is_there = view is not None and not view.is_lost and not view.is_draining
            if view is not None and is_there and cached[instance_id] > least and instance_id not in tracked.avoid:
                return view.instance.peer
        return None

    def _place_after_loss(self, tracked: Tracked, reason: str, now_s: float) -> None:
        """Begin the next attempt, unless the request has been there too often when an instance died: it may be what kills them."""
        tracked.num_lost += 1
        if tracked.num_lost >= self.options.max_lost_instances:
            lost = f"{tracked.num_lost} instances were lost while serving this request"
            self._fail(tracked, FastDeployPDError(lost, code="poison"), now_s)
        else:
            self._place_again(tracked, reason, now_s)

    def _place_again(self, tracked: Tracked, reason: str, now_s: float) -> None:
        """Begin the next attempt: the tokens so far become part of what is prefilled."""
        request = tracked.request
        self.num_retries[reason] = self.num_retries.get(reason, 0) + 1
        self._tell_abort(tracked)
        request.advance(Phase.ARRIVED, now_s)
        request.attempt += 1
        tracked.early.clear()
        tracked.decode_id, tracked.placement, tracked.unplaced_since_s = "", None, now_s
        self._place(tracked, now_s)

    def _on_no_candidate(self, tracked: Tracked, now_s: float) -> None:
        if tracked.avoid and self._candidates(self._views):
            if all(reason == "overloaded" for reason in tracked.avoid.values()):
                self._fail(tracked, Overloaded("Every instance's queue is full; try again later."), now_s)
                return
            tracked.avoid.clear()  # somebody is there: what it was avoided for may have passed
            return
        since_s = tracked.unplaced_since_s if tracked.unplaced_since_s is not None else now_s
        tracked.unplaced_since_s = since_s
        if now_s - since_s >= self.options.placement_timeout_s:
            why = (
                "the placement policy chose none"
                if self.is_serving_possible()
                else "no decode or mixed instance is there"
            )
            why = "; ".join([why, *self._refused()])
            text = f"The request was placed nowhere for {self.options.placement_timeout_s:g} s: {why}."
            self._fail(tracked, NoCapacity(text), now_s)

    def _tick_request(self, tracked: Tracked, now_s: float) -> None:
        options, request = self.options, tracked.request
        deadline_s = min(options.deadline_s, request.slo.deadline_s or options.deadline_s)
        if now_s - request.arrival_s >= deadline_s:
            self._fail(tracked, DeadlineExceeded(f"The request did not end within {deadline_s:g} s."), now_s)
        elif tracked.placement is None:
            self._place(tracked, now_s)
        elif request.phase is Phase.PLACED:
            if now_s - tracked.sent_s >= options.resend_s:
                self._send_reserve(tracked, now_s)
        elif now_s - max(tracked.heard_s, tracked.asked_s) >= options.quiet_s:
            tracked.asked_s = now_s
            self.outbox.send(
                tracked.decode_id, Query(request.request_id, request.attempt, len(request.output_token_ids))
            )

    def _current(self, request_id: str, attempt: int, now_s: float) -> Tracked | None:
        """Returns: the request if this attempt is its current one."""
        tracked = self.requests.get(request_id)
        if tracked is None or tracked.request.attempt != attempt:
            return None
        tracked.heard_s = now_s
        return tracked

    def _on_chunk(self, chunk: TokenChunk, now_s: float) -> None:
        tracked = self.requests.get(chunk.request_id)
        if tracked is None or tracked.request.attempt != chunk.attempt:
            return
        request = tracked.request
        expected = len(request.output_token_ids)
        if chunk.index > expected:
            # Early: prefill's token 0 and decode's token 1 come over different links. Not heard_s: if the gap stays, we ask.
            tracked.early[chunk.index] = chunk
            return
        self._deliver(tracked, chunk, now_s)
        while not request.is_done and len(request.output_token_ids) in tracked.early:
            self._deliver(tracked, tracked.early.pop(len(request.output_token_ids)), now_s)

    def _deliver(self, tracked: Tracked, chunk: TokenChunk, now_s: float) -> None:
        request = tracked.request
        num_known = len(request.output_token_ids) - chunk.index
        if num_known > 0:
            if num_known >= len(chunk.token_ids) and chunk.finish_reason is None:
                return
            if num_known > len(chunk.token_ids):
                return
            chunk = replace(
                chunk,
                index=chunk.index + num_known,
                token_ids=chunk.token_ids[num_known:],
                logprobs=chunk.logprobs[num_known:],
                prompt_logprobs=(),
            )
        tracked.heard_s = now_s
        self._enter_decoding(request, now_s)
        request.output_token_ids.extend(chunk.token_ids)
        if chunk.finish_reason is FinishReason.ERROR:
            self._fail(tracked, FastDeployPDError(chunk.error, code=chunk.error_code or None), now_s)
            return
        self._events.append(Delivered(request.request_id, chunk))
        if chunk.finish_reason is not None:
            request.advance(Phase.FINISHED, now_s)
            del self.requests[request.request_id]

    def _enter_decoding(self, request: Request, now_s: float) -> None:
        """Tokens may overtake Reserved: step through the phases that were not seen."""
        for before, after in (
            (Phase.PLACED, Phase.RESERVED),
            (Phase.RESERVED, Phase.PREFILLING),
            (Phase.PREFILLING, Phase.DECODING),
        ):
            if request.phase is before:
                request.advance(after, now_s)

    def _on_refused(self, sender_id: str, message: Refused, now_s: float) -> None:
        tracked = self._current(message.request_id, message.attempt, now_s)
        if tracked is None:
            return
        if message.is_final:
            error_type = ContextLengthExceeded if message.code == "context_length_exceeded" else InvalidRequest
            self._fail(tracked, error_type(message.reason, code=message.code), now_s)
            return
        prefill_id = tracked.placement.prefill_id if tracked.placement else None
        if message.code in ("prefill_lost", "prefill_failed", "transfer_failed", "transfer_timeout") and prefill_id:
            tracked.avoid[prefill_id] = message.code
        elif message.code != "checksum_mismatch":
            tracked.avoid[sender_id] = message.code
        if message.code == "prefill_lost":
            self._place_after_loss(tracked, message.code, now_s)
        else:
            self._place_again(tracked, message.code, now_s)

    def _on_beat(self, sender_id: str, beat: Beat, now_s: float) -> None:
        view = self._views.get(sender_id)
        if view is None:
            return
        if view.is_lost and beat.counter == view.counter:
            return  # its process beats, and its device hangs
        view.is_lost, view.why_refused, view.counter = False, "", beat.counter
        view.is_draining = view.is_draining or beat.is_draining
        if beat.role is not None:
            role = Role(beat.role)
            view.instance = replace(view.instance, can_prefill=role.can_prefill, can_decode=role.can_decode)
        view.reported_tokens, view.added_tokens = beat.outstanding_tokens, 0
        if beat.load is not None and beat.load.is_sane:
            view.load, view.load_s = beat.load, now_s
        view.added.clear()  # known there by now, or soon told of
        self._list(sender_id)
        self._liveness.beat(sender_id, beat.counter, now_s, beat.longest_step_s)

    def _tell_abort(self, tracked: Tracked) -> None:
        if tracked.decode_id:
            self.outbox.send(tracked.decode_id, Abort(tracked.request.request_id, tracked.request.attempt))

    def _fail(self, tracked: Tracked, error: FastDeployPDError, now_s: float) -> None:
        self._tell_abort(tracked)
        tracked.request.advance(Phase.FAILED, now_s)
        self.requests.pop(tracked.request.request_id, None)
        self._events.append(Failed(tracked.request.request_id, error))
