"""What can go wrong with RDMA, as exceptions that name the call, the cause and the peer."""

from __future__ import annotations

import os


class RdmaError(Exception):
    """Base of everything this package raises on purpose."""


class RdmaUnavailable(RdmaError):
    """This machine cannot do RDMA (or not with this device); the text says why and what would mend it."""


class VerbsError(RdmaError):
    """A verb failed."""

    def __init__(self, verb: str, errno: int, peer: str = "", hint: str = "") -> None:
        """
        Args:
            verb: libibverbs' function.
            errno: what it returned.
            peer: whom the queue pair was for, if it was for one.
            hint: what mends it, if there is something.
        """
        self.verb, self.errno, self.peer = verb, errno, peer
        text = f"{verb} failed: {os.strerror(errno)} (errno {errno})"
        super().__init__(text + (f", peer {peer}" if peer else "") + (f"; {hint}" if hint else ""))


class CompletionFailed(RdmaError):
    """A posted write or read did not complete."""

    def __init__(self, status: int, name: str, vendor_error: int, peer: str = "") -> None:
        """
        Args:
            status: the completion's status (libibverbs' ibv_wc_status).
            name: the status in words.
            vendor_error: the device's own code.
        """
        self.status, self.name, self.vendor_error, self.peer = status, name, vendor_error, peer
        super().__init__(
            f"completion failed: {name} (status {status}, vendor {vendor_error:#x})"
            + (f", peer {peer}" if peer else "")
        )


class HandshakeFailed(RdmaError):
    """The peer is not one we talk to; the text names what differs."""
