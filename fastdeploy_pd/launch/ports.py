"""Ports that were asked for are bound, or refused with the flag that asked."""

from __future__ import annotations

import errno
import socket

from fastdeploy_pd.errors import ConfigError


def bind_tcp(host: str, port: int, flag: str, instead: str = "leave the flag out to get a free one") -> socket.socket:
    """Returns: a listening socket; port 0 takes a free one.

    Args:
        instead: of choosing another port, if this one is taken.
    Raises: ConfigError: the port is taken or the address is not ours; names the flag.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"{flag} {port} is in use on {host}: choose another port, or {instead}") from error
        raise ConfigError(f"{flag} {port} cannot be used on {host}: {error.strerror}") from error
    return listener


def check_own(host: str, flag: str) -> None:
    """Raises: ConfigError: the address is none of this machine's; names the flag that gave it."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(
            f"{flag} is {host!r}; it must be an address of this machine ({error.strerror}; `ip address` shows them)"
        ) from error


def check_free(host: str, port: int, flag: str, instead: str = "leave the flag out to get a free one") -> None:
    """Raises: ConfigError: the port can't be bound now; names the flag."""
    bind_tcp(host, port, flag, instead).close()
