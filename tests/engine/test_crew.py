"""Rank 0's hold on a worker: neither waits for the other to listen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import pytest

from fastdeploy_pd.engine import crew
from fastdeploy_pd.engine.channel import Call
from fastdeploy_pd.transfer.base import EpochFailed
from tests.engine.test_worker import Rank

NUM_EPOCHS = 2000  # what they give rise to fills the pipe both ways several times
WAIT_S = 3.0  # for the other end


def new_worker(rank: Rank) -> crew.Worker:
    """What rank 0 has of a worker that serves already."""
    worker = crew.Worker.__new__(crew.Worker)
    worker.rank, worker._orders = 1, rank.channel
    worker._num_unanswered, worker._answer, worker._events = 0, None, {}
    return worker


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    monkeypatch.setattr("fastdeploy_pd.engine.channel.TIMEOUT_S", WAIT_S)
    rank = Rank()
    yield rank
    rank.close()


def test_many_orders_at_once_meet_many_events(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(worker: crew.Worker, why: str = "") -> NoReturn:
        raise AssertionError(why)

    monkeypatch.setattr(crew.Worker, "_lost", lost)
    worker = new_worker(rank)
    peer = rank.transfer.descriptor()
    for number in range(NUM_EPOCHS):  # as when a decode instance is lost: each call gives rise to an event
        worker.call(Call("tcp", "start", [f"e{number}", 7, peer, [4]]))
        worker.call(Call("tcp", "cancel", [f"e{number}"]))
    worker.call(Call("tcp", "reaches", [peer], is_asked=True))
    assert worker.settle() == ""
    assert worker.events("tcp") == [EpochFailed(f"e{number}", "cancelled") for number in range(NUM_EPOCHS)]
