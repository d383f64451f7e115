"""The compiled part alone: two queue pairs of one process, on a device that is there."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from rdma_comm import _verbs
from rdma_comm.devices import choose_gid, list_nics
from rdma_comm.errors import RdmaUnavailable, VerbsError

ACCESS = _verbs.LOCAL_WRITE | _verbs.REMOTE_READ | _verbs.REMOTE_WRITE
POOL_BYTES = 4 << 20
TIMEOUT_S = 20.0


@dataclass
class Host:
    """A device with two registered pools."""

    device: _verbs.Device
    domain: _verbs.ProtectionDomain
    gid_index: int
    port: int
    source: np.ndarray
    target: np.ndarray
    from_source: _verbs.MemoryRegion
    to_target: _verbs.MemoryRegion

    def pair_to_be(self) -> _verbs.QueuePair:
        queues = [_verbs.CompletionQueue(self.device, 64) for _ in range(2)]
        return _verbs.QueuePair(self.domain, queues[0], queues[1], 32, 1)

    def connect(self, own: _verbs.QueuePair, remote_number: int, timeout: int = 17, retry_count: int = 4) -> None:
        own.connect(
            port=self.port, gid_index=self.gid_index, is_ethernet=True, mtu=1024, access=ACCESS, local_psn=7,
            remote_number=remote_number, remote_psn=7, remote_lid=0, remote_gid=self.device.gid(self.port, self.gid_index),
            timeout=timeout, retry_count=retry_count, rnr_retry=6, max_reads=16, max_peer_reads=16,
        )  # fmt: skip

    def pair(
        self,
        timeout: int = 17,
        retry_count: int = 4,
        max_send_wr: int = 256,
        queues: list[_verbs.CompletionQueue] | None = None,
    ) -> tuple[_verbs.QueuePair, _verbs.QueuePair]:
        queues = queues or [_verbs.CompletionQueue(self.device, 1100) for _ in range(4)]
        one = _verbs.QueuePair(self.domain, queues[0], queues[1], max_send_wr, 16, "two")
        two = _verbs.QueuePair(self.domain, queues[2], queues[3], max_send_wr, 16, "one")
        for own, peer in ((one, two), (two, one)):
            self.connect(own, peer.number, timeout, retry_count)
        self.queues = queues
        return one, two

    def to(
        self, pair: _verbs.QueuePair, key: int | None = None
    ) -> tuple[_verbs.QueuePair, _verbs.MemoryRegion, int, int, int]:
        region = self.to_target
        return pair, self.from_source, region.address, region.length, region.remote_key if key is None else key


@pytest.fixture(scope="module")
def host() -> Host:
    nic = next(n for n in list_nics() if n.active_port)
    port = nic.active_port
    assert port is not None
    device = _verbs.Device(nic.name)
    domain = _verbs.ProtectionDomain(device)
    source = np.random.default_rng(1).integers(0, 256, POOL_BYTES, dtype=np.uint8)
    target = np.zeros(POOL_BYTES, np.uint8)
    regions = [_verbs.MemoryRegion(domain, a.ctypes.data, a.nbytes, ACCESS, a) for a in (source, target)]
    return Host(device, domain, choose_gid(port).index, port.number, source, target, *regions)


def scattered(size: int, seed: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = POOL_BYTES // size
    rng = np.random.default_rng(seed)
    return rng.permutation(count) * size, rng.permutation(count) * size, np.full(count, size)


def test_the_device_says_what_it_can_do(host: Host) -> None:
    assert host.device.attributes()["max_qp_wr"] >= 1024
    assert host.device.port(host.port)["state"] == 4
    assert len(host.device.gid(host.port, host.gid_index)) == 16
    if "RDMA_GID_INDEX" in os.environ:
        assert host.gid_index == int(os.environ["RDMA_GID_INDEX"])


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(RdmaUnavailable, match="no RDMA device nic9"):
        _verbs.Device("nic9")


@pytest.mark.parametrize("size", [512, 4096, 65536, 1 << 20])
def test_scattered_blocks_are_written_and_read(host: Host, size: int) -> None:
    local, remote, sizes = scattered(size)
    one, two = host.pair(max_send_wr=64)  # a list of thousands must not overrun a queue of 64
    host.target[:] = 0
    num_done, results, is_stalled = _verbs.transfer(_verbs.WRITE, (host.to(one),), local, remote, sizes, TIMEOUT_S)
    assert (num_done, is_stalled, results[0][1]) == (len(local), False, 0)
    source, target = host.source.reshape(-1, size), host.target.reshape(-1, size)
    assert np.array_equal(target[remote // size], source[local // size])
    host.target[:] = 0
    region = host.from_source
    rail = (two, host.to_target, region.address, region.length, region.remote_key)
    assert _verbs.transfer(_verbs.READ, (rail,), remote, local, sizes, TIMEOUT_S)[0] == len(local)
    assert np.array_equal(target[remote // size], source[local // size])


def test_an_immediate_arrives_behind_what_was_written(host: Host) -> None:
    one, two = host.pair()
    two.post_receives(4)
    one.send_immediate(0xDEADBEEF)
    found = host.queues[3].poll(4, timeout_s=TIMEOUT_S)
    assert [(status, immediate) for _, status, _, _, immediate, _ in found] == [(0, 0xDEADBEEF)]


def test_a_wrong_key_is_refused_by_the_peer_s_device(host: Host) -> None:
    local, remote, sizes = scattered(65536)
    one, _ = host.pair()
    host.target[:] = 0
    rail = host.to(one, key=host.to_target.remote_key + 77)
    num_done, results, _ = _verbs.transfer(_verbs.WRITE, (rail,), local, remote, sizes, TIMEOUT_S)
    assert num_done == 0 and "access" in results[0][2]
    assert not host.target.any()


def test_two_rails_share_and_one_that_is_lost_leaves_its_blocks_to_the_other(host: Host) -> None:
    local, remote, sizes = scattered(16384)
    one, _ = host.pair()
    three, four = host.pair(timeout=14, retry_count=2)
    host.target[:] = 0
    rails = (host.to(one), host.to(three))
    assert all(done > 0 for done, *_ in _verbs.transfer(_verbs.WRITE, rails, local, remote, sizes, TIMEOUT_S)[1])
    host.target[:] = 0
    four.close()  # its peer is gone
    num_done, results, _ = _verbs.transfer(_verbs.WRITE, rails, local, remote, sizes, TIMEOUT_S)
    assert num_done == len(local)
    assert results[0][1] == 0 and results[1][1] != 0
    source, target = host.source.reshape(-1, 16384), host.target.reshape(-1, 16384)
    assert np.array_equal(target[remote // 16384], source[local // 16384])  # numpy's sort is wrong under QEMU's AVX2


def test_a_pair_that_is_stopped_in_mid_transfer_says_so(host: Host) -> None:
    local, remote, sizes = scattered(4096)
    one, _ = host.pair()
    threading.Timer(0.02, one.fail).start()
    began_s = time.monotonic()
    num_done, results, _ = _verbs.transfer(_verbs.WRITE, (host.to(one),), local, remote, sizes, TIMEOUT_S)
    assert num_done < len(local) and results[0][1] != 0
    assert time.monotonic() - began_s < 10


@pytest.mark.parametrize("end", ["refused", "stopped", "stalled"])
def test_a_failed_pair_is_destroyed_before_its_blocks_are_free(host: Host, end: str) -> None:
    local, remote, sizes = scattered(4096)
    one, two = host.pair()
    key, timeout_s = host.from_source.remote_key + (77 if end == "refused" else 0), TIMEOUT_S
    if end == "stopped":
        threading.Timer(0.02, one.fail).start()
    if end == "stalled":
        two.close()
        timeout_s = 0.1
    rail = (one, host.to_target, host.from_source.address, host.from_source.length, key)
    num_done, results, is_stalled = _verbs.transfer(_verbs.READ, (rail,), local, remote, sizes, timeout_s)
    assert num_done < len(local) and results[0][1] != 0 and is_stalled == (end == "stalled")
    host.target[:] = 0  # somebody else's by now
    with pytest.raises(ValueError, match="closed"):
        _ = one.number
    with pytest.raises(ValueError, match="closed"):
        _verbs.transfer(_verbs.READ, (rail,), local, remote, sizes, timeout_s)
    time.sleep(0.3)
    assert not host.target.any() and not host.queues[0].poll()
    for _ in range(2):
        one.fail()
        one.close()


def test_a_late_completion_is_not_taken_for_another_pair_s(host: Host) -> None:
    one, two = host.pair(timeout=14, retry_count=2)
    two.close()  # the number goes nowhere, which the device says after its tries
    with pytest.raises(VerbsError, match="timed out"):
        one.send_immediate(1, timeout_s=0.02)
    time.sleep(1.5)
    local, remote, sizes = scattered(65536)
    again, _ = host.pair(queues=host.queues)
    host.target[:] = 0
    assert _verbs.transfer(_verbs.WRITE, (host.to(again),), local, remote, sizes, TIMEOUT_S)[0] == len(local)
    assert np.array_equal(
        host.target.reshape(-1, 65536)[remote // 65536], host.source.reshape(-1, 65536)[local // 65536]
    )


def test_bytes_outside_a_region_are_refused_before_anything_is_posted(host: Host) -> None:
    local, remote, sizes = scattered(65536)
    one, _ = host.pair()
    for changed in (
        (local + 1, remote, sizes),
        (local, remote + 1, sizes),
        (local, remote, -sizes),
        (local - 65536, remote, sizes),
    ):
        with pytest.raises(ValueError, match="outside"):
            _verbs.transfer(_verbs.WRITE, (host.to(one),), *changed, TIMEOUT_S)
    with pytest.raises(ValueError):
        _verbs.transfer(_verbs.WRITE, (host.to(one),), local[1:], remote, sizes, TIMEOUT_S)
    with pytest.raises(ValueError):
        _verbs.transfer(77, (host.to(one),), local, remote, sizes, TIMEOUT_S)


def test_children_keep_parents_and_what_is_closed_says_so(host: Host) -> None:
    with pytest.raises(VerbsError, match="ibv_dealloc_pd failed: Device or resource busy"):
        host.domain.close()
    domain = _verbs.ProtectionDomain(host.device)
    region = _verbs.MemoryRegion(domain, host.source.ctypes.data, 4096, ACCESS, host.source)
    del domain  # the region needs it still
    assert region.remote_key
    region.close()
    region.close()
    one, two = host.pair()
    one.close()
    one.close()
    with pytest.raises(ValueError, match="closed"):
        one.post_receives(1)
    with pytest.raises(ValueError, match="closed"):
        _verbs.transfer(_verbs.WRITE, (host.to(one),), *scattered(65536), TIMEOUT_S)
    two.close()


def test_a_pair_is_not_closed_while_it_connects(host: Host) -> None:
    num_refused = 0

    def connect(pair: _verbs.QueuePair, number: int) -> None:
        with contextlib.suppress(ValueError):  # closed before it began
            host.connect(pair, number)

    for _ in range(60):
        pair = host.pair_to_be()
        thread = threading.Thread(target=connect, args=(pair, pair.number))
        thread.start()
        while thread.is_alive():
            try:
                pair.close()
                thread.join()
            except RuntimeError:
                num_refused += 1
        pair.close()
    assert num_refused


def test_a_pair_that_is_stopped_while_it_connects_says_so(host: Host) -> None:
    said: list[str] = []

    def connect(pair: _verbs.QueuePair, number: int) -> None:
        try:
            host.connect(pair, number)
        except VerbsError as error:
            said.append(str(error))

    for _ in range(50):
        pair, other = host.pair_to_be(), host.pair_to_be()
        thread = threading.Thread(target=connect, args=(pair, other.number))
        thread.start()
        while thread.is_alive():
            pair.fail()
        pair.close()
    assert said
    assert all("canceled" in text for text in said), said


def test_a_queue_that_somebody_waits_for_is_left_alone(host: Host) -> None:
    queue = _verbs.CompletionQueue(host.device, 16)
    waits = threading.Thread(target=queue.poll, kwargs={"timeout_s": 1.0})
    waits.start()
    time.sleep(0.3)
    with pytest.raises(RuntimeError, match="waiting"):
        queue.close()
    with pytest.raises(RuntimeError, match="waiting"):
        queue.poll()
    waits.join()
    assert queue.poll() == []
    queue.close()


def test_what_a_transfer_uses_is_left_alone(host: Host) -> None:
    local, remote, sizes = scattered(65536)
    one, two = host.pair()
    region = _verbs.MemoryRegion(host.domain, host.target.ctypes.data, POOL_BYTES, ACCESS, host.target)
    rail = (one, region, host.from_source.address, host.from_source.length, host.from_source.remote_key)
    with pytest.raises(RuntimeError, match="another call"):
        _verbs.transfer(_verbs.READ, (rail, rail), local, remote, sizes, TIMEOUT_S)
    two.close()  # what is read stalls
    thread = threading.Thread(target=_verbs.transfer, args=(_verbs.READ, (rail,), local, remote, sizes, 1.0))
    thread.start()
    time.sleep(0.3)
    for act in (one.close, region.close, host.queues[0].close, host.queues[0].poll, lambda: one.send_immediate(1)):
        with pytest.raises((RuntimeError, VerbsError), match=r"another call|a transfer|waiting"):
            act()
    thread.join()
    for own in (region, one, *host.queues):
        own.close()


def test_a_device_is_not_closed_under_what_it_has(host: Host) -> None:
    device = _verbs.Device(host.device.name)
    domain, queue = _verbs.ProtectionDomain(device), _verbs.CompletionQueue(device, 16)
    for child in (domain, queue):
        with pytest.raises(VerbsError, match="ibv_close_device failed: Device or resource busy"):
            device.close()
        child.close()
    device.close()
    device.close()


def test_a_thousand_pairs_leave_nothing(host: Host) -> None:
    def used() -> tuple[int, int]:
        gc.collect()
        count = subprocess.run("rdma resource show qp 2>/dev/null | wc -l", shell=True, capture_output=True, check=True)
        return len(os.listdir("/proc/self/fd")), int(count.stdout)

    def connect_and_close() -> None:  # a pair that is still named keeps its queues
        for pair in host.pair():
            pair.close()
        host.queues = []

    connect_and_close()
    before = used()
    for _ in range(500):  # 1,000 queue pairs
        connect_and_close()
    assert used() <= before
