"""Published schedulers to compare ours with, each as its source describes it, on the same instances and step times.

- `tropical`: every request waits at a dispatcher, the shortest first, until a prefill instance is idle, or can take it with nobody in its
  queue late, or a decode instance's streams can all spare the prompt's time. Prefill instances compute one prompt at a time, in chunks,
  the one with the least left first. `tropical-decode-first` asks decode instances before prefill instances that are busy or idle, as the
  authors' code does and their text does not. Source: Ma et al., Tropical, DAC 2025, and the README of tropical-project.
- `distserve`: prompts go to the prefill instance with the fewest tokens left, which computes them in order, as many whole ones at once as
  the token budget holds; decode instances pull KV when they have room, until then it stays where it was computed.
  Source: Zhong et al., DistServe, OSDI 2024.
- `vllm-chunked`: mixed instances, each request to the one with the fewest requests; in order, prompts in chunks beside what generates.
  Source: Agrawal et al., Sarathi-Serve, OSDI 2024, as in vLLM.

They are given what they would have to predict: prefill times are those that the simulation goes by.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.placement import Candidate, FewestTokens, Placement
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Phase, Request
from fastdeploy_pd.sim.cluster import ARRIVAL, HANDED_OVER, Cluster, ClusterOptions, Record, Served
from fastdeploy_pd.sim.instance import Instance
from fastdeploy_pd.sim.latency import Latency
from fastdeploy_pd.sim.report import Slo

ITERATION_WATERMARK_S = 0.85  # of a decode instance that may take a prompt; these three are Tropical's defaults
TOKENS_WATERMARK = 400_000
MAX_MULTIPLEXED_TOKENS = 8192  # prompts below it may go to decode instances
SAFETY = 1.02  # on predicted times of others' prompts
POLL_S = (
    0.01  # how often held requests are looked at when nothing happens; Tropical's dispatcher does every millisecond
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that an instance has not finished."""

    left_s: float  #: its prefill takes from the end of the step in flight
    due_s: float  #: when its first token is due


@dataclass(frozen=True, slots=True)
class Facts:
    """What a dispatcher's monitor knows of an instance."""

    free_s: float  #: when the step in flight ends; now if there is none
    prompts: tuple[Prompt, ...]  #: waiting or begun, without those that the step in flight finishes
    num_prompt_tokens: int  #: of these, left to compute
    num_requests: int  #: of all kinds
    num_decode_tokens: int  #: KV tokens of what generates, or is to be pulled
    decode_due_s: float  #: earliest time at which a stream falls behind its objective; infinite if there are none
    iteration_s: float  #: of a step that generates a token for each


