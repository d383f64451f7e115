"""What of the optional backends this machine has."""

from __future__ import annotations

from functools import cache


@cache
def has_mooncake() -> bool:
    """Whether its engine loads."""
    try:
        import mooncake.engine  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        return False
    return True
