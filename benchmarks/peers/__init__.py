"""Ways of moving KV blocks from one process to another, ours and others', behind one small interface.

Each module defines `Target` and `Source`, built as `Target(pool_bytes, block_bytes, option)` in two processes by benchmarks/pair.py:

Target.facts() -> plain values        once: how a source finds it
Target.offer(job) -> plain values     before each job: what it must be told (may be {})
Target.take(job)                      returns when everything has landed; at once where the source alone knows
Source(..., facts)
Source.send(job, offer) -> seconds    from the first call until the job's bytes have left the source, or have landed
memory                                [pool_bytes] uint8: what is moved, or moved into
close()

Apart from these, vllm_*.py are programs and helpers with which vLLM is measured on the same workloads as our engine and cluster.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Peer:
    """One way, by the name it has in tables."""

    name: str
    module: str
    option: str
    install: str = ""  #: how to get what is not there; "" for what is ours
    is_foreign: bool = False  #: listens on all interfaces: runs in a network namespace of its own alone

    def load(self) -> Any:
        """Returns: its module. Raises: ImportError."""
        return importlib.import_module(f"benchmarks.peers.{self.module}")


MOONCAKE = "pip install mooncake-transfer-engine-non-cuda && apt-get install libibverbs1 libnuma1 libcurl4"
NIXL = "pip install --no-deps nixl-cu13"
PEERS = {
    peer.name: peer
    for peer in (
        Peer("tcp", "ours", "tcp"),
        Peer("shm", "ours", "shm"),
        Peer("rdma", "ours", "rdma"),
        Peer("socket", "plain_socket", ""),
        Peer("mooncake tcp", "mooncake_te", "tcp", MOONCAKE, True),
        Peer("nixl", "nixl_agent", "", NIXL, True),
        Peer("nixl UCX_TLS=tcp", "nixl_agent", "tcp", NIXL, True),
    )
}
