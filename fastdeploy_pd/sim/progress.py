"""A line on stderr that says how far a command is: on a terminal always the newest, elsewhere one now and then of what takes long."""

from __future__ import annotations

import sys
from typing import TextIO

from fastdeploy_pd.clock import Clock, WallClock

WIDTH = 30
INTERVAL_S = 0.1
FIRST_S = 5.0  # until the first line in a log; each next one comes when it has taken twice as long


class Progress:
    """Counts up to a total; use it with `with`, so that the line goes when the work ends."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None, clock: Clock | None = None) -> None:
        """
        Args:
            stream: where the line goes; stderr.
        """
        self._label, self._total = label, max(1, total)
        self._stream, self._clock = stream or sys.stderr, clock or WallClock()
        self._is_shown = self._stream.isatty()
        self._begun_s = self._clock.now_s()
        self._next_s = self._begun_s + (INTERVAL_S if self._is_shown else FIRST_S)
        self._num_done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def reach(self, num_done: int, label: str | None = None) -> None:
        """So many are done; a smaller number than before changes nothing but the label."""
        self._label = label or self._label
        self._num_done = max(self._num_done, num_done)
        now_s = self._clock.now_s()
        if now_s < self._next_s:
            return
        if self._is_shown:
            self._next_s = now_s + INTERVAL_S
            self._stream.write(f"\r\x1b[K{self.line(now_s)}")
        else:
            self._next_s = 2 * now_s - self._begun_s
            self._stream.write(f"{self.line(now_s)}\n")
        self._stream.flush()

    def line(self, now_s: float) -> str:
        """Returns: what the terminal shows at a time."""
        share = min(1.0, self._num_done / self._total)
        left = f", {(now_s - self._begun_s) * (1 - share) / share:.0f} s left" if share > 0 else ""
        return f"{self._label} [{'#' * int(share * WIDTH):{WIDTH}}] {100 * share:.0f} %{left}"
