"""Connections over all NICs at once: memory registered once on each, one queue pair a NIC and peer, blocks striped over them.

endpoint = Endpoint(["mlx5_0", "mlx5_1"])
region = endpoint.register(address, length, owner)
connection = endpoint.connection("host b")            # on both sides
connection.connect([region], peer_offer)              # offers are exchanged over any channel: see bootstrap.py
connection.read(local, remote, sizes, timeout_s)      # offsets into both regions
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdma_comm import _verbs
from rdma_comm.devices import SYSFS, Nic, choose_gid, distance, list_gpus, list_nics
from rdma_comm.errors import CompletionFailed, HandshakeFailed, RdmaError, RdmaUnavailable, VerbsError
from rdma_comm.gpu_memory import GpuMemory

if TYPE_CHECKING:
    from rdma_comm.cuda.driver import Gpu

MAX_RAILS = 16  # _transfer.c's
MAX_SEND_WR = 1024
MAX_RECV_WR = 16
MAX_READS = 16  # outstanding reads a queue pair; NICs allow 16 at most
WAITS_FOR_EVER = 7  # as a retry count, soft-RoCE never gives up


@dataclass(frozen=True, slots=True)
class Options:
    """How connections are made."""

    nics: tuple[str, ...] = ()  #: in order of preference; none: all that are active
    gid_index: int | None = None  #: None: chosen
    timeout: int = 18  #: of one try: 4.096 us * 2**timeout; 18 is 1.07 s
    retry_count: int = 6
    traffic_class: int = 0
    is_relaxed: bool = False  #: relaxed PCI ordering
    is_flushed: bool | None = (
        None  #: whether what NICs wrote to a GPU is flushed before it is used; None: where its GPU needs it
    )

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Options:
        """Read KVCACHE_RDMA_NICS, KVCACHE_RDMA_GID_INDEX, KVCACHE_IB_TIMEOUT, KVCACHE_RELAX_ORDERING, KVCACHE_GDRCOPY_FLUSH_ENABLE.

        Raises: ValueError: a value is not valid; names the variable and what is allowed.
        """

        def number(name: str, low: int, high: int) -> int | None:
            text = env.get(name, "").strip()
            if not text:
                return None
            if not text.isdecimal() or not low <= int(text) <= high:
                raise ValueError(f"{name} is {text!r}; it must be a number from {low} to {high}")
            return int(text)

        nics = tuple(n.strip() for n in env.get("KVCACHE_RDMA_NICS", "").split(",") if n.strip())
        timeout, flush = number("KVCACHE_IB_TIMEOUT", 8, 31), number("KVCACHE_GDRCOPY_FLUSH_ENABLE", 0, 1)
        return cls(
            nics=nics,
            gid_index=number("KVCACHE_RDMA_GID_INDEX", 0, 255),
            timeout=18 if timeout is None else timeout,
            is_relaxed=bool(number("KVCACHE_RELAX_ORDERING", 0, 1)),
            is_flushed=None if flush is None else bool(flush),
        )


def choose_nics(names: Sequence[str], sysfs: Path = SYSFS, gpu: str = "") -> list[Nic]:
    """
    Args:
        gpu: PCI address of the one whose memory they are for.
    Returns: the named NICs in that order; without names those that are nearest to the GPU, or all active ones; MAX_RAILS at most.
    Raises: RdmaUnavailable: one is not there or has no active port, or there is none at all.
    """
    known = {n.name: n for n in list_nics(sysfs)}
    if not names:
        usable = [n for n in known.values() if n.active_port is not None]
        if not usable:
            _verbs.device_names()  # says why, where the kernel or the library is what is missing
            raise RdmaUnavailable(f"no RDMA device here has an active port (devices: {', '.join(known) or 'none'})")
        near = next((g for g in list_gpus(sysfs) if g.address == gpu), None)
        if near is not None:
            least = min(distance(n, near) for n in usable)
            usable = [n for n in usable if distance(n, near) == least]
        return usable[:MAX_RAILS]
    if len(names) > MAX_RAILS:
        raise RdmaUnavailable(f"KVCACHE_RDMA_NICS names {len(names)} devices; there may be {MAX_RAILS}")
    for name in names:
        if name not in known:
            raise RdmaUnavailable(
                f"KVCACHE_RDMA_NICS names {name!r}; there are {', '.join(known) or 'no RDMA devices'}"
            )
        if known[name].active_port is None:
            raise RdmaUnavailable(f"KVCACHE_RDMA_NICS names {name!r}, which has no active port")
    return [known[name] for name in names]


class Rail:
    """One NIC, opened."""

    def __init__(self, nic: Nic, options: Options) -> None:
        """Raises: RdmaUnavailable, VerbsError."""
        port = nic.active_port
        if port is None:
            raise RdmaUnavailable(f"{nic.name} has no active port")
        self.nic, self.port = nic, port
        self.gid = choose_gid(port, options.gid_index)
        self.device = _verbs.Device(nic.name)
        attributes = self.device.attributes()
        facts = self.device.port(port.number)
        self.mtu, self.lid = facts["active_mtu"], facts["lid"]
        self.max_reads = max(1, min(MAX_READS, attributes["max_qp_rd_atomic"], attributes["max_qp_init_rd_atomic"]))
        self.max_send_wr = min(MAX_SEND_WR, attributes["max_qp_wr"])
        self.domain = _verbs.ProtectionDomain(self.device)

    def close(self) -> None:
        """Close the NIC; its regions and queue pairs are closed already."""
        self.domain.close()
        self.device.close()


class Region:
    """One piece of memory, registered on every NIC."""

    def __init__(
        self, rails: Sequence[Rail], address: int, length: int, owner: object, access: int, memory: GpuMemory | None
    ) -> None:
        self.address, self.length, self._memory = address, length, memory
        self.on_rail = []
        try:
            for rail in rails:
                if memory is not None:
                    self.on_rail.append(memory.register(rail.nic.name, rail.domain, access, owner))
                else:
                    self.on_rail.append(_verbs.MemoryRegion(rail.domain, address, length, access, owner))
        except Exception:
            self.close()
            raise

    def flush(self) -> None:
        """What NICs have written to it so far is seen by its GPU's kernels from now on. Raises: CudaError."""
        if self._memory is not None:
            self._memory.flush()

    def close(self) -> None:
        """Deregister. Idempotent."""
        for region in self.on_rail:
            region.close()
        if self._memory is not None:
            self._memory.close()


