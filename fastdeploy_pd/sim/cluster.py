"""A simulated cluster: requests arrive, are placed, prefilled, handed over, generated and end, on a virtual clock.

The hand-over is that of `engine/decode.py` and `engine/prefill.py` without what can go wrong: decode reserves blocks for the whole prompt
first and queues what finds no room; prefill computes, answers the client with the first token, and writes each chunk's complete blocks
over its link while the chunk is computed; decode goes on when the last byte is there. Messages take no time, KV does.
"""

from __future__ import annotations

import gc
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

from fastdeploy_pd.clock import VirtualClock
from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.order import make_policy
from fastdeploy_pd.core.placement import Candidate, Placement, PlacementPolicy, RoundRobin
from fastdeploy_pd.core.scheduler import SchedulerOptions
from fastdeploy_pd.core.shortlist import MOST, RecentPlacements, Shortlist
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import MAX_SLO_S, Phase, Request, SamplingParams, Slo
from fastdeploy_pd.sim.instance import MAX_LEAP, Instance, MakePolicy
from fastdeploy_pd.sim.latency import Latency
from fastdeploy_pd.sim.streams import SAMPLED_TOKEN
from fastdeploy_pd.sim.trace import TRACE_BLOCK_TOKENS, Offered

# What happens at the same time happens in this order.
ACTION, ARRIVAL, HANDED_OVER, STEP_END = range(4)


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What the simulated instances are like; all are alike but for their kind."""

    kinds: str  #: a letter an instance: P prefills, D decodes, M does both
    num_blocks: int
    block_size: int = 64
    kv_bytes_per_token: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_lone_prompt_tokens: int = 0  #: see core.scheduler.SchedulerOptions
    enable_prefix_caching: bool = True
    prefill_policy: str = "fcfs"
    ttft_x: float | None = (
        None  #: each request's TTFT SLO, in units of the prompt's prefill in an empty cluster; None: it says none
    )
    tpot_s: float | None = None
    is_predicted: bool = False  #: whether schedulers and placement know how long steps take
    link_bytes_per_s: float = 50e9  #: of a prefill instance's outgoing link
    link_latency_s: float = 1e-3  #: from the last byte sent, or computed, to decode's going on

    def check(self) -> None:
        """Raises: ConfigError: no cluster can be made of this."""
        if not {"D", "M"} & set(self.kinds):
            raise ConfigError("a layout needs at least one instance that decodes (D or M)")
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "link_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.max_lone_prompt_tokens and self.max_lone_prompt_tokens < self.max_num_batched_tokens:
            raise ConfigError(
                f"--max-lone-prompt-tokens is {self.max_lone_prompt_tokens}; it must be 0 or at least --max-num-batched-tokens "
                f"({self.max_num_batched_tokens})"
            )
        if not self.link_latency_s >= 0:
            raise ConfigError(f"link_latency_s is {self.link_latency_s}; it must be 0 or more")
        if TRACE_BLOCK_TOKENS % self.block_size:
            raise ConfigError(f"--block-size is {self.block_size}; it must divide {TRACE_BLOCK_TOKENS}")
        if "P" in self.kinds and self.kv_bytes_per_token <= 0:
            raise ConfigError("--kv-bytes-per-token must be given for a layout with prefill instances")


@dataclass(slots=True)
class Record:
    """What became of one offered request; times in seconds, None where it did not come so far."""

    offered: Offered
    prefill_id: str | None = None  #: None: decode computed the prompt
    decode_id: str | None = None
    started_s: float | None = None  #: its prompt's first step began
    first_token_s: float | None = None
    end_s: float | None = None
    num_cached: int = 0  #: prompt tokens that were in the prefix cache where the prompt was computed
    num_preemptions: int = 0
    is_refused: bool = False  #: too long for an instance's pool
    is_failed: bool = False  #: too many instances have died, or nobody was left; see `failures`
    num_lost: int = 0  #: instances that died while they served it


@dataclass(slots=True, eq=False)
class Served:
    """A request in the cluster: decode's side and, where another instance computes the prompt, prefill's order."""

    record: Record
    request: Request
    decode: Instance
    prefill: Instance | None = None
    order: Request | None = None
    num_sent_blocks: int = 0  #: of the order's table, written or in decode's cache
    pinned: list[int] = field(
        default_factory=list
    )  #: prefill's blocks that were put on the link; the order's own while it runs
    sent_s: float = math.inf  #: when the last byte has left prefill
    lost_by: int | None = None  #: number of the failure that ended prefill before it was ordered anything


class Cluster:
    """Serves what is offered; `run` once."""

    def __init__(
        self,
        options: ClusterOptions,
        latency: Latency,
        policy: PlacementPolicy,
        rng: random.Random,
        max_leap: int = MAX_LEAP,
        make_policy: MakePolicy = make_policy,
    ) -> None:
        """
        Args:
            max_leap: see `Instance`; 1 schedules each step by itself.
            make_policy: see `Scheduler`.
        Raises: ConfigError: the options are wrong, or there is no such prefill policy.
        """
        options.check()
        self.options = options
        self.clock = VirtualClock()
        self._max_tokens = options.num_blocks * options.block_size
        scheduling = SchedulerOptions(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=self._max_tokens,
            enable_prefix_caching=options.enable_prefix_caching,
            prefill_policy=options.prefill_policy,
            guards_tpot=options.is_predicted,
            max_lone_prompt_tokens=options.max_lone_prompt_tokens,
        )
        self._latency = latency
        self.instances = [
            Instance(
                n, kind, BlockPool(options.num_blocks, options.block_size), scheduling, latency, max_leap, make_policy
            )
            for n, kind in enumerate(options.kinds)
        ]
        if options.is_predicted:
            predictor = latency.predictor()
            for instance in self.instances:
                instance.scheduler.predictor = predictor
        self._by_id = {i.instance_id: i for i in self.instances}
        self._policy, self._rng = policy, rng
        self._events: list[tuple[float, int, int]] = []  # (time, kind, number)
        self._actions: dict[int, Callable[[float], None]] = {}  # by number of their ACTION event
        self._num_actions = 0
        self._served: dict[Request, Served] = {}  # by decode's request and by prefill's order
        self._queued: dict[Instance, deque[Served]] = {i: deque() for i in self.instances}  # no room yet
        self._num_ordered = dict.fromkeys(self.instances, 0)  # that wait for a prefill instance ...
        self._num_ordered_tokens = dict.fromkeys(self.instances, 0)  # ... and their tokens
        self._on_link: dict[int, Served] = {}  # by number of their HANDED_OVER event
        self._num_sent = 0
        self._sampling = lru_cache(1 << 12)(lambda num_output: SamplingParams(max_tokens=num_output))
        self._slo_of = lru_cache(1 << 14)(self._make_slo)  # many requests are as long as another
        self.on_arrival: Callable[[int], object] = lambda number: None  #: told each request's number when it arrives
        self.on_unplaced: Callable[[Record, Request, float], None] = _nobody_decodes  #: told of whom nobody can take
        self.on_lost: Callable[[Served, float], None] = (
            _never  #: told whose prefill instance has died, in place of ordering
        )
        self._live = self.instances
        self._recent = RecentPlacements(stride=1)
        self._shortlist = self._make_shortlist()  # None: placement looks at all

    def _make_shortlist(self) -> Shortlist | None:
        if len(self.instances) <= MOST or isinstance(self._policy, RoundRobin):
            return None
        shortlist = Shortlist()
        for instance in self.instances:
            shortlist.put(instance.instance_id, instance.kind, 0)
        return shortlist

    def run(self, offered: Iterable[Offered]) -> list[Record]:
        """Serve requests to the end.

        Args:
            offered: in order of arrival; each is asked for when the one before it arrives.
        Returns: [len(offered)] in this order, each ended once: finished, or refused.
        Raises: ValueError: one arrives before the one before it.
        """
        was_enabled = gc.isenabled()
        gc.disable()  # it finds no cycles, and looks for them a fifth of the time
        try:
            return self._run(offered)
        finally:
            if was_enabled:
                gc.enable()

    def _run(self, offered: Iterable[Offered]) -> list[Record]:
        records: list[Record] = []
        arrivals = iter(offered)
        self._expect(arrivals, records)
        while self._events:
            now_s, kind, number = heapq.heappop(self._events)
            self.clock.advance_to(now_s)
            if kind == ACTION:
                self._actions.pop(number)(now_s)
            elif kind == ARRIVAL:
                if number == len(records) - 1:
                    self._expect(arrivals, records)
                self.on_arrival(number)
                self._arrive(records[number], now_s)
            elif kind == HANDED_OVER:
                served = self._on_link.pop(number, None)
                if served is not None:  # else: decode, or prefill before it had sent all, has died
                    self._take_over(served, now_s)
            elif self.instances[number].due_s == now_s:  # else: it was interrupted, or somebody else's event ended it
                self._end_step(self.instances[number], now_s)
        lost = [r.offered.number for r in records if r.end_s is None]
        if lost or self._served:
            raise RuntimeError(f"{len(lost)} requests never ended, the first of them {lost[:5]}")
        return records

    def _expect(self, arrivals: Iterator[Offered], records: list[Record]) -> None:
        """Let the next request arrive when it is time, if there is one; the heap is small with one at a time."""
        offered = next(arrivals, None)
        if offered is not None:
            heapq.heappush(self._events, (offered.arrival_s, ARRIVAL, len(records)))
            records.append(Record(offered))

    def _arrive(self, record: Record, now_s: float) -> None:
        offered = record.offered
        if offered.num_input >= self._max_tokens:
            record.is_refused, record.end_s = True, now_s
            return
        self.place(record, self._make_request(offered, now_s), now_s)

    def place(self, record: Record, request: Request, now_s: float) -> None:
        """Choose instances for a request and give it to them."""
        candidates = [self._candidate(i, request, now_s) for i in self._shortlisted(record.offered)]
        age_s = now_s - request.arrival_s
        placement = self._policy.place(request.num_tokens, candidates, self._rng, request.slo, age_s)
        if placement is None:
            self.on_unplaced(record, request, now_s)
        else:
            self._place(record, request, placement, now_s)

    def _make_request(self, offered: Offered, now_s: float) -> Request:
        request = Request(str(offered.number), offered.prompt(), self._sampling(offered.num_output))
        request.slo, request.arrival_s = self._slo_of(offered.num_input), now_s
        request.local.block_hashes = offered.block_hashes(self.options.block_size)
        return request

    def _make_slo(self, num_input: int) -> Slo:
        ttft_x, tpot_s = self.options.ttft_x, self.options.tpot_s
        ttft_s = None if ttft_x is None else ttft_x * self._latency.alone_s(num_input)
        ttft_s, tpot_s = (s if s is not None and s < MAX_SLO_S else None for s in (ttft_s, tpot_s))
        return Slo(ttft_s, tpot_s)

    def _place(self, record: Record, request: Request, placement: Placement, now_s: float) -> None:
        request.advance(Phase.PLACED, now_s)
        served = Served(record, request, self._by_id[placement.decode_id])
        record.decode_id, record.prefill_id = placement.decode_id, placement.prefill_id
        if self._shortlist is not None:
            self._recent.note(record.offered.prefix_ids(), placement.prefill_id or placement.decode_id)
        self._served[request] = served
        if placement.prefill_id is None:
            self._interrupt(served.decode, now_s)
            request.advance(Phase.RESERVED, now_s)
            served.decode.scheduler.add(request)
            self._launch(served.decode, now_s)
        else:
            served.prefill = self._by_id[placement.prefill_id]
            served.decode.advance(now_s)
            self._queued[served.decode].append(served)
            self._admit_queued(served.decode, now_s)
            if served.decode.blocks_taken():
                self._push_end(served.decode)
            self._note_load(served.decode)

    def _shortlisted(self, offered: Offered) -> list[Instance]:
        """Returns: the instances that placement looks at."""
        if self._shortlist is None:
            return self._live
        holders = self._recent.holders(offered.prefix_ids())
        return [self._by_id[i] for i in self._shortlist.choose(holders, self._rng)]

    def _note_load(self, instance: Instance) -> None:
        if self._shortlist is not None and instance.is_up:
            self._shortlist.put(instance.instance_id, instance.kind, self._outstanding_tokens(instance))

    def _candidate(self, instance: Instance, request: Request, now_s: float) -> Candidate:
        """Returns: an instance as front ends would see it if its reports were never late."""
        tokens = self._outstanding_tokens(instance)
        if not self.options.is_predicted:
            return Candidate(instance.instance_id, instance.can_prefill, instance.can_decode, tokens)
        num_cached = instance.scheduler.num_matching_tokens(request)
        load = instance.load(now_s).with_ordered(self._num_ordered[instance], self._num_ordered_tokens[instance])
        if self._queued[instance]:
            num_queued = sum(s.request.num_tokens for s in self._queued[instance])
            load = replace(load, num_free_tokens=load.num_free_tokens - num_queued)
        return Candidate(instance.instance_id, instance.can_prefill, instance.can_decode, tokens, num_cached, load)

    def _outstanding_tokens(self, instance: Instance) -> int:
        """Returns: the load that placement balances, as `Engine.outstanding_tokens` reports it, but never late."""
        tokens, queued = instance.outstanding_tokens() + self._num_ordered[instance], self._queued[instance]
        return tokens + sum(s.request.num_tokens for s in queued) if queued else tokens

    def _admit_queued(self, decode: Instance, now_s: float) -> None:
        """Reserve blocks for queued requests, in order, as far as there is room, and order their prefills."""
        queued, scheduler = self._queued[decode], decode.scheduler
        while queued:
            served = queued[0]
            if not scheduler.reserve(served.request, scheduler.num_wanted_blocks()):
                is_alone = scheduler.is_idle and not self._num_ordered[decode]
                if not is_alone or not scheduler.reserve(served.request):
                    return
            queued.popleft()
            if served.lost_by is None:
                self._order(served, now_s)
            else:
                self.on_lost(served, now_s)

    def _order(self, served: Served, now_s: float) -> None:
        request, prefill = served.request, served.prefill
        assert prefill is not None
        request.advance(Phase.RESERVED, now_s)
        request.advance(Phase.PREFILLING, now_s)
        order = Request(request.request_id, request.prompt_token_ids, request.sampling)
        order.output_token_ids = list(request.output_token_ids)
        order.slo, order.arrival_s = request.slo, request.arrival_s
        order.local.block_hashes = request.local.block_hashes
        order.local.is_preemptible, order.local.ends_with_next_token = False, True
        order.advance(Phase.PLACED, now_s)
        order.advance(Phase.RESERVED, now_s)
        served.order = order
        served.num_sent_blocks = request.local.num_computed_tokens // self.options.block_size
        self._served[order] = served
        self._num_ordered[served.decode] += 1
        self._num_ordered_tokens[served.decode] += request.num_tokens
        self._interrupt(prefill, now_s)
        prefill.scheduler.add(order)
        self._launch(prefill, now_s)

    def _end_step(self, instance: Instance, now_s: float) -> None:
        start_s = instance.start_s
        for sequence in instance.end():
            request = sequence.request
            served = self._served[request]
            if request is served.order:
                self._send(served, sequence, start_s, now_s)
            if sequence.needs_sample:
                request.output_token_ids.append(SAMPLED_TOKEN)
                self._on_token(served, request, now_s)
        self._admit_queued(instance, now_s)
        self._launch(instance, now_s)

    def _on_token(self, served: Served, request: Request, now_s: float) -> None:
        if request.phase is Phase.PREFILLING:  # the first one, or the first after a preemption
            if served.record.first_token_s is None:
                self._note_start(served.record, request, now_s)
            if request is served.order:
                self._hand_over(served, now_s)
                return
            request.advance(Phase.DECODING, now_s)
        if request.finish_reason_after(request.output_token_ids[-1], self._max_tokens) is not None:
            served.decode.scheduler.remove(request)
            self._finish(served, now_s)

    def _note_start(self, record: Record, request: Request, now_s: float) -> None:
        record.started_s = request.timeline.stamps[Phase.PREFILLING]
        record.first_token_s, record.num_cached = now_s, request.local.num_cached_tokens

    def _send(self, served: Served, sequence: ScheduledSequence, start_s: float, now_s: float) -> None:
        """Put the blocks that a chunk has completed on prefill's link; they went out while it was computed."""
        prefill, order = served.prefill, sequence.request
        assert prefill is not None
        pool, options = prefill.scheduler.pool, self.options
        is_last = sequence.stop == order.num_known_tokens
        stop = pool.num_blocks_for(sequence.stop) if is_last else sequence.stop // options.block_size
        if stop <= served.num_sent_blocks:
            return
        block_ids = order.local.block_table[served.num_sent_blocks : stop]
        served.pinned += block_ids
        served.num_sent_blocks = stop
        num_bytes = len(block_ids) * options.block_size * options.kv_bytes_per_token
        prefill.link_free_s = max(prefill.link_free_s, start_s) + num_bytes / options.link_bytes_per_s

    def _hand_over(self, served: Served, now_s: float) -> None:
        order, prefill = served.order, served.prefill
        assert order is not None and prefill is not None
        del self._served[order]
        order.advance(Phase.TRANSFERRING, now_s)
        table = order.local.block_table
        del table[len(table) - len(served.pinned) :]  # the end of it, which is released when it has left
        prefill.scheduler.remove(order)
        served.sent_s = max(now_s, prefill.link_free_s)
        heapq.heappush(self._events, (served.sent_s + self.options.link_latency_s, HANDED_OVER, self._num_sent))
        self._on_link[self._num_sent] = served
        self._num_sent += 1

    def _take_over(self, served: Served, now_s: float) -> None:
        """Everything is there: prefill lets its blocks go, decode goes on from the second token."""
        request, order, prefill, decode = served.request, served.order, served.prefill, served.decode
        assert order is not None and prefill is not None
        order.advance(Phase.FINISHED, now_s)
        prefill.advance(now_s)
        prefill.scheduler.pool.release(served.pinned)
        served.pinned = []
        self._interrupt(decode, now_s)
        self._num_ordered[decode] -= 1
        self._num_ordered_tokens[decode] -= request.num_tokens
        request.advance(Phase.TRANSFERRING, now_s)
        request.local.num_computed_tokens = request.num_tokens
        decode.scheduler.make_findable(request, request.num_tokens)
        request.output_token_ids.append(order.output_token_ids[-1])
        request.advance(Phase.DECODING, now_s)
        if request.finish_reason_after(request.output_token_ids[-1], self._max_tokens) is None:
            decode.scheduler.add(request)
        else:
            decode.scheduler.release_blocks(request)
            self._finish(served, now_s)
        self._admit_queued(decode, now_s)
        self._launch(decode, now_s)
        self._launch(prefill, now_s)

    def _finish(self, served: Served, now_s: float) -> None:
        request, record = served.request, served.record
        request.advance(Phase.FINISHED, now_s)
        del self._served[request]
        record.end_s = now_s
        record.num_preemptions += request.local.num_preemptions

    # what failures.Failures needs

    def at(self, time_s: float, action: Callable[[float], None]) -> None:
        """Do something at a point in time, before whatever else happens then."""
        heapq.heappush(self._events, (time_s, ACTION, self._num_actions))
        self._actions[self._num_actions] = action
        self._num_actions += 1

    def served(self) -> list[Served]:
        """Returns: the requests that have been placed and not ended, as they were placed."""
        return list(dict.fromkeys(self._served.values()))

    def forget(self, served: Served) -> None:
        """Have nothing to do with a request any more."""
        for request in (served.request, served.order):
            if request is not None:
                self._served.pop(request, None)

    def is_complete(self, request: Request) -> bool:
        """Returns: whether a request's newest output token, if it has any, is its last."""
        tokens = request.output_token_ids
        return bool(tokens) and request.finish_reason_after(tokens[-1], self._max_tokens) is not None

    def remove(self, instance: Instance) -> None:
        """Place nothing there any more, and forget what waits for room there."""
        instance.is_up = False
        self._queued[instance].clear()
        self._num_ordered[instance] = self._num_ordered_tokens[instance] = 0
        self._live = [i for i in self.instances if i.is_up]
        if self._shortlist is not None:
            self._shortlist.remove(instance.instance_id)

    def add(self, instance: Instance) -> None:
        """Place requests there again."""
        instance.is_up = True
        self._live = [i for i in self.instances if i.is_up]
        self._note_load(instance)

    def take_off_link(self, served: Served) -> None:
        """Let a hand-over that is on its way never arrive."""
        del self._on_link[next(n for n, s in self._on_link.items() if s is served)]

    def end_order(self, served: Served) -> None:
        """Give up decode's blocks for a prompt that is not there yet."""
        served.decode.scheduler.release_blocks(served.request)
        self._num_ordered[served.decode] -= 1
        self._num_ordered_tokens[served.decode] -= served.request.num_tokens

    def interrupt(self, instance: Instance, now_s: float) -> None:
        """Let an instance decide anew after the step in flight; what it has may be changed now."""
        self._interrupt(instance, now_s)

    def go_on(self, instance: Instance, now_s: float) -> None:
        """Let an instance use what was given back to it."""
        self._admit_queued(instance, now_s)
        self._launch(instance, now_s)

    def _interrupt(self, instance: Instance, now_s: float) -> None:
        if instance.interrupt(now_s):
            self._push_end(instance)

    def _launch(self, instance: Instance, now_s: float) -> None:
        if instance.launch(now_s):
            self._push_end(instance)
        self._note_load(instance)

    def _push_end(self, instance: Instance) -> None:
        assert instance.due_s is not None
        heapq.heappush(self._events, (instance.due_s, STEP_END, instance.index))


def _nobody_decodes(record: Record, request: Request, now_s: float) -> None:
    raise ValueError("no instance decodes")


def _never(served: Served, now_s: float) -> None:
    raise AssertionError("nobody dies")
