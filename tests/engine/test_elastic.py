"""The leader's part over a registry in memory: one instance leads, tells one flip, and another goes on when it is gone."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.memory import MemoryRegistry
from fastdeploy_pd.cluster.messages import Command, Peer
from fastdeploy_pd.cluster.registry import MemberLoad, MemberRecord
from fastdeploy_pd.core.elastic import ElasticOptions
from fastdeploy_pd.engine import elastic
from fastdeploy_pd.engine.elastic import Elastic, ElasticThread

BUSY = MemberLoad(prefill_s=20.0, is_elastic=True)
IDLE = MemberLoad(num_seats=8, is_elastic=True)
OPTIONS = ElasticOptions(cooldown_s=30.0, window_s=0.1)


def record(instance_id: str, role: str, load: MemberLoad = IDLE, **changes: object) -> MemberRecord:
    return MemberRecord(instance_id, role, "", f"tcp://{instance_id}", load=load, **changes)  # type: ignore[arg-type]


def test_a_flip_is_told_once_in_a_cooldown() -> None:
    leader = Elastic(OPTIONS)
    members = [record("p", "prefill", BUSY), record("d1", "decode"), record("d2", "decode")]
    assert leader.look(members, 0.0) is None, "one look is no average"
    told = leader.look(members, 10.0)
    assert told is not None and told[0] == Peer("d1", "tcp://d1") and told[1].role == "prefill"
    assert [leader.look(members, 10.0 + s) for s in (1, 15, 29)] == [None] * 3, (
        "its record is late, or the command lost"
    )
    again = leader.look(members, 40.0)
    assert again is not None and again[0].instance_id == "d1"


def test_who_drains_or_stays_out_is_not_flipped() -> None:
    leader = Elastic(OPTIONS)
    fixed = record("d1", "decode", replace(IDLE, is_elastic=False))
    members = [record("p", "prefill", BUSY), fixed, record("d2", "decode"), record("d3", "decode", is_draining=True)]
    leader.look(members, 0.0)
    told = leader.look(members, 10.0)
    assert told is not None and told[0].instance_id == "d2"
    members = [record("p", "prefill", BUSY), record("d2", "decode"), record("d3", "decode", is_draining=True)]
    assert leader.look(members, 60.0) is None, "who drains is no instance that is left"


def test_the_leader_leaves_it_when_an_operator_was_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look and its turn the roles have changed: what it has decided would leave nobody to decode."""
    monkeypatch.setattr(elastic, "LOOK_S", 0.02)

    class Topic(MemoryRegistry):
        def begin_flip(self, flip_id: str, lease_s: float = 30.0) -> bool:
            self.heartbeat(record("d2", "prefill"))  # what an operator's flip has come to
            asked.append(flip_id)
            return super().begin_flip(flip_id, lease_s)

    asked: list[str] = []
    told: list[Command] = []
    registry, own = Topic(WallClock()), record("d1", "decode")
    for member in (record("p", "prefill", BUSY), own, record("d2", "decode")):
        registry.heartbeat(member)
    options = ElasticOptions(cooldown_s=0.1, window_s=0.05)
    thread = ElasticThread(registry, lambda: own, lambda _, c: told.append(c), options, WallClock())
    thread.start()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.3)
    thread.stop()
    assert not told


def test_a_dead_leader_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "LOOK_S", 0.02)
    registry = MemoryRegistry(WallClock(), lease_s=60.0, leader_lease_s=1.0)
    stopped = threading.Event()
    told: list[tuple[str, str]] = []

    def start(instance_id: str) -> ElasticThread:
        own = record(instance_id, "decode")

        def tell(peer: Peer, command: Command) -> None:
            told.append((instance_id, peer.instance_id))

        options = ElasticOptions(cooldown_s=0.2, window_s=0.05)
        source = lambda: None if stopped.is_set() and instance_id == "d1" else own  # noqa: E731
        thread = ElasticThread(registry, source, tell, options, WallClock())
        thread.start()
        return thread

    for member in (record("p", "prefill", BUSY), record("d1", "decode"), record("d2", "decode")):
        registry.heartbeat(member)
    threads = [start("d1")]
    while not told:
        time.sleep(0.01)
    threads.append(start("d2"))
    time.sleep(1.5)
    assert {who for who, _ in told} == {"d1"}
    stopped.set()  # its engine hangs
    deadline_s = time.monotonic() + 20
    while told[-1][0] != "d2" and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert told[-1][0] == "d2"
    for thread in threads:
        thread.stop()
