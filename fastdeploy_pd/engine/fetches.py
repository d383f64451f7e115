"""Cached blocks from peers: a request that holds blocks of its own has those filled that a peer has, then goes on, with or without them.

Nothing depends on a fetch: refused, damaged, late or lost with the peer, its tokens are computed. Decode fetches what lets it compute
the rest by itself, prefill what it would have to compute else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastdeploy_pd.cluster.messages import FetchOrder, HandOver, Peer
from fastdeploy_pd.core.fetch import FetchRule
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.engine.grants import Failure, Grant, Grants
from fastdeploy_pd.request import Request

# Who waits for as long as computing takes loses at most as much again, whatever the peer does (the ski rental problem). Twice that, as a peer
# that computes looks at its messages between steps only.
PATIENCE = 2.0
LEAST_PATIENCE_S = 0.25

Then = Callable[[float], None]  # what goes on at this time


@dataclass(frozen=True, slots=True)
class Held:
    """What a peer has of a request, as far as is known."""

    holder: Peer
    num_tokens: int  #: so many of the first ones
    most_left: float = math.inf  #: without use where more tokens than these would be left to compute


@dataclass(slots=True, eq=False)
class Fetch:
    """What a request is to get."""

    held: Held
    then: Then
    grant: Grant


class Fetches:
    """All fetches of one engine."""

    def __init__(self, context: EngineContext, grants: Grants) -> None:
        self.context = context
        self._grants = grants
        self._rule = FetchRule(context.options.min_fetch_tokens)
        self._open: dict[int, Fetch] = {}  # by id() of the request: two attempts have the same request_id

    def num_blocks(self, request: Request, num_here: int, held: Held) -> int:
        """Returns: how many blocks, after those of the first num_here tokens, are sooner fetched than computed."""
        scheduler = self.context.scheduler
        block_size, peer_id = scheduler.pool.block_size, held.holder.instance_id
        num_held = min(held.num_tokens, request.num_tokens - 1) // block_size
        stop = min(num_held, len(request.local.block_hashes)) * block_size
        num_blocks = (stop - num_here) // block_size
        if peer_id == self.context.instance_id or request.num_tokens - stop > held.most_left:
            return 0
        return num_blocks if self._rule.is_sooner(peer_id, num_blocks, num_here, stop, scheduler.predictor) else 0

    def begin(self, request: Request, held: Held, then: Then, now_s: float) -> bool:
        """Have blocks of a request filled; it holds them, and is not in the scheduler.

        Returns: whether they are on their way: `then` is called once they are here or won't come. False: nothing was done.
        """
        num_here, scheduler = request.local.num_computed_tokens, self.context.scheduler
        num_blocks = self.num_blocks(request, num_here, held)
        if num_blocks:
            grant = self._grants.open(self, request, held.holder, num_blocks, now_s, is_fetch=True)
            if scheduler.predictor is not None:
                compute_s = scheduler.predictor.prefill_s(num_here + num_blocks * scheduler.pool.block_size, num_here)
                grant.gives_up_s = min(grant.gives_up_s, now_s + max(LEAST_PATIENCE_S, PATIENCE * compute_s))
            self._open[id(request)] = Fetch(held, then, grant)
        return num_blocks > 0

    def cancel(self, request: Request) -> bool:
        """Returns: whether something was on its way; nothing lands any more, and `then` is not called."""
        fetch = self._open.pop(id(request), None)
        if fetch is not None:
            self._grants.cancel(fetch.grant)
        return fetch is not None

    # of GrantOwner

    def order(self, grant: Grant, now_s: float) -> FetchOrder:
        """See GrantOwner."""
        block_ids, context = tuple(grant.block_ids), self.context
        hashes = tuple(grant.request.local.block_hashes[grant.first_block : grant.first_block + len(block_ids)])
        transfers = {name: transfer.descriptor() for name, transfer in context.transfers.items()}
        return FetchOrder(grant.grant_id, grant.nonce, hashes, block_ids, context.instance_id, transfers)

    def handed(self, grant: Grant, now_s: float) -> None:
        """See GrantOwner."""

    def arrived(self, grant: Grant, hand_over: HandOver, now_s: float) -> None:
        """See GrantOwner: what comes after them is computed."""
        fetch, request = self._open.pop(id(grant.request)), grant.request
        local, block_size = request.local, self.context.scheduler.pool.block_size
        num_blocks, seconds = len(grant.block_ids), now_s - grant.ordered_s
        self._rule.observe(grant.peer_id, num_blocks, dict(hand_over.stage_s).get("wire", 0.0), seconds)
        self.context.observer.fetched(num_blocks * block_size, hand_over.num_bytes, seconds)
        local.num_computed_tokens = local.num_cached_tokens = (grant.first_block + num_blocks) * block_size
        self.context.scheduler.make_findable(request, local.num_computed_tokens)
        fetch.then(now_s)

    def failed(self, grant: Grant, failure: Failure, now_s: float) -> None:
        """See GrantOwner: ask for what the peer has after all, or go on without."""
        fetch, request = self._open.pop(id(grant.request)), grant.request
        if failure.num_held_blocks > 0:
            num_held_tokens = (grant.first_block + failure.num_held_blocks) * self.context.scheduler.pool.block_size
            is_less = num_held_tokens < fetch.held.num_tokens  # each time, so this ends
            if is_less and self.begin(request, replace(fetch.held, num_tokens=num_held_tokens), fetch.then, now_s):
                again = self._open[id(request)].grant
                again.gives_up_s = min(again.gives_up_s, grant.gives_up_s)
                return
        else:
            self.context.observer.fetch_failed(failure.code)
            if failure.code == "transfer_timeout":
                self._rule.observe(grant.peer_id, len(grant.block_ids), 0.0, now_s - grant.ordered_s)
        fetch.then(now_s)
