"""A prefill policy of one's own: the shortest prompt first, but nobody is overtaken for more than MAX_WAIT_S."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdeploy_pd.core.order import num_left
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.request import Request

MAX_WAIT_S = 10.0


class AgingSjf:
    """See fastdeploy_pd/core/order.py, `PrefillPolicy`."""

    def __init__(self, predictor: Callable[[], Predictor | None]) -> None:
        """
        Args:
            predictor: gives what steps take, as far as that is known now; None: not yet. This policy has no use for it.
        """

    def order(self, prompts: Sequence[Request], now_s: float, stretch: float = 1.0) -> list[Request]:
        """Returns: the prompts in the order to compute them; one that is left out waits."""

        def place(request: Request) -> tuple[bool, float]:
            is_young = now_s - request.arrival_s < MAX_WAIT_S
            return is_young, num_left(request) if is_young else request.arrival_s

        return sorted(prompts, key=place)
