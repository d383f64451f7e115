"""One instance: `python -m fastdeploy_pd.entrypoints.openai.api_server FLAGS`.

This process binds the HTTP port, starts the engine process, and serves the OpenAI API as a front end of its topic; with --workers N
it starts N API processes that share the port instead. It restarts an engine that dies (its streams go on elsewhere meanwhile), and
when it ends, everything it started ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import uvloop

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.engine import policies
from fastdeploy_pd.engine.interpreter import uncollected
from fastdeploy_pd.engine.lifetime import PARENT_PID, die_with_parent, raise_file_limit
from fastdeploy_pd.engine.process_log import configure_process_log
from fastdeploy_pd.entrypoints.openai.signals import Signals
from fastdeploy_pd.errors import ConfigError, CoordinatorLost, FastDeployPDError
from fastdeploy_pd.launch.ports import bind_tcp, check_free, check_own
from fastdeploy_pd.scratch import ScratchDirectory
from fastdeploy_pd.transfer.select import find as find_transfer

log = logging.getLogger("fastdeploy_pd.api_server")

ENGINE_START_TIMEOUT_S = 300.0
MAX_ENGINE_RESTARTS = 5
RESTART_PAUSE_S = 0.5
STOP_GRACE_S = 35.0  #: a draining engine has 30 s
STOP_AT_ONCE_S = 2.0  #: one that is told to end at once
POLL_S = 0.02


class EngineSupervisor:
    """Keeps one engine process running."""

    def __init__(self, argv: list[str], run_dir: Path, http_address: str) -> None:
        self._argv = argv
        self._run_dir = run_dir
        self._env = {**os.environ, "FD_RUN_DIR": str(run_dir), "FD_HTTP_ADDRESS": http_address}
        self._env[PARENT_PID] = str(os.getpid())
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopping = threading.Event()
        self._lock = threading.Lock()  # no engine starts once it is stopping
        self._num_restarts = 0
        self._has_been_ready = False
        self.has_given_up = False  #: engines have ended too often
        self._clock = WallClock()

    def start(self) -> None:
        """Start the engine; `wait_ready` comes next."""
        self._spawn()

    def wait_ready(self, signals: Signals) -> dict[str, object] | None:
        """Wait for the engine that was started, and watch it from then on.

        Returns: what it announces: instance_id, links_address, max_model_len, ...; None if a signal comes first.
        Raises: ConfigError: it refused its configuration or died.
        """
        deadline_s = self._clock.now_s() + ENGINE_START_TIMEOUT_S
        ready = self._run_dir / "engine.json"
        while (facts := _facts(ready)) is None:
            if signals.received:
                return None
            process = self._process
            if process is None or process.poll() is not None or self._clock.now_s() > deadline_s:
                raise ConfigError(self._why_not())
            threading.Event().wait(POLL_S)
        threading.Thread(target=self._watch, name="engine-supervisor", daemon=True).start()
        self._has_been_ready = True
        return facts

    def drain(self) -> None:
        """Let the engine take nothing new and end when what it serves has ended."""
        with self._lock:
            self._is_stopping.set()
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)

    def start_no_more(self) -> None:
        """Start no engine in the place of one that ends."""
        with self._lock:
            self._is_stopping.set()

    def stop(self, is_gentle: bool, signals: Signals) -> None:
        """End the engine: SIGTERM lets it drain, SIGINT does not; SIGKILL follows when it takes too long, and when a signal hurries."""
        self.start_no_more()
        process = self._process
        if process is None:
            return
        deadline_s = self._clock.now_s()
        if self._has_been_ready:  # else it serves nobody yet
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if is_gentle else signal.SIGINT)
            deadline_s += STOP_GRACE_S if is_gentle else STOP_AT_ONCE_S
        while process.poll() is None and self._clock.now_s() < deadline_s and not (is_gentle and signals.is_hurried):
            threading.Event().wait(POLL_S)
        process.kill()  # nothing, if it has ended
        process.wait()

    def _spawn(self) -> None:
        for name in ("engine.json", "engine.error"):
            (self._run_dir / name).unlink(missing_ok=True)
        command = [sys.executable, "-m", "fastdeploy_pd.engine.process", *self._argv]
        with self._lock:
            if not self._is_stopping.is_set():
                self._process = subprocess.Popen(command, env=self._env, stdin=subprocess.DEVNULL)

    def _watch(self) -> None:
        while not self._is_stopping.is_set():
            process = self._process
            if process is None:
                return
            status = process.wait()
            if self._is_stopping.is_set():
                return
            if status == 0 or (self._run_dir / "engine.draining").exists():
                what = "drained" if status == 0 else f"ended with status {status} while it drained"
                log.info("the engine has %s; stopping the instance", what)
                os.kill(os.getpid(), signal.SIGUSR1)  # as SIGTERM, but the operator's own may still come
                return
            self._num_restarts += 1
            if self._num_restarts > MAX_ENGINE_RESTARTS:
                log.error("the engine ended %d times; giving up", self._num_restarts)
                self.has_given_up = True
                os.kill(os.getpid(), signal.SIGUSR1)
                return
            log.error("the engine ended with status %s; starting it again", status)
            self._is_stopping.wait(RESTART_PAUSE_S * self._num_restarts)
            self._spawn()

    def _why_not(self) -> str:
        error = self._run_dir / "engine.error"
        if error.exists():
            return error.read_text()
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return f"the engine was not ready within {ENGINE_START_TIMEOUT_S:g} s"
        return f"the engine process ended with status {status} before it was ready; its log says why"


def _facts(path: Path) -> dict[str, object] | None:
    try:
        facts: dict[str, object] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return facts


def check_ports(config: InstanceConfig) -> None:
    """Raises: ConfigError: a port that was asked for is taken, or an address is not ours; names its flag."""
    check_own(config.server.host, "--host")
    host = config.cluster.advertise_host
    if config.cluster.scheduler_name != "local":
        check_own(host, "--advertise-host")
    for flag, port in (
        ("--pd-comm-port", config.cluster.pd_comm_port),
        ("--cache-queue-port", config.cache.cache_queue_port),
        *(("--rdma-comm-ports", port) for port in config.cache.rdma_comm_ports),
    ):
        if port:
            check_free(host, port, flag)
    if config.cluster.engine_worker_queue_port:
        check_free("127.0.0.1", config.cluster.engine_worker_queue_port, "--engine-worker-queue-port")


def check_ready_file(path: str | None) -> None:
    """Raises: ConfigError: --ready-file cannot be written; says why."""
    if not path:
        return
    directory = Path(path).absolute().parent
    why = (
        "is a directory" if Path(path).is_dir() else "is in no directory that exists" if not directory.is_dir() else ""
    )
    if not why and not os.access(directory, os.W_OK | os.X_OK):
        why = "is in a directory that this user cannot write to"
    if why:
        raise ConfigError(f"--ready-file is {path!r}, which {why}; it must be a file's path")


def check_redis(config: InstanceConfig) -> None:
    """Raises: ConfigError: Redis refuses us or is too old. One that cannot be reached may come later, and is only warned of."""
    if config.cluster.scheduler_name == "local":
        return
    from fastdeploy_pd.cluster.redis_connection import RedisConnection
    from fastdeploy_pd.engine.build import redis_options

    connection = RedisConnection(redis_options(config.cluster))
    try:
        connection.check_version()
    except CoordinatorLost as error:
        where = f"{config.cluster.scheduler_host}:{config.cluster.scheduler_port}"
        log.warning("%s (%s); starting all the same, and trying again until it is there", error.message, where)
    finally:
        connection.close()


def http_address(config: InstanceConfig, http_socket: socket.socket) -> str:
    """Returns: the URL under which others reach this instance."""
    host = config.server.host
    if host in ("0.0.0.0", "::"):
        host = config.cluster.advertise_host
    return f"http://{host}:{http_socket.getsockname()[1]}"


def announce(config: InstanceConfig, address: str, facts: dict[str, object]) -> None:
    """Tell whoever reads the log, and whoever waits for --ready-file (launchers, tests), where the instance is."""
    cluster = config.cluster
    log.info(
        "ready: %s (%s) at %s, model %s, %s",
        facts["instance_id"],
        cluster.splitwise_role,
        address,
        ", ".join(config.model.served_model_name),
        f"topic {cluster.scheduler_topic}" if cluster.scheduler_name != "local" else "alone",
    )
    if config.server.ready_file:
        path = Path(config.server.ready_file)
        part = path.with_name(path.name + ".part")
        part.write_text(
            json.dumps({"http": address, "role": config.cluster.splitwise_role, "api_pid": os.getpid(), **facts})
        )
        part.replace(path)


def run_instance(config: InstanceConfig, argv: list[str], run_dir: Path, signals: Signals) -> int:
    """Serve until a signal comes. Returns: the process's exit status."""
    check_ready_file(config.server.ready_file)
    check_ports(config)
    http_socket = bind_tcp(config.server.host, config.server.port or 0, "--port")
    check_redis(config)
    metrics_socket = None
    if config.server.metrics_port:
        metrics_socket = bind_tcp(config.server.host, config.server.metrics_port, "--metrics-port")
    address = http_address(config, http_socket)
    supervisor = EngineSupervisor(argv, run_dir, address)
    workers: list[subprocess.Popen[bytes]] = []
    status = 0
    try:
        supervisor.start()
        with uncollected():  # takes a second, beside the engine's start
            from fastdeploy_pd.entrypoints.openai.worker import serve_api
        facts = supervisor.wait_ready(signals)
        if facts is None:
            return 0
        if config.server.workers == 1:
            ready = lambda: announce(config, address, facts)  # noqa: E731
            # Alone, the engine has to serve what its own API has accepted; in a topic others take what comes from now on.
            drain = supervisor.drain if config.cluster.scheduler_name != "local" else lambda: None
            sockets = http_socket, metrics_socket
            uvloop.run(serve_api(config, run_dir, facts, sockets, signals, ready, drain))
        else:
            if metrics_socket is not None:
                metrics_socket.close()  # the first worker binds it
            workers = start_workers(config, argv, run_dir, http_socket, facts)
            announce(config, address, facts)
            status = wait_for_workers(workers, signals)
    finally:
        signals.install()
        is_gentle = signals.is_gentle and not signals.is_hurried
        supervisor.start_no_more()
        for worker in workers:  # SIGUSR1, as they may have had the operator's SIGTERM, with all of the process group
            worker.send_signal(signal.SIGUSR1 if is_gentle else signal.SIGINT)
        supervisor.stop(is_gentle, signals)
        see_out(workers, is_gentle, signals)
    return status or int(supervisor.has_given_up)


