"""Which requests compute how many tokens in the next step.

There is no prefill phase and no decode phase in here: each request only has `num_computed_tokens` chasing `num_tokens`. Running
requests come first, so a stream never waits for a new prompt's turn; what is left of the token budget goes to the waiting ones, in
order. When blocks run out, the youngest running request gives up its own and is computed again later (preemption by recompute).
Source: the budget rule is Sarathi-Serve's (Agrawal et al., OSDI 2024); recompute preemption is PagedAttention's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool, extend_hashes
from fastdeploy_pd.request import Phase, Request


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """The limits of one step and of the queue."""

    max_num_seqs: int = 8  #: most sequences in a step
    max_num_batched_tokens: int = 2048  #: most tokens in a step
    max_model_len: int = 4096  #: most tokens a sequence may have
    enable_chunked_prefill: bool = True  #: a prompt may be computed in several steps
    enable_prefix_caching: bool = True


class Scheduler:
    """The waiting and the running requests of one engine."""

    def __init__(self, pool: BlockPool, options: SchedulerOptions) -> None:
        self.pool = pool
        self.options = options
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_prefix_queries = 0  #: tokens looked up in the prefix cache
        self.num_prefix_hits = 0  #: of these, found

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.waiting and not self.running

    def outstanding_tokens(self) -> int:
        """Returns: tokens known but not yet computed plus one for each running stream; the load that placement balances."""
        return sum(max(1, r.num_tokens - r.local.num_computed_tokens) for r in (*self.waiting, *self.running))

    def add(self, request: Request) -> None:
        """Queue a request. One that holds blocks already (received KV) keeps them and `num_computed_tokens`."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is, and release its blocks. Does nothing if it is not here."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return
        self.release_blocks(request)

    def release_blocks(self, request: Request) -> None:
        """Give up a request's blocks; full computed ones stay findable."""
        self.pool.release(request.local.block_table)
        request.local.block_table = []
        request.local.num_computed_tokens = 0
        request.local.num_findable_blocks = 0

    def forget_content(self, request: Request) -> None:
        """Let no later request find this one's blocks: something is wrong with what they hold."""
        self.pool.forget(request.local.block_table)

    def schedule(self, now_s: float) -> Batch:
        """Choose the next step's work and allocate its blocks.

        Args:
            now_s: for the phase stamps.
        Returns: the batch; empty if nothing can be computed now.
        """
        sequences: list[ScheduledSequence] = []
        budget = self.options.max_num_batched_tokens
        for request in list(self.running):
            if budget == 0:
                break
            if request not in self.running:  # preempted on behalf of an earlier one
                continue
            num_new = min(request.num_tokens - request.local.num_computed_tokens, budget)
            if num_new > 0 and self._ensure_blocks(request, request.local.num_computed_tokens + num_new, now_s):
                sequences.append(self._scheduled(request, num_new))
                budget -= num_new
        self._drop_preempted(sequences)
        is_blocked = False
        for request in list(self.waiting):
            if budget == 0 or len(self.running) >= self.options.max_num_seqs:
                break
            # A request that got no room must not be overtaken by one that would take the blocks it waits for; one that
            # holds its blocks already takes none, and may be the one whose end frees some.
            if (is_blocked and not request.local.block_table) or not self._admit(request, budget, now_s):
                is_blocked = True
                continue
            self.waiting.remove(request)
            self.running.append(request)
            if request.phase is Phase.RESERVED:
                request.advance(Phase.PREFILLING, now_s)
            num_new = min(request.num_tokens - request.local.num_computed_tokens, budget)
            sequences.append(self._scheduled(request, num_new))
            budget -= num_new
        return Batch(sequences, self.pool.block_size)

    def computed(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Record that a batch's sequences were computed: counts move on, full blocks become findable."""
        for sequence in sequences:
            sequence.request.local.num_computed_tokens = sequence.stop
            self.make_findable(sequence.request)

    def make_findable(self, request: Request) -> None:
        """Let the full, computed blocks of a request be found by later requests with the same prefix."""
        if not self.options.enable_prefix_caching:
            return
        local, block_size = request.local, self.pool.block_size
        num_full = local.num_computed_tokens // block_size
        if num_full > local.num_findable_blocks:
            extend_hashes(
                local.block_hashes, request.token_ids(0, num_full * block_size), block_size, request.cache_salt
            )
        for index in range(local.num_findable_blocks, num_full):
            self.pool.make_findable(local.block_table[index], local.block_hashes[index])
        local.num_findable_blocks = max(local.num_findable_blocks, num_full)

    def match_prefix(self, request: Request) -> list[int]:
        """Find the longest cached prefix, leaving at least one token to compute (its logits are needed).

        Returns: block ids, not held yet. Empty when caching is off or the prompt's log-probabilities are wanted.
        """
        if not self.options.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
            return []
        local, block_size = request.local, self.pool.block_size
        num_matchable = (request.num_tokens - 1) // block_size
        extend_hashes(
            local.block_hashes, request.token_ids(0, num_matchable * block_size), block_size, request.cache_salt
        )
        found = self.pool.find_prefix(local.block_hashes[:num_matchable])
        self.num_prefix_queries += request.num_tokens
        self.num_prefix_hits += len(found) * block_size
        return found

    def reserve(self, request: Request, num_spare_blocks: int = 0) -> bool:
        """Give a request all the blocks its known tokens need, the cached prefix first.

        Args:
            num_spare_blocks: free blocks that must be left for others.
        Returns: whether there was room; if not, nothing has changed.
        """
        cached = self.match_prefix(request)
        num_fresh = self.pool.num_blocks_for(request.num_tokens) - len(cached)
        if num_fresh + self.pool.num_free_among(cached) + num_spare_blocks > self.pool.num_free:
            return False
        self.pool.hold(cached)
        request.local.block_table = cached + self.pool.allocate(num_fresh)
        request.local.num_computed_tokens = len(cached) * self.pool.block_size
        request.local.num_cached_tokens = request.local.num_computed_tokens
        return True

    def _scheduled(self, request: Request, num_new: int) -> ScheduledSequence:
        start = request.local.num_computed_tokens
        return ScheduledSequence(request, start, start + num_new)

    def _admit(self, request: Request, budget: int, now_s: float) -> bool:
        """Whether a waiting request can start in this step; reserves its blocks if so."""
        if request.local.block_table and not self._complete_table(request, now_s):
            return False
        if not request.local.block_table and not self.reserve(request, num_spare_blocks=len(self.running)):
            # Alone, a request may take the last block: nobody is there to need it.
            if self.running or not self.reserve(request):
                return False
        num_left = request.num_tokens - request.local.num_computed_tokens
        if self.options.enable_chunked_prefill or num_left <= budget:
            return True
        return budget == self.options.max_num_batched_tokens  # longer than any budget: it must be cut all the same

    def _complete_table(self, request: Request, now_s: float) -> bool:
        """Extend the table of a request that came with blocks to its newest token.

        With nobody running there is nobody to wait for: it gives its blocks up instead and is computed again.
        Returns: whether it can go on, with a full table or with none.
        """
        num_missing = self.pool.num_blocks_for(request.num_tokens) - len(request.local.block_table)
        if num_missing <= self.pool.num_free:
            request.local.block_table.extend(self.pool.allocate(num_missing))
            return True
        if self.running:
            return False
        self._give_up_blocks(request, now_s)
        return True

    def _ensure_blocks(self, request: Request, num_tokens: int, now_s: float) -> bool:
        """Extend a running request's table to num_tokens, preempting the youngest where needed.

        Returns: whether it still runs.
        """
        num_missing = self.pool.num_blocks_for(num_tokens) - len(request.local.block_table)
        while num_missing > self.pool.num_free:
            victim = next((r for r in reversed(self.running) if r.local.is_preemptible), None)
            if victim is None:
                return False
            self._preempt(victim, now_s)
            if victim is request:
                return False
        if num_missing > 0:
            request.local.block_table.extend(self.pool.allocate(num_missing))
        return True

    def _preempt(self, request: Request, now_s: float) -> None:
        self.running.remove(request)
        self._give_up_blocks(request, now_s)
        self.waiting.appendleft(request)

    def _give_up_blocks(self, request: Request, now_s: float) -> None:
        self.release_blocks(request)
        request.local.num_preemptions += 1
        self.num_preemptions += 1
        request.advance(Phase.RESERVED, now_s)

    def _drop_preempted(self, sequences: list[ScheduledSequence]) -> None:
        """A later request's need may have preempted one that was scheduled before it in this very step."""
        sequences[:] = [s for s in sequences if s.request in self.running]
