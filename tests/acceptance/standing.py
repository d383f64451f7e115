"""A cluster that several tests use one after the other: to start an instance costs as much as many a test."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

import httpx

from fastdeploy_pd.launch.local import LocalCluster, LocalInstance

VIEW_TIMEOUT_S = 30.0


class Standing:
    """Gives each test instances of exactly the roles it asks for: those that still live, and new ones for the rest."""

    def __init__(self, cluster: LocalCluster, topic: str) -> None:
        self._cluster = cluster
        self.topic = topic

    def of(self, roles: Sequence[str]) -> list[LocalInstance]:
        """Returns: one instance a role, in this order; all others have ended, and each sees just these."""
        living = [i for i in self._cluster.instances if i.process.poll() is None]
        chosen: list[LocalInstance] = []
        for role in roles:
            found = next((i for i in living if i.role == role and i not in chosen), None)
            chosen.append(found or self._cluster.launch(role))
        for instance in living:
            if instance not in chosen:
                instance.process.send_signal(signal.SIGINT)
                assert instance.process.wait(20) == 0, instance.last_lines()
        self._cluster.wait_ready(chosen)
        wanted, deadline_s = {i.instance_id for i in chosen}, time.monotonic() + VIEW_TIMEOUT_S
        while any(set(httpx.get(i.http_url + "/health").json()["instances"]) != wanted for i in chosen):
            assert time.monotonic() < deadline_s, "some still see what has ended"
            time.sleep(0.1)
        return chosen
