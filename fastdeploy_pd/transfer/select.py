"""Which backend a pair uses: the first of ours, in the configured order, that works here, that the peer has and that reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fastdeploy_pd.errors import ConfigError, IncompatiblePeer
from fastdeploy_pd.transfer.base import CLOSED, Transfer

RETRY_S = 30.0  # a backend that failed for a peer is left out for that peer so long, where there is another
MAX_FAILURES = 4096  # remembered
GROUP = "fastdeploy_pd.transfers"  #: of entry points; docs/transfer_backends.md
BACKENDS = tuple(  # loaded when asked for: each imports what it needs
    EntryPoint(name, f"fastdeploy_pd.transfer.{name}:{name.capitalize()}Transfer", GROUP)
    for name in ("ipc", "mooncake", "nccl", "rdma", "shm", "tcp")
)


@dataclass(frozen=True, slots=True)
class Choice:
    """A pair's backend."""

    name: str
    transfer: Transfer
    passed_over: tuple[str, ...]  #: "name: reason" of each that is preferred to it


def choose(
    own: Mapping[str, Transfer | str],
    peer_descriptors: Mapping[str, dict[str, Any]],
    failed: Mapping[str, str] | None = None,
) -> Choice:
    """
    Args:
        own: backends in order of preference; a string says why it cannot be used on this machine.
        failed: reasons of those that failed for this peer just now: taken only if nothing else is left.
    Raises: IncompatiblePeer: none fits; names each backend's reason.
    """
    passed_over: list[str] = []
    last_resort: Choice | None = None
    for name, transfer in own.items():
        if isinstance(transfer, str):
            reason = transfer
        else:
            descriptor = peer_descriptors.get(name)
            reason = "the peer does not offer it" if descriptor is None else transfer.reaches(descriptor)
            if not reason and failed and name in failed:
                reason = f"failed just now: {failed[name]}"
                last_resort = last_resort or Choice(name, transfer, tuple(passed_over))
            if not reason:
                return Choice(name, transfer, tuple(passed_over))
        passed_over.append(f"{name}: {reason}")
    if last_resort is not None:
        return last_resort
    raise IncompatiblePeer(
        "no transfer backend fits both sides: " + "; ".join(passed_over or ["none is configured here"])
    )


class Selection:
    """Chooses backends for pairs and remembers which has failed for whom."""

    def __init__(self, own: Mapping[str, Transfer | str]) -> None:
        self._own = own
        self._failures: dict[tuple[str, str], tuple[float, str]] = {}  # (peer, backend) -> when, why

    def choose(self, peer_id: str, descriptors: Mapping[str, dict[str, Any]], now_s: float) -> Choice:
        """Returns and raises as `choose`."""
        failed = {}
        for name in self._own:
            at_s, reason = self._failures.get((peer_id, name), (-RETRY_S, ""))
            if now_s - at_s < RETRY_S:
                failed[name] = reason
        return choose(self._own, descriptors, failed)

    def failed(self, peer_id: str, name: str, reason: str, now_s: float) -> None:
        """A hand-over to this peer failed on this backend, or was closed there, which says nothing of the backend."""
        if reason == CLOSED:
            return
        self._failures[(peer_id, name)] = (now_s, reason)
        while len(self._failures) > MAX_FAILURES:
            del self._failures[next(iter(self._failures))]


def find(name: str) -> EntryPoint:
    """Returns: a backend by name, not loaded: one of ours, or one that another package offers as entry point `fastdeploy_pd.transfers`.

    Raises: ConfigError: there is none of that name; lists those there are.
    """
    points = {point.name: point for point in BACKENDS}
    if name not in points:
        points |= {point.name: point for point in entry_points(group=GROUP)} | points
        if name not in points:
            raise ConfigError(f"--cache-transfer-protocol names {name!r}; there are {', '.join(sorted(points))}")
    return points[name]


def build(name: str, **arguments: Any) -> Transfer:
    """Returns: a backend by name. Raises: ConfigError: see `find`; TransferUnavailable: this machine has not got what it needs."""
    transfer: Transfer = find(name).load()(**arguments)
    return transfer
