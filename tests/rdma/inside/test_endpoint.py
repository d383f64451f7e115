"""Endpoints over two NICs: blocks striped over both, one lost in between, and peers that go away."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from rdma_comm.devices import list_nics
from rdma_comm.endpoint import Connection, Endpoint, Options, Region
from rdma_comm.errors import CompletionFailed, HandshakeFailed, RdmaError, RdmaUnavailable

POOL_BYTES, BLOCK_BYTES = 8 << 20, 16384
NUM_BLOCKS = POOL_BYTES // BLOCK_BYTES
SECOND = "rxe_second"


def rdma_link(*arguments: str) -> int:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return subprocess.run(["rdma", "link", *arguments], env={"PATH": path}, capture_output=True, check=False).returncode


@pytest.fixture
def second_nic() -> Iterator[str]:
    if "RDMA_DEV" not in os.environ or rdma_link("add", SECOND, "type", "rxe", "netdev", "lo"):
        pytest.skip("a second soft-RoCE device can be made in the tests' virtual machine only")
    yield SECOND
    rdma_link("delete", SECOND)


class Side:
    """One process's part: an endpoint with one pool."""

    def __init__(self, options: Options, seed: int | None = None) -> None:
        self.endpoint = Endpoint(options)
        self.pool = np.zeros(POOL_BYTES, np.uint8)
        if seed is not None:
            self.pool[:] = np.random.default_rng(seed).integers(0, 256, POOL_BYTES, dtype=np.uint8)
        self.region: Region = self.endpoint.register(
            self.pool.ctypes.data, POOL_BYTES, self.pool, is_writable_by_peers=True
        )

    @property
    def blocks(self) -> np.ndarray:
        return self.pool.reshape(NUM_BLOCKS, BLOCK_BYTES)


def join(one: Side, two: Side) -> tuple[Connection, Connection]:
    ends = one.endpoint.connection("two"), two.endpoint.connection("one")
    offers = ends[0].offer([one.region]), ends[1].offer([two.region])
    ends[0].connect([one.region], offers[1])
    ends[1].connect([two.region], offers[0])
    return ends


def scattered(seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.permutation(NUM_BLOCKS) * BLOCK_BYTES,
        rng.permutation(NUM_BLOCKS) * BLOCK_BYTES,
        np.full(NUM_BLOCKS, BLOCK_BYTES),
    )


