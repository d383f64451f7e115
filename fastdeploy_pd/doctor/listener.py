"""The side that listens: answers what `doctor --peer` asks, to those alone who know the cluster secret."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.config import is_loopback
from fastdeploy_pd.doctor.backends import BLOCKS, NONCE, open_backend, wait_for_end
from fastdeploy_pd.doctor.exchange import PEER_ERRORS, RdmaEnd, handshake, receive_stream, send_stream
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.launch.ports import bind_tcp, check_free
from fastdeploy_pd.transfer.base import Transfer
from rdma_comm.bootstrap import receive_frame, send_frame

MAX_SESSIONS = 4
SESSION_S, IDLE_TIMEOUT_S = 120.0, 30.0
ACCEPT_PAUSE_S = 0.1
INSTEAD = "--listen 0 to get a free one"
PAIR_BACKENDS = ("shm", "rdma", "tcp")  #: those of host memory, the fastest first
log = logging.getLogger("fastdeploy_pd.doctor")


def check_address(host: str, port: int, secret: bytes | None) -> None:
    """Raises: ConfigError: it cannot be had, or others reach it and there is no secret."""
    if secret is None and not is_loopback(host):
        raise ConfigError(
            f"--listen {host}:{port} can be reached from other machines; that needs a cluster secret "
            "(--cluster-secret-file or FD_CLUSTER_SECRET)"
        )
    check_free(host, port, "--listen", INSTEAD)


class Listener:
    """Listens; `run` answers."""

    def __init__(
        self, host: str, port: int, secret: bytes | None, report: dict[str, Any], env: Mapping[str, str]
    ) -> None:
        """
        Args:
            report: what this machine has found about itself.
        Raises: ConfigError: see check_address.
        """
        check_address(host, port, secret)
        self._listener = bind_tcp(host, port, "--listen", INSTEAD)
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._secret, self._report, self._env = secret, report, env
        self._places = threading.BoundedSemaphore(MAX_SESSIONS)

    def run(self) -> None:
        """Answer until the process ends."""
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError as error:  # no more files for now
                log.warning("cannot take a connection: %s", error)
                time.sleep(ACCEPT_PAUSE_S)
                continue
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            try:
                threading.Thread(target=self._answer, args=(connection, address[0]), daemon=True).start()
            except RuntimeError as error:  # no more threads for now
                log.warning("cannot take a connection: %s", error)
                connection.close()
                self._places.release()

    def _answer(self, connection: socket.socket, peer: str) -> None:
        try:
            with connection:
                handshake_ = handshake(self._secret)
                handshake_.accept(connection, None)
                handshake_.welcome(connection)
                connection.settimeout(IDLE_TIMEOUT_S)
                log.info("examining the pair with %s", peer)
                with Session(connection, peer, self._secret, self._report, self._env) as session:
                    session.run()
        except PEER_ERRORS as error:
            log.warning("%s: %s", peer, error)
        finally:
            self._places.release()


class Session:
    """What one peer has asked for, and what is open for it."""

    def __init__(
        self, connection: socket.socket, peer: str, secret: bytes | None, report: dict[str, Any], env: Mapping[str, str]
    ) -> None:
        self._connection, self._peer, self._secret = connection, peer, secret
        self._report, self._env = report, env
        self._stack = ExitStack()
        self._backends: dict[str, Transfer] = {}
        self._rdma: RdmaEnd | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Answer until the peer has enough. Raises: PEER_ERRORS."""
        clock = WallClock()
        end_s = clock.now_s() + SESSION_S
        while clock.now_s() < end_s:
            request = receive_frame(self._connection)
            if request["do"] == "end":
                return
            send_frame(self._connection, self._answer(request))

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "report":
                return self._report
            case "time":
                return {"unix_s": WallClock().unix_s()}
            case "receive":
                return {"bytes_per_s": receive_stream(self._connection)}
            case "send":
                send_stream(self._connection)
                return {}
        try:
            match request["do"]:
                case "backends":
                    return self._open_backends()
                case "open":
                    self._backends[request["name"]].open_epoch(request["name"], BLOCKS, NONCE)
                    return {}
                case "arrived":
                    return {"digests": wait_for_end(self._backends[request["name"]])}
                case "rdma":
                    return self._join_rdma(request["offer"])
                case "digest":
                    return {"digest": self._rdma.digest() if self._rdma else ""}
        except PEER_ERRORS as error:
            return {"reason": str(error)}
        return {"reason": f"this version does not know {request['do']!r}"}

    def _start_anew(self) -> None:
        """Close what is open: a peer that asks again and again takes no more than one that asks once."""
        self._stack.close()
        self._backends.clear()
        self._rdma = None

    def _open_backends(self) -> dict[str, Any]:
        self._start_anew()
        reasons = {}
        for name in PAIR_BACKENDS:
            try:
                self._backends[name] = open_backend(name, self._stack, self._connection.getsockname()[0], self._secret)
            except ConfigError as error:
                reasons[name] = error.message
        return {"descriptors": {n: t.descriptor() for n, t in self._backends.items()}, "reasons": reasons}

    def _join_rdma(self, offer: Any) -> dict[str, Any]:
        self._start_anew()
        self._rdma = RdmaEnd(self._peer, self._env)
        self._stack.callback(self._rdma.close)
        if offer is not None:
            self._rdma.connect(offer)
        return {"offer": self._rdma.offer}
