"""What a front end remembers of a request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from fastdeploy_pd.core.placement import Placement
from fastdeploy_pd.request import Phase, Request, TokenChunk

PREFILL_PHASES = (Phase.PLACED, Phase.RESERVED, Phase.PREFILLING)  # in which the prefill instance is needed


@dataclass(slots=True, eq=False)
class Tracked:
    """One request and its current attempt."""

    request: Request
    unplaced_since_s: float | None
    placement: Placement | None = None
    cached: dict[str, int] = field(
        default_factory=dict
    )  #: instance id -> tokens in its prefix cache, when it was placed
    decode_id: str = ""
    sent_s: float = 0.0
    heard_s: float = 0.0
    asked_s: float = 0.0
    early: dict[int, TokenChunk] = field(default_factory=dict)  #: chunks whose turn has not come, by index
    avoid: dict[str, str] = field(default_factory=dict)  #: instance id -> why not there again
    num_lost: int = 0

    def needs(self, instance_ids: Collection[str]) -> bool:
        """Whether the attempt waits for something of one of these instances."""
        if self.placement is None:
            return False
        is_at_prefill = self.request.phase in PREFILL_PHASES
        return self.decode_id in instance_ids or (is_at_prefill and self.placement.prefill_id in instance_ids)