def start_workers(
    config: InstanceConfig, argv: list[str], run_dir: Path, http_socket: socket.socket, facts: dict[str, object]
) -> list[subprocess.Popen[bytes]]:
    """Start --workers API processes on one listening socket; the first serves --metrics-port."""
    processes = []
    for index in range(config.server.workers):
        env = {
            **os.environ,
            "FD_RUN_DIR": str(run_dir),
            PARENT_PID: str(os.getpid()),
            "FD_ENGINE": json.dumps(facts),
            "FD_API_WORKER": str(index),
            "FD_HTTP_FD": str(http_socket.fileno()),
        }
        command = [sys.executable, "-m", "fastdeploy_pd.entrypoints.openai.api_server", *argv]
        processes.append(subprocess.Popen(command, env=env, pass_fds=[http_socket.fileno()], stdin=subprocess.DEVNULL))
    return processes


def wait_for_workers(workers: list[subprocess.Popen[bytes]], signals: Signals) -> int:
    """Wait for a signal, or for a worker's end, which counts as one of ours. Returns: the exit status."""
    while not signals.received:
        if any(worker.poll() is not None for worker in workers):
            log.error("an API process ended; stopping the instance")
            signals.received.append(signal.SIGUSR1)  # the operator's next one is the first
            return 1
        threading.Event().wait(POLL_S)
    return 0


