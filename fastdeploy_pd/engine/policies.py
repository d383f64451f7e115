"""Scheduling policies by name: ours, and those that other packages offer as entry points."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from fastdeploy_pd.core import order
from fastdeploy_pd.core.multiplexing import PLACEMENTS
from fastdeploy_pd.core.order import PrefillPolicy
from fastdeploy_pd.core.placement import PlacementPolicy
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.errors import ConfigError

PREFILL_GROUP = "fastdeploy_pd.prefill_policies"
PLACEMENT_GROUP = "fastdeploy_pd.placement_policies"


def prefill_policy(name: str, predictor: Callable[[], Predictor | None]) -> PrefillPolicy | None:
    """Returns: the order of prompts by name; an entry point is called with predictor, which gives the present one.

    Raises: ConfigError: there is none of that name; lists those there are.
    """
    if name in order.POLICIES:
        return order.make_policy(name, predictor)
    points = entry_points(group=PREFILL_GROUP)
    if name not in points.names:
        raise ConfigError(f"--prefill-policy is {name!r}; there are {', '.join([*order.POLICIES, *points.names])}")
    found: PrefillPolicy = points[name].load()(predictor)
    return found


def placement_policy(name: str) -> PlacementPolicy:
    """Returns: a placement policy by name; an entry point is called without arguments.

    Raises: ConfigError: there is none of that name; lists those there are.
    """
    if name in PLACEMENTS:
        return PLACEMENTS[name]()
    points = entry_points(group=PLACEMENT_GROUP)
    if name not in points.names:
        raise ConfigError(f"--placement is {name!r}; there are {', '.join([*PLACEMENTS, *points.names])}")
    found: PlacementPolicy = points[name].load()()
    return found


def check(prefill: str, placement: str) -> None:
    """Raises: ConfigError: one of the two policies is not there."""
    prefill_policy(prefill, lambda: None)
    placement_policy(placement)
