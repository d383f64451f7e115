"""One transfer out of several ranks' ends: what is written arrives on every rank, whatever the two numbers of ranks; fences hold on all."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from fastdeploy_pd.core.layout import KVLayout, shard
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, TransferEvent
from fastdeploy_pd.transfer.frames import Notice, WriteFrame
from fastdeploy_pd.transfer.handshake import receive_frame, send_frame
from fastdeploy_pd.transfer.layout import KVPool, pack_ids
from fastdeploy_pd.transfer.ranks import RankedTransfer
from fastdeploy_pd.transfer.select import build

WHOLE = KVLayout(num_layers=3, num_blocks=40, num_kv_heads=4, block_size=16, head_dim=8, dtype="float32")
LOCAL, REMOTE = [3, 9, 4, 30, 31], [7, 0, 21, 22, 23]


class Instance:
    """As many ranks as asked for, each with a pool and an end of its own."""

    def __init__(self, backend: str, num_ranks: int, data: np.ndarray | None = None, fingerprint: str = "m") -> None:
        self.layouts = [shard(WHOLE, r, num_ranks) for r in range(num_ranks)] if num_ranks > 1 else [WHOLE]
        self.pools = [KVPool(layout) for layout in self.layouts]
        self.ends = [
            build(backend, pool=pool, layout=layout, fingerprint=fingerprint)
            for pool, layout in zip(self.pools, self.layouts, strict=True)
        ]
        self.transfer = RankedTransfer(self.ends, self.layouts)
        if data is not None:
            for pool, layout in zip(self.pools, self.layouts, strict=True):
                pool.array[:] = data[:, :, :, self.heads(layout)].reshape(-1)

    @staticmethod
    def heads(layout: KVLayout) -> slice:
        return slice(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)

    def holds(self, data: np.ndarray) -> bool:
        """Whether each rank's pool is its part of the data, [layer, block, K or V, head, bytes]."""
        return all(
            np.array_equal(pool.array.reshape(3, 40, 2, layout.num_kv_heads, -1), data[:, :, :, self.heads(layout)])
            for pool, layout in zip(self.pools, self.layouts, strict=True)
        )

    def events(self, count: int = 1) -> list[TransferEvent]:
        found: list[TransferEvent] = []
        end_s = time.monotonic() + 30
        while len(found) < count:
            assert time.monotonic() < end_s, f"only {found}"
            found += self.transfer.poll()
            time.sleep(0.001)
        return found


def some_data() -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (3, 40, 2, 4, 16 * 8 * 4), dtype=np.uint8)


@contextmanager
def instances(*made: Instance) -> Iterator[tuple[Instance, ...]]:
    yield made
    for instance in made:
        instance.transfer.close()
        instance.transfer.close()


def send(source: Instance, target: Instance, epoch: str = "e", nonce: int = 5) -> None:
    source.transfer.start(epoch, nonce, target.transfer.descriptor(), REMOTE)
    for first, stop in ((0, 2), (2, 5)):  # two chunks of a prompt
        for layer in range(3):
            source.transfer.write(epoch, [layer], LOCAL[first:stop], REMOTE[first:stop])
    source.transfer.finish(epoch)


PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (2, 4), (4, 4), (1, 8), (8, 1), (8, 4), (4, 8), (8, 8)]


