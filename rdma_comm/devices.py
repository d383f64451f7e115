"""What RDMA hardware there is, read from sysfs (addresses from pyverbs where the system has it): NICs, ports, GIDs, and how far each NIC is from
each GPU.

The sysfs root can be given, so that recorded trees of other machines are understood as well.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from rdma_comm.errors import RdmaUnavailable

SYSFS = Path("/sys")
ACTIVE = 4  # of a port's state
NVIDIA = "0x10de"
GPU_CLASSES = ("0x0300", "0x0302")  # VGA and 3D controllers


@dataclass(frozen=True, slots=True)
class Gid:
    """One entry of a port's address table."""

    index: int
    address: ipaddress.IPv6Address
    type: str  #: "IB/RoCE v1" or "RoCE v2"


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a NIC."""

    number: int
    state: int
    is_ethernet: bool
    rate: str  #: as the kernel says it: "400 Gb/sec (4X NDR)"
    gids: tuple[Gid, ...]

    @property
    def is_active(self) -> bool:
        """Whether it can carry traffic."""
        return self.state == ACTIVE


@dataclass(frozen=True, slots=True)
class Nic:
    """One RDMA device."""

    name: str
    pci_path: tuple[str, ...]  #: bridges from the root to it; empty for a device without PCI
    ports: tuple[Port, ...]
    numa: int = -1  #: node, -1 where it is not known
    interfaces: tuple[str, ...] = field(default=())  #: network interfaces on it

    @property
    def active_port(self) -> Port | None:
        """The first port that can carry traffic."""
        return next((p for p in self.ports if p.is_active), None)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU."""

    address: str  #: PCI, with its domain
    pci_path: tuple[str, ...]
    numa: int = -1


def _read(path: Path, default: str = "") -> str:
    try:
        return path.read_text().strip()
    except OSError:  # some entries exist and cannot be read
        return default


def _number(text: str, default: int = 0) -> int:
    digits = text.split(":")[0].strip()
    return int(digits) if digits.isdecimal() else default


def pci_path(device: Path) -> tuple[str, ...]:
    """Returns: the PCI addresses from the root complex down to a device of sysfs."""
    parts = device.resolve().parts
    start = next((i for i, part in enumerate(parts) if part.startswith("pci")), len(parts))
    return tuple(part for part in parts[start:] if ":" in part)


def distance(first: Nic | Gpu, second: Nic | Gpu) -> int:
    """Returns: PCI hops between two devices; 50 more under different roots, 100 more on different NUMA nodes."""
    shared, one, other = 0, first.pci_path, second.pci_path
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    hops = len(one) + len(other) - 2 * shared
    if shared:
        return hops
    return hops + (50 if first.numa == second.numa != -1 else 100)


def _numa(device: Path) -> int:
    text = _read(device / "numa_node", "-1")
    return int(text) if text.lstrip("-").isdecimal() else -1


def _port(directory: Path, gids: tuple[Gid, ...] | None) -> Port:
    return Port(
        number=int(directory.name),
        state=_number(_read(directory / "state")),
        is_ethernet=_read(directory / "link_layer") == "Ethernet",
        rate=_read(directory / "rate"),
        gids=_gids(directory) if gids is None else gids,
    )


def _gids(directory: Path) -> tuple[Gid, ...]:
    gids = []
    for entry in (
        sorted((directory / "gids").iterdir(), key=lambda p: int(p.name)) if (directory / "gids").exists() else ()
    ):
        text = _read(entry)
        if text and set(text) - set("0:"):
            kind = _read(directory / "gid_attrs" / "types" / entry.name, "IB/RoCE v1")
            gids.append(Gid(int(entry.name), ipaddress.IPv6Address(text), kind))
    return tuple(gids)


def list_nics(sysfs: Path = SYSFS) -> list[Nic]:
    """Returns: all RDMA devices by name; none where the kernel has no RDMA. Addresses are libibverbs' own where pyverbs is here."""
    from rdma_comm import pyverbs  # late: it needs Gid

    tables = pyverbs.gid_tables() if sysfs == SYSFS else {}
    found = []
    root = sysfs / "class" / "infiniband"
    for directory in sorted(root.iterdir()) if root.exists() else ():
        numbered = sorted(directory.glob("ports/*"), key=lambda p: int(p.name))
        ports = tuple(_port(p, tables.get((directory.name, int(p.name)))) for p in numbered)
        names = {_read(n) for n in directory.glob("ports/*/gid_attrs/ndevs/*")}
        interfaces = tuple(sorted(names - {""} | {p.name for p in (directory / "device" / "net").glob("*")}))
        device = directory / "device"
        found.append(Nic(directory.name, pci_path(device) if device.exists() else (), ports, _numa(device), interfaces))
    return found


def list_gpus(sysfs: Path = SYSFS, visible: str | None = None) -> list[Gpu]:
    """Args:
        visible: CUDA_VISIBLE_DEVICES: indices into the list by PCI address; other names select nothing and are ignored.
    Returns: NVIDIA GPUs in the order in which CUDA (with PCI_BUS_ID order) counts them.
    """
    root = sysfs / "bus" / "pci" / "devices"
    gpus = [
        Gpu(device.name, pci_path(device), _numa(device))
        for device in (sorted(root.iterdir()) if root.exists() else ())
        if _read(device / "vendor") == NVIDIA and _read(device / "class")[:6] in GPU_CLASSES
    ]
    wanted = [int(i) for i in (visible or "").split(",") if i.strip().isdecimal()]
    return [gpus[i] for i in wanted if i < len(gpus)] if wanted else gpus


def order_nics(nics: list[Nic], gpus: list[Gpu]) -> list[Nic]:
    """Returns: NICs with an active port, the one nearest to any of the GPUs first, then by name."""
    usable = [n for n in nics if n.active_port is not None]
    return sorted(usable, key=lambda n: (min((distance(n, g) for g in gpus), default=0), n.name))


def choose_gid(port: Port, wanted: int | None = None) -> Gid:
    """The address to use on a port: on Ethernet RoCE v2, routable before link-local and IPv4 before IPv6.

    Args:
        wanted: an index that overrides the choice (KVCACHE_RDMA_GID_INDEX).
    Raises: RdmaUnavailable: there is none, or not that one.
    """
    if wanted is not None:
        for gid in port.gids:
            if gid.index == wanted:
                return gid
        shown = ", ".join(str(g.index) for g in port.gids) or "none"
        raise RdmaUnavailable(f"KVCACHE_RDMA_GID_INDEX is {wanted}; the port has {shown}")
    usable = [g for g in port.gids if g.type == "RoCE v2"] if port.is_ethernet else list(port.gids)
    if not usable:
        raise RdmaUnavailable(
            f"port {port.number} has no {'RoCE v2 ' if port.is_ethernet else ''}GID; does its network interface have an address?"
        )
    return min(usable, key=lambda g: (g.address.is_link_local, g.address.ipv4_mapped is None, g.index))
