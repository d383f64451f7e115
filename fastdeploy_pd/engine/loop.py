"""One engine step: receive, schedule, run, hand over, emit.

A step is launched and asked after, never waited for: while the device computes it, messages are taken, transfers polled, layers
handed over and, where the runner's depth is 2, the next one is launched: shortly before the device needs it, so that who comes during a
long step has a place in the next one. What happened to a request meanwhile decides whether the step's outputs for it still count.

The engine is a function of (state, messages, time): it owns no socket and no thread. The shell (`engine/process.py`, or a test with
a virtual clock) feeds it messages and sends what it puts into the outbox.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastdeploy_pd.clock import Clock
from fastdeploy_pd.cluster.liveness import Liveness
from fastdeploy_pd.cluster.messages import (
    Abort,
    Beat,
    CancelOrder,
    Command,
    FetchOrder,
    HandOver,
    HandOverAck,
    Message,
    OrderAccepted,
    OrderEnded,
    OrderQuery,
    PrefillOrder,
    Query,
    Refused,
    Reserve,
    Standing,
)
from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.online import Observation, OnlinePredictor
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.engine.context import EngineContext, Runner, Step, StepOutput
from fastdeploy_pd.engine.decode import DecodeSide
from fastdeploy_pd.engine.fetches import Fetches
from fastdeploy_pd.engine.grants import Grants
from fastdeploy_pd.engine.outbox import Action, Connect
from fastdeploy_pd.engine.prefill import PrefillSide
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.request import FinishReason, Request, TokenChunk, TokenLogprobs

TICK_S = 0.05
LEAD_S = 0.02  # before a step is predicted to end, the next one is launched: preparing one of many tokens takes some milliseconds
LEAST_BEAT_S = 0.02  # between beats where placement must hear of something ...
BEAT_S_A_CALLER = 0.001  # ... and as much for each who hears it: a thousand messages a second at most
LONGEST_STEP_MEMORY = 0.9  # the longest step fades by this factor in beat_s: one slow step is not remembered for ever


@dataclass(slots=True)
class StepReport:
    """A step that has ended, for the metrics."""

    num_tokens: int = 0
    step_s: float = 0.0  #: since it was launched or, if that was later, since the one before it ended
    observation: Observation | None = None  #: how far that is from its prediction, if there was one


@dataclass(slots=True)
class InFlight:
    """A step between its launch and the handling of its outputs."""

    batch: Batch
    step: Step
    launched_s: float


@dataclass(slots=True)
class NoOutput:
    """Stands for each output of a step that failed as a whole; see `StepOutput`."""

    error: FastDeployPDError | None
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


class Engine:
    """Serves requests on one instance, in whatever role."""

    def __init__(self, role: Role, context: EngineContext, runner: Runner, clock: Clock) -> None:
        self.role, self.role_since_s = role, clock.now_s()
        self.flipped_s: float | None = None
        self.context = context
        self.runner = runner
        self.clock = clock
        self.grants = Grants(context)
        fetches = Fetches(context, self.grants)
        self.prefill = PrefillSide(context, fetches)
        self.decode = DecodeSide(context, self.grants, fetches)
        self.counter = 0
        self.is_draining, self.stop_at_s = False, float("inf")
        self._online = OnlinePredictor()
        self.has_moved = False  #: the last call of `step` launched or ended a step, or the next may queue more of one: no time to wait
        self._in_flight: deque[InFlight] = deque()
        self._last_end_s = 0.0
        self._longest_step_s = 0.0
        self._next_tick_s = 0.0
        self._next_beat_s = self._last_beat_s = 0.0
        self._served_peers: set[str] = set()  # instances that we have connected to
        self._callers: set[str] = set()  # front ends and decode instances that have spoken to us
        self._liveness = Liveness(context.options.peer_timeout_s)
        self._caller_liveness = Liveness(context.options.front_end_timeout_s)

    def start_from(self, predictor: Predictor | None) -> None:
        """Take what was measured before for what is known of the time that steps take; None: nothing."""
        self._online = OnlinePredictor(predictor)
        self._tell_scheduler()

    @property
    def predictor(self) -> Predictor | None:
        """Of this instance's steps, as learned so far; None: nothing is known. Of what it does not do one half may stay unknown."""
        return self._online.current

    # in

    def receive(self, sender_id: str, message: Message) -> None:
        """Take one message from a peer."""
        now_s = self.clock.now_s()
        match message:
            case Beat():
                self._on_beat(sender_id, message, now_s)
            case Reserve():
                self._hear(sender_id, now_s)
                if isinstance(message.request.get("attempt", 1), int):  # else nobody to answer
                    self._on_reserve(sender_id, message, now_s)
                    self._beat_soon()
            case Abort():
                self.decode.on_abort(message, now_s)
            case Query():
                self.decode.on_query(sender_id, message)
            case PrefillOrder():
                self._hear(sender_id, now_s)
                self._on_order(sender_id, message, now_s)
                self._beat_soon()
            case FetchOrder():
                self._hear(sender_id, now_s)
                self._on_fetch(message, now_s)
            case CancelOrder():
                self.prefill.on_cancel(sender_id, message, now_s)
            case OrderQuery():
                self.prefill.on_query(sender_id, message, now_s)
            case HandOverAck():
                self.prefill.on_ack(message, now_s)
            case OrderAccepted():
                self.grants.on_accepted(message, now_s)
            case OrderEnded():
                self.grants.on_ended(message, now_s)
            case HandOver():
                self.grants.on_hand_over(sender_id, message, now_s)
            case Command():
                self._on_command(sender_id, message, now_s)
            case _:
                pass  # Reserved, Tokens, ... are for front ends; a peer that mixes us up does no harm

    def peer_lost(self, peer_id: str) -> None:
        """A link ended, or a peer has been silent for too long."""
        now_s = self.clock.now_s()
        self._liveness.forget(peer_id)
        self._caller_liveness.forget(peer_id)
        self._served_peers.discard(peer_id)
        self._callers.discard(peer_id)
        self.grants.on_peer_lost(peer_id, now_s)
        self.decode.on_front_end_lost(peer_id, now_s)
        self.prefill.on_peer_lost(peer_id, now_s)

    def set_role(self, role: Role) -> None:
        """Take new work of this role alone from now on; what was accepted before is served to its end. Idempotent."""
        if role is not self.role:
            self.role, self.role_since_s = role, self.clock.now_s()
            self.flipped_s = self.role_since_s
            self._next_tick_s = self._next_beat_s = 0.0  # everybody connected hears of it in the next step

    def drain(self, timeout_s: float) -> None:
        """Take nothing new; `is_drained` when what is served has ended, and to be stopped at `stop_at_s` at the latest."""
        self.is_draining, self.stop_at_s = True, min(self.stop_at_s, self.clock.now_s() + timeout_s)
        self._next_tick_s = self._next_beat_s = 0.0

    # out

    def take_actions(self) -> list[Action]:
        """Returns: what the shell must send and connect now."""
        actions = self.context.outbox.take()
        for action in actions:
            if isinstance(action, Connect):
                self._served_peers.add(action.peer.instance_id)
                self._liveness.seen(action.peer.instance_id, self.clock.now_s())
        return actions

    @property
    def has_work(self) -> bool:
        """Whether something is being computed or waits for it."""
        return bool(self._in_flight) or not self.context.scheduler.is_idle

    @property
    def is_idle(self) -> bool:
        """Whether nothing is computed, waited for or handed over."""
        return not self.has_work and not self.decode.num_ordered and not self.prefill.num_active

    @property
    def is_drained(self) -> bool:
        """Whether nothing is being served or handed over any more."""
        return self.is_draining and not self._in_flight and not self.decode.active() and not self.prefill.num_active

    def outstanding_tokens(self) -> int:
        """Returns: the load that placement balances; of prompts also what is computed just now."""
        in_flight = (s.num_tokens for step in self._in_flight for s in step.batch.sequences)
        return (
            sum(count for count in in_flight if count > 1)
            + self.context.scheduler.outstanding_tokens()
            + self.decode.outstanding_tokens()
            + self.prefill.outstanding_tokens()
        )

    def load(self, now_s: float) -> Load | None:
        """Returns: what there is to do, as placement sees it; None while nobody knows how long it takes."""
        scheduler, predictor = self.context.scheduler, self.predictor
        if predictor is None or (scheduler.predictor is None and self.role.can_prefill):
            return None
        found = scheduler.load(predictor, now_s, self._busy_s(now_s))
        promised = sum(s.request.num_tokens for s in self.decode.queued)
        found = found.with_ordered(self.decode.num_ordered, self.decode.num_ordered_tokens)
        return replace(found, num_free_tokens=found.num_free_tokens - promised)

    # the step

    def step(self) -> StepReport:
        """Do what there is to do now and don't wait: transfers, timers, the outputs of the oldest step in flight, one launch."""
        now_s = self.clock.now_s()
        self.decode.count_again()
        for transfer in self.context.transfers.values():
            for event in transfer.poll():
                self.prefill.on_transfer(event, now_s)
                self.grants.on_transfer(event, now_s)
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            self._tick(now_s)
        report = self._end_oldest()
        has_launched = self._is_time(now_s) and self._launch(now_s)
        if report is None and has_launched:  # on a CPU it is done
            report = self._end_oldest()
        self.has_moved = has_launched or report is not None or self.runner.can_advance
        if self.has_moved or not self._in_flight:  # a device that hangs is not alive
            self.counter += 1
        return report or StepReport()

    def prepare(self) -> bool:
        """Use idle time for later steps; what is to be sent should be on its way. Returns: whether to come again without waiting."""
        return self.is_idle and self.runner.prepare_more()

    # inside

    def _is_time(self, now_s: float) -> bool:
        """Whether the next step is to be launched: who comes later has no place in it."""
        if not self._in_flight:
            return True
        has_room = len(self._in_flight) < self.runner.depth
        if not has_room or self.runner.is_nearly_done:
            return has_room
        return self.runner.is_queued and self._busy_s(now_s) < LEAD_S

    def _launch(self, now_s: float) -> bool:
        """Returns: whether there was something to compute."""
        batch = self.context.scheduler.schedule(now_s, self._busy_s(now_s))
        if not batch:
            return False
        self.prefill.on_scheduled(batch, now_s)
        try:
            step = self.runner.launch(batch, self.prefill.layer_hook(batch))
        except FastDeployPDError as error:
            for sequence in batch.sequences:
                self._fail(sequence.request, error)
            return True
        self.context.scheduler.launched(batch)
        self._in_flight.append(InFlight(batch, step, now_s))
        return True

    def _end_oldest(self) -> StepReport | None:
        """Hand over the layers of the oldest step in flight; handle its outputs if they are there.

        Returns: None if they are not.
        """
        if not self._in_flight:
            return None
        oldest = self._in_flight[0]
        outputs: Sequence[StepOutput]
        has_failed = False
        try:
            if not oldest.step.poll():
                return None
            outputs = oldest.step.outputs()
        except FastDeployPDError as error:
            outputs, has_failed = [NoOutput(error)] * len(oldest.batch.sequences), True
        self._in_flight.popleft()
        now_s = self.clock.now_s()
        self._handle(oldest.batch, outputs, now_s)
        step_s = now_s - max(oldest.launched_s, self._last_end_s)
        self._last_end_s = now_s
        self._longest_step_s = max(self._longest_step_s, step_s)
        observation = None if has_failed else self._online.observe(oldest.batch.sequences, step_s)
        self._tell_scheduler()
        if any(s.num_tokens > 1 for s in oldest.batch.sequences):
            self._beat_soon()
        return StepReport(oldest.batch.num_tokens, step_s, observation)

    def _busy_s(self, now_s: float) -> float:
        """Returns: seconds until the steps in flight have ended, as predicted."""
        if not self._in_flight:
            return 0.0
        began_s = max(self._in_flight[0].launched_s, self._last_end_s)
        first_s, *rest_s = (self._online.step_s(step.batch.sequences) for step in self._in_flight)
        return max(0.0, first_s - (now_s - began_s)) + sum(rest_s)

    def _tell_scheduler(self) -> None:
        predictor = self._online.current
        # It asks for prompts' times: without them nothing is better than zeros.
        self.context.scheduler.predictor = predictor if predictor is not None and predictor.knows_prefill else None

    def _handle(self, batch: Batch, outputs: Sequence[StepOutput], now_s: float) -> None:
        scheduler = self.context.scheduler
        good: list[tuple[ScheduledSequence, StepOutput]] = []
        for sequence, output in zip(batch.sequences, outputs, strict=True):
            if sequence.request not in scheduler.running:
                continue  # it ended while the step ran
            if output.error is not None:
                self._fail(sequence.request, output.error)
            else:
                good.append((sequence, output))
        scheduler.computed([s for s, _ in good])
        for sequence, output in good:
            if output.prompt_logprobs:
                sequence.request.local.prompt_logprobs.extend(output.prompt_logprobs)
            if output.token_id is not None:
                self._on_token(sequence.request, output.token_id, output, now_s)
        self.decode.admit_queued(now_s)  # blocks may have become free

    def _on_token(self, request: Request, token_id: int, output: StepOutput, now_s: float) -> None:
        index = len(request.output_token_ids)
        request.output_token_ids.append(token_id)
        local = request.local
        chunk = TokenChunk(
            request.request_id,
            request.attempt,
            index,
            (token_id,),
            request.finish_reason_after(token_id, self.context.scheduler.options.max_model_len),
            (output.logprobs,) if output.logprobs is not None else (),
            num_cached_tokens=local.num_cached_tokens,
            served_by=self.context.instance_id,
        )
        if local.prompt_logprobs:
            chunk.prompt_logprobs = tuple(local.prompt_logprobs) if index == 0 else ()
            local.prompt_logprobs = []
        side = self.prefill if self.prefill.owns(request) else self.decode
        side.on_token(request, chunk, now_s)

    def _fail(self, request: Request, error: FastDeployPDError) -> None:
        """End a request that could not be computed: its front end is told, and what it left in its blocks is not used again."""
        self.context.scheduler.forget_content(request)
        chunk = TokenChunk(
            request_id=request.request_id,
            attempt=request.attempt,
            index=len(request.output_token_ids),
            token_ids=(),
            finish_reason=FinishReason.ERROR,
            error=error.message,
            error_code=error.code or "engine_error",
        )
        side = self.prefill if self.prefill.owns(request) else self.decode
        side.on_error(request, chunk, self.clock.now_s())

    def _on_reserve(self, sender_id: str, message: Reserve, now_s: float) -> None:
        request_id, attempt = str(message.request.get("request_id", "")), int(message.request.get("attempt", 1))
        is_known = (request_id, attempt) in self.decode.served
        if not is_known and (self.is_draining or not self.role.can_decode):
            reason = "draining" if self.is_draining else f"a {self.role.value} instance takes no requests"
            self.context.outbox.send(sender_id, Refused(request_id, attempt, reason, "not_served_here"))
            return
        self.decode.on_reserve(sender_id, message, now_s)

    def _on_order(self, sender_id: str, message: PrefillOrder, now_s: float) -> None:
        is_known = message.grant_id in self.prefill.orders
        if not is_known and (self.is_draining or not self.role.can_prefill):
            reason = "draining" if self.is_draining else f"a {self.role.value} instance takes no prefill orders"
            self.context.outbox.send(sender_id, OrderEnded(message.grant_id, reason))
            return
        self.prefill.on_order(message, now_s)

    def _on_command(self, sender_id: str, message: Command, now_s: float) -> None:
        if message.role is not None:
            self.set_role(Role(message.role))
        if message.drain_s is not None:
            self.drain(message.drain_s)
        standing = Standing(
            message.command_id,
            self.role.value,
            now_s - self.role_since_s,
            len(list(self.decode.active())),
            self.prefill.num_active,
            max(0.0, self.stop_at_s - now_s) if self.is_draining else None,
        )
        self.context.outbox.send(sender_id, standing)

    def _on_fetch(self, message: FetchOrder, now_s: float) -> None:
        if self.is_draining and message.grant_id not in self.prefill.orders:
            self.context.outbox.send(message.decode_id, OrderEnded(message.grant_id, "draining"))
            return
        self.prefill.on_order(message, now_s)

    def _hear(self, sender_id: str, now_s: float) -> None:
        if sender_id not in self._callers:
            self._callers.add(sender_id)
            self._caller_liveness.seen(sender_id, now_s)

    def _on_beat(self, sender_id: str, message: Beat, now_s: float) -> None:
        if sender_id in self._served_peers:
            self._liveness.beat(sender_id, message.counter, now_s, message.longest_step_s)
        self._callers.add(sender_id)
        self._caller_liveness.beat(sender_id, message.counter, now_s, message.longest_step_s)

    def _beat_soon(self) -> None:
        """Prompts came or were computed: who places by what it heard a quarter of a second ago chooses a busy instance."""
        soon_s = self._last_beat_s + max(LEAST_BEAT_S, BEAT_S_A_CALLER * len(self._callers))
        self._next_beat_s, self._next_tick_s = min(self._next_beat_s, soon_s), min(self._next_tick_s, soon_s)

    def _tick(self, now_s: float) -> None:
        self.grants.tick(now_s)
        self.decode.tick(now_s)
        self.prefill.tick(now_s)
        silent = [i for i in self._caller_liveness.lost(now_s) if i not in self._served_peers]  # those have longer
        for peer_id in (*self._liveness.lost(now_s), *silent):
            self.peer_lost(peer_id)
        if now_s >= self._next_beat_s:
            beat_s, since_s = self.context.options.beat_s, now_s - self._last_beat_s
            self._next_beat_s, self._last_beat_s = now_s + beat_s, now_s
            beat = Beat(
                self.counter,
                self.outstanding_tokens(),
                self._longest_step_s,
                self.is_draining,
                load=self.load(now_s),
                role=self.role.value,
            )
            self._longest_step_s *= LONGEST_STEP_MEMORY ** min(1.0, since_s / beat_s)
            for peer_id in self._served_peers | self._callers:
                self.context.outbox.send(peer_id, beat)
