"""Which backend a pair uses: the first of ours, in the configured order, that the peer has and that reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from fastdeploy_pd.errors import ConfigError, IncompatiblePeer
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


def build(name: str, **arguments: Any) -> Transfer:
    """Returns: a backend by name: one of ours, or one that another package offers as entry point `fastdeploy_pd.transfers`.

    Raises: ConfigError: there is none of that name; lists those there are.
    """
    from fastdeploy_pd.transfer.shm import ShmTransfer
    from fastdeploy_pd.transfer.tcp import TcpTransfer

    known: dict[str, Any] = {"shm": ShmTransfer, "tcp": TcpTransfer}
    if name not in known:
        known |= {point.name: point for point in entry_points(group="fastdeploy_pd.transfers")}
        if name not in known:
            raise ConfigError(f"--cache-transfer-protocol names {name!r}; there are {', '.join(sorted(known))}")
        known[name] = known[name].load()
    transfer: Transfer = known[name](**arguments)
    return transfer
