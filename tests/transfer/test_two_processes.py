"""What only a peer in another process shows: it stalls or dies in the middle, and what it had begun lands nowhere afterwards."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, TransferEvent
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.select import build
from tests.transfer.optional import has_mooncake

LAYOUT = KVLayout(num_layers=2, num_blocks=1024, num_kv_heads=8, block_size=16, head_dim=64, dtype="float32")
BLOCKS = list(range(1024))
BACKENDS = [
    "tcp",
    "shm",
    "nccl",
    pytest.param("mooncake", marks=pytest.mark.skipif(not has_mooncake(), reason="no Mooncake here")),
]
SECRET = b"a secret that all instances know"
STALL_S = 1.5


def events(transfer: Any, timeout_s: float = 20.0) -> list[TransferEvent]:
    deadline_s = time.monotonic() + timeout_s
    while not (found := transfer.poll()):
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return found


def peer_process(backend: str, pipe: Connection) -> None:
    """An instance that takes orders: its method to call, with arguments."""
    pool = KVPool(LAYOUT)
    pool.array[:] = 1
    transfer = build(backend, pool=pool, layout=LAYOUT, fingerprint="m", secret=SECRET)
    pipe.send(transfer.descriptor())
    while (order := pipe.recv()) is not None:
        if order[0] == "send":
            send(transfer, *order[1:])
        else:
            getattr(transfer, order[0])(*order[1:])
    transfer.close()


def send(transfer: Any, epoch: str, peer: dict[str, Any]) -> None:
    transfer.start(epoch, 5, peer, BLOCKS)
    transfer.write(epoch, range(LAYOUT.num_layers), BLOCKS, BLOCKS)
    transfer.finish(epoch)


class Pair:
    """An end here and one in another process."""

    def __init__(self, backend: str) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=peer_process, args=(backend, theirs), daemon=True)
        self.process.start()
        self.pool = KVPool(LAYOUT)
        self.transfer: Any = build(backend, pool=self.pool, layout=LAYOUT, fingerprint="m", secret=SECRET)
        assert self.pipe.poll(60)
        self.peer = self.pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < deadline_s
            time.sleep(0.0005)

    def close(self) -> None:
        began_s = time.monotonic()
        self.transfer.close()
        assert time.monotonic() - began_s < 4
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.process.join(10)


@pytest.fixture(params=BACKENDS)
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    made = Pair(request.param)
    for module in ("stream", "torch_link", "mooncake"):
        monkeypatch.setattr(f"fastdeploy_pd.transfer.{module}.STALL_TIMEOUT_S", STALL_S)
    yield made
    made.close()


def test_both_ways(pair: Pair) -> None:
    pair.transfer.open_epoch("there", BLOCKS, 5)
    pair.pipe.send(("send", "there", pair.transfer.descriptor()))
    (arrived,) = events(pair.transfer)
    assert isinstance(arrived, EpochArrived)
    assert (pair.pool.array == 1).all()
    pair.pipe.send(("open_epoch", "back", BLOCKS, 5))
    send(pair.transfer, "back", pair.peer)
    (sent,) = events(pair.transfer)
    assert isinstance(sent, EpochSent)


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL], ids=["stalls", "dies"])
def test_a_sender_in_the_middle(pair: Pair, end: signal.Signals) -> None:
    pair.transfer.open_epoch("e", BLOCKS, 5)
    pair.pipe.send(("send", "e", pair.transfer.descriptor()))
    pair.until(lambda: pair.transfer._book.find("e").num_bytes > 0)
    pair.signal(end)
    # Between two frames of tcp silence means nothing; what shm was told of is read without the sender.
    if end == signal.SIGKILL or pair.transfer.name not in ("tcp", "shm"):
        assert isinstance(events(pair.transfer, 4 * STALL_S)[0], EpochFailed) or pair.transfer.name == "shm"
    began_s = time.monotonic()
    pair.transfer.revoke("e")
    assert time.monotonic() - began_s < 0.2
    pair.pool.array[:] = 77
    if end == signal.SIGSTOP:
        pair.signal(signal.SIGCONT)
    time.sleep(1.0)
    assert (pair.pool.array == 77).all()


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL], ids=["stalls", "dies"])
@pytest.mark.parametrize("is_known", [True, False], ids=["in the middle", "before it starts"])
def test_a_receiver(pair: Pair, end: signal.Signals, is_known: bool) -> None:
    if is_known:
        pair.pipe.send(("open_epoch", "e", BLOCKS, 5))
        send(pair.transfer, "e", pair.peer)
        pair.until(lambda: pair.transfer._out["e"].num_done > 0)
        pair.signal(end)
    else:
        pair.signal(end)
        send(pair.transfer, "e", pair.peer)
    assert isinstance(events(pair.transfer, 8.0)[0], EpochFailed)
    assert np.count_nonzero(pair.pool.array) == 0


def test_revoking_while_the_sender_stalls_waits_for_nothing(pair: Pair) -> None:
    pair.transfer.open_epoch("e", BLOCKS, 5)
    pair.pipe.send(("send", "e", pair.transfer.descriptor()))
    pair.until(lambda: pair.transfer._book.find("e").num_bytes > 0)
    pair.signal(signal.SIGSTOP)
    time.sleep(0.05)
    began_s = time.monotonic()
    pair.transfer.revoke("e")
    assert time.monotonic() - began_s < 0.2
    pair.pool.array[:] = 77
    pair.signal(signal.SIGCONT)
    time.sleep(1.0)
    assert (pair.pool.array == 77).all()