class Endpoint:
    """This process's NICs."""

    def __init__(self, options: Options | None = None, sysfs: Path = SYSFS, gpu: str = "") -> None:
        """
        Args:
            gpu: PCI address of the GPU whose memory will be registered; NICs that are not named are chosen by their distance to it.
        Raises: RdmaUnavailable: why there is no RDMA here, or not with these NICs; VerbsError.
        """
        self.options = options or Options.from_environment(os.environ)
        self.rails: list[Rail] = []
        self._regions: list[Region] = []
        try:
            for nic in choose_nics(self.options.nics, sysfs, gpu):
                self.rails.append(Rail(nic, self.options))
        except Exception:
            self.close()
            raise

    def register(
        self,
        address: int,
        length: int,
        owner: object = None,
        is_writable_by_peers: bool = False,
        gpu: Gpu | None = None,
    ) -> Region:
        """Register memory on every NIC, once a process and piece of memory.

        Args:
            owner: kept alive as long as the region.
            is_writable_by_peers: peers may write to it, not only read.
            gpu: whose memory it is (rdma_comm.cuda.driver); None: the host's.
        Raises: VerbsError; RdmaUnavailable: a NIC has no way to this GPU's memory.
        """
        access = _verbs.LOCAL_WRITE | _verbs.REMOTE_READ
        access |= _verbs.REMOTE_WRITE if is_writable_by_peers else 0
        access |= _verbs.RELAXED_ORDERING if self.options.is_relaxed else 0
        memory = None if gpu is None else GpuMemory(gpu, address, length, self.options.is_flushed)
        region = Region(self.rails, address, length, owner, access, memory)
        self._regions.append(region)
        return region

    def connection(self, peer: str = "") -> Connection:
        """Returns: one end of a connection, not connected yet. Raises: VerbsError."""
        return Connection(self, peer)

    def close(self) -> None:
        """Close everything; connections first. Idempotent."""
        for region in self._regions:
            region.close()
        self._regions.clear()
        while self.rails:
            self.rails.pop().close()


@dataclass(slots=True)
class _Link:
    """One queue pair and what it reaches."""

    rail: Rail
    pair: Any
    queues: tuple[Any, ...]
    psn: int
    regions: list[Any] = field(default_factory=list)
    remote: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # address, length, key of each of the peer's regions
    is_lost: bool = False


def _bits(value: Any, count: int) -> int:
    """Returns: value. Raises: ValueError: it is no unsigned number of so many bits."""
    if not isinstance(value, int) or not 0 <= value < 1 << count:
        raise ValueError(f"{value!r} is not an unsigned number of {count} bits")
    return value


