"""Who may wait at a listener without having said who they are; the communicator's over an endpoint that plays a NIC's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("rdma_comm._verbs", reason="needs the compiled part: a C compiler and Python.h")

from rdma_comm import communicator
from rdma_comm.communicator import RDMACommunicator
from rdma_comm.strangers import Strangers

SECRET = b"a secret"


class PlayedConnection:
    def __init__(self, endpoint: PlayedEndpoint) -> None:
        self._endpoint, self.num_rails = endpoint, 1
        endpoint.connections.add(self)

    def offer(self, _: object) -> list[dict[str, Any]]:
        return [{"regions": [[0, 4096, 0]]}]

    def connect(self, *_: object) -> None:
        pass

    def fail(self) -> None:
        pass

    def close(self) -> None:
        self._endpoint.connections.discard(self)


class PlayedEndpoint:
    """Counts what a NIC would have queue pairs for."""

    def __init__(self, _: object = None) -> None:
        self.connections: set[PlayedConnection] = set()

    def register(self, *_: object, **__: object) -> object:
        return object()

    def connection(self, _: str) -> PlayedConnection:
        return PlayedConnection(self)

    def close(self) -> None:
        pass


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def is_ended(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_strangers_have_few_queue_pairs_and_peers_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator, "Endpoint", PlayedEndpoint)
    monkeypatch.setattr(communicator, "Strangers", lambda: Strangers(4), raising=False)
    target = RDMACommunicator("decode", 0, "0", [1], [], 1, 4096, secret=SECRET, host="127.0.0.1")
    peers = [RDMACommunicator("prefill", 0, "0", [1], [], 1, 4096, secret=SECRET) for _ in range(6)]
    for peer in peers[:5]:
        peer.connect_or_raise("127.0.0.1", target.port)
    taken: set[PlayedConnection] = target._endpoint.connections  # type: ignore[attr-defined]
    strangers = []
    for _ in range(20):
        strangers.append(socket.create_connection(("127.0.0.1", int(target.port))))
        time.sleep(0.01)
    until(lambda: all(is_ended(s) for s in strangers[:16]))
    until(lambda: len(taken) == 9)
    assert not any(is_ended(s) for s in strangers[16:])
    peers[5].connect_or_raise("127.0.0.1", target.port)
    assert not any(is_ended(p._channels["127.0.0.1", target.port]) for p in peers)
    for connection in strangers:
        connection.close()
    until(lambda: len(taken) == 6)
    for end in (*peers, target):
        end.close()
    until(lambda: not any(t.name == "rdma-handshake" for t in threading.enumerate()))


def test_a_stranger_that_does_not_go_is_not_waited_for_for_ever() -> None:
    strangers, pairs = Strangers(2), [socket.socketpair() for _ in range(3)]
    began_s = time.monotonic()
    for ours, _ in pairs:
        strangers.admit(ours)
    assert 0.9 < time.monotonic() - began_s < 4
    assert [is_ended(theirs) for _, theirs in pairs] == [True, True, False]
    for ours, theirs in pairs:
        strangers.leave(ours)
        ours.close()
        theirs.close()
