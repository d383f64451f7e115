"""The requests of a simulated instance that generate, all a token further with each step, worked out when somebody looks.

A step does the same to each of them: a token more, a block more where its table is full, an end where the last token came. When that is to be is known when
a stream joins, so a step costs what it costs however many there are, and a stream's request is brought to where it is when it ends,
or when `settle` is called. Blocks are taken step by step, in the order in which the scheduler would take them.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from dataclasses import dataclass

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.core.order import TPOT_AIM, least_slack_s
from fastdeploy_pd.core.scheduler import Scheduler
from fastdeploy_pd.request import Phase, Request

SAMPLED_TOKEN = 0  # what every step samples


@dataclass(slots=True, eq=False)
class Stream:
    """A request that generates."""

    number: int  #: in the order of joining
    request: Request
    joined: int  #: steps launched until then
    settled: int  #: steps launched until the one that its request shows as ended
    last: int  #: number of the step that makes its last token
    pace: tuple[float, float, int] | None  #: begun, TPOT SLO, tokens before step 0; None: no SLO


class Streams:
    """See the module; `Scheduler.schedule_prompts` asks it what it must know."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._num_joined = 0
        self.num_steps = 0  #: launched
        self.forget()

    def forget(self) -> None:
        """Have no streams; call `settle` before."""
        self._streams: dict[Request, Stream] = {}
        self.num = 0
        self._ends: list[tuple[int, int, Stream]] = []  # a heap by last step
        self._full: list[tuple[int, int, Stream]] = []  # a heap by the step that needs a block more
        self._num_tokens = 0  # of all, less num_steps of each
        #: TPOT SLO -> (slack but for what all gain and lose alike, stream's number, begun, tokens), least slack first
        self._paces: dict[float, list[tuple[float, int, float, int]]] = {}

    def __contains__(self, request: Request) -> bool:
        return request in self._streams

    def num_tokens(self) -> int:
        """Returns: KV tokens in sum, those that the step launched last adds included."""
        return self._num_tokens + (self.num_steps - 1) * self.num

    @property
    def num_steps_left(self) -> int:
        """Steps from the one launched last to the one in which the first stream ends, both included; there must be streams."""
        return self._ends[0][0] - self.num_steps + 1

    def join(self, request: Request) -> None:
        """Take in a request that computes its newest token in the next step; none is in flight."""
        num_tokens, num_output = request.num_known_tokens, len(request.output_token_ids)
        steps, scheduler = self.num_steps, self._scheduler
        num_left = min(request.sampling.max_tokens - num_output, scheduler.options.max_model_len - num_tokens)
        begun_s, tpot_s = request.timeline.stamps.get(Phase.DECODING), request.slo.tpot_s
        pace = None
        if begun_s is not None and tpot_s is not None:
            pace = begun_s, tpot_s, num_output - steps - 1
        stream = Stream(self._num_joined, request, steps, steps, steps + num_left, pace)
        self._num_joined += 1
        self._streams[request] = stream
        self.num += 1
        self._num_tokens += num_tokens - steps
        heapq.heappush(self._ends, (stream.last, stream.number, stream))
        due = len(request.local.block_table) * scheduler.pool.block_size - num_tokens + steps + 2
        heapq.heappush(self._full, (due, stream.number, stream))
        if pace is not None:
            insort(self._paces.setdefault(pace[1], []), _by_slack(stream, pace))

    def least_tpot_s(self) -> float:
        """Returns: the least TPOT SLO of them; infinite where none has one."""
        return min(self._paces, default=math.inf)

    def slack_s(self, step_s: float, now_s: float, is_launched: bool = False) -> float:
        """Returns: see `order.stream_slack_s`; as it was when the step launched last was to be chosen, or with its tokens."""
        least_s, num_steps = math.inf, self.num_steps + is_launched
        for slo_s, by_slack in self._paces.items():
            tpot_s = slo_s * TPOT_AIM
            limit_s = least_slack_s(tpot_s, step_s)
            # A stream's slack is its key and what all gain by a step; the first one above the limit is looked at closely.
            index = bisect_left(by_slack, (limit_s + now_s + step_s - tpot_s * num_steps,))
            for _, _, begun_s, num_tokens in by_slack[index - 1 if index else 0 : index + 2]:
                slack_s = begun_s + tpot_s * (num_tokens + num_steps) - now_s - step_s
                if limit_s <= slack_s < least_s:
                    least_s = slack_s
        return least_s

    def num_blocks_due(self) -> int:
        """Returns: how many blocks the next step needs more."""
        full, step = self._full, self.num_steps + 1
        if not full or full[0][0] > step:
            return 0
        due = []
        while full and full[0][0] <= step:
            entry = heapq.heappop(full)
            if entry[2].request in self._streams:
                due.append(entry)
        for entry in due:
            heapq.heappush(full, entry)
        return len(due)

    def launch(self, num_steps: int = 1) -> None:
        """Begin steps, each when the one before has ended; their blocks are taken.

        Raises: OutOfBlocks: there are fewer.
        """
        full, block_size = self._full, self._scheduler.pool.block_size
        self.num_steps += num_steps
        while full and full[0][0] <= self.num_steps:
            step, due = full[0][0], []
            while full and full[0][0] == step:
                stream = full[0][2]
                if stream.request in self._streams:
                    due.append(stream)
                    heapq.heapreplace(full, (step + block_size, stream.number, stream))
                else:
                    heapq.heappop(full)
            if len(due) > 1:  # in the scheduler's order
                by_request = {s.request: s for s in due}
                due = [by_request[r] for r in self._scheduler.running if r in by_request]
            for stream, block_id in zip(due, self._scheduler.pool.allocate(len(due)), strict=True):
                stream.request.local.block_table.append(block_id)

    def end(self) -> list[ScheduledSequence]:
        """End the step in flight.

        Returns: what it computed for the streams of which it was the last; they have left, and are as after `Scheduler.launched`.
        """
        sequences = []
        while self._ends and self._ends[0][0] == self.num_steps:
            stream = heapq.heappop(self._ends)[2]
            request, local = stream.request, stream.request.local
            self._settle(stream, self.num_steps - 1)
            self._leave(stream)
            num_tokens = request.num_known_tokens
            sequences.append(ScheduledSequence(request, num_tokens - 1, num_tokens))
            local.num_computed_tokens, local.num_pending_tokens = num_tokens, 1
        return sequences

    def settle(self, num_ended: int) -> None:
        """Bring requests to where they are when so many steps have ended."""
        for stream in self._streams.values():
            self._settle(stream, num_ended)

    def _settle(self, stream: Stream, num_ended: int) -> None:
        count = num_ended - stream.settled
        if count:
            request = stream.request
            request.output_token_ids.extend([SAMPLED_TOKEN] * count)
            request.local.num_computed_tokens += count
            stream.settled = num_ended
            self._scheduler.make_findable(request, request.local.num_computed_tokens)

    def _leave(self, stream: Stream) -> None:
        del self._streams[stream.request]
        self.num -= 1
        request = stream.request
        self._num_tokens -= request.num_known_tokens - self.num_steps + 1
        if stream.pace is not None:
            by_slack = self._paces[stream.pace[1]]
            del by_slack[bisect_left(by_slack, _by_slack(stream, stream.pace))]
            if not by_slack:
                del self._paces[stream.pace[1]]


def _by_slack(stream: Stream, pace: tuple[float, float, int]) -> tuple[float, int, float, int]:
    begun_s, tpot_s, num_tokens = pace
    return begun_s + tpot_s * TPOT_AIM * num_tokens, stream.number, begun_s, num_tokens
