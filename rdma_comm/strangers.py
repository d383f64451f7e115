"""Connections to a listener that have not proved yet who they are: never more than a few, whatever comes.

Each costs a thread, and with RDMA queue pairs. When there are as many as may be, the oldest one goes for the newcomer: a peer needs
milliseconds to prove itself, who only takes up room is the oldest before long. Who has passed is not counted, and not touched.
"""

from __future__ import annotations

import socket
import threading

MAX_STRANGERS = 64


class Strangers:
    """Thread-safe."""

    def __init__(self, most: int = MAX_STRANGERS) -> None:
        self._most = most
        self._connections: dict[socket.socket, None] = {}  # the oldest one first
        self._room = threading.Condition()

    def admit(self, connection: socket.socket) -> None:
        """Count a connection, once there is room: the oldest ones are shut down, and their threads call `leave`."""
        with self._room:
            for oldest in list(self._connections):
                if len(self._connections) < self._most:
                    break
                shut(oldest)
                while oldest in self._connections and self._room.wait(1.0):
                    pass
            self._connections[connection] = None

    def leave(self, connection: socket.socket) -> None:
        """It has proved who it is, or has ended. Idempotent."""
        with self._room:
            self._connections.pop(connection, None)
            self._room.notify_all()


def shut(connection: socket.socket) -> None:
    """Wake whoever waits in a connection: it has ended."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it had ended already
