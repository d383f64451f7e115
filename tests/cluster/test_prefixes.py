"""What instances publish of their prefix caches reaches front ends through a real Redis, and outlives its troubles."""

from __future__ import annotations

import random
import uuid

import pytest
import redis

from fastdeploy_pd.clock import VirtualClock
from fastdeploy_pd.cluster import prefixes
from fastdeploy_pd.cluster.prefixes import PrefixFollower, PrefixPublisher
from fastdeploy_pd.cluster.redis_connection import RedisOptions
from fastdeploy_pd.core.prefix_index import HeldBlocks, PrefixIndex
from fastdeploy_pd.errors import CoordinatorLost
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis


class Pair:
    """One instance that publishes and one front end that follows."""

    def __init__(self, url: str) -> None:
        options = RedisOptions.from_url(url, topic=uuid.uuid4().hex)
        self.held, self.index, self.clock = HeldBlocks(), PrefixIndex(), VirtualClock()
        self.publisher = PrefixPublisher(options, "i", self.held, self.clock)
        self.members = ["i", "silent"]
        self.follower = PrefixFollower(options, self.index, lambda: self.members)
        self.client = redis.Redis.from_url(url)
        self.stream, self.snapshot = (f"{{fd:{options.topic}}}:{n}:i" for n in ("prefix_changes", "prefixes"))
        self.rng = random.Random(1)
        self.chain: list[bytes] = []

    def grow(self, count: int) -> None:
        for _ in range(count):
            self.chain.append(self.rng.randbytes(16))
            self.held.found(self.chain[-1])

    def cut(self, count: int) -> None:
        for _ in range(count):
            self.held.gone(self.chain.pop())

    def check(self) -> None:
        self.follower.follow()
        assert self.index.match(self.chain, ["i", "silent"]) == ({"i": len(self.chain)} if self.chain else {})
        assert self.index.num_blocks("i") == len(self.chain)


@pytest.fixture
def pair(redis_server: EmbeddedRedis) -> Pair:
    return Pair(redis_server.url)


def test_front_end_knows_what_the_instance_holds(pair: Pair) -> None:
    pair.follower.follow()
    assert pair.index.match([b"0" * 16], ["i"]) == {}
    for number in range(30):
        pair.grow(20)
        pair.cut(7 * (number % 3))
        pair.publisher.publish()
        if number % 4 == 0:
            pair.check()
    pair.check()
    length = pair.client.xlen(pair.stream)
    pair.publisher.publish()
    assert pair.client.xlen(pair.stream) == length  # nothing new, nothing written
    assert 0 < pair.client.pttl(pair.stream) <= prefixes.TTL_MS
    pair.clock.advance_to(prefixes.RENEW_S + 1)
    pair.client.pexpire(pair.snapshot, 1000)
    pair.publisher.publish()
    assert pair.client.pttl(pair.snapshot) > 1000
    pair.members = []
    pair.follower.follow()
    assert pair.index.instance_ids() == []
    pair.publisher.close()
    assert not pair.client.exists(pair.stream, pair.snapshot)


def test_keys_stay_bounded_and_a_follower_that_fell_behind_catches_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "MIN_SNAPSHOT_BYTES", 1000)
    most = 0
    for number in range(200):
        pair.grow(10)
        pair.publisher.publish()
        pair.cut(9)
        pair.publisher.publish()
        most = max(most, pair.client.xlen(pair.stream))
        if number == 0:
            pair.check()
    assert 2 < most < 20
    pair.follower.follow()  # finds a gap
    pair.check()


def test_redis_loses_its_data(pair: Pair) -> None:
    pair.grow(50)
    pair.publisher.publish()
    pair.check()
    pair.client.delete(pair.stream, pair.snapshot)
    pair.check()  # stale is what it is
    pair.grow(3)
    pair.publisher.publish()  # finds out
    pair.publisher.publish()
    pair.follower.follow()
    pair.check()


@pytest.mark.parametrize("what", ["entry", "string"])
def test_somebody_else_writes_there(pair: Pair, what: str) -> None:
    pair.grow(50)
    pair.publisher.publish()
    pair.check()
    if what == "entry":
        pair.client.xadd(pair.stream, {"any": "thing"}, id=f"{2**64 - 1}-{2**64 - 1}")
    else:
        pair.client.set(pair.stream, "anything")
    pair.grow(3)
    with pytest.raises(CoordinatorLost, match="Redis refuses a command"):
        pair.publisher.publish()
    pair.publisher.publish()
    pair.follower.follow()
    pair.check()


def test_a_write_that_failed_is_made_up_for() -> None:
    with EmbeddedRedis() as server:
        pair = Pair(server.url)
        pair.grow(5)
        pair.publisher.publish()
        pair.check()
        pair.client.config_set("maxmemory", 1)
        pair.grow(5)
        with pytest.raises(CoordinatorLost, match="memory"):
            pair.publisher.publish()
        pair.client.config_set("maxmemory", 0)
        pair.grow(5)
        pair.publisher.publish()
        pair.follower.follow()
        pair.check()
    pair.held.found(b"1" * 16)
    with pytest.raises(CoordinatorLost):
        pair.publisher.publish()
    with pytest.raises(CoordinatorLost):
        pair.follower.follow()
    assert pair.index.match(pair.chain, ["i"]) == {"i": 15}
