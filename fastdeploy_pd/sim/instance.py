"""One simulated instance: a real scheduler over a real block pool, and a latency model that says when its steps end.

A batch that only generates repeats itself, one token further, until a sequence ends or something is handed to the instance. Such
steps are not scheduled one by one: `launch` works out when they would end, `settle` brings scheduler and pool to where so many of them
would have brought them. What comes out is the same to the last byte (tests/sim/test_cluster.py), many times faster.
"""

from __future__ import annotations

from bisect import bisect_left

from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.request import Request
from fastdeploy_pd.sim.latency import Latency

MAX_LEAP = 64  # steps that are worked out at once; most are cut short by an arrival anyway


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
    ) -> None:
        """
        Args:
            kind: "P", "D" or "M".
            max_leap: most steps to work out at once.
        """
        self.index, self.kind = index, kind
        self.instance_id = f"{kind}{index}"
        self.can_prefill, self.can_decode = kind in "PM", kind in "DM"
        self.scheduler = Scheduler(pool, options)
        self.latency = latency
        self.start_s = 0.0  #: of the step in flight
        self.idle_s = 0.0  #: before and between steps
        self.link_free_s = 0.0  #: when everything put on its outgoing link until now has left
        self.num_steps = self.num_computed_tokens = self.max_held_blocks = 0
        self._max_leap = max_leap
        self._last_end_s = 0.0
        self._outstanding_tokens: int | None = None  # None: it may have changed
        self._batch = Batch()
        self._ends: list[float] = []  # of the step in flight and of those which repeat it
        self.due_s: float | None = None  #: when to call `end`; None: nothing is in flight

    @property
    def busy_s(self) -> float:
        """Seconds in which a step was in flight, until the last one ended."""
        return self._last_end_s - self.idle_s

    def outstanding_tokens(self) -> int:
        """Returns: the scheduler's; it stays while steps repeat."""
        if self._outstanding_tokens is None:
            self._outstanding_tokens = self.scheduler.outstanding_tokens()
        return self._outstanding_tokens

    def load(self, now_s: float) -> Load:
        """Returns: what placement may know of it. Raises: ValueError: its scheduler has no predictor."""
        predictor = self.scheduler.predictor
        if predictor is None:
            raise ValueError("the scheduler has no predictor")
        return self.scheduler.load(predictor, now_s, self._ends[0] - now_s if self._ends else 0.0)

    def launch(self, now_s: float) -> bool:
        """Schedule a step if none is in flight; called after everything that is handed to the scheduler.

        Returns: whether one has begun; `due_s` says until when.
        """
        self._outstanding_tokens = None
        if self._ends:
            return False
        batch = self.scheduler.schedule(now_s)
        if not batch:
            return False
        self.scheduler.launched(batch)
        chunks, num_decodes, kv_tokens = [], 0, 0
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
        num_steps = 1 if chunks else self._leap(batch)
        if num_steps > 1:
            curve = self.latency.decode_curve(num_decodes)
            self._ends += curve.sums(end_s, kv_tokens + num_decodes, num_decodes, num_steps - 1)
        self.due_s = self._ends[-1]
        self._note_held()
        return True

    def catch_up(self, now_s: float) -> None:
        """Bring requests and blocks to where they are now: somebody is about to look at the blocks, or take some."""
        if len(self._ends) > 1:
            num_ended = min(bisect_left(self._ends, now_s), len(self._ends) - 1)
            self._settle(num_ended + 1)
            del self._ends[:num_ended]

    def interrupt(self, now_s: float) -> bool:
        """Let the instance decide anew after the step that is in flight now: something is about to be handed to it.

        Returns: whether `due_s` has changed.
        """
        self.catch_up(now_s)
        return self._cut()

    def blocks_taken(self) -> bool:
        """Let the instance decide anew if its next steps may lack the blocks that were just taken.

        Returns: whether `due_s` has changed.
        """
        return not self._has_room(self._batch, len(self._ends)) and self._cut()

    def end(self) -> Batch:
        """End the step in flight. Returns: its batch; the caller appends the sampled tokens."""
        self._settle(len(self._ends))
        batch, self._last_end_s = self._batch, self._ends[-1]
        self.num_steps += 1
        self.num_computed_tokens += batch.num_tokens
        self._ends, self.due_s = [], None
        self.scheduler.computed(batch.sequences)
        return batch

    def _leap(self, batch: Batch) -> int:
        """Returns: how many steps the batch, all of it generating, is certain to be scheduled for if nobody interrupts."""
        scheduler = self.scheduler
        if scheduler.waiting or len(batch.sequences) != len(scheduler.running):
            return 1
        max_model_len = scheduler.options.max_model_len
        num_steps = self._max_leap
        for s in batch.sequences:
            request = s.request
            num_left = request.sampling.max_tokens - len(request.output_token_ids)
            num_steps = min(num_steps, num_left, max_model_len - request.num_known_tokens)
        return num_steps if self._has_room(batch, num_steps) else 1

    def _has_room(self, batch: Batch, num_steps: int) -> bool:
        if num_steps < 2:
            return True
        pool = self.scheduler.pool
        num_held = sum(len(s.request.local.block_table) for s in batch.sequences)
        return sum(pool.num_blocks_for(s.stop + num_steps) for s in batch.sequences) <= num_held + pool.num_free

    def _cut(self) -> bool:
        if len(self._ends) < 2:
            return False
        del self._ends[1:]
        is_new = self.due_s != self._ends[0]
        self.due_s = self._ends[0]
        return is_new

    def _settle(self, num_steps: int) -> None:
        """Bring requests and blocks to where they are while step num_steps (1: the launched one) is in flight.

        Blocks that fill on the way become findable when the step has ended: nobody else's prompt goes on like them.
        """
        num_ended = num_steps - 1
        if num_ended == 0:
            return
        pool, block_size = self.scheduler.pool, self.scheduler.pool.block_size
        full: list[tuple[int, Request]] = []  # (ended steps until the table was full, ...)
        for s in self._batch.sequences:
            request = s.request
            local = request.local
            for num_slots in range(len(local.block_table) * block_size, s.stop + num_ended, block_size):
                full.append((num_slots - s.stop, request))
            request.output_token_ids.extend([sampled_token(request)] * num_ended)
            local.num_computed_tokens += num_ended
            s.start += num_ended
            s.stop += num_ended
        full.sort(key=lambda f: f[0])  # blocks are taken step by step, within a step in the batch's order
        for _, request in full:
            request.local.block_table += pool.allocate(1)
        self.start_s = self._ends[num_ended - 1]
        self.num_steps += num_ended
        self.num_computed_tokens += num_ended * len(self._batch.sequences)
        self._note_held()

    def _note_held(self) -> None:
        pool = self.scheduler.pool
        self.max_held_blocks = max(self.max_held_blocks, pool.num_blocks - pool.num_free)


def sampled_token(request: Request) -> int:
    """Returns: what every step samples for a request; like its prompt's last token it is nobody else's."""
    return request.prompt_token_ids[-1]
