"""Which instance should change its side, when one side is under pressure and the other is not: at most one flip at a time.

A side's demand is how many instances its work would keep busy; its pressure is demand by instances. Prefill's demand: an instance with
prompts to compute is busy (1), and more than that as its queue grows beyond `wait_s`. Decode's: the share of seats or of KV blocks in
use, and what is queued. Demands are averaged over `window_s`, so that one long prompt moves nobody.

One instance goes over if the needy side's pressure is above `high` and the giving side will still be under clearly less pressure than
the needy one *after* it. A flip back would need the contrary, so a constant load, whatever it is, moves instances one way only.
Mixed instances serve both sides already: they are neither flipped nor counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """An instance as it was last seen."""

    instance_id: str
    can_prefill: bool
    can_decode: bool
    prefill_s: float = 0.0  #: predicted seconds of the prompts that it has taken and not computed
    num_decodes: int = 0  #: streams that it generates
    num_seats: int = 1  #: most streams of a step
    num_queued: int = 0  #: requests that wait for KV blocks
    kv_usage: float = 0.0  #: share of its KV blocks that requests hold, 0 to 1
    flip_age_s: float | None = None  #: since its last flip; None: it has the role it was started with
    is_movable: bool = True  #: it may be flipped

    @property
    def is_dedicated(self) -> bool:
        """Whether it is on one side alone."""
        return self.can_prefill is not self.can_decode

    def decode_demand(self) -> float:
        """Returns: instances that its streams and queue keep busy. A prefill instance's blocks are those of orders, and no decode's."""
        seats = self.num_decodes / self.num_seats
        return (max(seats, self.kv_usage) if self.can_decode else seats) + self.num_queued / self.num_seats


@dataclass(frozen=True, slots=True)
class ElasticOptions:
    """When a side is under pressure, and how often one may act on it."""

    cooldown_s: float = 30.0  #: between two flips in a topic
    window_s: float = 10.0  #: of the averages
    wait_s: float = 1.0  #: of prompts in a prefill instance's queue: as much as one instance should have
    high: float = 0.9
    margin: float = 0.25  #: the giving side's pressure afterwards is so much less than the needy one's


@dataclass(frozen=True, slots=True)
class Demand:
    """Instances that the work of each side would keep busy."""

    prefill: float = 0.0
    decode: float = 0.0

    def averaged(self, loads: Collection[InstanceLoad], passed_s: float, options: ElasticOptions) -> Demand:
        """Returns: this average and the present loads, which have been so for passed_s seconds (exponential average)."""
        dedicated = [load for load in loads if load.is_dedicated]
        prefill = sum(max(1.0, load.prefill_s / options.wait_s) for load in dedicated if load.prefill_s > 0)
        decode = sum(load.decode_demand() for load in dedicated)
        share = 1.0 - math.exp(-max(0.0, passed_s) / options.window_s)
        return Demand(
            self.prefill + (prefill - self.prefill) * share,
            self.decode + (decode - self.decode) * share,
        )


@dataclass(frozen=True, slots=True)
class Flip:
    """An instance should go to the other side."""

    instance_id: str
    role: Literal["prefill", "decode"]


def decide(demand: Demand, loads: Collection[InstanceLoad], options: ElasticOptions) -> Flip | None:
    """
    Args:
        loads: of all members of the topic that don't drain.
    Returns: the flip that helps, or None: all is well, nothing would help, or the last flip is too recent.
    """
    if any(load.flip_age_s is not None and load.flip_age_s < options.cooldown_s for load in loads):
        return None
    prefills = [load for load in loads if load.is_dedicated and load.can_prefill]
    decodes = [load for load in loads if load.is_dedicated and load.can_decode]
    if _helps(demand.prefill, len(prefills), demand.decode, len(decodes), options):
        giver = _idlest(decodes)
        return Flip(giver.instance_id, "prefill") if giver else None
    if _helps(demand.decode, len(decodes), demand.prefill, len(prefills), options):
        giver = _idlest(prefills)
        return Flip(giver.instance_id, "decode") if giver else None
    return None


def _helps(needed: float, num_needy: int, given: float, num_givers: int, options: ElasticOptions) -> bool:
    """Whether the needy side is under pressure and one instance more relieves it without moving the pressure over."""
    if num_givers < 2 or needed / max(1, num_needy) <= options.high:
        return False
    return given / (num_givers - 1) <= (1.0 - options.margin) * needed / (num_needy + 1)


def _idlest(givers: Collection[InstanceLoad]) -> InstanceLoad | None:
    movable = [load for load in givers if load.is_movable]
    return min(movable, key=lambda m: (m.decode_demand() + m.prefill_s, m.instance_id), default=None)
