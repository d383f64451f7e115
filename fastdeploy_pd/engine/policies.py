"""Scheduling policies by name: ours, and those that other packages offer as entry points."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.metadata import entry_points
from typing import Any, TypeVar

from fastdeploy_pd.core import order
from fastdeploy_pd.core.multiplexing import PLACEMENTS
from fastdeploy_pd.core.order import PrefillPolicy
from fastdeploy_pd.core.placement import NO_SLO, Candidate, FewestTokens, Placement, PlacementPolicy
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Request, Slo

log = logging.getLogger("fastdeploy_pd.policies")
Result = TypeVar("Result")

PREFILL_GROUP = "fastdeploy_pd.prefill_policies"
PLACEMENT_GROUP = "fastdeploy_pd.placement_policies"


class GuardedOrder:
    """A user's prefill policy; where it fails, or orders what is not there, `slack` orders that step. The first failure is logged."""

    def __init__(
        self, name: str, policy: PrefillPolicy, fallback: PrefillPolicy, on_failure: Callable[[], None]
    ) -> None:
        """
        Args:
            on_failure: called at each failure.
        """
        self._name, self._policy, self._fallback, self._on_failure = name, policy, fallback, on_failure
        self._has_failed = False

    def order(self, prompts: Sequence[Request], now_s: float, stretch: float = 1.0) -> Iterable[Request]:
        """See `PrefillPolicy.order`."""
        found = _attempt(lambda: _check_order(list(self._policy.order(list(prompts), now_s, stretch)), prompts))
        if not isinstance(found, Exception):
            return found
        if not self._has_failed:
            self._has_failed = True
            text = "--prefill-policy %s failed; such steps are ordered by slack (said once)"
            log.error(text, self._name, exc_info=found)
        self._on_failure()
        return self._fallback.order(prompts, now_s, stretch)


class GuardedPlacement:
    """A user's placement policy; where it fails, or chooses who is not there, `fewest-tokens` places. The first failure is logged."""

    def __init__(self, name: str, policy: PlacementPolicy) -> None:
        self._name, self._policy, self._fallback = name, policy, FewestTokens()
        self._has_failed = False

    def place(
        self,
        num_tokens: int,
        candidates: Collection[Candidate],
        rng: random.Random,
        slo: Slo = NO_SLO,
        age_s: float = 0.0,
    ) -> Placement | None:
        """See `PlacementPolicy.place`."""
        found = _attempt(
            lambda: _check_placement(self._policy.place(num_tokens, candidates, rng, slo, age_s), candidates)
        )
        if not isinstance(found, Exception):
            return found
        if not self._has_failed:
            self._has_failed = True
            text = "--placement %s failed; such requests are placed by fewest-tokens (said once)"
            log.error(text, self._name, exc_info=found)
        return self._fallback.place(num_tokens, candidates, rng, slo, age_s)


def _attempt(act: Callable[[], Result]) -> Result | Exception:
    """Returns: what a user's code returns or raises: whatever that is, the process goes on."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001 - the one place that takes whatever it is
        return error


def _check_order(found: list[Request], prompts: Sequence[Request]) -> list[Request]:
    """Returns: `found`. Raises: ValueError: it is not some of the prompts, each once."""
    if len(set(map(id, found))) < len(found) or not {id(r) for r in found} <= {id(r) for r in prompts}:
        raise ValueError("`order` returned a prompt twice, or something that is none of the prompts it was given")
    return found


def _check_placement(found: Placement | None, candidates: Collection[Candidate]) -> Placement | None:
    """Returns: `found`. Raises: ValueError: one that was chosen is no candidate for its part."""
    if found is None:
        return None
    if found.decode_id not in {c.instance_id for c in candidates if c.can_decode}:
        raise ValueError(f"`place` returned decode_id={found.decode_id!r}, which is no candidate that can decode")
    if found.prefill_id is not None and found.prefill_id not in {c.instance_id for c in candidates if c.can_prefill}:
        raise ValueError(f"`place` returned prefill_id={found.prefill_id!r}, which is no candidate that can prefill")
    return found


def prefill_policy(
    name: str, predictor: Callable[[], Predictor | None], on_failure: Callable[[], None] = lambda: None
) -> PrefillPolicy | None:
    """Returns: the order of prompts by name; an entry point is called with predictor, which gives the present one.

    Args:
        on_failure: called at each step that a user's own policy fails to order.
    Raises: ConfigError: there is none of that name, lists those there are; or it cannot be made.
    """
    if name in order.POLICIES:
        return order.make_policy(name, predictor)
    found: PrefillPolicy = _make(PREFILL_GROUP, "--prefill-policy", name, order.POLICIES, "order", predictor)
    return GuardedOrder(name, found, order.Slack(predictor), on_failure)


def placement_policy(name: str) -> PlacementPolicy:
    """Returns: a placement policy by name; an entry point is called without arguments.

    Raises: ConfigError: there is none of that name, lists those there are; or it cannot be made.
    """
    if name in PLACEMENTS:
        return PLACEMENTS[name]()
    found: PlacementPolicy = _make(PLACEMENT_GROUP, "--placement", name, tuple(PLACEMENTS), "place")
    return GuardedPlacement(name, found)


def _make(group: str, flag: str, name: str, ours: Sequence[str], method: str, *arguments: object) -> Any:
    """Returns: what a user's entry point makes. Raises: ConfigError: it is not there, or fails, or has not the method."""
    points = entry_points(group=group)
    if name not in points.names:
        raise ConfigError(f"{flag} is {name!r}; there are {', '.join([*ours, *points.names])}")
    made: Any = _attempt(lambda: points[name].load()(*arguments))
    if isinstance(made, Exception):
        raise ConfigError(f"{flag} is {name!r}, which cannot be made: {type(made).__name__}: {made}") from made
    if not callable(getattr(made, method, None)):
        raise ConfigError(f"{flag} is {name!r}; a {type(made).__name__} has no method {method!r}")
    return made


def check(prefill: str, placement: str) -> None:
    """Raises: ConfigError: one of the two policies is not there."""
    prefill_policy(prefill, lambda: None)
    placement_policy(placement)
