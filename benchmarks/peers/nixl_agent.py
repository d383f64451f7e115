"""NIXL over UCX. The request's handle (descriptor lists and all) is made before the clock starts: what a reused handle would do."""

from __future__ import annotations

import base64
import os
import time
from typing import Any

import numpy as np
from nixl_cu13._api import nixl_agent, nixl_agent_config

from benchmarks.job import Job


class _End:
    def __init__(self, pool_bytes: int, block_bytes: int, option: str) -> None:
        if option:
            os.environ["UCX_TLS"] = option
        self.memory = np.zeros(pool_bytes, np.uint8)
        self._address = self.memory.ctypes.data
        self.agent = nixl_agent(type(self).__name__, nixl_agent_config(backends=["UCX"]))
        self.agent.register_memory([(self._address, pool_bytes, 0, "")], mem_type="DRAM")

    def close(self) -> None:
        """See peers: the process ends without destructors, in which the library crashes."""


class Target(_End):
    """See peers."""

    def facts(self) -> dict[str, Any]:
        """See peers."""
        return {"metadata": base64.b64encode(self.agent.get_agent_metadata()).decode(), "address": self._address}

    def offer(self, job: Job) -> dict[str, Any]:
        """See peers."""
        return {}

    def take(self, job: Job) -> None:
        """See peers: the source knows."""


class Source(_End):
    """See peers."""

    def __init__(self, pool_bytes: int, block_bytes: int, option: str, facts: dict[str, Any]) -> None:
        super().__init__(pool_bytes, block_bytes, option)
        self._remote_address = facts["address"]
        self._peer = self.agent.add_remote_agent(base64.b64decode(facts["metadata"]))

    def send(self, job: Job, offer: dict[str, Any]) -> float:
        """See peers. Raises: RuntimeError: it has failed."""
        local, remote, size = job.pieces()
        places = (local + self._address).tolist(), (remote + self._remote_address).tolist()
        lists = [self.agent.get_xfer_descs([(p, size, 0) for p in side], mem_type="DRAM") for side in places]
        handle = self.agent.initialize_xfer("WRITE", *lists, self._peer)
        began_s = time.perf_counter()
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        seconds = time.perf_counter() - began_s
        if state != "DONE":
            raise RuntimeError(f"NIXL's transfer ended as {state}")
        self.agent.release_xfer_handle(handle)
        return seconds
