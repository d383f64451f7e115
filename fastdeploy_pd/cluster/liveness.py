"""Who is alive, judged by progress: a peer is lost when its step counter stands still for too long on the observer's clock.

A connection that answers is not enough: ZeroMQ's I/O thread answers for an engine that hangs.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_STEP_FACTOR = 3.0  # a busy peer may take this many of its own longest steps


@dataclass(slots=True)
class _Sign:
    counter: int
    changed_s: float
    longest_step_s: float = 0.0


class Liveness:
    """The counters of all peers of one observer."""

    def __init__(self, timeout_s: float) -> None:
        """
        Args:
            timeout_s: seconds a counter may stand still, at least.
        """
        self.timeout_s = timeout_s
        self._signs: dict[str, _Sign] = {}

    def seen(self, peer_id: str, now_s: float) -> None:
        """A peer was met, or did something that shows progress."""
        sign = self._signs.get(peer_id)
        if sign is None:
            self._signs[peer_id] = _Sign(-1, now_s)
        else:
            sign.changed_s = now_s

    def beat(self, peer_id: str, counter: int, now_s: float, longest_step_s: float = 0.0) -> None:
        """A peer told its counter; only a change is a sign of life."""
        sign = self._signs.get(peer_id)
        if sign is None:
            self._signs[peer_id] = _Sign(counter, now_s, longest_step_s)
            return
        if counter > sign.counter:
            sign.counter, sign.changed_s = counter, now_s
        sign.longest_step_s = longest_step_s

    def lost(self, now_s: float) -> list[str]:
        """Returns: peers whose counter has stood still for max(timeout_s, 3 x their longest step); they are forgotten."""
        gone = [
            peer_id
            for peer_id, sign in self._signs.items()
            if now_s - sign.changed_s > max(self.timeout_s, LONGEST_STEP_FACTOR * sign.longest_step_s)
        ]
        for peer_id in gone:
            del self._signs[peer_id]
        return gone

    def forget(self, peer_id: str) -> None:
        """Watch a peer no longer. Does nothing if it is not watched."""
        self._signs.pop(peer_id, None)
