"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis

with suppress(ImportError):  # where only GPU tests run it may be missing
    import hypothesis

    # An example's time says nothing on a machine that does other work too; each test has a limit.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A real server, shared by the tests of a session; each uses topics of its own."""
    with EmbeddedRedis() as server:
        yield server