@dataclass(slots=True)
class SimCandidate(Candidate):
    """An instance as a simulated dispatcher sees it: with all that it could know."""

    facts: Facts = Facts(0.0, (), 0, 0, 0, math.inf, 0.0)


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A request that is to be placed."""

    num_tokens: int
    prefill_s: float
    due_s: float  #: when its first token is due


class DispatchPolicy(Protocol):
    """Where a request goes, from all that can be known."""

    def choose(self, newcomer: Newcomer, candidates: Collection[SimCandidate], now_s: float) -> Placement | None:
        """Returns: where it goes now; decode may change when the prompt is computed. None: it waits."""
        ...


@dataclass(frozen=True, slots=True)
class Tropical:
    """The multiplexing toggle."""

    tpot_slo_s: float
    is_decode_first: bool = False

    def choose(self, newcomer: Newcomer, candidates: Collection[SimCandidate], now_s: float) -> Placement | None:
        """See `DispatchPolicy.choose`."""
        orders = (self._multiplex, self._separate) if self.is_decode_first else (self._separate, self._multiplex)
        for order in orders:
            found = order(newcomer, candidates, now_s)
            if found is not None:
                return found
        return None

    def _separate(self, newcomer: Newcomer, candidates: Collection[SimCandidate], now_s: float) -> Placement | None:
        prefills = [c for c in candidates if c.can_prefill]
        idle = [c for c in prefills if not c.facts.prompts and c.facts.free_s <= now_s]
        feasible = idle or [c for c in prefills if _is_feasible(c.facts, newcomer)]
        return _apart(feasible, candidates)

    def _multiplex(self, newcomer: Newcomer, candidates: Collection[SimCandidate], now_s: float) -> Placement | None:
        if newcomer.num_tokens >= MAX_MULTIPLEXED_TOKENS:
            return None
        latest_s = now_s + newcomer.prefill_s + self.tpot_slo_s  # one token's time stays in reserve
        spare = [c for c in candidates if c.can_decode and _is_below_watermarks(c.facts)]
        found = _least([c for c in spare if c.facts.decode_due_s >= latest_s], _decode_tokens)
        return None if found is None else Placement(None, found.instance_id)


@dataclass(frozen=True, slots=True)
class DistServe:
    """The prefill instance with the fewest prompt tokens left, at once."""

    def choose(self, newcomer: Newcomer, candidates: Collection[SimCandidate], now_s: float) -> Placement | None:
        """See `DispatchPolicy.choose`."""
        return _apart([c for c in candidates if c.can_prefill], candidates)


@dataclass(frozen=True, slots=True)
class FewestRequests:
    """The mixed instance with the fewest requests, at once."""

    def choose(self, newcomer: Newcomer, candidates: Collection[SimCandidate], now_s: float) -> Placement | None:
        """See `DispatchPolicy.choose`."""
        found = _least(candidates, lambda c: c.facts.num_requests)
        return None if found is None else Placement(None, found.instance_id)


def _is_feasible(facts: Facts, newcomer: Newcomer) -> bool:
    """Whether all of a queue, the newcomer among them, are in time if those with the least left go first."""
    start_s = facts.free_s
    queue = [*facts.prompts, Prompt(newcomer.prefill_s, newcomer.due_s)]
    for prompt in sorted(queue, key=lambda p: p.left_s):
        if start_s + prompt.left_s >= prompt.due_s:
            return False
        start_s += SAFETY * prompt.left_s
    return True


def _is_below_watermarks(facts: Facts) -> bool:
    return (
        not facts.prompts and facts.iteration_s < ITERATION_WATERMARK_S and facts.num_decode_tokens < TOKENS_WATERMARK
    )


def _apart(prefills: Iterable[SimCandidate], candidates: Iterable[SimCandidate]) -> Placement | None:
    prefill = _least(prefills, lambda c: c.facts.num_prompt_tokens)
    decode = _least((c for c in candidates if c.can_decode and not c.can_prefill), _decode_tokens)
    return None if prefill is None or decode is None else Placement(prefill.instance_id, decode.instance_id)


def _least(candidates: Iterable[SimCandidate], key: Callable[[SimCandidate], int]) -> SimCandidate | None:
    return min(candidates, key=lambda c: (key(c), c.instance_id), default=None)


def _decode_tokens(candidate: SimCandidate) -> int:
    return candidate.facts.num_decode_tokens


class ShortestRemaining(Scheduler):
    """Computes one prompt a step, that which has the least left; one that loses its turn keeps its blocks and what is computed."""

    def __init__(self, pool: BlockPool, options: SchedulerOptions, left_s: Callable[[Request], float]) -> None:
        """
        Args:
            left_s: how long the rest of a prompt takes.
        """
        super().__init__(pool, replace(options, max_num_seqs=1))
        self._left_s = left_s

    def schedule(self, now_s: float, busy_s: float = 0.0) -> Batch:
        """See `Scheduler.schedule`."""
        self.waiting = deque(sorted([*self.running, *self.waiting], key=self._left_s))
        self.running.clear()
        return super().schedule(now_s, busy_s)


class DispatchCluster(Cluster):
    """A cluster with a dispatcher, whose decode instances reserve blocks for a prompt when it is computed, and pull them then."""

    def __init__(
        self, options: ClusterOptions, latency: Latency, policy: DispatchPolicy, slo: Slo, rng: random.Random
    ) -> None:
        """Raises: ConfigError: the options are wrong."""
        super().__init__(options, latency, FewestTokens(), rng)
        self._dispatch_policy, self._slo = policy, slo
        self._held: list[tuple[int, int, Record, Request]] = []  # a heap, the shortest prompt first
        self._seen: set[int] = set()
        self._is_polling = False

    def left_s(self, request: Request) -> float:
        """Returns: how long the rest of a prompt takes, alone."""
        return self._latency.step_s([(request.local.num_computed_tokens, request.num_known_tokens, True)], 0, 0)

    def _arrive(self, record: Record, now_s: float) -> None:
        """Take a request into the dispatcher; one that is in there already says that it is time to look again."""
        number = record.offered.number
        if number in self._seen:
            self._is_polling = False
        else:
            self._seen.add(number)
            if record.offered.num_input >= self._max_tokens:
                record.is_refused, record.end_s = True, now_s
                return
            request = self._make_request(record.offered, now_s)
            heapq.heappush(self._held, (record.offered.num_input, number, record, request))
        self._dispatch(now_s)

    def _dispatch(self, now_s: float) -> None:
        """Place held requests, the shortest first, until one must wait."""
        while self._held:
            num_tokens, number, record, request = self._held[0]
            alone_s = self._latency.alone_s(num_tokens)
            newcomer = Newcomer(num_tokens, alone_s, record.offered.arrival_s + self._slo.ttft_x * alone_s)
            candidates = [self._facts(i, now_s) for i in self.instances]
            placement = self._dispatch_policy.choose(newcomer, candidates, now_s)
            if placement is None:
                if not self._is_polling:
                    self._is_polling = True
                    heapq.heappush(self._events, (now_s + POLL_S, ARRIVAL, number))
                return
            heapq.heappop(self._held)
            self._place(record, request, placement, now_s)

    def _facts(self, instance: Instance, now_s: float) -> SimCandidate:
        instance.catch_up(now_s)
        prompts, streams, num_left = [], [], 0
        for request in (*instance.scheduler.running, *instance.scheduler.waiting):
            if request.output_token_ids:
                streams.append(request)
            elif request.num_known_tokens > request.local.num_computed_tokens:
                due_s = self._due_s(self._served[request].record)
                prompts.append(Prompt(self.left_s(request), due_s))
                num_left += request.num_known_tokens - request.local.num_computed_tokens
        num_tokens = sum(r.num_known_tokens for r in streams)
        on_the_way = (*self._queued[instance], *(s for s in self._on_link.values() if s.decode is instance))
        facts = Facts(
            free_s=now_s if instance.due_s is None else instance.due_s,
            prompts=tuple(prompts),
            num_prompt_tokens=num_left,
            num_requests=len(instance.scheduler.running) + len(instance.scheduler.waiting),
            num_decode_tokens=num_tokens + sum(s.request.num_known_tokens for s in on_the_way),
            decode_due_s=min((self._stream_due_s(r) for r in streams), default=math.inf),
            iteration_s=self._latency.step_s((), len(streams), num_tokens) if streams else 0.0,
        )
        return SimCandidate(instance.instance_id, instance.can_prefill, instance.can_decode, num_left, facts=facts)

    def _due_s(self, record: Record) -> float:
        offered = record.offered
        return offered.arrival_s + self._slo.ttft_x * self._latency.alone_s(offered.num_input)

    def _stream_due_s(self, request: Request) -> float:
        first_token_s = self._served[request].record.first_token_s
        assert first_token_s is not None
        return first_token_s + self._slo.tpot_ms / 1e3 * max(1, len(request.output_token_ids))

    def _end_step(self, instance: Instance, now_s: float) -> None:
        super()._end_step(instance, now_s)
        self._dispatch(now_s)

    def _admit_queued(self, decode: Instance, now_s: float) -> None:
        """Order prompts without reserving anything; let decode pull, in order, those computed ones that it has room for."""
        queued, scheduler = self._queued[decode], decode.scheduler
        for served in [s for s in queued if s.order is None]:
            queued.remove(served)
            self._order(served, now_s)
        while queued:
            request = queued[0].request
            if not scheduler.reserve(request, num_spare_blocks=len(scheduler.running)):
                if not scheduler.is_idle or not scheduler.reserve(request):
                    return
            self._pull(queued.popleft(), now_s)

    def _send(self, served: Served, sequence: ScheduledSequence, start_s: float, now_s: float) -> None:
        """Nothing goes out while prompts are computed."""

    def _hand_over(self, served: Served, now_s: float) -> None:
        """Keep the prompt's blocks, and queue it where the fewest tokens are."""
        order, prefill = served.order, served.prefill
        assert order is not None and prefill is not None
        served.pinned = list(order.local.block_table)
        prefill.scheduler.pool.hold(served.pinned)
        del self._served[order]
        order.advance(Phase.TRANSFERRING, now_s)
        prefill.scheduler.remove(order)
        candidates = [self._facts(i, now_s) for i in self.instances if i.can_decode]
        decode = self._by_id[min(candidates, key=lambda c: (c.facts.num_decode_tokens, c.instance_id)).instance_id]
        self._num_ordered[served.decode] -= 1
        self._num_ordered[decode] += 1
        served.decode, served.record.decode_id = decode, decode.instance_id
        self._queued[decode].append(served)
        self._admit_queued(decode, now_s)
        if decode.blocks_taken():
            self._push_end(decode)

    def _pull(self, served: Served, now_s: float) -> None:
        prefill, options = served.prefill, self.options
        assert prefill is not None
        num_cached = served.request.local.num_computed_tokens // options.block_size
        num_bytes = (len(served.pinned) - num_cached) * options.block_size * options.kv_bytes_per_token
        prefill.link_free_s = max(prefill.link_free_s, now_s) + num_bytes / options.link_bytes_per_s
        heapq.heappush(self._events, (prefill.link_free_s + options.link_latency_s, HANDED_OVER, self._num_sent))
        self._on_link[self._num_sent] = served
        self._num_sent += 1