def _unsigned(remote: Mapping[str, Any], name: str, bits: int) -> int:
    try:
        return _bits(remote[name], bits)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class Connection:
    """Queue pairs to one peer, one a NIC. One transfer at a time; `fail` and `close` from any thread."""

    def __init__(self, endpoint: Endpoint, peer: str = "") -> None:
        self.peer = peer
        self.options = endpoint.options
        self.lost: list[str] = []  #: what was said when a NIC failed
        self._links: list[_Link] = []
        self._remote_lengths: list[int] = []  # of the peer's regions: kept when the links are gone
        self._changing = threading.Lock()  # of _links
        self._is_stopped = False  # by `fail`, perhaps between two NICs' turns in `connect`
        for rail in endpoint.rails:
            # A failed pair reports every request it had, signalled or not: the queue holds them all.
            queues = (
                _verbs.CompletionQueue(rail.device, rail.max_send_wr + 16),
                _verbs.CompletionQueue(rail.device, MAX_RECV_WR),
            )
            pair = _verbs.QueuePair(rail.domain, *queues, rail.max_send_wr, MAX_RECV_WR, peer)
            self._links.append(_Link(rail, pair, queues, secrets.randbits(24)))

    def offer(self, regions: Sequence[Region]) -> list[dict[str, Any]]:
        """Returns: what the peer needs to connect and to reach the regions: plain values, one entry a NIC."""
        return [
            {
                "nic": link.rail.nic.name,
                "gid": link.rail.gid.address.packed.hex(),
                "lid": link.rail.lid,
                "is_ethernet": link.rail.port.is_ethernet,
                "mtu": link.rail.mtu,
                "max_reads": link.rail.max_reads,
                "number": link.pair.number,
                "psn": link.psn,
                "regions": [[r.address, r.length, r.on_rail[index].remote_key] for r in regions],
            }
            for index, link in enumerate(self._links)
        ]

    def connect(self, regions: Sequence[Region], offer: Sequence[Mapping[str, Any]]) -> None:
        """Join the queue pairs with the peer's, NIC by NIC in both sides' order; NICs that only one side has are left out.

        Args:
            regions: ours; a transfer goes between the regions of one index.

        Raises: HandshakeFailed: the offer is not one, or this end is closed or was stopped; VerbsError: a NIC cannot reach its counterpart.
        """
        with self._changing:  # `close` waits
            self._connect(regions, offer)

    def _connect(self, regions: Sequence[Region], offer: Sequence[Mapping[str, Any]]) -> None:
        if not self._links:
            raise HandshakeFailed("this connection is closed")
        try:
            for index, (link, remote) in enumerate(zip(self._links, offer, strict=False)):
                link.regions = [r.on_rail[index] for r in regions]
                link.remote = [
                    (_bits(a, 64), _bits(length, 64), _bits(key, 32)) for a, length, key in remote["regions"]
                ]
                if len(link.remote) != len(regions):
                    raise HandshakeFailed(f"regions: {len(regions)} here, {len(link.remote)} there")
                self._join(link, remote)
                if self._is_stopped:
                    link.pair.fail()
                    raise HandshakeFailed("this connection was stopped")
        except (KeyError, TypeError, OverflowError, ValueError) as error:
            raise HandshakeFailed(f"the peer's offer cannot be used: {type(error).__name__}: {error}") from error
        if not offer:
            raise HandshakeFailed("the peer offers no NIC")
        for link in self._links[len(offer) :]:
            self._drop(link)
        del self._links[len(offer) :]
        self._remote_lengths = [length for _, length, _ in self._links[0].remote]

    def _join(self, link: _Link, remote: Mapping[str, Any]) -> None:
        rail, options = link.rail, self.options
        if bool(remote["is_ethernet"]) != rail.port.is_ethernet:
            kinds = {True: "Ethernet", False: "InfiniBand"}
            raise HandshakeFailed(
                f"{rail.nic.name} is {kinds[rail.port.is_ethernet]}, the peer's {remote['nic']} is {kinds[bool(remote['is_ethernet'])]}"
            )
        max_reads = max(1, min(rail.max_reads, int(remote["max_reads"])))
        link.pair.connect(
            port=rail.port.number,
            gid_index=rail.gid.index,
            is_ethernet=rail.port.is_ethernet,
            mtu=min(rail.mtu, int(remote["mtu"])),
            access=_verbs.LOCAL_WRITE | _verbs.REMOTE_READ | _verbs.REMOTE_WRITE,
            local_psn=link.psn,
            remote_number=_unsigned(remote, "number", 24),
            remote_psn=_unsigned(remote, "psn", 24),
            remote_lid=_unsigned(remote, "lid", 16),
            remote_gid=bytes.fromhex(remote["gid"]),
            timeout=options.timeout,
            retry_count=min(options.retry_count, WAITS_FOR_EVER - 1),
            rnr_retry=WAITS_FOR_EVER - 1,
            max_reads=max_reads,
            max_peer_reads=max_reads,
            traffic_class=options.traffic_class,
        )
        link.pair.post_receives(MAX_RECV_WR)

    def remote_length(self, region: int = 0) -> int:
        """Returns: bytes of one of the peer's regions."""
        return self._remote_lengths[region]

    @property
    def num_rails(self) -> int:
        """NICs that still work."""
        return sum(not link.is_lost for link in self._links)

    def read(self, local: Any, remote: Any, sizes: Any, timeout_s: float = 10.0, region: int = 0) -> None:
        """Read blocks of the peer's region into ours; when it returns they are there.

        Args:
            local, remote, sizes: int64 arrays, one entry a block: offsets into our region and the peer's, bytes.
            timeout_s: without any progress for so long the connection fails.
            region: which of the regions.
        Raises: CompletionFailed: every NIC has failed, and nothing lands any more; VerbsError: something may; ValueError: a block is outside a region.
        """
        self._run(_verbs.READ, local, remote, sizes, timeout_s, region)

    def write(self, local: Any, remote: Any, sizes: Any, timeout_s: float = 10.0, region: int = 0) -> None:
        """Write blocks of our region into the peer's; when it returns the peer's NIC has acknowledged them. As `read` otherwise."""
        self._run(_verbs.WRITE, local, remote, sizes, timeout_s, region)

    def _run(self, opcode: int, local: Any, remote: Any, sizes: Any, timeout_s: float, region: int) -> None:
        links = [link for link in self._links if link.remote and not link.is_lost]
        if not links:
            raise CompletionFailed(-1, self.lost[-1] if self.lost else "not connected", 0, self.peer)
        rails = tuple((link.pair, link.regions[region], *link.remote[region]) for link in links)
        try:
            num_done, results, is_stalled = _verbs.transfer(opcode, rails, local, remote, sizes, timeout_s)
        except VerbsError as error:  # a NIC does not even let go of a failed queue pair
            for link in links:
                link.is_lost = True
                self.lost.append(f"{link.rail.nic.name}: {error}")
            raise
        fault = (0, "", 0)
        for link, (_, status, name, vendor_error) in zip(links, results, strict=True):
            if status:
                link.is_lost = True
                fault = (status, f"no progress for {timeout_s:g} s" if is_stalled else name, vendor_error)
                self.lost.append(f"{link.rail.nic.name}: {fault[1]}")
        if num_done * 8 < len(memoryview(sizes).cast("B")):
            raise CompletionFailed(*fault, self.peer)

    def send_immediate(self, value: int, timeout_s: float = 10.0) -> None:
        """Raise a number at the peer, behind everything written before. Raises: VerbsError, CompletionFailed."""
        link = next((x for x in self._links if not x.is_lost), None)
        if link is None:
            raise CompletionFailed(-1, "every NIC has failed", 0, self.peer)
        try:
            link.pair.send_immediate(value, timeout_s)
        except RdmaError as error:
            link.is_lost = True
            self.lost.append(f"{link.rail.nic.name}: {error}")
            raise

    def receive_immediates(self, timeout_s: float) -> list[int]:
        """Returns: numbers that the peer has raised; none after timeout_s. Raises: VerbsError."""
        values: list[int] = []
        for link in self._links:
            wait_s = timeout_s if not values else 0.0
            for _, status, _, _, immediate, _ in link.queues[1].poll(timeout_s=wait_s):
                if status == 0 and immediate is not None:
                    values.append(immediate)
                    if not link.is_lost:
                        link.pair.post_receives(1)
        return values

    def fail(self) -> None:
        """Stop at once and for good: a transfer in progress, or `connect`, ends with an error, and nothing of it lands any more."""
        self._is_stopped = True
        for link in self._links:
            link.pair.fail()

    def close(self) -> None:
        """Destroy the queue pairs, after a `connect` that is under way. Idempotent. Raises: RuntimeError: a transfer is using them; `fail` ends it."""
        with self._changing:
            while self._links:
                self._drop(self._links[-1])
                self._links.pop()

    def _drop(self, link: _Link) -> None:
        link.pair.close()
        for queue in link.queues:
            queue.close()