@pytest.mark.parametrize("backend", ["tcp", "shm", "nccl"])
@pytest.mark.parametrize(("num_sources", "num_targets"), PAIRS)
def test_every_byte_arrives_and_checksums_are_equal(backend: str, num_sources: int, num_targets: int) -> None:
    data, expected = some_data(), np.zeros((3, 40, 2, 4, 16 * 8 * 4), np.uint8)
    expected[:, REMOTE] = data[:, LOCAL]
    with instances(Instance(backend, num_sources, data), Instance(backend, num_targets)) as (source, target):
        assert source.transfer.reaches(target.transfer.descriptor()) == ""
        target.transfer.open_epoch("e", REMOTE, 5)
        send(source, target)
        (arrived,), (sent,) = target.events(), source.events()
        assert isinstance(arrived, EpochArrived) and isinstance(sent, EpochSent)
        assert arrived.epoch == sent.epoch == "e"
        num_copies = max(1, num_targets // 4)
        assert arrived.digests == sent.digests and len(set(sent.digests)) == len(sent.digests) // num_copies > 0
        assert arrived.num_bytes == sent.num_bytes == data[:, LOCAL].nbytes * num_copies
        assert target.holds(expected)
        target.transfer.revoke("e")
        assert source.transfer.poll() == target.transfer.poll() == []
        assert not any(end._book._open or end._book._parts for end in target.ends)
        assert not source.transfer._out and not target.transfer._in


@pytest.mark.parametrize("backend", ["tcp", "shm"])
@pytest.mark.parametrize(("num_sources", "num_targets"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_no_byte_lands_on_any_rank_after_revoke(backend: str, num_sources: int, num_targets: int) -> None:
    data = some_data()
    rng = random.Random(num_sources)
    with instances(Instance(backend, num_sources, data), Instance(backend, num_targets)) as (source, target):
        for number in range(20):
            epoch = f"e{number}"
            target.transfer.open_epoch(epoch, REMOTE, 5)
            send(source, target, epoch)
            time.sleep(rng.uniform(0, 0.002))
            target.transfer.revoke(epoch)
            for pool in target.pools:
                pool.array[:] = 77
            time.sleep(0.005)
            assert all((pool.array == 77).all() for pool in target.pools)
            source.transfer.poll()
            target.transfer.poll()


@pytest.mark.parametrize(("num_sources", "num_targets"), [(1, 2), (2, 1), (2, 2)])
def test_one_rank_that_fails_fails_the_epoch(num_sources: int, num_targets: int) -> None:
    with instances(Instance("shm", num_sources, some_data()), Instance("shm", num_targets)) as (source, target):
        target.transfer.open_epoch("e", REMOTE, 5)
        target.ends[-1].revoke("e")  # this rank takes nothing
        send(source, target)
        (failed,) = source.events()
        assert isinstance(failed, EpochFailed) and failed.epoch == "e" and "the epoch is closed" in failed.reason
        assert not any(end._out for end in source.ends), "nothing of it is read any more"
        time.sleep(0.05)
        assert not any(isinstance(event, EpochArrived) for event in target.transfer.poll())


@pytest.mark.parametrize(("num_sources", "num_targets"), [(1, 2), (2, 1), (2, 2)])
def test_cancel_and_the_sender_s_death_are_told_once(num_sources: int, num_targets: int) -> None:
    with instances(Instance("tcp", num_sources, some_data()), Instance("tcp", num_targets)) as (source, target):
        for number, end in enumerate(("cancel", "close")):
            epoch = f"e{number}"
            target.transfer.open_epoch(epoch, REMOTE, 5)
            source.transfer.start(epoch, 5, target.transfer.descriptor(), REMOTE)
            source.transfer.write(epoch, [0], LOCAL, REMOTE)
            time.sleep(0.1)
            if end == "cancel":
                source.transfer.cancel(epoch)
                (failed,) = source.events()
                assert failed == EpochFailed(epoch, "cancelled")
                target.transfer.revoke(epoch)
            else:
                source.transfer.close()
                for instance in (source, target):
                    (failed,) = instance.events()
                    assert isinstance(failed, EpochFailed) and failed.epoch == epoch
            time.sleep(0.05)
            assert source.transfer.poll() == target.transfer.poll() == []


@pytest.mark.parametrize(("num_sources", "num_targets"), [(1, 1), (1, 2), (2, 1)])
def test_block_ids_that_nobody_has_fail_the_epoch(num_sources: int, num_targets: int) -> None:
    with instances(Instance("tcp", num_sources, some_data()), Instance("tcp", num_targets)) as (source, target):
        source.transfer.start("e", 5, target.transfer.descriptor(), [2**40])
        source.transfer.write("e", [0], [1], [2**40])
        (failed,) = source.events()
        assert isinstance(failed, EpochFailed) and "no block ids" in failed.reason


def test_who_does_not_fit_is_refused_by_name() -> None:
    with instances(Instance("tcp", 2), Instance("tcp", 1, fingerprint="other"), Instance("tcp", 2)) as (
        own,
        other,
        like,
    ):
        assert "fingerprint" in own.transfer.reaches(other.transfer.descriptor())
        assert "fingerprint" in other.transfer.reaches(own.transfer.descriptor())
        descriptor = like.transfer.descriptor()
        for changes, reason in (
            ({"block_size": 32}, "block_size: 16 != 32"),
            ({"num_kv_heads": 8}, "model_kv_heads: 4 != 8"),
            ({"dtype": "float16"}, "dtype: float32 != float16"),
        ):
            layout = {**descriptor["layout"], **changes}
            assert reason in own.transfer.reaches({**descriptor, "layout": layout})
        broken = [descriptor["ranks"][0], {**descriptor["ranks"][1], "fingerprint": "other"}]
        assert own.transfer.reaches({**descriptor, "ranks": broken}).startswith("rank 1 to 1: fingerprint")
        for ranks in (7, [], [{}], [descriptor["ranks"][0]] * 65, [{"layout": {"num_layers": "x"}}], "ab"):
            assert own.transfer.reaches({**descriptor, "ranks": ranks}), ranks
        rank = descriptor["ranks"][0]
        for heads in ({"num_kv_heads": 0}, {"num_kv_heads": 2, "total_kv_heads": 4}):  # nothing would be sent, or half
            alone = {**rank, "layout": {**descriptor["layout"], **heads}}
            for peer in ({**descriptor, "ranks": [alone]}, alone):
                assert own.transfer.reaches(peer), heads


def test_names_of_parts_that_make_no_sense_open_nothing() -> None:
    with instances(Instance("tcp", 2), Instance("tcp", 1)) as (target, alone):
        target.transfer.open_epoch("e", REMOTE, 5)
        alone.transfer.open_epoch("e", REMOTE, 5)
        book, whole_book = target.ends[0]._book, alone.ends[0]._book
        names = ["e@", "e@1", "e@1.0", "e@0.0.0", "e@2.2.0", "e@65.0.0", "e@x.0.0", "e@-1.0.0", "e@3.0.0", "f@1.0.0"]
        names += ["e@4.3.0", "e@1.0.0@1.0.0", "e@1.0.0.0"]  # rank 3 of 4 has none of this rank's heads
        names += ["e@2.0.0", "e@01.0.0", "e@1.0.00", *(f"e@1.0.{number}" for number in range(1, 200))]  # others' ranks
        assert [name for name in names if book.find(name, 5) is not None] == []
        assert book.find("e@1.0.0", 6) is None, "who does not know the nonce opens nothing"
        assert book.find("e@1.0.0", 5) is not None and whole_book.find("e@2.1.0", 5) is not None
        assert book.find("e@1.0.0", 5) is book.find("e@1.0.0")
        for name in ("e", "e@4.0.0", "e@4.1.0"):
            assert book.find(name, 5) is None, "its parts are one source's by now"
        assert whole_book.find("e@2.0.0", 5) is not None and whole_book.find("e@4.0.0", 5) is None
        target.transfer.revoke("e")
        assert book.find("e@1.0.0", 5) is None and not book._open and not book._parts and not book._num_sources


@pytest.mark.parametrize("name", ["e@1.0.1", "e@2.0.0", "e@4.0.0", "e"])
def test_blocks_that_have_arrived_are_not_written_under_another_name(name: str) -> None:
    """What belongs to another rank, or comes in another way, does not land: checksums were compared already."""
    with instances(Instance("tcp", 1, some_data()), Instance("tcp", 2)) as (source, target):
        target.transfer.open_epoch("e", REMOTE, 5)
        send(source, target)
        assert isinstance(target.events()[0], EpochArrived) and isinstance(source.events()[0], EpochSent)
        before, end = target.pools[0].array.copy(), source.ends[0]
        layout = target.layouts[0].cut({"e@1.0.1": 2, "e@4.0.0": 4}.get(name, 1))
        parts = [block_id * layout.parts for block_id in REMOTE]
        rogue = end.dial(target.transfer.descriptor()["ranks"][0])
        ids = pack_ids(parts[:1])
        send_frame(rogue, msgspec.msgpack.encode(WriteFrame(name, 5, [0], ids, ids, layout.block_bytes)))
        rogue.sendall(bytes([123]) * layout.block_bytes)
        rogue.settimeout(5)
        assert msgspec.msgpack.decode(receive_frame(rogue), type=Notice).refusal
        assert np.array_equal(target.pools[0].array, before)
        end.drop(rogue)


def test_ranks_with_the_same_heads_take_turns_and_one_does_not_write_in_the_other_s_place() -> None:
    with instances(Instance("tcp", 4)) as (target,):
        target.transfer.open_epoch("e", REMOTE, 5)
        senders = [
            [r for r in range(8) if end._book.find(f"e@8.{r}.{rank}", 5)] for rank, end in enumerate(target.ends)
        ]
        assert senders == [[0], [3], [4], [7]]


def test_a_whole_model_s_layout_is_what_ranks_tell(tmp_path: object) -> None:
    with instances(Instance("tcp", 4), Instance("tcp", 1)) as (several, alone):
        descriptor = several.transfer.descriptor()
        assert KVLayout(**descriptor["layout"]) == replace(WHOLE, num_kv_heads=4)
        assert len(descriptor["ranks"]) == 4 and "ranks" not in alone.transfer.descriptor()
