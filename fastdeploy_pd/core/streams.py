"""The streams of a step, as those who schedule prompts beside them see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.core.order import stream_slack_s


class Streams(Protocol):
    """What the prompts' part of a step must know of the streams beside them."""

    num: int

    def num_tokens(self) -> int:
        """Returns: KV tokens in sum, those that the step adds included."""
        ...

    def least_tpot_s(self) -> float:
        """Returns: the least TPOT SLO of them; infinite where none has one."""
        ...

    def slack_s(self, step_s: float, now_s: float) -> float:
        """Returns: see `order.stream_slack_s`."""
        ...


class ScheduledStreams:
    """The streams of a step that has been scheduled."""

    def __init__(self, sequences: Sequence[ScheduledSequence]) -> None:
        self._sequences = sequences
        self.num = len(sequences)

    def num_tokens(self) -> int:
        """See `Streams.num_tokens`."""
        return sum(s.stop for s in self._sequences)

    def least_tpot_s(self) -> float:
        """See `Streams.least_tpot_s`."""
        return min((s.request.slo.tpot_s or math.inf for s in self._sequences), default=math.inf)

    def slack_s(self, step_s: float, now_s: float) -> float:
        """See `Streams.slack_s`."""
        return stream_slack_s((s.request for s in self._sequences), step_s, now_s)
