"""A rank's ends as rank 0 calls them: blocks leave when this rank has computed them, answers don't wait for that, faults end processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.engine.channel import Answer, Call, Channel, Happened, Refusal, Setup
from fastdeploy_pd.engine.worker import Ends
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, TransferEvent
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.tcp import TcpTransfer

LAYOUT = KVLayout(num_layers=3, num_blocks=8, num_kv_heads=2, block_size=16, head_dim=8, dtype="float32")
TOLD = msgspec.msgpack.Decoder(Answer | Happened | Refusal)


class Rank:
    """Ends served by a thread, and the other end of their channel."""

    def __init__(self) -> None:
        self.pool = KVPool(LAYOUT)
        self.transfer = TcpTransfer(self.pool, LAYOUT, "m")
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self.ends = Ends({"tcp": self.transfer}, Channel(theirs))
        self.events: list[TransferEvent] = []
        self._sockets = ours, theirs
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with pytest.raises((EOFError, ConnectionError)):
            self.ends.serve()

    def call(self, method: str, *arguments: Any, step: int = 0, layer: int = 0, is_asked: bool = False) -> None:
        self.channel.send(msgspec.msgpack.encode(Call("tcp", method, list(arguments), step, layer, is_asked)))

    def hear(self, timeout_s: float = 5.0) -> Answer | Happened | Refusal | None:
        data = self.channel.receive(timeout_s)
        return None if data is None else TOLD.decode(data)

    def close(self) -> None:
        self._sockets[0].shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self.transfer.close()


@pytest.fixture
def pair() -> Iterator[tuple[Rank, Rank]]:
    ranks = Rank(), Rank()
    yield ranks
    for rank in ranks:
        rank.close()


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def test_blocks_leave_when_this_rank_has_computed_them(pair: tuple[Rank, Rank]) -> None:
    source, target = pair
    target.call("open_epoch", "e", [4, 5], 7, is_asked=True)
    assert target.hear() == Answer(None)
    source.call("start", "e", 7, target.transfer.descriptor(), [4, 5])
    for layer in range(3):  # all of it is ordered before anything is computed here
        source.call("write", "e", [layer], [1, 2], [4, 5], step=2, layer=layer)
    source.call("finish", "e")
    source.call("reaches", target.transfer.descriptor(), is_asked=True)
    assert source.hear() == Answer("")  # is not kept waiting
    expected = np.random.default_rng(1).integers(0, 256, LAYOUT.pool_bytes, dtype=np.uint8)
    source.ends.on_layer(1, 2)  # of an earlier step
    assert source.hear(0.1) is None and target.hear(0.1) is None and not target.pool.array.any()
    for layer in range(3):
        begin = layer * LAYOUT.layer_bytes
        source.pool.array[begin : begin + LAYOUT.layer_bytes] = expected[begin : begin + LAYOUT.layer_bytes]
        source.ends.on_layer(2, layer)
    sent, arrived = source.hear(), target.hear()
    assert isinstance(sent, Happened) and isinstance(arrived, Happened)
    assert isinstance(sent.event(), EpochSent) and isinstance(arrived.event(), EpochArrived)
    assert sent.event().digests == arrived.event().digests == source.pool.digest([1, 2], 7)
    blocks = expected.reshape(3, 8, -1)
    assert np.array_equal(target.pool.array.reshape(3, 8, -1)[:, 4:6], blocks[:, 1:3])


@pytest.mark.parametrize("step", [5, 0])  # the latest that was computed for others; none, and blocks that are cached
def test_what_needs_not_wait_is_done_at_once(pair: tuple[Rank, Rank], step: int) -> None:
    source, target = pair
    target.call("open_epoch", "e", [4], 7, is_asked=True)
    assert target.hear() == Answer(None)
    source.pool.array[:] = 9
    if step:
        source.ends.on_layer(step, 2)
    source.call("start", "e", 7, target.transfer.descriptor(), [4])
    for layer in range(3):
        source.call("write", "e", [layer], [1], [4], step=step, layer=layer)
    source.call("finish", "e")
    arrived = target.hear()
    assert isinstance(arrived, Happened) and arrived.event().num_bytes == 3 * LAYOUT.block_bytes


def test_a_revocation_is_answered_when_nothing_lands_any_more(pair: tuple[Rank, Rank]) -> None:
    source, target = pair
    target.call("open_epoch", "e", [4], 7, is_asked=True)
    assert target.hear() == Answer(None)
    target.call("write", "other", [0], [1], [1], step=9)  # waits for a layer: a revocation does not
    target.call("revoke", "e", is_asked=True)
    assert target.hear() == Answer(None)
    source.call("start", "e", 7, target.transfer.descriptor(), [4])
    source.call("write", "e", [0], [1], [4])
    source.call("cancel", "e")
    failed = source.hear()
    assert isinstance(failed, Happened) and isinstance(failed.event(), EpochFailed) and not target.pool.array.any()


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Channel, list[socket.socket]]]]:
    made: list[subprocess.Popen[bytes]] = []

    def start(*flags: str) -> tuple[subprocess.Popen[bytes], Channel, list[socket.socket]]:
        (own_steps, steps), (own_orders, orders) = socket.socketpair(), socket.socketpair()
        numbers = [str(steps.fileno()), str(orders.fileno()), str(os.getpid())]
        command = [sys.executable, "-m", "fastdeploy_pd.engine.worker", *numbers]
        process = subprocess.Popen(command, pass_fds=(steps.fileno(), orders.fileno()), cwd=Path(__file__).parents[2])
        made.append(process)
        steps.close()
        orders.close()
        channel = Channel(own_orders)
        setup = Setup(1, 2, InstanceConfig.from_args(["--tensor-parallel-size", "2", *flags], {}), "/nowhere/group")
        channel.send(msgspec.msgpack.encode(setup))
        return process, channel, [own_steps, own_orders]

    yield start
    for process in made:
        process.kill()
        process.wait()


def test_a_worker_that_cannot_start_says_why(started: Callable[..., Any]) -> None:
    process, channel, _ = started("--num-gpu-blocks-override", "3")
    data = channel.receive(60)
    told = TOLD.decode(data)
    assert isinstance(told, Refusal) and told.message.startswith("--num-gpu-blocks-override gives 3 KV blocks")
    assert process.wait(10) == 2


@pytest.mark.parametrize("when", ["at once", "loaded"])
def test_a_worker_leaves_with_rank_0(started: Callable[..., Any], when: str) -> None:
    process, channel, sockets = started("--num-gpu-blocks-override", "100")
    if when == "loaded":
        assert TOLD.decode(channel.receive(60)) == Answer(100)
    for number in (signal.SIGINT, signal.SIGTERM):  # not by a terminal's: rank 0 decides
        if when == "loaded":
            process.send_signal(number)
    for connection in sockets:
        connection.close()
    assert process.wait(30) == 0