NAMES = ("distserve", "tropical", "tropical-decode-first", "vllm-chunked")


def allows(name: str, kinds: str) -> bool:
    """Returns: whether a layout is one that a baseline, or any other placement, is made for."""
    if name not in NAMES:
        return True
    return set(kinds) == ({"M"} if name == "vllm-chunked" else {"P", "D"})


def make_cluster(name: str, options: ClusterOptions, latency: Latency, slo: Slo, rng: random.Random) -> Cluster:
    """Returns: a cluster run as one of NAMES says. Raises: ConfigError: the options are wrong, or the layout is not the baseline's."""
    if not allows(name, options.kinds):
        kinds = "M instances" if name == "vllm-chunked" else "P and D instances"
        raise ConfigError(f"--placement {name} needs a layout of {kinds} alone")
    if options.prefill_policy != "fcfs":
        raise ConfigError(f"--prefill-policy is {options.prefill_policy}; --placement {name} has an order of its own")
    policies: dict[str, DispatchPolicy] = {
        "distserve": DistServe(),
        "tropical": Tropical(slo.tpot_ms / 1e3),
        "tropical-decode-first": Tropical(slo.tpot_ms / 1e3, is_decode_first=True),
        "vllm-chunked": FewestRequests(),
    }
    cluster = DispatchCluster(options, latency, policies[name], slo, rng)
    for instance in cluster.instances:
        pool, scheduling = instance.scheduler.pool, instance.scheduler.options
        if instance.can_prefill and name.startswith("tropical"):
            instance.scheduler = ShortestRemaining(pool, scheduling, cluster.left_s)
        elif instance.can_prefill and name == "distserve":
            instance.scheduler = Scheduler(pool, replace(scheduling, enable_chunked_prefill=False))
    return cluster
