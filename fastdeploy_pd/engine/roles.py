"""The roles an instance can have, and what each lets it do. Nobody outside `engine/` compares roles: they ask these questions."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    """What an instance is for."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def can_prefill(self) -> bool:
        """Whether it takes prefill orders."""
        return self is not Role.DECODE

    @property
    def can_decode(self) -> bool:
        """Whether it takes requests."""
        return self is not Role.PREFILL
