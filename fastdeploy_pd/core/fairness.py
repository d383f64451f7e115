"""Whose prompts come first when tenants compete: those of the tenant that has had the least service here (virtual token counters).

A tenant's counter grows by INPUT_WEIGHT with each token computed of its prompts and by OUTPUT_WEIGHT with each token generated for it. The
prompts of the one whose counter is least come first; within a tenant a prefill policy orders them as if nobody else were there. Who comes
(back) is lifted to the least counter of those who wait: what was not used is not saved up. Streams go on in any case and are charged.
What a decode instance generates after a prompt that was computed here it tells with its next order for the tenant.
So as long as two tenants have prompts waiting, their counters differ by no more than what requests admitted at one time can take, however
many requests either of them sends; and no step computes less because of it.
Source: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024 (VTC); here counted as it is computed, chunk by chunk.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.core.order import PrefillPolicy, num_left
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Request

FAIRNESS = ("none", "vtc")
INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # as in the paper, which has them from the prices of APIs
MAX_TENANTS = 10_000  # that are remembered while they have no prompt here


class VirtualTokenCounters:
    """A prefill policy over others, one for each tenant that has prompts; see the module."""

    def __init__(self, make_policy: Callable[[], PrefillPolicy | None]) -> None:
        """
        Args:
            make_policy: gives the order of one tenant's prompts; None: as they came.
        """
        self.counters: dict[str, int] = {}  #: by tenant
        self._make_policy = make_policy
        self._policies: dict[str, PrefillPolicy | None] = {}  # of those that had prompts when they were last ordered
        self._least = 0  # counter of those
        self._heard: dict[tuple[str, str], int] = {}  # by decode instance and tenant: tokens generated, the newest last

    def order(self, prompts: Sequence[Request], now_s: float, stretch: float = 1.0) -> Iterable[Request]:
        """See `PrefillPolicy.order`."""
        by_tenant: dict[str, list[Request]] = {}
        for request in prompts:
            by_tenant.setdefault(request.tenant, []).append(request)
        self._note_present(by_tenant)
        turns: list[tuple[int, int, Iterator[Request]]] = []
        for number, (tenant, own) in enumerate(by_tenant.items()):
            policy = self._policies[tenant]
            turns.append(
                (self.counters[tenant], number, iter(own if policy is None else policy.order(own, now_s, stretch)))
            )
        heapq.heapify(turns)
        found = []
        while turns:
            counter, number, rest = turns[0]
            following = next(rest, None)
            if following is None:
                heapq.heappop(turns)
                continue
            found.append(following)
            heapq.heapreplace(turns, (counter + INPUT_WEIGHT * max(1, num_left(following)), number, rest))
        return found

    def serve(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Count what a step computes."""
        counters = self.counters
        for s in sequences:
            tenant = s.request.tenant
            counters[tenant] = counters.get(tenant, self._least) + service(s)

    def hear(self, decode_id: str, tenant: str, num_generated: int) -> None:
        """Count what was generated elsewhere.

        Args:
            num_generated: tokens, since the beginning, after this tenant's prompts that were computed here.
        """
        before = self._heard.pop((decode_id, tenant), num_generated)  # nobody knows what of it was counted
        new = max(0, num_generated - before)  # less: a late message
        self.counters[tenant] = self.counters.get(tenant, self._least) + OUTPUT_WEIGHT * new
        self._heard[decode_id, tenant] = before + new
        if len(self._heard) > MAX_TENANTS:
            del self._heard[next(iter(self._heard))]

    def _note_present(self, tenants: Iterable[str]) -> None:
        """Lift the counters of those that had no prompts before, and forget those of many that have none now."""
        before, counters = self._policies, self.counters
        self._policies = {t: before[t] if t in before else self._make_policy() for t in tenants}
        least = min((counters[t] for t in self._policies if t in before), default=self._least)
        for tenant in self._policies:
            if tenant not in before:
                counters[tenant] = max(counters.get(tenant, 0), least)
        self._least = min((counters[t] for t in self._policies), default=least)
        if len(counters) > MAX_TENANTS + len(self._policies):
            # Those with the least would be lifted when they come back.
            kept = heapq.nlargest(MAX_TENANTS // 2, counters, key=lambda t: counters[t])
            self.counters = {t: counters[t] for t in {**dict.fromkeys(kept), **self._policies}}


def service(sequence: ScheduledSequence) -> int:
    """Returns: by how much a part of a step moves its tenant's counter."""
    is_stream = sequence.num_tokens == 1 and sequence.start >= len(sequence.request.prompt_token_ids)
    return INPUT_WEIGHT * (0 if is_stream else sequence.num_tokens) + OUTPUT_WEIGHT * sequence.needs_sample


def make_counters(name: str, make_policy: Callable[[], PrefillPolicy | None]) -> VirtualTokenCounters | None:
    """Returns: what --fairness asks for; None: nothing. Raises: ConfigError: there is none of that name."""
    if name not in FAIRNESS:
        raise ConfigError(f"--fairness is {name!r}; it must be one of {', '.join(FAIRNESS)}")
    return VirtualTokenCounters(make_policy) if name == "vtc" else None
