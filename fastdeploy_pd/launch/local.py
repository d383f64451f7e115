"""A cluster on this machine: instances as child processes, ended by pid, leaving nothing behind. Used by `up` and by the tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.redis_connection import RedisOptions
from fastdeploy_pd.engine.lifetime import die_with_parent
from fastdeploy_pd.engine.process_log import no_log
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.scratch import ScratchDirectory

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 5.0
LAST_LINES = 12


@dataclass(slots=True)
class LocalInstance:
    """One running instance."""

    name: str
    role: str
    process: subprocess.Popen[bytes]
    directory: Path
    log_dir: Path
    facts: dict[str, object] = field(default_factory=dict)
    old_bytes: dict[Path, int] = field(default_factory=dict)  #: of its log files, which another one of its name wrote

    @property
    def pid(self) -> int:
        """The API server's process id."""
        return self.process.pid

    @property
    def engine_pid(self) -> int:
        """The engine's process id, as of its start."""
        return int(str(self.facts["pid"]))

    @property
    def instance_id(self) -> str:
        """The engine's id."""
        return str(self.facts["instance_id"])

    @property
    def http_url(self) -> str:
        """Where it answers."""
        return str(self.facts["http"])

    @property
    def is_ready(self) -> bool:
        """Whether it has said where it is."""
        path = self.directory / "ready.json"
        if not self.facts and path.exists():
            self.facts = json.loads(path.read_text())
        return bool(self.facts)

    def last_lines(self) -> str:
        """Returns: the end of its log: of each file, if there are several."""
        ends = []
        for path in sorted(self.log_dir.glob("*.log")):
            lines = path.read_bytes()[self.old_bytes.get(path, 0) :].decode(errors="replace").splitlines()
            ends += [f"{path}:", *lines[-LAST_LINES:]] if lines else []
        return "\n".join(ends)

    def kill(self) -> None:
        """kill -9 of every process of the instance, at the same moment."""
        for pid in (self.engine_pid, self.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


class LocalCluster:
    """Instances of one topic, or, without a Redis URL, one mixed instance alone."""

    def __init__(
        self,
        redis_url: str | None,
        topic: str = "local",
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            flags: for every instance.
            env: added to the environment of every instance.
        Raises: ConfigError: FD_LOG_DIR is no directory to write to.
        """
        self._redis_flags, self._redis_env = _redis_flags(redis_url, topic) if redis_url else ([], {})
        self._flags, self._env = list(flags), dict(env or {})
        self._given_log_dir = {**os.environ, **self._env}.get("FD_LOG_DIR")
        #: has a directory an instance: FD_LOG_DIR, or one that `stop` removes unless the logs are to be kept
        self.log_dir = Path(self._given_log_dir or tempfile.mkdtemp(prefix="fastdeploy-pd-logs-")).absolute()
        self.keeps_logs = bool(self._given_log_dir)
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise no_log(self._given_log_dir, error) from error
        self._directory = ScratchDirectory("local-cluster")
        self.instances: list[LocalInstance] = []
        self._clock = WallClock()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def launch(self, role: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None) -> LocalInstance:
        """Start an instance; it is not ready yet."""
        name = f"{role}-{len(self.instances)}"
        directory, log_dir = self._directory.path / name, self.log_dir / name
        directory.mkdir()
        log_dir.mkdir(exist_ok=True)
        old_bytes = {path: path.stat().st_size for path in log_dir.glob("*.log")}
        command = [
            sys.executable,
            "-m",
            "fastdeploy_pd.entrypoints.openai.api_server",
            "--splitwise-role",
            role,
            "--ready-file",
            str(directory / "ready.json"),
            *self._redis_flags,
            *self._flags,
            *flags,
        ]
        parent = os.getpid()
        own_env = {"TMPDIR": str(directory), "FD_LOG_DIR": str(log_dir) if self._given_log_dir else ""}
        with (log_dir / "output.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self._redis_env, **self._env, **own_env, **(env or {})},
                preexec_fn=lambda: die_with_parent(parent),
            )
        instance = LocalInstance(name, role, process, directory, log_dir, old_bytes=old_bytes)
        self.instances.append(instance)
        return instance

    def start(
        self, roles: Sequence[str], on_wait: Callable[[list[str], float], None] | None = None
    ) -> list[LocalInstance]:
        """Start instances and wait until all are ready and see each other.

        Args:
            on_wait: told every tenth of a second what is waited for and for how long.
        Raises: ConfigError: one ended or took too long; with the end of its log.
        """
        started = [self.launch(role) for role in roles]
        self.wait_ready(started, on_wait)
        return started

    def wait_ready(
        self, instances: Sequence[LocalInstance], on_wait: Callable[[list[str], float], None] | None = None
    ) -> None:
        """See `start`."""
        start_s = self._clock.now_s()
        while True:
            waiting = [i.name for i in instances if not i.is_ready]
            if not waiting:
                waiting = [f"{i.name} to see the others" for i in instances if not self._sees_all(i)]
            if not waiting:
                return
            for instance in instances:
                if instance.process.poll() is not None:
                    raise ConfigError(
                        f"{instance.name} ended with status {instance.process.returncode}:\n{instance.last_lines()}"
                    )
            elapsed_s = self._clock.now_s() - start_s
            if elapsed_s > START_TIMEOUT_S:
                raise ConfigError(
                    f"not ready after {START_TIMEOUT_S:g} s: {', '.join(waiting)}\n{instances[0].last_lines()}"
                )
            if on_wait is not None:
                on_wait(waiting, elapsed_s)
            threading.Event().wait(0.1)

    def stop(self) -> None:
        """End every instance and remove its files, but for logs that are to be kept. Idempotent."""
        living = [i for i in self.instances if i.process.poll() is None]
        for instance in living:
            instance.process.send_signal(signal.SIGINT)
        deadline_s = self._clock.now_s() + STOP_TIMEOUT_S
        for instance in living:
            try:
                instance.process.wait(max(0.1, deadline_s - self._clock.now_s()))
            except subprocess.TimeoutExpired:
                instance.process.kill()  # its engine dies with it
                instance.process.wait()
        self._directory.remove()
        if not self.keeps_logs:
            shutil.rmtree(self.log_dir, ignore_errors=True)

    def _sees_all(self, instance: LocalInstance) -> bool:
        """Whether its front end has every living instance in view."""
        try:
            with urllib.request.urlopen(instance.http_url + "/health", timeout=2) as answer:
                seen = json.loads(answer.read()).get("instances", [])
        except OSError:
            return False
        living = {i.instance_id for i in self.instances if i.facts and i.process.poll() is None}
        return living <= set(seen)


def _redis_flags(url: str, topic: str) -> tuple[list[str], dict[str, str]]:
    """Returns: the instances' flags, and their environment: `ps` shows no password there."""
    options = RedisOptions.from_url(url, topic)
    flags = ["--scheduler-name", "splitwise", "--scheduler-topic", topic, "--scheduler-host", options.host]
    flags += ["--scheduler-port", str(options.port), "--scheduler-db", str(options.db)]
    given = {
        "--scheduler-username": options.username,
        "--scheduler-tls-ca-file": options.tls_ca_file,
        "--scheduler-tls-cert-file": options.tls_cert_file,
        "--scheduler-tls-key-file": options.tls_key_file,
    }
    flags += ["--scheduler-tls"] if options.tls else []
    flags += [word for flag, value in given.items() if value for word in (flag, value)]
    return flags, {"FD_SCHEDULER_PASSWORD": options.password} if options.password else {}
