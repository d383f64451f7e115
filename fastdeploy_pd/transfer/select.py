"""Which backend a pair uses: the first of ours, in the configured order, that the peer has and that reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdeploy_pd.errors import IncompatiblePeer
from fastdeploy_pd.transfer.base import Transfer


def choose(own: Mapping[str, Transfer], peer_descriptors: Mapping[str, dict[str, Any]]) -> tuple[str, Transfer]:
    """Returns: (name, backend). Raises: IncompatiblePeer: none fits; names each backend's reason."""
    reasons = []
    for name, transfer in own.items():
        descriptor = peer_descriptors.get(name)
        reason = "the peer does not offer it" if descriptor is None else transfer.reaches(descriptor)
        if not reason:
            return name, transfer
        reasons.append(f"{name}: {reason}")
    raise IncompatiblePeer("no transfer backend fits both sides: " + "; ".join(reasons or ["none is configured here"]))
