"""Many epochs at random: written, cancelled and revoked at any moment. Bytes, digests, one end a side, nothing after a revocation."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, TransferEvent
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.select import build
from fastdeploy_pd.transfer.stream import CLOSE_TIMEOUT_S
from tests.transfer.optional import has_mooncake

LAYOUT = KVLayout(num_layers=3, num_blocks=512, num_kv_heads=4, block_size=16, head_dim=32, dtype="float32")
SECRET = b"a secret that all instances know"
BACKENDS = ["tcp", "shm", "nccl", *(["mooncake"] if has_mooncake() else [])]
NUM_EPOCHS, AT_ONCE = 500, 12
IN_PASSING = 6  # files or threads of a connection that is just being replaced; a leak of one an epoch is hundreds
MARK = 77  # what revoked blocks are filled with


@dataclass
class Epoch:
    name: str
    local: list[int]
    remote: list[int]
    parts: int
    nonce: int
    fate: int  #: steps until it is cancelled or revoked; 0: never
    layer: int = 0  # the next to be written
    is_finished: bool = False
    is_cancelled: bool = False
    is_revoked: bool = False
    ends: dict[str, list[TransferEvent]] = field(default_factory=lambda: {"source": [], "target": []})

    @property
    def is_over(self) -> bool:
        return bool(self.ends["source"]) and (self.is_revoked or bool(self.ends["target"]))


class Stress:
    """Two ends, and what they must hold to."""

    def __init__(self, backend: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pools = KVPool(LAYOUT), KVPool(LAYOUT)
        self.pools[0].array[:] = np.random.default_rng(seed).integers(0, 256, LAYOUT.pool_bytes, dtype=np.uint8)
        self.source, self.target = (
            build(backend, pool=p, layout=LAYOUT, fingerprint="m", secret=SECRET) for p in self.pools
        )
        self.free = set(range(LAYOUT.num_blocks))  # of the target
        self.live: dict[str, Epoch] = {}
        self.known: dict[str, Epoch] = {}
        self.num_good = 0

    def begin(self, number: int) -> None:
        rng, parts = self.rng, self.rng.choice((1, 1, 2, 8))
        blocks = rng.sample(sorted(self.free), rng.randint(1, 24))
        self.free -= set(blocks)
        remote = [b * parts + p for b in blocks for p in range(parts)]
        rng.shuffle(remote)
        local = rng.sample(range(LAYOUT.num_blocks * parts), len(remote))
        fate = rng.choice((0, 0, rng.randint(1, 12)))
        epoch = Epoch(f"e{number}", local, remote, parts, rng.getrandbits(63), fate)
        self.target.open_epoch(epoch.name, remote, epoch.nonce, parts)
        self.source.start(epoch.name, epoch.nonce, self.target.descriptor(), remote, parts)
        self.live[epoch.name] = self.known[epoch.name] = epoch

    def step(self, epoch: Epoch) -> None:
        rng = self.rng
        epoch.fate -= 1
        if epoch.fate == 0 and rng.random() < 0.5:
            epoch.is_cancelled = True
            self.source.cancel(epoch.name)
        if (epoch.fate == 0 or (epoch.is_cancelled and rng.random() < 0.2)) and not epoch.is_revoked:
            self.revoke(epoch)
        if epoch.layer < LAYOUT.num_layers:
            cut, stop = rng.randint(0, len(epoch.local)), rng.randint(epoch.layer + 1, LAYOUT.num_layers)
            for part in (slice(0, cut), slice(cut, None)):
                self.source.write(epoch.name, range(epoch.layer, stop), epoch.local[part], epoch.remote[part])
            epoch.layer = stop
        elif not epoch.is_finished:
            epoch.is_finished = True
            self.source.finish(epoch.name)

    def revoke(self, epoch: Epoch) -> None:
        """From now on nothing lands: the blocks get a mark, which `forget` looks for."""
        self.target.revoke(epoch.name)
        epoch.is_revoked = True
        pool, ids = self.blocks(epoch, 1)
        pool[:, ids] = MARK

    def blocks(self, epoch: Epoch, side: int) -> tuple[np.ndarray, list[int]]:
        """Returns: ([layers, blocks or parts, bytes] view of a side's pool, the epoch's in it)."""
        pool = self.pools[side].array.reshape(LAYOUT.num_layers, LAYOUT.num_blocks * epoch.parts, -1)
        return pool, epoch.remote if side else epoch.local

    def content(self, epoch: Epoch, side: int) -> np.ndarray:
        """Returns: [layers, n, bytes] of the epoch's blocks as they are now."""
        pool, ids = self.blocks(epoch, side)
        return pool[:, ids]

    def poll(self) -> None:
        for name in ("source", "target"):
            for event in getattr(self, name).poll():
                epoch = self.known[event.epoch]
                epoch.ends[name].append(event)
                assert len(epoch.ends[name]) == 1, epoch
        for epoch in [e for e in self.live.values() if e.is_over]:
            self.forget(epoch)

    def forget(self, epoch: Epoch) -> None:
        sent, arrived = epoch.ends["source"][0], (epoch.ends["target"] or [None])[0]
        if isinstance(arrived, EpochArrived) and not epoch.is_revoked and not epoch.is_cancelled:
            assert isinstance(sent, EpochSent), epoch
            assert sent.digests == arrived.digests
            assert (self.content(epoch, 0) == self.content(epoch, 1)).all()
            self.num_good += 1
        elif epoch.is_revoked:
            assert (self.content(epoch, 1) == MARK).all()
        else:
            assert epoch.is_cancelled, epoch
        self.target.revoke(epoch.name)
        self.free |= {i // epoch.parts for i in epoch.remote}
        del self.live[epoch.name]


def resources() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_epochs_at_random(backend: str, seed: int) -> None:
    stress = Stress(backend, seed)
    number, deadline_s = 0, time.monotonic() + 60
    before: tuple[int, int] | None = None
    while number < NUM_EPOCHS or stress.live:
        assert time.monotonic() < deadline_s, stress.live
        while number < NUM_EPOCHS and len(stress.live) < AT_ONCE:
            stress.begin(number)
            number += 1
        for epoch in stress.rng.sample(list(stress.live.values()), len(stress.live)):
            stress.step(epoch)
        stress.poll()
        if number > AT_ONCE * 3:
            before = before or resources()
        time.sleep(0)
    assert stress.num_good > NUM_EPOCHS / 2
    assert all(len(events) <= 1 for e in stress.known.values() for events in e.ends.values())
    assert not stress.source._out
    assert not stress.target._book._open
    assert before is not None
    assert all(now <= then + IN_PASSING for now, then in zip(resources(), before, strict=True)), (resources(), before)
    for end in (stress.source, stress.target):
        end.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ends_that_close_in_the_middle(backend: str) -> None:
    """One end closes at a random moment; the other is told of each epoch's end, and goes on with the next peer."""
    rng, blocks = random.Random(4), list(range(LAYOUT.num_blocks))
    pools = KVPool(LAYOUT), KVPool(LAYOUT)
    pools[0].array[:] = 1
    ends: list[Any] = [build(backend, pool=p, layout=LAYOUT, fingerprint="m", secret=SECRET) for p in pools]
    for number in range(8):
        source, target = ends
        epoch, which = f"e{number}", rng.randrange(2)
        target.open_epoch(epoch, blocks, number)
        source.start(epoch, number, target.descriptor(), blocks)
        source.write(epoch, range(LAYOUT.num_layers), blocks, blocks)
        source.finish(epoch)
        time.sleep(rng.uniform(0, 0.02))
        began_s = time.monotonic()
        ends[which].close()
        assert time.monotonic() - began_s < CLOSE_TIMEOUT_S + 2
        found: list[TransferEvent] = []
        if which == 1 or target._book.find(epoch).connections:  # of what never began nobody is told
            while not found:
                assert time.monotonic() - began_s < 15
                found += ends[1 - which].poll()
                time.sleep(0.001)
        time.sleep(0.05)
        found += ends[1 - which].poll()
        assert len(found) <= 1
        assert all(isinstance(e, EpochFailed | EpochSent | EpochArrived) for e in found)
        target.revoke(epoch)
        pools[1].array[:] = MARK
        time.sleep(0.02)
        assert (pools[1].array == MARK).all()
        ends[which] = build(backend, pool=pools[which], layout=LAYOUT, fingerprint="m", secret=SECRET)
    for end in ends:
        end.close()
