"""vLLM's servers for bench_pd: two replicas, or a prefill and a decode server with NixlConnector behind vllm_proxy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastdeploy_pd.launch.embedded_redis import free_port

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
CONNECTOR = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


class Server:
    """A process that answers HTTP on a free port of this machine; `with` ends it and what it started."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own group: workers that have outlived it
        except ProcessLookupError:
            pass
        self._process.wait()
        self._log.close()

    def wait_ready(self) -> None:
        """Return when it answers. Raises: RuntimeError: it has ended or takes too long; with the end of its log."""
        deadline_s = time.perf_counter() + START_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return
            except OSError:
                if self._process.poll() is not None or time.perf_counter() > deadline_s:
                    self._log.seek(max(0, self._log.tell() - 3000))
                    said = self._log.read().decode(errors="replace")
                    raise RuntimeError(f"{self._process.args!r} does not answer:\n{said}") from None
            time.sleep(0.25)


def _serve(python: str, model: Path, flags: Sequence[str], gpu: str, **env: str) -> Server:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--seed", "0", *flags]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return Server(command, {**quiet, "CUDA_VISIBLE_DEVICES": gpu, **env})


@contextmanager
def replicas(python: str, model: Path, flags: Sequence[str], gpus: Sequence[str]) -> Iterator[list[str]]:
    """Yields: the URLs of a server on each of two GPUs; chunked prefill is vLLM's default."""
    with ExitStack() as stack:
        servers = [stack.enter_context(_serve(python, model, flags, gpu)) for gpu in gpus[:2]]
        for server in servers:
            server.wait_ready()
        yield [server.url for server in servers]


@contextmanager
def pair(python: str, model: Path, flags: Sequence[str], gpus: Sequence[str]) -> Iterator[list[str]]:
    """Yields: the URL of a proxy before a prefill and a decode server. Source: vLLM's NixlConnector usage guide."""
    with ExitStack() as stack:
        servers = []
        for gpu in gpus[:2]:
            ports = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
            connector = ["--kv-transfer-config", json.dumps(CONNECTOR)]
            servers.append(stack.enter_context(_serve(python, model, [*flags, *connector], gpu, **ports)))
        for server in servers:
            server.wait_ready()
        proxy = [sys.executable, "-m", "benchmarks.peers.vllm_proxy"]
        front = stack.enter_context(Server([*proxy, "--prefill", servers[0].url, "--decode", servers[1].url]))
        front.wait_ready()
        yield [front.url]
