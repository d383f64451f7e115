"""One simulated instance: a real scheduler over a real block pool, and a latency model that says when its steps end.

Requests that generate are handed from the scheduler to `streams.Streams`, which does for all of them at once what the scheduler would do
for each in every step; the scheduler chooses the prompts' part of a step beside them. Where blocks run short they are handed back.
A batch that only generates repeats itself until a sequence ends or something is handed to the instance: the ends of such steps are worked
out at once. What comes out is the same to the last byte (tests/sim/test_cluster.py), many times faster.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.order import PrefillPolicy, make_policy, num_left, stream_slack_s
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions, is_prompt, is_stream
from fastdeploy_pd.core.streams import ScheduledStreams
from fastdeploy_pd.request import Phase, Request
from fastdeploy_pd.sim.latency import Latency
from fastdeploy_pd.sim.streams import Streams

MakePolicy = Callable[[str, Callable[[], Predictor | None]], PrefillPolicy | None]

MAX_LEAP = 64  # steps that are worked out at once; most are cut short by an arrival anyway


class Beside:
    """All streams of a step: the carried ones, and those that the scheduler has stepped."""

    def __init__(self, carried: Streams, stepped: ScheduledStreams) -> None:
        self._carried, self._stepped = carried, stepped
        self.num = carried.num + stepped.num

    def num_tokens(self) -> int:
        """See `scheduler.Streams.num_tokens`."""
        return self._carried.num_tokens() + self._stepped.num_tokens()

    def least_tpot_s(self) -> float:
        """See `scheduler.Streams.least_tpot_s`."""
        return min(self._carried.least_tpot_s(), self._stepped.least_tpot_s())

    def slack_s(self, step_s: float, now_s: float) -> float:
        """See `scheduler.Streams.slack_s`."""
        return min(self._carried.slack_s(step_s, now_s), self._stepped.slack_s(step_s, now_s))


class Instance:
    """A scheduler, its pool, and at most one step in flight."""

    def __init__(
        self,
        index: int,
        kind: str,
        pool: BlockPool,
        options: SchedulerOptions,
        latency: Latency,
        max_leap: int = MAX_LEAP,
        make_policy: MakePolicy = make_policy,
    ) -> None:
        """
        Args:
            kind: "P", "D" or "M".
            max_leap: most steps to work out at once; 1: each stream is scheduled in each step.
            make_policy: see `Scheduler`.
        """
        self.index, self.kind = index, kind
        self.instance_id = f"{kind}{index}"
        self.can_prefill, self.can_decode = kind in "PM", kind in "DM"
        self.scheduler = Scheduler(pool, options, make_policy=make_policy)
        self.latency = latency
        self.is_up = True  #: see `failures`
        self.start_s = 0.0  #: of the step in flight
        self.idle_s = 0.0  #: before and between steps
        self.link_free_s = 0.0  #: when everything put on its outgoing link until now has left
        self.num_steps = self.num_computed_tokens = self.max_held_blocks = 0
        self._max_leap = max_leap
        self._carries = max_leap > 1
        self._carried = Streams(self.scheduler)
        self._own: dict[Request, None] = {}  # running and not carried, oldest first
        self._last_end_s = 0.0
        self._outstanding_tokens: int | None = None  # None: it may have changed
        self._left: tuple[list[tuple[float, float]], int, tuple[Request, ...]] | None = None  # see load; None: as above
        self._batch = Batch()  # without the carried streams
        self._num_stepped = 0  # sequences at its head that are streams
        self._dropped: set[Request] = set()  # of the step in flight
        self._ends: list[float] = []  # of the step in flight and of those which repeat it
        self.due_s: float | None = None  #: when to call `end`; None: nothing is in flight

    @property
    def busy_s(self) -> float:
        """Seconds in which a step was in flight, until the last one ended."""
        return self._last_end_s - self.idle_s

    def outstanding_tokens(self) -> int:
        """Returns: as `Engine.outstanding_tokens`, of this instance alone; it stays while steps repeat."""
        if self._outstanding_tokens is None:
            tokens = self._carried.num
            if self._ends:
                tokens += sum([n for s in self._batch.sequences if (n := s.stop - s.start) > 1])
            for request in (*self._own, *self.scheduler.waiting):
                tokens += max(1, num_left(request))
            self._outstanding_tokens = tokens
        return self._outstanding_tokens

    def load(self, now_s: float) -> Load:
        """Returns: what placement may know of it. Raises: ValueError: its scheduler has no predictor."""
        scheduler, pool, carried = self.scheduler, self.scheduler.pool, self._carried
        if scheduler.predictor is None:
            raise ValueError("the scheduler has no predictor")
        self.advance(now_s)
        if self._left is None:
            requests = (*self._own, *scheduler.waiting)
            jobs, num_promised = scheduler.prompts_left(scheduler.predictor, requests)
            streams = () if len(jobs) == len(requests) else tuple(r for r in requests if is_stream(r))
            self._left = jobs, num_promised, streams
        jobs, num_promised, own = self._left
        num_streams, num_tokens, slack_s = len(own) + carried.num, 0, math.inf
        if own:
            num_tokens = sum([r.num_tokens for r in own])
        if carried.num:
            num_tokens += carried.num_tokens() + carried.num
        if num_streams:
            step_s = scheduler.predictor.decode_s(num_streams, num_tokens)
            slack_s = carried.slack_s(step_s, now_s, is_launched=True)
            if own:
                slack_s = min(slack_s, stream_slack_s(own, step_s, now_s))
        busy_s = self._ends[0] - now_s if self._ends else 0.0
        prompts = tuple([(due_s - now_s, seconds) for due_s, seconds in jobs]) if jobs else ()
        num_free = pool.num_free * pool.block_size - num_promised
        num_seats = scheduler.options.max_num_seqs - num_streams
        return Load(
            scheduler.predictor, prompts, busy_s, num_streams, num_tokens, slack_s, num_free, num_seats=num_seats
        )

    def launch(self, now_s: float) -> bool:
        """Schedule a step if none is in flight; called after everything that is handed to the scheduler.

        Returns: whether one has begun; `due_s` says until when.
        """
        self._outstanding_tokens = self._left = None
        if self._ends:
            return False
        self._carry()
        batch = self._schedule(now_s)
        carried = self._carried
        if not batch and not carried.num:
            return False
        self.scheduler.launched(batch)
        chunks, num_decodes, kv_tokens = [], carried.num, carried.num_tokens()
        for s in batch.sequences:
            if s.stop - s.start == 1 and s.needs_sample:
                num_decodes += 1
                kv_tokens += s.stop
            else:
                chunks.append((s.start, s.stop, s.needs_sample))
        self.idle_s += now_s - self._last_end_s
        self._batch, self.start_s = batch, now_s
        end_s = now_s + self.latency.step_s(chunks, num_decodes, kv_tokens)
        self._ends = [end_s]
        num_steps = self._leap()
        if num_steps > 1:
            curve = self.latency.decode_curve(num_decodes)
            self._ends += curve.sums(end_s, kv_tokens + num_decodes, num_decodes, num_steps - 1)
        self.due_s = self._ends[-1]
        self._note_held()
        return True

    def advance(self, now_s: float) -> None:
        """Bring blocks to where they are now: somebody is about to look at them, or take some."""
        if len(self._ends) > 1:
            num_ended = min(bisect_left(self._ends, now_s), len(self._ends) - 1)
            self._settle(num_ended)

    def catch_up(self, now_s: float) -> None:
        """Bring requests and blocks to where they are now: somebody is about to look at requests."""
        self.advance(now_s)
        self._carried.settle(self._carried.num_steps - bool(self._ends))

    def interrupt(self, now_s: float) -> bool:
        """Let the instance decide anew after the step that is in flight now: something is about to be handed to it.

        Returns: whether `due_s` has changed.
        """
        self.advance(now_s)
        return self._cut()

    def blocks_taken(self) -> bool:
        """Let the instance decide anew if its next steps may lack the blocks that were just taken.

        Returns: whether `due_s` has changed.
        """
        return not self._has_room(len(self._ends)) and self._cut()

    def end(self) -> list[ScheduledSequence]:
        """End the step in flight.

        Returns: its sequences but for streams that go on; the caller appends the sampled tokens.
        """
        self._settle(len(self._ends) - 1)
        self.num_steps += 1
        self.num_computed_tokens += self._batch.num_tokens + self._carried.num
        self._last_end_s, self._ends, self.due_s = self._ends[-1], [], None
        self._outstanding_tokens = None
        ended = self._carried.end()
        sequences = self._batch.sequences
        if ended:
            first = sequences[: self._num_stepped] + ended
            if len(first) > 1:  # in the scheduler's order
                places = {r: n for n, r in enumerate(self.scheduler.running)}
                first.sort(key=lambda s: places[s.request])
            sequences = first + sequences[self._num_stepped :]
        if self._dropped:
            sequences = [s for s in sequences if s.request not in self._dropped]
            self._dropped.clear()
        self.scheduler.computed(sequences)
        return sequences

    def drop(self, request: Request) -> None:
        """Take a prompt out that nobody waits for any more; what the step in flight computes of it is for nothing."""
        self.scheduler.remove(request)
        self._own.pop(request, None)
        self._outstanding_tokens = self._left = None
        if self._ends:
            self._dropped.add(request)

    def lose(self, now_s: float) -> None:
        """Be as after a start: without requests, blocks and a step in flight; what it has done until now still counts."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        if self._ends:
            scheduler.computed(())
            self._last_end_s = now_s
        for request in (*scheduler.running, *scheduler.waiting):
            scheduler.remove(request)
        self._carried.forget()
        self._dropped.clear()
        scheduler.pool = BlockPool(pool.num_blocks, pool.block_size)
        self._own, self._batch, self._num_stepped, self._ends, self.due_s = {}, Batch(), 0, [], None
        self._outstanding_tokens = self._left = None
        self.link_free_s = now_s

    def _carry(self) -> None:
        """Take the requests that have got a token in the step that ended from the scheduler's hands."""
        running = self.scheduler.running
        for s in self._batch.sequences:
            if s.request not in running:
                self._own.pop(s.request, None)
            elif self._carries and s.request.phase is Phase.DECODING:
                del self._own[s.request]
                self._carried.join(s.request)
        self._batch = Batch()

    def _hand_back(self) -> None:
        self._carried.settle(self._carried.num_steps)
        self._carried.forget()
        self._own = dict(self.scheduler.running)

    def _schedule(self, now_s: float) -> Batch:
        """Returns: the step without the carried streams, which are launched."""
        scheduler, carried = self.scheduler, self._carried
        if carried.num and not self._has_blocks():
            self._hand_back()
        if not carried.num:
            batch = scheduler.schedule(now_s)
            self._own = dict(scheduler.running)
            return batch
        carried.launch()
        own = self._own
        num_preemptions = scheduler.num_preemptions
        stepped, _ = scheduler.schedule_streams(own, now_s)
        streams = Beside(carried, ScheduledStreams(stepped)) if stepped else carried
        sequences = stepped + scheduler.schedule_prompts(own, streams, now_s)
        for s in sequences:
            own[s.request] = None
        if len(own) + carried.num != len(scheduler.running) or scheduler.num_preemptions != num_preemptions:
            # one was admitted and could compute nothing, or lost its blocks
            self._own = {r: None for r in scheduler.running if r not in carried}
        self._num_stepped = len(stepped)
        return Batch(sequences, scheduler.pool.block_size)

    def _has_blocks(self) -> bool:
        """Whether the streams' next step finds the blocks that it needs, without a preemption."""
        pool = self.scheduler.pool
        if self._carried.num_blocks_due() > pool.num_free:
            return False
        for request in self._own:
            if not is_prompt(request) and pool.num_blocks_for(request.num_tokens) > len(request.local.block_table):
                return False
        return True

    def _leap(self) -> int:
        """Returns: how many steps, all streams' alone, are certain to repeat the one launched if nobody interrupts, that one included."""
        carried = self._carried
        if not carried.num or self._own or self.scheduler.waiting:
            return 1
        num_steps = min(self._max_leap, carried.num_steps_left)
        return num_steps if self._has_room(num_steps) else 1

    def _has_room(self, num_steps: int) -> bool:
        pool = self.scheduler.pool
        return self._carried.num * pool.num_blocks_for(num_steps - 1) <= pool.num_free

    def _cut(self) -> bool:
        if len(self._ends) < 2:
            return False
        del self._ends[1:]
        is_new = self.due_s != self._ends[0]
        self.due_s = self._ends[0]
        return is_new

    def _settle(self, num_ended: int) -> None:
        """Bring blocks to where they are when so many of the steps that were worked out have ended, and the next one is in flight."""
        if num_ended == 0:
            return
        self._carried.launch(num_ended)
        self.start_s = self._ends[num_ended - 1]
        self.num_steps += num_ended
        self.num_computed_tokens += num_ended * self._carried.num
        del self._ends[:num_ended]
        self._note_held()

    def _note_held(self) -> None:
        pool = self.scheduler.pool
        num_held = pool.num_blocks - pool.num_free
        if num_held > self.max_held_blocks:
            self.max_held_blocks = num_held
