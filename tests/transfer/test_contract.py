"""One contract for every transfer backend: bytes, digests, fences, refusals, deaths."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fastdeploy_pd.core.layout import KVLayout, shard, share_heads
from fastdeploy_pd.errors import ConfigError, IncompatiblePeer
from fastdeploy_pd.transfer.base import CLOSED, EpochArrived, EpochFailed, EpochSent, Transfer, TransferEvent
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.loopback import LoopbackNetwork, LoopbackTransfer
from fastdeploy_pd.transfer.select import RETRY_S, Choice, Selection, build, choose
from fastdeploy_pd.transfer.shm import ShmTransfer
from fastdeploy_pd.transfer.tcp import TcpTransfer
from rdma_comm.devices import list_nics
from tests.transfer.gpu import has_gpu, seen_by_gpu
from tests.transfer.optional import has_mooncake

LAYOUT = KVLayout(num_layers=3, num_blocks=40, num_kv_heads=2, block_size=16, head_dim=8, dtype="float32")
#: rdma needs a device: where there is none, tests/rdma/test_in_vm.py runs this file in a machine that has one
#: files is the example of docs/transfer_backends.md
BACKENDS = ["tcp", "shm", "nccl", "loopback", "files", *(["mooncake"] if has_mooncake() else [])]
BACKENDS += [*(["rdma"] if list_nics() else []), *(["ipc"] if has_gpu() else [])]
SECRET = b"a secret that all instances know"


@dataclass
class Pair:
    """A prefill and a decode end."""

    make: Callable[..., Transfer]
    network: LoopbackNetwork | None
    source: Transfer
    target: Transfer
    source_pool: KVPool
    target_pool: KVPool

    def events(self, transfer: Transfer, count: int = 1, timeout_s: float = 20.0) -> list[TransferEvent]:
        found: list[TransferEvent] = []
        deadline_s = time.monotonic() + timeout_s
        virtual_s = 0.0
        while len(found) < count:
            assert time.monotonic() < deadline_s, f"only {found}"
            if self.network is not None:
                virtual_s += 1.0
                self.network.run_until(self.network._now_s + virtual_s)
            found += transfer.poll()
            time.sleep(0.001)
        return found

    def send(
        self, epoch: str, local: list[int], remote: list[int], nonce: int = 5, peer: Transfer | None = None
    ) -> None:
        self.source.start(epoch, nonce, (peer or self.target).descriptor(), remote)
        half = len(local) // 2
        for layers in (range(1), range(1, LAYOUT.num_layers)):
            self.source.write(epoch, layers, local[:half], remote[:half])
            self.source.write(epoch, layers, local[half:], remote[half:])
        self.source.finish(epoch)


def new_pool(layout: KVLayout = LAYOUT, seed: int | None = None) -> KVPool:
    pool = KVPool(layout)
    if seed is not None:
        pool.array[:] = np.random.default_rng(seed).integers(0, 256, layout.pool_bytes, dtype=np.uint8)
    return pool


@pytest.fixture(params=BACKENDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if request.param == "files":
        request.getfixturevalue("installed_example")
    network = LoopbackNetwork() if request.param == "loopback" else None
    made: list[Transfer] = []

    def make(pool: KVPool, layout: KVLayout = LAYOUT, fingerprint: str = "model", **options: object) -> Transfer:
        if network is not None:
            transfer: Transfer = LoopbackTransfer(f"end-{len(made)}", pool, layout, network, fingerprint)
        else:
            if request.param == "mooncake":
                options.setdefault("secret", SECRET)
            place = seen_by_gpu(pool) if request.param == "ipc" else pool
            transfer = build(request.param, pool=place, layout=layout, fingerprint=fingerprint, **options)
        made.append(transfer)
        return transfer

    pools = new_pool(seed=1), new_pool(seed=2)
    num_threads = threading.active_count()
    yield Pair(make, network, make(pools[0]), make(pools[1]), *pools)
    for transfer in made:
        transfer.close()
        transfer.close()
    deadline_s = time.monotonic() + 20
    while threading.active_count() > num_threads and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert threading.active_count() <= num_threads, [t.name for t in threading.enumerate()]


def test_bytes_and_digests_are_equal(pair: Pair) -> None:
    rng = random.Random(3)
    before = pair.target_pool.array.copy()
    local, remote = rng.sample(range(40), 11), rng.sample(range(40), 11)
    pair.target.open_epoch("e", remote, 5)
    pair.send("e", local, remote)
    (arrived,) = pair.events(pair.target)
    (sent,) = pair.events(pair.source)
    assert isinstance(arrived, EpochArrived)
    assert isinstance(sent, EpochSent)
    assert arrived.digests == sent.digests == pair.source._pool.digest(local, 5)
    assert sent.num_bytes == arrived.num_bytes == 11 * LAYOUT.block_bytes * LAYOUT.num_layers
    for layer in range(LAYOUT.num_layers):
        for source, target in zip(local, remote, strict=True):
            assert pair.source_pool.block(layer, source) == pair.target_pool.block(layer, target)
        for other in set(range(40)) - set(remote):
            start = LAYOUT.offset(layer, other)
            assert bytes(pair.target_pool.block(layer, other)) == before[start : start + LAYOUT.block_bytes].tobytes()


def test_digest_depends_on_the_nonce_and_every_byte(pair: Pair) -> None:
    assert pair.source_pool.digest([3], 1) != pair.source_pool.digest([3], 2)
    before = pair.source_pool.digest([3], 1)
    pair.source_pool.block(2, 3)[-1] ^= 1
    assert pair.source_pool.digest([3], 1) != before


def test_many_epochs_at_once(pair: Pair) -> None:
    for number in range(10):
        pair.target.open_epoch(f"e{number}", [number * 4 + i for i in range(4)], number)
    for number in range(10):
        pair.send(f"e{number}", [39 - number * 4 - i for i in range(4)], [number * 4 + i for i in range(4)], number)
    arrived = {e.epoch: e for e in pair.events(pair.target, 10)}
    sent = {e.epoch: e for e in pair.events(pair.source, 10)}
    assert len(arrived) == len(sent) == 10
    assert all(isinstance(e, EpochArrived) and e.digests == sent[i].digests for i, e in arrived.items())


@pytest.mark.parametrize("case", ["closed", "never opened", "foreign block", "wrong nonce"])
def test_what_may_not_be_written_lands_nowhere(pair: Pair, case: str) -> None:
    before = pair.target_pool.array.copy()
    if case != "never opened":
        pair.target.open_epoch("e", [1, 2, 3, 4], 5)
    if case == "closed":
        pair.target.revoke("e")
    remote = [1, 2, 3, 9] if case == "foreign block" else [1, 2, 3, 4]
    pair.send("e", [5, 6, 7, 8], remote, nonce=6 if case == "wrong nonce" else 5)
    events = pair.events(pair.source)
    # Over TCP the last byte may be on its way before the refusal comes back: then the receiver alone knows.
    assert isinstance(events[0], EpochFailed) or pair.source.name == "tcp"
    if case == "foreign block":
        assert isinstance(pair.events(pair.target)[0], EpochFailed)
    time.sleep(0.05)
    assert not any(isinstance(e, EpochArrived) for e in pair.target.poll())
    changed = np.flatnonzero(before != pair.target_pool.array)
    allowed = {1, 2, 3} if case == "foreign block" else set()
    assert {int(c) % LAYOUT.layer_bytes // LAYOUT.block_bytes for c in changed} <= allowed


def test_no_byte_lands_after_revoke(pair: Pair) -> None:
    blocks = list(range(40))
    for number in range(20):
        epoch = f"e{number}"
        pair.target.open_epoch(epoch, blocks, 5)
        pair.send(epoch, blocks, blocks)
        if pair.network is not None:
            pair.network.run_until(pair.network._now_s + 0.03)
        time.sleep(random.Random(number).uniform(0, 0.002))
        pair.target.revoke(epoch)
        pair.target_pool.array[:] = 77
        time.sleep(0.005)
        if pair.network is not None:
            pair.network.run_until(pair.network._now_s + 10)
        assert (pair.target_pool.array == 77).all()
        pair.source.poll()
        pair.target.poll()


def test_cancel(pair: Pair) -> None:
    pair.target.open_epoch("e", [1, 2], 5)
    pair.source.start("e", 5, pair.target.descriptor(), [1, 2])
    pair.source.write("e", [0], [1, 2], [1, 2])
    pair.source.cancel("e")
    assert isinstance(pair.events(pair.source)[0], EpochFailed)
    pair.source.write("e", [1], [1, 2], [1, 2])
    pair.source.finish("e")
    pair.source.cancel("e")
    pair.target.revoke("e")
    pair.target.revoke("e")
    time.sleep(0.05)
    assert not any(isinstance(e, EpochArrived) for e in pair.target.poll())


def test_a_peer_that_dies_fails_its_epochs_and_comes_back(pair: Pair) -> None:
    pair.target.open_epoch("e", [1, 2], 5)
    pair.source.start("e", 5, pair.target.descriptor(), [1, 2])
    pair.source.write("e", [0], [1, 2], [1, 2])
    time.sleep(0.1)
    pair.target.close()
    pair.source.write("e", [1], [1, 2], [1, 2])
    assert isinstance(pair.events(pair.source)[0], EpochFailed)
    again = pair.make(pair.target_pool)
    again.open_epoch("f", [1, 2], 5)
    pair.send("f", [3, 4], [1, 2], peer=again)
    assert isinstance(pair.events(again)[0], EpochArrived)


def test_a_sender_that_dies_fails_its_epochs(pair: Pair) -> None:
    pair.target.open_epoch("e", [1, 2], 5)
    pair.source.start("e", 5, pair.target.descriptor(), [1, 2])
    pair.source.write("e", [0], [1, 2], [1, 2])
    if pair.network is not None:
        pair.network.run_until(1.0)
    # A sender that dies before its first byte is nobody the target ever heard of: the cluster's beats end that one.
    sent, arrived = pair.source_pool.block(0, 2), pair.target_pool.block(0, 2)
    deadline_s = time.monotonic() + 20
    while not np.array_equal(sent, arrived) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    pair.source.close()
    assert isinstance(pair.events(pair.target)[0], EpochFailed)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layout": replace(LAYOUT, block_size=32)}, "block_size"),
        ({"layout": replace(LAYOUT, dtype="float16")}, "dtype"),
        ({"fingerprint": "other"}, "fingerprint"),
    ],
)
def test_ends_that_do_not_fit_name_the_field(pair: Pair, changes: dict[str, object], field: str) -> None:
    layout = changes.get("layout", LAYOUT)
    other = pair.make(new_pool(layout), **changes)
    assert field in pair.source.reaches(other.descriptor())
    with pytest.raises(IncompatiblePeer, match=field):
        choose({"x": pair.source}, {"x": other.descriptor()})


def test_choice_follows_our_order_and_is_never_silent() -> None:
    pool = new_pool()
    ends = [TcpTransfer(pool, LAYOUT, "m"), ShmTransfer(pool, LAYOUT, "m")]
    offers = {e.name: e.descriptor() for e in ends}
    assert choose({"shm": ends[1], "tcp": ends[0]}, offers).name == "shm"
    assert choose({"tcp": ends[0], "shm": ends[1]}, offers).name == "tcp"
    elsewhere = {**offers, "shm": {**offers["shm"], "host_id": "another machine"}}
    assert choose({"shm": ends[1], "tcp": ends[0]}, elsewhere).name == "tcp"
    with pytest.raises(IncompatiblePeer, match="host_id"):
        choose({"shm": ends[1]}, elsewhere)
    with pytest.raises(ConfigError, match="carrier-pigeon"):
        build("carrier-pigeon")
    for end in ends:
        end.close()


def test_a_backend_that_failed_for_a_peer_is_passed_over_until_it_is_tried_again() -> None:
    pool = new_pool()
    tcp, shm = TcpTransfer(pool, LAYOUT, "m"), ShmTransfer(pool, LAYOUT, "m")
    offers = {"shm": shm.descriptor(), "tcp": tcp.descriptor()}
    selection = Selection({"rdma": "no NIC", "shm": shm, "tcp": tcp})
    assert selection.choose("a", offers, 0.0) == Choice("shm", shm, ("rdma: no NIC",))
    selection.failed("a", "shm", CLOSED, 0.5)
    assert selection.choose("a", offers, 1.0).name == "shm"
    selection.failed("a", "shm", "the connection ended", 1.0)
    choice = selection.choose("a", offers, 2.0)
    assert choice.name == "tcp" and "the connection ended" in choice.passed_over[1]
    assert selection.choose("b", offers, 2.0).name == "shm"
    selection.failed("a", "tcp", "timed out", 3.0)
    assert selection.choose("a", offers, 4.0).name == "shm"  # nothing else is left: the preferred one
    assert selection.choose("a", offers, 1.0 + RETRY_S).name == "shm"
    shm.close()
    tcp.close()


# what only sockets have


@pytest.mark.parametrize("backend", ["tcp", "shm", "nccl"])
def test_another_secret_is_refused(backend: str) -> None:
    pools = new_pool(seed=1), new_pool()
    source = build(backend, pool=pools[0], layout=LAYOUT, fingerprint="m", secret=SECRET)
    for secret, fits in ((SECRET, True), (b"not the secret they know", False), (None, False)):
        target = build(backend, pool=pools[1], layout=LAYOUT, fingerprint="m", secret=secret)
        pair = Pair(lambda: None, None, source, target, *pools)
        target.open_epoch("e", [1], 5)
        pair.send("e", [1], [1])
        event = pair.events(source)[0]
        assert isinstance(event, EpochSent if fits else EpochFailed), event
        assert fits or "secret" in event.reason
        target.close()
    source.close()


def test_no_open_port_without_a_secret() -> None:
    with pytest.raises(ConfigError, match="cluster secret"):
        TcpTransfer(new_pool(), LAYOUT, "m", host="0.0.0.0")


def test_an_address_that_is_not_ours_names_its_flag() -> None:
    for host, flag in (
        (("nosuch.invalid", 0), "--advertise-host nosuch.invalid"),
        (("8.8.8.8", 5), "--cache-queue-port 5 on"),
    ):
        with pytest.raises(ConfigError, match=flag):
            TcpTransfer(new_pool(), LAYOUT, "m", *host, SECRET)


def test_garbage_on_the_port_does_nothing() -> None:
    target = TcpTransfer(new_pool(), LAYOUT, "m")
    where = (target.descriptor()["host"], target.descriptor()["port"])
    for data in (b"", b"\x80\x04\x95pickle", b"\xff" * 5000, b"\x04\x00\x00\x00abcd", os.urandom(4000)):
        with socket.create_connection(where) as connection:
            connection.sendall(data)
    source = TcpTransfer(new_pool(seed=1), LAYOUT, "m")
    pair = Pair(lambda: None, None, source, target, new_pool(), new_pool())
    target.open_epoch("e", [1], 5)
    pair.send("e", [1], [1])
    assert isinstance(pair.events(target)[0], EpochArrived)
    assert target.num_rejected >= 1
    source.close()
    target.close()


def test_a_stalled_peer_delays_no_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        source = TcpTransfer(new_pool(seed=1), LAYOUT, "m")
        target = TcpTransfer(new_pool(), LAYOUT, "m")
        pair = Pair(lambda: None, None, source, target, new_pool(), new_pool())
        nowhere = {**target.descriptor(), "port": deaf.getsockname()[1]}
        source.start("stuck", 5, nowhere, [1])
        source.write("stuck", [0], [1], [1])
        target.open_epoch("e", [1], 5)
        pair.send("e", [1], [1])
        assert isinstance(pair.events(target, timeout_s=1.0)[0], EpochArrived)
        source.close()
        target.close()


def test_pools_beyond_four_gibibytes() -> None:
    layout = KVLayout(2, 70_000, 2, 64, 64, "float32")  # 64 KiB a block, 8.5 GiB of address space, touched sparsely
    pools = KVPool(layout), KVPool(layout)
    pools[0].block(1, 69_999)[:] = b"\x5a" * layout.block_bytes
    for backend in ("tcp", "shm", "nccl"):
        source = build(backend, pool=pools[0], layout=layout, fingerprint="m")
        target = build(backend, pool=pools[1], layout=layout, fingerprint="m")
        target.open_epoch(backend, [69_998], 1)
        source.start(backend, 1, target.descriptor(), [69_998])
        for layer in range(2):
            source.write(backend, [layer], [69_999], [69_998])
        source.finish(backend)
        pair = Pair(lambda: None, None, source, target, *pools)
        assert isinstance(pair.events(target)[0], EpochArrived)
        assert pools[1].block(1, 69_998)[-1] == 0x5A
        source.close()
        target.close()


def test_a_stranger_that_drips_its_handshake_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy_pd.transfer.handshake.HANDSHAKE_TIMEOUT_S", 0.5)
    target = TcpTransfer(new_pool(), LAYOUT, "m")
    descriptor = target.descriptor()
    began_s = time.monotonic()
    with socket.create_connection((descriptor["host"], descriptor["port"])) as stranger:
        stranger.settimeout(5)
        with pytest.raises(OSError):  # noqa: PT012  # whichever byte is the first that nobody takes
            for byte in (200).to_bytes(4, "little") + bytes(200):
                stranger.sendall(bytes([byte]))
                time.sleep(0.1)
    assert time.monotonic() - began_s < 3
    target.close()


@pytest.mark.parametrize(("num_sources", "num_targets"), [(1, 2), (2, 1), (4, 2), (2, 4), (1, 8)])
def test_ranks_that_are_not_equally_many_move_each_byte_once(pair: Pair, num_sources: int, num_targets: int) -> None:
    whole = replace(LAYOUT, num_kv_heads=4)
    layouts = [[shard(whole, rank, count) for rank in range(count)] for count in (num_sources, num_targets)]
    data = np.random.default_rng(9).integers(
        0, 256, (3, 40, 2, 4, 16 * 8 * 4), dtype=np.uint8
    )  # [layer, block, K or V, head, ...]
    ends: list[list[tuple[Transfer, KVPool]]] = [[], []]
    for side, of_ranks in enumerate(layouts):
        for layout in of_ranks:
            pool = new_pool(layout)
            if side == 0:
                heads = slice(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)
                pool.array[:] = data[:, :, :, heads].reshape(-1)
            ends[side].append((pair.make(pool, layout), pool))
    local, remote = [3, 9, 4], [7, 0, 21]
    num_bytes = 0
    for number, share in enumerate(share_heads(*layouts)):
        (source, _), (target, _) = ends[0][share.source_rank], ends[1][share.target_rank]
        assert not source.reaches(target.descriptor())
        epoch, here, there = f"e-{number}", share.source_ids(local), share.target_ids(remote)
        target.open_epoch(epoch, there, 5, share.target_parts)
        source.start(epoch, 5, target.descriptor(), there, share.source_parts)
        for layer in range(LAYOUT.num_layers):
            source.write(epoch, [layer], here, there)
        source.finish(epoch)
        (arrived,), (sent,) = pair.events(target), pair.events(source)
        assert isinstance(arrived, EpochArrived) and isinstance(sent, EpochSent)
        assert arrived.digests == sent.digests and len(set(sent.digests)) == len(there)
        num_bytes += arrived.num_bytes
    for (_, pool), layout in zip(ends[1], layouts[1], strict=True):
        have = pool.array.reshape(3, 40, 2, layout.num_kv_heads, -1)
        heads = slice(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)
        assert np.array_equal(have[:, remote], data[:, local][:, :, :, heads])
        assert not have[:, [b for b in range(40) if b not in remote]].any()
    assert num_bytes == data[:, local].nbytes * max(1, num_targets // 4)


def test_parts_of_another_size_are_refused(pair: Pair) -> None:
    pair.target.open_epoch("e", [4, 5], 5, 2)
    pair.source.start("e", 5, pair.target.descriptor(), [4, 5])
    for layer in range(LAYOUT.num_layers):
        pair.source.write("e", [layer], [1, 2], [4, 5])
    pair.source.finish("e")
    (ended,) = pair.events(pair.source)  # with tcp it may all be on its way before it is refused
    assert isinstance(ended, EpochSent) or "2048 bytes, not of 1024" in getattr(ended, "reason", "")
    failed = pair.events(pair.target)[0]
    assert isinstance(failed, EpochFailed) and "2048 bytes, not of 1024" in failed.reason
    with pytest.raises(ValueError, match="cut into 3 parts"):
        pair.target.open_epoch("f", [4], 5, 3)
