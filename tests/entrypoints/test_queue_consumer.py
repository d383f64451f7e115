"""What a front end makes of a request that another one has begun to answer."""

from __future__ import annotations

import asyncio
import uuid

import msgspec

from fastdeploy_pd.cluster.queue import Claimed, RedisQueue
from fastdeploy_pd.cluster.redis_connection import RedisOptions
from fastdeploy_pd.entrypoints.queue_consumer import OutputChunk, QueueConsumer
from fastdeploy_pd.entrypoints.serving import Choice, Serving
from fastdeploy_pd.errors import InvalidRequest
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from tests.entrypoints.stub_engine import StubEngine, default_options, demo_tokenizer


class Consumer(QueueConsumer):
    """Goes no further than to find out what was delivered."""

    delivered: list[int]

    def _choice(self, claimed: Claimed, delivered: list[int]) -> Choice:
        self.delivered = delivered
        raise InvalidRequest("that is all")


def test_all_of_a_long_output_is_known(redis_server: EmbeddedRedis) -> None:
    """What it does not know it would generate again, and append behind what is there."""
    options = RedisOptions.from_url(redis_server.url, topic=uuid.uuid4().hex)
    queue = RedisQueue(options)
    queue.submit("r", b"body")
    (claimed,) = queue.claim("front-1", 1, 0.01)
    chunks = [(n, msgspec.msgpack.encode(OutputChunk(n, [n], "", None))) for n in range(2500)]
    chunks.append((2500, msgspec.msgpack.encode(OutputChunk(2500, [2500, 2501], "", None))))
    assert queue.append("front-1", claimed, chunks)
    consumer = Consumer(
        options, StubEngine(lambda request, position: 7), Serving(demo_tokenizer(), default_options()), "front-2"
    )
    asyncio.run(consumer._serve(claimed))
    assert consumer.delivered == list(range(2502))