def see_out(workers: list[subprocess.Popen[bytes]], is_gentle: bool, signals: Signals) -> None:
    """Wait until workers that were told to end have ended; a signal that hurries goes on to them. Who takes too long is killed."""
    clock = WallClock()
    deadline_s = clock.now_s() + (STOP_GRACE_S if is_gentle else STOP_AT_ONCE_S)
    while any(worker.poll() is None for worker in workers) and clock.now_s() < deadline_s:
        if is_gentle and signals.is_hurried:
            is_gentle, deadline_s = False, clock.now_s() + STOP_AT_ONCE_S
            for worker in workers:
                worker.send_signal(signal.SIGINT)
        threading.Event().wait(POLL_S)
    for worker in workers:
        worker.kill()  # nothing, if it has ended
        worker.wait()


def run_worker(config: InstanceConfig, run_dir: Path, signals: Signals) -> int:
    """One of several API processes."""
    with uncollected():
        from fastdeploy_pd.entrypoints.openai.worker import serve_api

    http_socket = socket.socket(fileno=int(os.environ["FD_HTTP_FD"]))
    metrics_socket = None
    if config.server.metrics_port and os.environ["FD_API_WORKER"] == "0":
        metrics_socket = bind_tcp(config.server.host, config.server.metrics_port, "--metrics-port")
    facts = json.loads(os.environ["FD_ENGINE"])
    sockets = http_socket, metrics_socket
    uvloop.run(serve_api(config, run_dir, facts, sockets, signals, lambda: None, lambda: None))
    return 0


def configure_logging(config: InstanceConfig) -> None:
    """Log to stderr, or to a file in FD_LOG_DIR."""
    configure_process_log(config.server.log_dir, "api_server")
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)


def main(argv: list[str] | None = None, program: str = "api_server") -> int:
    """Returns: exit status: 0 after a stop, 2 when the configuration is refused."""
    argv, signals = sys.argv[1:] if argv is None else argv, Signals()
    if is_worker := "FD_API_WORKER" in os.environ:
        die_with_parent(int(os.environ[PARENT_PID]))
    raise_file_limit()
    try:
        config = InstanceConfig.from_args(argv, dict(os.environ), program)
        configure_logging(config)
        if is_worker:
            return run_worker(config, Path(os.environ["FD_RUN_DIR"]), signals)
        policies.check(config.scheduling.prefill_policy, config.scheduling.placement)
        for name in config.cache.cache_transfer_protocol:  # an instance alone would never look for them
            find_transfer(name)
        run_dir = ScratchDirectory("run")
        try:
            return run_instance(config, argv, run_dir.path, signals)
        finally:
            run_dir.remove()
            signals.ignore()
    except FastDeployPDError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
