"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A real server, shared by the tests of a session; each uses topics of its own."""
    with EmbeddedRedis() as server:
        yield server
