"""Network interfaces and their IPv4 addresses, as Linux tells them (netdevice(7))."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket

_SIOCGIFADDR = 0x8915
_REQUEST_BYTES = 40  # struct ifreq; the address stands behind the name's 16 bytes and 4 of family and port


def address_of(interface: str) -> str:
    """Returns: an interface's IPv4 address; "" if there is no such interface, or it has none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, os.fsencode(interface)[:15].ljust(_REQUEST_BYTES, b"\0"))
        return socket.inet_ntoa(answer[20:24])
    return ""


def interface_of(host: str) -> str:
    """Returns: the interface that has this address (or host's); "" if none has."""
    with contextlib.suppress(OSError):
        wanted = socket.gethostbyname(host)
        return next((name for _, name in socket.if_nameindex() if address_of(name) == wanted), "")
    return ""
