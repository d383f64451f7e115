"""How a write becomes frames."""

import random
import threading
from typing import Any

import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.transfer.base import EpochArrived, EpochSent
from fastdeploy_pd.transfer.frames import WriteFrame
from fastdeploy_pd.transfer.layout import KVPool, pack_ids, unpack_ids
from fastdeploy_pd.transfer.select import build
from tests.transfer.test_ipc import events


@pytest.mark.parametrize("seed", range(50))
def test_frames_write_each_block_of_each_layer_once(seed: int) -> None:
    rng = random.Random(seed)
    num_layers, num_blocks = rng.randint(1, 40), rng.randint(1, 30)
    most, num_parts = rng.randint(0, 100), rng.randint(1, 3)
    first = rng.randint(0, 5)
    remote, local = rng.sample(range(99), num_blocks), rng.sample(range(99), num_blocks)
    whole = WriteFrame("e", 7, list(range(first, first + num_layers)), pack_ids(remote), pack_ids(local), 64)
    frames = list(whole.cut(most, num_parts))
    written = [
        (layer, *pair)
        for frame in frames
        for layer in frame.layers
        for pair in zip(unpack_ids(frame.remote).tolist(), unpack_ids(frame.local).tolist(), strict=True)
    ]
    assert sorted(written) == sorted((n, *p) for n in whole.layers for p in zip(remote, local, strict=True))
    assert all(frame.num_blocks <= max(1, most) for frame in frames)
    assert len(frames) >= min(num_layers, num_parts)
    for frame in frames:  # a sender joins what waits
        frame.layers += [99]
    assert [frame.layers.count(99) for frame in frames] == [1] * len(frames)


def test_few_frames_where_there_is_room() -> None:
    whole = WriteFrame("e", 7, list(range(8)), pack_ids(range(32)), pack_ids(range(32)), 64)
    assert [frame.layers for frame in whole.cut(1000, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [frame.layers for frame in whole.cut(100, 1)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize("num_blocks", [6, 7, 10, 11])
@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_what_waits_is_joined_to_frames_that_are_taken(
    backend: str, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = KVLayout(32, 12, 8, 16, 128, "bfloat16")  # 64 KiB a block and layer
    source, target = (build(backend, pool=KVPool(layout), layout=layout, fingerprint="m") for _ in range(2))
    are_queued, dial = threading.Event(), source.dial

    def dial_late(descriptor: dict[str, Any]) -> Any:
        assert are_queued.wait(10)
        return dial(descriptor)

    monkeypatch.setattr(source, "dial", dial_late)
    ids = list(range(num_blocks))
    target.open_epoch("e", ids, 5)
    source.start("e", 5, target.descriptor(), ids)
    for first in range(0, 32, 8):
        source.write("e", range(first, first + 8), ids, ids)
    source.finish("e")
    are_queued.set()
    (arrived,), (sent,) = events(target), events(source)
    assert isinstance(sent, EpochSent) and isinstance(arrived, EpochArrived), (sent, arrived)
    assert sent.digests == arrived.digests
    for end in (source, target):
        end.close()
