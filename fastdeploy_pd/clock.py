"""The only place that reads time: `WallClock` for processes, `VirtualClock` for tests and the simulator.

Times are seconds as float on a monotonic clock of this process. They are never compared between hosts.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Says what time it is."""

    def now_s(self) -> float:
        """Returns: seconds on this process's monotonic clock."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Returns: seconds since an arbitrary point, never going back."""
        return time.monotonic()

    def unix_s(self) -> float:
        """Returns: seconds since 1970, for `created` fields, log lines and what `doctor` says of clocks only."""
        return time.time()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """Returns: the virtual time in seconds."""
        return self._now_s

    def advance_to(self, now_s: float) -> None:
        """Move to a later point in time.

        Raises: ValueError: now_s lies in the past.
        """
        if now_s < self._now_s:
            raise ValueError(f"time cannot go back from {self._now_s} to {now_s}")
        self._now_s = now_s
