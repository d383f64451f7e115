"""Which requests compute how many tokens in the next step.

There is no prefill phase and no decode phase in here: each request only has `num_computed_tokens` chasing `num_tokens`. Running
requests come first, so a stream never waits for a new prompt's turn. The token budget goes to prompts, in order; streams' tokens, one
each, come on top, so that prompts which fill the budget are not cut for a few streams beside them. A prompt that is alone, with no
stream and no other prompt, may have more: nobody waits when its step begins, and it is over sooner in one piece. When blocks run out,
the youngest running request gives up its own and is computed again later (preemption by recompute); so do prompts whose first token is
late in any case, where one that can be on time lacks blocks.

Steps run while the next ones are scheduled: `launched` says that a step has begun, `computed` that the oldest one has ended. Between
the two a request's newest token may be pending: it counts, and its id is not known. Blocks that are given up while a launched step
may write into them are fenced: they stay held until that step has ended. Preemption, which needs blocks at once, waits until no step
is in flight; lost prompts that no such step computes need not wait.
Source: the budget rule is Sarathi-Serve's (Agrawal et al., OSDI 2024); recompute preemption is PagedAttention's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool, extend_hashes
from fastdeploy_pd.core.fairness import make_counters
from fastdeploy_pd.core.order import (
    LATE_EVERY,
    WORTH_S,
    PrefillPolicy,
    due_s,
    is_lost,
    make_policy,
    num_left,
    prefill_left_s,
    stream_slack_s,
)
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.streams import ScheduledStreams, Streams
from fastdeploy_pd.request import Phase, Request

MAX_PROMPTS = 256  # that placement is told of: those that are due first
MOST_SHARE = 0.8  # of the time, that streams are taken to need
DUE_AIM = (
    0.8  # of the time until a first token is due, that a step may take in which it comes: predictions are not exact
)
LATE_BANK_S = 0.5
LEAST_CHUNK = 256  # tokens: with fewer a chunk's own cost is too large a part


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """The limits of one step and of the queue."""

    max_num_seqs: int = 8  #: most sequences in a step
    max_num_batched_tokens: int = 2048  #: most tokens of prompts in a step
    max_model_len: int = 4096  #: most tokens a sequence may have
    enable_chunked_prefill: bool = True  #: a prompt may be computed in several steps
    enable_prefix_caching: bool = True
    prefill_policy: str = "fcfs"  #: see `order`
    guards_tpot: bool = False  #: chunks are cut so that running streams keep their SLO, where the predictor is known
    fairness: str = "none"  #: see `fairness`
    max_lone_prompt_tokens: int = 0  #: as max_num_batched_tokens, of a prompt that is alone; used if it is more


def is_prompt(request: Request) -> bool:
    """Returns: whether more than its newest token is left to compute."""
    local = request.local
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids) + local.num_pending_tokens
    return num_tokens - local.num_computed_tokens > 1


def is_stream(request: Request) -> bool:
    """Returns: whether a request has its next token alone to compute; a new prompt of one token is none, and waits for its turn."""
    return request.local.num_computed_tokens > 0 and not is_prompt(request)


class Scheduler:
    """The waiting and the running requests of one engine."""

    def __init__(
        self,
        pool: BlockPool,
        options: SchedulerOptions,
        samples_on_device: Callable[[Request], bool] = lambda request: False,
        make_policy: Callable[[str, Callable[[], Predictor | None]], PrefillPolicy | None] = make_policy,
    ) -> None:
        """
        Args:
            make_policy: gives the prefill policy of a name; it may ask for the present predictor.
            samples_on_device: whether a request can be computed on while its newest token is pending.
        """
        self.pool = pool
        self.options = options
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}  # oldest first
        self._samples_on_device = samples_on_device
        self._num_launched = 0  # steps
        self._num_ended = 0
        self._fenced: deque[tuple[int, list[int]]] = deque()  # (step that may write into them, block ids)
        self.predictor: Predictor | None = None  #: None: not known (yet)
        make = partial(make_policy, options.prefill_policy, lambda: self.predictor)
        self._counters = make_counters(options.fairness, make)
        self._policy = self._counters or make()
        self._num_held_off = 0  # steps in a row in which prompts waited for streams
        self._held_off_at = -1  # steps launched before the last of them
        self.num_preemptions = 0
        self.num_prefix_queries = 0  #: tokens looked up in the prefix cache
        self.num_prefix_hits = 0  #: of these, found
        self.num_swap_hits = 0  #: of these, brought back from the lower tier

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.waiting and not self.running

    def outstanding_tokens(self) -> int:
        """Returns: tokens known but neither computed nor cached, plus one for each running stream; the load that placement balances."""
        return sum(max(1, num_left(r)) for r in (*self.waiting, *self.running))

    def load(self, predictor: Predictor, now_s: float, busy_s: float) -> Load:
        """Returns: what there is to do, for placement; busy_s: until the step in flight ends."""
        requests = [*self.running, *self.waiting]
        jobs, num_promised = self.prompts_left(predictor, requests)
        streams = [r for r in requests if is_stream(r)]
        num_tokens = sum(r.num_tokens for r in streams)
        slack_s = stream_slack_s(streams, predictor.decode_s(len(streams), num_tokens), now_s) if streams else math.inf
        num_free = self.pool.num_free * self.pool.block_size - num_promised
        prompts = tuple([(due - now_s, seconds) for due, seconds in jobs])
        found = Load(predictor, prompts, busy_s, len(streams), num_tokens, slack_s, num_free)
        priorities = {r.priority for r in requests if is_prompt(r)}
        is_alike = len(priorities) < 2 and self._counters is None
        if self.options.prefill_policy == "edf" and is_alike:
            found.priority = max(priorities, default=0)
        found.is_fcfs = self._policy is None
        found.most_step_s = predictor.prefill_s(self.options.max_num_batched_tokens)
        found.num_seats = self.options.max_num_seqs - len(streams)
        if found.is_fcfs or (self.options.prefill_policy in ("edf", "slack") and is_alike):
            found.step_tokens = self._full_step_tokens(requests, num_free)
        return found

    def _full_step_tokens(self, requests: Iterable[Request], num_free_tokens: int) -> int:
        """Returns: tokens of prompts that every step computes while so many wait; 0: streams' SLOs, or blocks, may make it fewer."""
        options = self.options
        has_room = num_free_tokens >= options.max_num_seqs * self.pool.block_size  # a block more for each that runs
        if not has_room or not options.enable_chunked_prefill or any(r.slo.tpot_s is not None for r in requests):
            return 0
        # a part of one token costs what a stream does, not what prompts' tokens do
        return options.max_num_batched_tokens if options.max_num_batched_tokens > 1 else 0

    def prompts_left(self, predictor: Predictor, requests: Iterable[Request]) -> tuple[list[tuple[float, float]], int]:
        """Returns: (when due, seconds left to compute) of the prompts among `requests` that placement is told of, by due time, and how
        many tokens of all of them are still to be given blocks.
        """
        jobs, num_promised, running = [], 0, self.running
        for request in requests:
            if is_prompt(request):
                jobs.append((due_s(request), prefill_left_s(request, predictor)))
                if request not in running:
                    # cached blocks that nobody holds are free too until it takes them
                    num_promised += max(0, request.num_tokens - len(request.local.block_table) * self.pool.block_size)
        jobs.sort()
        return jobs[:MAX_PROMPTS], num_promised

    def add(self, request: Request) -> None:
        """Queue a request. One that holds blocks already (received KV) keeps them and `num_computed_tokens`."""
        request.local.samples_on_device = self._samples_on_device(request)
        if not request.local.block_table:
            request.local.num_matched_tokens = self.num_matching_tokens(request)
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is, and release its blocks. Does nothing if it is not here."""
        if request in self.running:
            del self.running[request]
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return
        self.release_blocks(request)

    def release_blocks(self, request: Request) -> None:
        """Give up a request's blocks, at the latest when no step in flight writes into them; full computed ones stay findable."""
        local = request.local
        if local.last_step > self._num_ended:
            self._fenced.append((local.last_step, local.block_table))
        else:
            self.pool.release(local.block_table)
        local.block_table = []
        local.num_computed_tokens = local.num_pending_tokens = local.num_findable_blocks = 0
        local.prompt_logprobs = []

    def count_elsewhere(self, decode_id: str, tenant: str, num_generated: int) -> None:
        """Let fairness know what a decode instance has generated; see `VirtualTokenCounters.hear`."""
        if self._counters is not None:
            self._counters.hear(decode_id, tenant, num_generated)

    def forget_content(self, request: Request) -> None:
        """Let no later request find this one's blocks: something is wrong with what they hold."""
        self.pool.forget(request.local.block_table)

    def schedule(self, now_s: float, busy_s: float = 0.0) -> Batch:
        """Choose the next step's work and allocate its blocks.

        Args:
            now_s: for the phase stamps, and what is due when.
            busy_s: predicted seconds until the steps in flight end, and this one begins.
        Returns: the batch; empty if nothing can be computed now.
        """
        others_wait = self._is_in_flight and any(self._waits_for_token(r) for r in self.running)
        running = list(self.running)
        streams, is_short = self.schedule_streams(running, now_s, others_wait)
        if is_short:
            return Batch([], self.pool.block_size)
        beside = streams
        if others_wait:  # prompts' time is theirs too
            stepped = {s.request for s in streams}
            held = [r for r in self.running if r not in stepped and not is_prompt(r)]
            beside = streams + [ScheduledSequence(r, r.num_tokens - 1, r.num_tokens) for r in held]
        prompts = self.schedule_prompts(running, ScheduledStreams(beside), now_s, others_wait, busy_s)
        return Batch(streams + prompts, self.pool.block_size)

    def schedule_streams(
        self, running: Iterable[Request], now_s: float, others_wait: bool = False
    ) -> tuple[list[ScheduledSequence], bool]:
        """Give streams their next token: those among `running`, the oldest first, and those that were handed over.

        Args:
            others_wait: see `_is_held_back`.
        Returns: what they compute, and whether blocks lack that the end of the steps in flight, or a preemption after it, would free.
        """
        sequences, is_short = self._schedule_running(running, others_wait, now_s)
        if not is_short:
            handed_over = [r for r in self.waiting if is_stream(r)]
            budget = max(len(handed_over), self.options.max_num_batched_tokens)  # one may have to give its blocks up
            sequences += self._schedule_waiting(handed_over, budget, math.inf, others_wait, now_s)
        return sequences, is_short

    def schedule_prompts(
        self,
        running: Iterable[Request],
        streams: Streams,
        now_s: float,
        others_wait: bool = False,
        busy_s: float = 0.0,
    ) -> list[ScheduledSequence]:
        """Give prompts the token budget, or what streams' SLOs leave of it: those that have begun, among `running`, and those that wait.

        Returns: what they compute.
        """
        prompts = [r for r in running if is_prompt(r) and r in self.running]
        prompts += (r for r in self.waiting if not is_stream(r))
        if not prompts:
            return []
        budget = self.options.max_num_batched_tokens
        is_lone = len(prompts) == 1 and not streams.num
        if (
            is_lone and prompts[0].sampling.prompt_logprobs is None
        ):  # where they are asked for, each token has its logits
            budget = max(budget, self.options.max_lone_prompt_tokens)
        start_s = now_s + busy_s
        slack_s, stretch = self._leave_to_prompts(streams, start_s)
        ordered = prompts if self._policy is None else list(self._policy.order(prompts, start_s, stretch))
        limit_s = self._prefill_limit_s(ordered, slack_s, budget, start_s)
        begun_s = busy_s
        if self.predictor is not None and streams.num:
            begun_s += self.predictor.decode_s(streams.num, streams.num_tokens())
        return self._schedule_waiting(ordered, budget, limit_s, others_wait, now_s, begun_s)

    def launched(self, batch: Batch) -> None:
        """Record that a batch is being computed, the newest of those in flight: counts move on, sampled tokens are pending."""
        self._num_launched += 1
        if self._counters is not None:
            self._counters.serve(batch.sequences)
        for sequence in batch.sequences:
            local = sequence.request.local
            local.num_computed_tokens = sequence.stop
            local.num_pending_tokens += sequence.needs_sample
            local.last_step = self._num_launched

    def computed(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Record that the oldest step in flight has ended; the caller appends each sampled token right after.

        Args:
            sequences: of its batch, those that were computed and whose requests still run; their full blocks become findable.
        """
        self._num_ended += 1
        while self._fenced and self._fenced[0][0] <= self._num_ended:
            self.pool.release(self._fenced.popleft()[1])
        for sequence in sequences:
            sequence.request.local.num_pending_tokens -= sequence.needs_sample
            self.make_findable(sequence.request, sequence.stop)

    def make_findable(self, request: Request, num_tokens: int) -> None:
        """Let the full blocks of a request's first num_tokens, all computed and known, be found by requests with the same prefix."""
        local, block_size = request.local, self.pool.block_size
        num_full = num_tokens // block_size
        if num_full <= local.num_findable_blocks or not self.options.enable_prefix_caching:
            return
        self._hash_blocks(request, num_full)
        new = slice(local.num_findable_blocks, num_full)
        self.pool.make_findable(local.block_table[new], local.block_hashes[new])
        local.num_findable_blocks = num_full

    def match_prefix(self, request: Request) -> list[int]:
        """Find the longest cached prefix, leaving at least one token to compute (its logits are needed).

        Returns: block ids, not held yet. Empty when caching is off or the prompt's log-probabilities are wanted.
        """
        return self.pool.find_prefix(self._matchable_hashes(request))

    def num_matching_tokens(self, request: Request) -> int:
        """Returns: how many tokens `match_prefix` finds."""
        return self.pool.num_findable(self._matchable_hashes(request)) * self.pool.block_size

    def _matchable_hashes(self, request: Request) -> list[bytes]:
        """Returns: the hashes of the blocks to look up."""
        if not self._looks_up(request):
            return []
        num_blocks = (request.num_tokens - 1) // self.pool.block_size
        self._hash_blocks(request, num_blocks)
        return request.local.block_hashes[:num_blocks]

    def reserve(self, request: Request, num_spare_blocks: int = 0) -> bool:
        """Give a request all the blocks its known tokens need, the cached prefix first.

        Args:
            num_spare_blocks: free blocks that must be left for others.
        Returns: whether there was room; if not, nothing has changed.
        """
        cached = self.match_prefix(request)
        request.local.num_matched_tokens = len(cached) * self.pool.block_size  # since it was queued some came, or went
        if self._num_lacking(request, cached, num_spare_blocks) > 0:
            return False
        num_fresh = self.pool.num_blocks_for(request.num_tokens) - len(cached)
        self.pool.hold(cached)
        num_matchable = (request.num_tokens - 1) // self.pool.block_size if self._looks_up(request) else 0
        lower = request.local.block_hashes[len(cached) : num_matchable]
        fresh, num_filled = self.pool.allocate_filled(num_fresh, lower)
        self.num_swap_hits += num_filled * self.pool.block_size
        request.local.block_table = cached + fresh
        request.local.num_computed_tokens = (len(cached) + num_filled) * self.pool.block_size
        request.local.num_cached_tokens = request.local.num_computed_tokens
        request.local.num_findable_blocks = len(cached)
        if self._looks_up(request):  # once, however often it found no room
            self.num_prefix_queries += request.num_tokens
            self.num_prefix_hits += request.local.num_cached_tokens
        return True

    def num_wanted_blocks(self) -> int:
        """Returns: free blocks with which any waiting request has room: who leaves so many takes none that one waits for."""
        most = max((r.num_tokens for r in self.waiting if not r.local.block_table), default=0)
        return self.pool.num_blocks_for(most) + len(self.running)

    def _num_lacking(self, request: Request, cached: Sequence[int], num_spare_blocks: int) -> int:
        """Returns: how many free blocks more `reserve` needs, with `cached` as the prefix; 0 or less: none."""
        num_fresh = self.pool.num_blocks_for(request.num_tokens) - len(cached)
        return num_fresh + self.pool.num_free_among(cached) + num_spare_blocks - self.pool.num_free

    def _looks_up(self, request: Request) -> bool:
        return self.options.enable_prefix_caching and request.sampling.prompt_logprobs is None

    def _hash_blocks(self, request: Request, num_blocks: int) -> None:
        """Let a request's block_hashes reach over its first num_blocks blocks, all known; hashed ones are not looked at again."""
        hashes, block_size = request.local.block_hashes, self.pool.block_size
        if len(hashes) < num_blocks:
            new = request.token_ids(len(hashes) * block_size, num_blocks * block_size)
            extend_hashes(hashes, new, block_size, request.cache_salt)

    def _schedule_running(
        self, running: Iterable[Request], others_wait: bool, now_s: float
    ) -> tuple[list[ScheduledSequence], bool]:
        """See `schedule_streams`."""
        sequences: list[ScheduledSequence] = []
        block_size = self.pool.block_size
        num_preemptions = self.num_preemptions
        for request in running:
            if request not in self.running:  # preempted on behalf of an earlier one
                continue
            start, stop = request.local.num_computed_tokens, request.num_tokens
            if stop - start > 1 or self._is_held_back(request, others_wait):
                continue
            if stop > len(request.local.block_table) * block_size and not self._extend_table(request, stop, now_s):
                if self._is_in_flight:
                    return [], True
                continue
            sequences.append(ScheduledSequence(request, start, stop))
        if self.num_preemptions > num_preemptions:  # one may have been scheduled in this very step before
            sequences = [s for s in sequences if s.request in self.running]
        return sequences, False

    def _schedule_waiting(
        self,
        prompts: Sequence[Request],
        budget: int,
        limit_s: float,
        others_wait: bool,
        now_s: float,
        begun_s: float = 0.0,
    ) -> list[ScheduledSequence]:
        """Give what is left of a step to requests that have not begun or are partly computed, in the order given.

        A prompt that ends in this step gets its first token when the step ends: what follows it must not make that late.

        Args:
            budget: tokens; limit_s: predicted seconds, infinite where nobody asks; begun_s: what the step takes until here.
        """
        predictor = self.predictor if self.options.guards_tpot and self.options.enable_chunked_prefill else None
        sequences: list[ScheduledSequence] = []
        is_blocked = False
        for place, request in enumerate(prompts, 1):
            if budget <= 0 or limit_s <= 0:
                break
            is_running = request in self.running
            num_left = request.num_tokens - request.local.num_computed_tokens
            if is_running and num_left <= budget and self._is_held_back(request, others_wait):
                continue
            if not is_running:
                # A request that got no room must not be overtaken by one that would take the blocks it waits for; one that
                # holds its blocks already takes none, and may be the one whose end frees some.
                is_full = len(self.running) >= self.options.max_num_seqs
                later = islice(prompts, place, None)
                is_behind = is_blocked and not request.local.block_table
                if is_full or is_behind or not self._admit(request, later, budget, now_s):
                    is_blocked = True
                    continue
                self.waiting.remove(request)
                self.running[request] = None
                if request.phase is Phase.RESERVED:
                    request.advance(Phase.PREFILLING, now_s)
            start = request.local.num_computed_tokens
            num_new = min(request.num_tokens - start, budget)
            if predictor is not None:
                if limit_s < math.inf:
                    num_new = min(num_new, predictor.tokens_within(limit_s, start))
                    if num_new < 1:
                        break
                seconds = predictor.prefill_s(start + num_new, start)
                limit_s, begun_s = limit_s - seconds, begun_s + seconds
                left_s = DUE_AIM * (due_s(request) - now_s) - begun_s
                if start + num_new == request.num_tokens and left_s > 0:
                    limit_s = min(limit_s, left_s)
            sequences.append(ScheduledSequence(request, start, start + num_new))
            budget -= num_new
        return sequences

    def _leave_to_prompts(self, streams: Streams, now_s: float) -> tuple[float, float]:
        """Returns: how many seconds the streams' SLOs leave to prompts in this step (infinite where nobody asks), and by how much
        longer than alone prompts take in the long run beside these streams.
        """
        if self.predictor is None or not streams.num or not self.options.guards_tpot:
            return math.inf, 1.0
        step_s = self.predictor.decode_s(streams.num, streams.num_tokens())
        stretch = 1 / (1 - min(MOST_SHARE, step_s / streams.least_tpot_s()))
        return streams.slack_s(step_s, now_s), stretch

    def _prefill_limit_s(self, ordered: Sequence[Request], slack_s: float, budget: int, now_s: float) -> float:
        """Returns: how long the prompts' part of a step may take, at most slack_s; 0: no prompt now.

        A chunk costs something by itself, and so does each step of the streams: prompts wait until streams are so far ahead that the
        first of them ends, or a long chunk fits; every LATE_EVERY-th step computes LEAST_CHUNK tokens in any case. While none but late
        ones wait, streams stay LATE_BANK_S ahead, for prompts to come.
        """
        if self.predictor is None or slack_s == math.inf or not ordered:
            return math.inf
        first, start = ordered[0], ordered[0].local.num_computed_tokens
        if is_lost(first, self.predictor, now_s):
            slack_s -= LATE_BANK_S
        worth_s = min(WORTH_S, self.predictor.prefill_s(min(first.num_tokens, start + budget), start))
        if slack_s < worth_s:
            if self._held_off_at != self._num_launched:  # asked again before anything was launched, it is the same step
                self._held_off_at = self._num_launched
                self._num_held_off += 1
            return 0.0 if self._num_held_off % LATE_EVERY else self.predictor.prefill_s(LEAST_CHUNK)
        self._num_held_off = 0
        return slack_s

    @property
    def _is_in_flight(self) -> bool:
        return self._num_launched > self._num_ended

    def _ends_with_pending_token(self, request: Request) -> bool:
        """Whether it is known beforehand that nothing comes after a request's pending token."""
        num_output = len(request.output_token_ids) + request.local.num_pending_tokens
        return (
            num_output >= request.sampling.max_tokens
            or request.num_tokens >= self.options.max_model_len
            or request.local.ends_with_next_token
        )

    def _waits_for_token(self, request: Request) -> bool:
        """Whether a request goes on when, and only when, its pending token is known."""
        local = request.local
        return (
            local.num_pending_tokens > 0 and not local.samples_on_device and not self._ends_with_pending_token(request)
        )

    def _is_held_back(self, request: Request, others_wait: bool) -> bool:
        """Whether a request, about to sample, takes no part in the steps before the one in flight has ended.

        All that don't sample on the device wait for each other (others_wait): half of them in every other step would be as slow
        for each, and all of them together in every other step serve twice as many.
        """
        if not request.local.samples_on_device and others_wait:
            return True
        return request.local.num_pending_tokens > 0 and self._ends_with_pending_token(request)

    def _admit(self, request: Request, later: Iterable[Request], budget: int, now_s: float) -> bool:
        """Whether a waiting request can start in this step; reserves its blocks if so. `later` prompts may lose theirs to it."""
        if request.local.block_table and not self._complete_table(request, now_s):
            return False
        if not request.local.block_table and not self.reserve(request, num_spare_blocks=len(self.running)):
            if not self._take_from_lost(request, later, now_s) or not self.reserve(request, len(self.running)):
                return False
        num_left = request.num_tokens - request.local.num_computed_tokens
        if self.options.enable_chunked_prefill or num_left <= budget:
            return True
        return budget >= self.options.max_num_batched_tokens  # longer than any budget: it must be cut all the same

    def _take_from_lost(self, request: Request, later: Iterable[Request], now_s: float) -> bool:
        """Free the blocks that a prompt lacks, if it can be on time, by preempting `later` ones that cannot, the last first.

        The first of them keeps its blocks, so that they end one after the other.
        Returns: whether it freed so many.
        """
        predictor = self.predictor
        if self._policy is None or predictor is None or is_lost(request, predictor, now_s):
            return False
        lost = [r for r in later if r in self.running and not r.output_token_ids and is_lost(r, predictor, now_s)][1:]
        victims = [r for r in lost if r.local.is_preemptible and r.local.last_step <= self._num_ended]
        if not victims:
            return False
        num_lacking = self._num_lacking(request, self.match_prefix(request), len(self.running))
        if num_lacking > sum(len(r.local.block_table) for r in victims):
            return False
        while num_lacking > 0:
            victim = victims.pop()
            num_lacking -= len(victim.local.block_table)
            self._preempt(victim, now_s)
        return True

    def _complete_table(self, request: Request, now_s: float) -> bool:
        """Extend the table of a request that came with blocks to its newest token.

        With nobody running and no step in flight there is nothing to wait for: it gives its blocks up and is computed again.
        Returns: whether it can go on, with a full table or with none.
        """
        num_missing = self.pool.num_blocks_for(request.num_tokens) - len(request.local.block_table)
        if num_missing <= self.pool.num_free:
            request.local.block_table.extend(self.pool.allocate(num_missing))
            return True
        if self.running or self._is_in_flight:
            return False
        self._give_up_blocks(request, now_s)
        return True

    def _extend_table(self, request: Request, num_tokens: int, now_s: float) -> bool:
        """Extend a running request's table to num_tokens, preempting the youngest where needed and no step is in flight.

        Returns: whether it still runs, with a full table.
        """
        num_missing = self.pool.num_blocks_for(num_tokens) - len(request.local.block_table)
        while num_missing > self.pool.num_free:
            victim = next((r for r in reversed(self.running) if r.local.is_preemptible), None)
            if victim is None or self._is_in_flight:
                return False
            self._preempt(victim, now_s)
            if victim is request:
                return False
        request.local.block_table.extend(self.pool.allocate(num_missing))
        return True

    def _preempt(self, request: Request, now_s: float) -> None:
        del self.running[request]
        self._give_up_blocks(request, now_s)
        self.waiting.appendleft(request)

    def _give_up_blocks(self, request: Request, now_s: float) -> None:
        self.release_blocks(request)
        request.local.num_preemptions += 1
        self.num_preemptions += 1
        request.advance(Phase.RESERVED, now_s)
