"""The README's two machines, as two network namespaces joined by a cable: nothing but the network between them."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy_pd.engine.lifetime import die_with_parent
from fastdeploy_pd.launch.embedded_redis import find_server
from tests.acceptance.conftest import (
    MAX_PROMPT_TOKENS,
    NUM_PROMPTS,
    OUTPUT_TOKENS,
    Case,
    answers_of,
    differences,
    make_prompts,
    reference_answers,
)

PASSWORD = secrets.token_hex(8)
NUM_CASES = 60
START_TIMEOUT_S = 90.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    """Whether this user may; asked by doing it."""
    name = f"fdpd-probe-{os.getpid()}"
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    ip("netns", "delete", name)
    return True


class TwoHosts:
    """Two namespaces and the processes in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names = [f"fdpd-{os.getpid()}-{side}" for side in "ab"]
        self.addresses = [f"10.253.{os.getpid() % 200}.{n}" for n in (1, 2)]
        self.processes: list[subprocess.Popen[bytes]] = []
        devices = [f"fd{os.getpid() % 10**6}{side}" for side in "ab"]
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            devices[0],
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            devices[1],
            "netns",
            self.names[1],
        )
        for name, address, device in zip(self.names, self.addresses, devices, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def run(self, host: int, *command: str) -> subprocess.Popen[bytes]:
        """Start a process on a host."""
        parent = os.getpid()
        with (self.directory / f"{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=lambda: die_with_parent(parent),
            )
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End everything."""
        for process in reversed(self.processes):
            process.terminate()
            process.wait(40)
        for name in self.names:
            ip("netns", "delete", name)

    def logs(self) -> str:
        """What the processes said."""
        return "\n".join(p.read_text(errors="replace")[-3000:] for p in sorted(self.directory.glob("*.log")))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    made = TwoHosts(tmp_path)
    try:
        yield made
    finally:
        made.close()


def start_instance(hosts: TwoHosts, host: int, role: str, secret: Path) -> Path:
    """With the README's flags. Returns: its ready file."""
    address, ready = hosts.addresses[host], hosts.directory / f"{role}.json"
    flags = (
        f"--splitwise-role {role} --scheduler-name splitwise --scheduler-host {hosts.addresses[0]} --scheduler-port 6379 "
        f"--scheduler-password {PASSWORD} --scheduler-topic demo --advertise-host {address} --cluster-secret-file {secret} "
        f"--host {address} --port 8000 --pd-comm-port 2334 --cache-queue-port 2335 --ready-file {ready} --ops torch"
    )
    hosts.run(host, sys.executable, "-m", "fastdeploy_pd.entrypoints.openai.api_server", *flags.split())
    return ready


@pytest.mark.skipif(not can_make_namespaces(), reason="this user may not make network namespaces (ip netns add)")
def test_prefill_on_one_host_decode_on_another(hosts: TwoHosts) -> None:
    cases = reference_answers(make_prompts(NUM_PROMPTS, MAX_PROMPT_TOKENS)[:NUM_CASES], OUTPUT_TOKENS)
    secret = hosts.directory / "cluster.secret"
    secret.write_text(secrets.token_hex(32))
    secret.chmod(0o600)
    hosts.run(0, find_server(), "--bind", hosts.addresses[0], "--port", "6379", "--requirepass", PASSWORD, "--save", "")
    ready = [start_instance(hosts, 0, "prefill", secret), start_instance(hosts, 1, "decode", secret)]
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not all(r.exists() for r in ready):
        assert time.monotonic() < deadline_s and all(p.poll() is None for p in hosts.processes), hosts.logs()
        time.sleep(0.1)
    assert {json.loads(r.read_text())["http"] for r in ready} == {f"http://{a}:8000" for a in hosts.addresses}
    # The client sits on host B: it reaches the front end of A over the cable, too.
    chosen = hosts.directory / "cases.json"
    chosen.write_text(json.dumps([c.prompt for c in cases]))
    program = f"import tests.acceptance.test_two_hosts as t; t.ask({[f'http://{a}:8000' for a in hosts.addresses]!r}, {str(hosts.directory)!r})"
    assert hosts.run(1, sys.executable, "-c", program).wait(200) == 0, hosts.logs()
    answers = json.loads((hosts.directory / "answers.json").read_text())
    assert not differences(cases, answers["tokens"])
    assert answers["kv_bytes"] > NUM_CASES * 10_000, hosts.logs()


def ask(urls: list[str], directory: str) -> None:
    """The client's half: put every case to one of the instances, write the answers and how much KV was moved by tcp."""
    import urllib.request

    prompts = json.loads((Path(directory) / "cases.json").read_text())
    deadline_s = time.monotonic() + 20
    while True:
        seen = [json.loads(urllib.request.urlopen(u + "/health", timeout=5).read())["instances"] for u in urls]
        if all(len(s) == 2 for s in seen):
            break
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the front ends see {seen}")
        time.sleep(0.1)
    tokens = asyncio.run(answers_of(urls, [Case(p, []) for p in prompts], concurrency=8))
    metrics = "".join(urllib.request.urlopen(u + "/metrics", timeout=5).read().decode() for u in urls)
    lines = [
        x for x in metrics.splitlines() if x.startswith("fastdeploy_pd:handover_bytes_total") and 'backend="tcp"' in x
    ]
    (Path(directory) / "answers.json").write_text(
        json.dumps({"tokens": tokens, "kv_bytes": sum(float(x.rsplit(" ", 1)[1]) for x in lines)})
    )