def test_two_nics_share_the_blocks_and_one_that_is_lost_leaves_them_to_the_other(second_nic: str) -> None:
    first = next(n.name for n in list_nics() if n.name != second_nic)
    options = Options(nics=(second_nic, first), timeout=14, retry_count=3)
    source, target = Side(options, seed=1), Side(options)
    assert [rail.nic.name for rail in source.endpoint.rails] == [second_nic, first]
    ends = join(source, target)
    assert ends[0].num_rails == 2
    local, remote, sizes = scattered()
    ends[0].write(local, remote, sizes, 20.0)
    assert np.array_equal(target.blocks[remote // BLOCK_BYTES], source.blocks[local // BLOCK_BYTES])

    target.pool[:] = 0
    port = source.endpoint.rails[0]
    before = _sent(second_nic), _sent(first)
    ends[1].read(remote, local, sizes, 20.0)
    assert np.array_equal(target.blocks[remote // BLOCK_BYTES], source.blocks[local // BLOCK_BYTES])
    assert _sent(second_nic) > before[0] and _sent(first) > before[1], "both carry a share"

    target.pool[:] = 0
    ends[1]._links[0].pair.close()  # the second NIC's queue pair at the peer is gone
    ends[0].write(local, remote, sizes, 30.0)
    assert np.array_equal(target.blocks[remote // BLOCK_BYTES], source.blocks[local // BLOCK_BYTES])
    assert ends[0].num_rails == 1 and ends[0].lost[0].startswith(port.nic.name)
    ends[0].write(local, remote, sizes, 30.0)  # and goes on without it
    for end in ends:
        end.close()
    for side in (source, target):
        side.endpoint.close()


def _sent(nic: str) -> int:
    with open(f"/sys/class/infiniband/{nic}/ports/1/hw_counters/sent_pkts") as file:
        return int(file.read())


def test_a_peer_that_vanishes_in_mid_transfer_fails_it() -> None:
    options = Options(timeout=14, retry_count=3)
    source, target = Side(options, seed=1), Side(options)
    ends = join(source, target)
    threading.Timer(0.02, ends[1].fail).start()
    began_s = time.monotonic()
    with pytest.raises(CompletionFailed, match="peer two"):
        ends[0].write(*scattered(), 20.0)
    assert time.monotonic() - began_s < 15
    assert ends[0].num_rails == 0
    with pytest.raises(CompletionFailed):
        ends[0].write(*scattered(), 20.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gid": "zz"}, "offer cannot be used"),
        ({"gid": "00"}, "offer cannot be used"),
        ({"mtu": 1500}, "offer cannot be used"),
        ({"number": -1}, "offer cannot be used"),
        ({"number": None}, "offer cannot be used"),
        ({"regions": []}, "regions: 1 here, 0 there"),
        ({"regions": [[1, 2]]}, "offer cannot be used"),
        ({"is_ethernet": False}, "InfiniBand"),
    ],
)
def test_an_offer_that_is_wrong_is_refused(change: dict[str, object], text: str) -> None:
    source = Side(Options())
    end = source.endpoint.connection("two")
    offer = [{**entry, **change} for entry in source.endpoint.connection("x").offer([source.region])]
    with pytest.raises(HandshakeFailed, match=text):
        end.connect([source.region], offer)
    with pytest.raises(HandshakeFailed, match="no NIC"):
        source.endpoint.connection("two").connect([source.region], [])


def test_blocks_outside_the_peer_s_region_are_refused_here() -> None:
    source, target = Side(Options(), seed=1), Side(Options())
    ends = join(source, target)
    local, remote, sizes = scattered()
    with pytest.raises(ValueError, match="outside"):
        ends[0].write(local, remote + 1, sizes)
    assert not target.pool.any() and ends[0].num_rails == 1


def test_an_end_is_closed_by_one_while_another_connects_it() -> None:
    source, target = Side(Options()), Side(Options())

    def connect(end: Connection, offer: list[dict[str, object]]) -> None:
        with contextlib.suppress(RdmaError):
            end.connect([source.region], offer)

    for number in range(40):
        end, peer = source.endpoint.connection("two"), target.endpoint.connection("one")
        offer = peer.offer([target.region])
        thread = threading.Thread(target=connect, args=(end, offer))
        thread.start()
        time.sleep(number * 5e-4)
        end.fail()
        end.close()
        thread.join()
        with pytest.raises(HandshakeFailed, match="closed"):
            end.connect([source.region], offer)
        peer.close()
    for side in (source, target):
        side.endpoint.close()


def test_who_is_stopped_before_a_nic_s_turn_does_not_connect() -> None:
    options = Options(timeout=14, retry_count=1)
    source, target = Side(options, seed=1), Side(options)
    end, peer = source.endpoint.connection("two"), target.endpoint.connection("one")
    peer.connect([target.region], end.offer([source.region]))
    end.fail()
    with pytest.raises(HandshakeFailed, match="stopped"):
        end.connect([source.region], peer.offer([target.region]))
    with pytest.raises(RdmaError):
        end.write(*scattered())
    before = source.pool.copy()
    with pytest.raises(RdmaError):
        peer.write(*scattered(), 5.0)
    assert np.array_equal(source.pool, before) and not target.pool.any()
    for connection, side in ((end, source), (peer, target)):
        connection.close()
        side.endpoint.close()


def test_the_peer_s_length_is_known_when_the_end_is_closed() -> None:
    source, target = Side(Options()), Side(Options())
    ends = join(source, target)
    ends[0].close()
    assert ends[0].remote_length() == POOL_BYTES  # who was about to read is told by `read`
    with pytest.raises(CompletionFailed, match="not connected"):
        ends[0].read(*scattered())


def test_who_has_never_connected_is_told_so() -> None:
    side = Side(Options())
    end = side.endpoint.connection("nobody")
    for move in (end.read, end.write):
        with pytest.raises(CompletionFailed, match="not connected"):
            move(*scattered())
    end.close()
    side.endpoint.close()


class HostAsGpu:
    """A GPU's part in registration, played by host memory: a descriptor that no NIC takes, or none; a pool that every NIC takes."""

    ordinal = 3

    def __init__(self, descriptor: int | None, orders: bool = True, can_flush: bool = True) -> None:
        self.descriptor, self.orders_nic_writes, self.can_flush_nic_writes = descriptor, orders, can_flush
        self.asked: tuple[int, int] = (0, 0)
        self.num_flushes = 0

    def dmabuf(self, pointer: int, num_bytes: int) -> int:
        self.asked = pointer, num_bytes
        if self.descriptor is None:
            raise RdmaError("cuMemGetHandleForAddressRange failed: CUDA_ERROR_NOT_SUPPORTED (801)")
        return self.descriptor

    def flush_nic_writes(self) -> None:
        self.num_flushes += 1


@pytest.mark.parametrize("has_descriptor", [True, False])
def test_gpu_memory_is_registered_in_the_other_way_where_dmabuf_fails(has_descriptor: bool) -> None:
    descriptor = os.memfd_create("no dmabuf") if has_descriptor else None
    gpu = HostAsGpu(descriptor, orders=False)
    source, target = Side(Options(), seed=1), Side(Options())
    address = target.pool.ctypes.data
    target.region = target.endpoint.register(address, POOL_BYTES, target.pool, gpu=gpu)  # type: ignore[arg-type]
    assert gpu.asked[0] <= address < gpu.asked[0] + 65536 and gpu.asked[0] % 65536 == gpu.asked[1] % 65536 == 0
    assert gpu.asked[0] + gpu.asked[1] >= address + POOL_BYTES
    ends = join(source, target)
    local, remote, sizes = scattered()
    ends[1].read(local, remote, sizes)
    assert np.array_equal(target.blocks[local // BLOCK_BYTES], source.blocks[remote // BLOCK_BYTES])
    target.region.flush()
    assert gpu.num_flushes == 1
    for end in ends:
        end.close()
    target.endpoint.close()
    if descriptor is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_gpu_memory_that_no_nic_reaches_is_said_with_both_reasons() -> None:
    endpoint = Endpoint(Options())
    with pytest.raises(RdmaUnavailable, match=r"GPU 3: by dmabuf: cuMemGet.*\(801\); by nvidia-peermem.*errno 14"):
        endpoint.register(4096, 8192, gpu=HostAsGpu(None))  # type: ignore[arg-type]
    with pytest.raises(RdmaUnavailable, match="KVCACHE_GDRCOPY_FLUSH_ENABLE=0"):
        endpoint.register(4096, 8192, gpu=HostAsGpu(None, orders=False, can_flush=False))  # type: ignore[arg-type]
    for value, expected in (("0", False), ("1", True), ("", None)):
        assert Options.from_environment({"KVCACHE_GDRCOPY_FLUSH_ENABLE": value}).is_flushed is expected
    with pytest.raises(ValueError, match="KVCACHE_GDRCOPY_FLUSH_ENABLE is '2'; it must be a number from 0 to 1"):
        Options.from_environment({"KVCACHE_GDRCOPY_FLUSH_ENABLE": "2"})
    endpoint.close()
