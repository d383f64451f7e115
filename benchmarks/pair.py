"""Two processes and one way between them (peers): `Pair` is the source's end, this module run as a program the target's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.job import Job, fill
from benchmarks.peers import PEERS

MARK = "RESULT "


def marked(printed: str) -> Any:
    """Returns: what a program has printed as JSON behind MARK, whatever libraries have printed around it."""
    return json.loads(printed.rsplit(MARK, 1)[1].splitlines()[0])


class Pair:
    """The source, here; and a target in a process of its own."""

    def __init__(self, name: str, pool_bytes: int, block_bytes: int) -> None:
        """Raises: ImportError: the peer is not installed; RuntimeError: its target has ended."""
        peer = PEERS[name]
        module = peer.load()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pair", name, str(pool_bytes), str(block_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)},
        )
        self.facts = self._hear()
        self.source = module.Source(pool_bytes, block_bytes, peer.option, self.facts)
        fill(self.source.memory)

    def move(self, job: Job) -> tuple[float, float]:
        """Returns: seconds until the bytes have left or landed, as the source knows it, and until the target has reported it."""
        self._tell(asdict(job))
        offer = self._hear()
        began_s = time.perf_counter()
        wire_s = self.source.send(job, offer)
        self._hear()
        return wire_s, time.perf_counter() - began_s

    def check(self, job: Job) -> None:
        """Raises: RuntimeError: the job that was moved last is not in the target's memory."""
        self._tell({"digest": asdict(job)})
        if self._hear()["digest"] != job.digest(self.source.memory, is_target=False):
            raise RuntimeError("the bytes that arrived are not those that were sent")

    def close(self) -> None:
        """End both ends."""
        self.source.close()
        self._process.communicate()

    def _tell(self, values: dict[str, Any]) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the target was started without a pipe")
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the target ended with {self._process.wait()}")
        values: dict[str, Any] = json.loads(line)
        return values


def claim_output() -> Any:
    """Returns: this process's standard output; what else is printed (by libraries, too) goes to the error output from now on."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return output


def serve(name: str, pool_bytes: int, block_bytes: int) -> None:
    """The target's process: take one job after the other until the input ends."""
    output, peer = claim_output(), PEERS[name]
    target = peer.load().Target(pool_bytes, block_bytes, peer.option)
    target.memory[:] = 0

    def say(**values: Any) -> None:
        output.write(json.dumps(values) + "\n")
        output.flush()

    say(**target.facts())
    for line in sys.stdin:
        values = json.loads(line)
        if "digest" in values:
            say(digest=Job(**values["digest"]).digest(target.memory, is_target=True))
            continue
        job = Job(**values)
        say(**target.offer(job))
        target.take(job)
        say()
    target.close()
    os._exit(0)  # NIXL's destructors crash at an interpreter's end


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
