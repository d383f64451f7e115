"""Against rdma-core's own binding: the devices that it reports, and a peer that is not ours at either end of a connection."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdma_comm import pyverbs
from rdma_comm.devices import SYSFS, list_nics
from rdma_comm.endpoint import Connection, Endpoint, Options

pytestmark = pytest.mark.skipif(pyverbs.find() is None, reason="no pyverbs: apt-get install python3-pyverbs")
POOL_BYTES, BLOCK_BYTES = 1 << 20, 4096
PSN, PORT = 0x123456, 1


def part(name: str) -> Any:
    return importlib.import_module(f"pyverbs.{name}")


class ForeignPeer:
    """A queue pair and a piece of memory of pyverbs'."""

    def __init__(self, nic: str, gid_index: int) -> None:
        e = part("enums")
        self._gid_index, self._e = gid_index, e
        self.context = part("device").Context(name=nic)
        self.domain = part("pd").PD(self.context)
        access = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_READ | e.IBV_ACCESS_REMOTE_WRITE
        self.memory = part("mr").MR(self.domain, POOL_BYTES, access)
        self.queue = part("cq").CQ(self.context, 64, None, None, 0)
        qp = part("qp")
        limits = qp.QPCap(max_send_wr=16, max_recv_wr=16, max_send_sge=1, max_recv_sge=1)
        self.pair = qp.QP(self.domain, qp.QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self.queue, rcq=self.queue, cap=limits))
        self._attributes = qp.QPAttr(port_num=PORT)
        self._attributes.qp_access_flags = access

    def offer(self) -> list[dict[str, Any]]:
        gid = self.context.query_gid(PORT, self._gid_index).gid
        memory = [self.memory.buf, POOL_BYTES, self.memory.rkey]
        return [
            {
                "nic": "foreign", "gid": gid.replace(":", ""), "lid": 0, "is_ethernet": True, "mtu": 1024, "max_reads": 1,
                "number": self.pair.qp_num, "psn": PSN, "regions": [memory],
            }
        ]  # fmt: skip

    def connect(self, offer: dict[str, Any]) -> None:
        addr, a = part("addr"), self._attributes
        text = ":".join(offer["gid"][i : i + 4] for i in range(0, 32, 4))
        route = addr.GlobalRoute(dgid=addr.GID(text), sgid_index=self._gid_index, hop_limit=64)
        a.ah_attr = addr.AHAttr(gr=route, is_global=1, port_num=PORT)
        a.dest_qp_num, a.path_mtu, a.rq_psn, a.max_dest_rd_atomic, a.min_rnr_timer = (
            offer["number"],
            3,
            offer["psn"],
            1,
            12,
        )
        a.timeout, a.retry_cnt, a.rnr_retry, a.sq_psn, a.max_rd_atomic = 17, 4, 4, PSN, 1
        self.pair.to_rts(a)

    def post(self, opcode: int, local: int, remote_address: int, remote_key: int, num_bytes: int) -> None:
        wr = part("wr")
        piece = wr.SGE(self.memory.buf + local, num_bytes, self.memory.lkey)
        request = wr.SendWR(opcode=opcode, num_sge=1, sg=[piece], send_flags=self._e.IBV_SEND_SIGNALED)
        request.set_wr_rdma(remote_key, remote_address)
        self.pair.post_send(request)
        while True:
            count, done = self.queue.poll(1)
            if count:
                assert done[0].status == self._e.IBV_WC_SUCCESS, done[0]
                return

    @property
    def content(self) -> np.ndarray:
        return np.frombuffer(self.memory.read(POOL_BYTES, 0), np.uint8)


@pytest.fixture
def ends() -> Any:
    endpoint = Endpoint(Options())
    pool = np.random.default_rng(1).integers(0, 256, POOL_BYTES, dtype=np.uint8)
    region = endpoint.register(pool.ctypes.data, POOL_BYTES, pool, is_writable_by_peers=True)
    rail = endpoint.rails[0]
    peer = ForeignPeer(rail.nic.name, rail.gid.index)
    peer.memory.write(np.random.default_rng(2).bytes(POOL_BYTES), POOL_BYTES, 0)
    connection = endpoint.connection("a foreign peer")
    offer = connection.offer([region])[0]
    connection.connect([region], peer.offer())
    peer.connect(offer)
    yield connection, pool, peer, offer["regions"][0]
    connection.close()
    peer.context.close()
    endpoint.close()


def test_it_reports_the_devices_and_addresses_that_sysfs_does() -> None:
    tables = pyverbs.gid_tables()
    ports = {(n.name, p.number): p.gids for n in list_nics(Path("/sys/../sys")) for p in n.ports}  # by files alone
    assert ports and set(tables) == {key for key, gids in ports.items() if gids}
    for key, gids in tables.items():
        assert sorted(gids, key=lambda g: g.index) == sorted(ports[key], key=lambda g: g.index)
    assert {(n.name, p.number): p.gids for n in list_nics(SYSFS) for p in n.ports if p.gids} == tables


def test_our_reads_and_writes_reach_its_memory(ends: tuple[Connection, np.ndarray, ForeignPeer, list[int]]) -> None:
    connection, pool, peer, _ = ends
    before, foreign = pool.copy(), peer.content.copy()
    rng = np.random.default_rng(3)
    local, remote = (rng.permutation(POOL_BYTES // BLOCK_BYTES)[:100] * BLOCK_BYTES for _ in range(2))
    sizes = np.full(100, BLOCK_BYTES)
    connection.read(local[:50], remote[:50], sizes[:50])
    for here, there in zip(local[:50], remote[:50], strict=True):
        assert np.array_equal(pool[here : here + BLOCK_BYTES], foreign[there : there + BLOCK_BYTES])
    connection.write(local[50:], remote[50:], sizes[50:])
    content = peer.content
    for here, there in zip(local[50:], remote[50:], strict=True):
        assert np.array_equal(content[there : there + BLOCK_BYTES], before[here : here + BLOCK_BYTES])


def test_its_reads_and_writes_reach_our_memory(ends: tuple[Connection, np.ndarray, ForeignPeer, list[int]]) -> None:
    _, pool, peer, (address, _, key) = ends
    e, foreign = part("enums"), peer.content.copy()
    peer.post(e.IBV_WR_RDMA_WRITE, 8192, address + 100_000, key, 5000)
    assert np.array_equal(pool[100_000:105_000], foreign[8192:13192])
    peer.post(e.IBV_WR_RDMA_READ, 200_000, address + 7, key, 70_000)
    assert np.array_equal(peer.content[200_000:270_000], pool[7:70_007])
