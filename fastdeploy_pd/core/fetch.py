"""Whether a prefix that a peer has is sooner fetched than computed.

n blocks take latency + n * seconds a block, both as fetches from that peer have shown (n blocks have n times the bytes of one, so this is bytes over link
speed); computing their tokens takes what the predictor says. Where either is not known yet the number of tokens decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdeploy_pd.core.predictor import Predictor

NEWEST = 0.3  # weight of the newest measurement
FADE = 0.9  # of an estimate each time it says no, so that one bad moment of a link is not believed for ever
MAX_PEERS = 1024


@dataclass(slots=True)
class LinkSpeed:
    """What fetches from one peer have shown, in seconds."""

    latency_s: float
    block_s: float


class FetchRule:
    """Decides, and learns how fast the links are."""

    def __init__(self, min_tokens: int) -> None:
        """
        Args:
            min_tokens: fewer are not fetched while speeds are unknown; 0: nothing is ever fetched.
        """
        self._min_tokens = min_tokens
        self._links: dict[str, LinkSpeed] = {}  # by peer id, the one measured longest ago first

    def observe(self, peer_id: str, num_blocks: int, wire_s: float, total_s: float) -> None:
        """A fetch has ended.

        Args:
            wire_s: from the first write to the last; total_s: from the order until the blocks were verified.
        """
        wire_s = min(max(0.0, wire_s), total_s)  # the peer's word
        measured = LinkSpeed(total_s - wire_s, wire_s / num_blocks)
        known = self._links.pop(peer_id, measured)
        known.latency_s += NEWEST * (measured.latency_s - known.latency_s)
        known.block_s += NEWEST * (measured.block_s - known.block_s)
        self._links[peer_id] = known
        while len(self._links) > MAX_PEERS:
            del self._links[next(iter(self._links))]

    def is_sooner(self, peer_id: str, num_blocks: int, start: int, stop: int, predictor: Predictor | None) -> bool:
        """Whether to fetch.

        Args:
            num_blocks: that hold the tokens [start, stop).
            predictor: of this instance's prefills; None: not known.
        """
        if self._min_tokens == 0 or num_blocks < 1:
            return False
        link = self._links.get(peer_id)
        if link is None or predictor is None:
            return stop - start >= self._min_tokens
        if link.latency_s + num_blocks * link.block_s < predictor.prefill_s(stop, start):
            return True
        link.latency_s, link.block_s = link.latency_s * FADE, link.block_s * FADE
        return False
