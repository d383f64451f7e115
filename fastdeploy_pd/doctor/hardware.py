"""NICs and GPUs: what there is, in what state, and how far from each other. Sysfs can be given, as in rdma_comm/devices.py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from ctypes import byref, c_int
from pathlib import Path

from fastdeploy_pd.doctor.finding import Finding
from rdma_comm.cuda.driver import ATTRIBUTE_DMA_BUF_SUPPORTED, CudaUnavailable, driver
from rdma_comm.devices import Gpu, Nic, Port, choose_gid, distance, list_gpus, list_nics
from rdma_comm.errors import RdmaUnavailable

#: an Ethernet MTU that leaves room for RDMA's largest packet, 4096 bytes, and the 96 that Linux reserves for its headers
FULL_RDMA_MTU = 4096 + 96
RDMA_MTUS = (4096, 2048, 1024, 512, 256)
NO_NIC_REMEDY = (
    "modprobe mlx5_ib (the NIC's driver), or soft-RoCE: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0"
)
DRIVER_REMEDY = "apt-get install nvidia-driver, then: modprobe nvidia; nvidia-smi"


def active_ports(sysfs: Path) -> list[tuple[Nic, Port]]:
    """Returns: NICs that can carry traffic, and through which port."""
    return [(nic, nic.active_port) for nic in list_nics(sysfs) if nic.active_port is not None]


def has_cuda() -> bool:
    """Whether the CUDA driver is here and finds a GPU."""
    try:
        driver()
    except CudaUnavailable:
        return False
    return True


def check_nics(sysfs: Path) -> Iterator[Finding]:
    """Which RDMA devices there are."""
    names = [nic.name for nic in list_nics(sysfs)]
    if names:
        yield Finding("nics", "ok", f"{len(names)}: {', '.join(names)}")
    else:
        yield Finding("nics", "absent", "no RDMA device; KV blocks go by shm and tcp", NO_NIC_REMEDY)


def check_link(sysfs: Path) -> Iterator[Finding]:
    """Which ports are up, and how fast."""
    nics = list_nics(sysfs)
    if not nics:
        yield Finding("link", "absent", "no RDMA device")
        return
    groups: dict[str, list[str]] = {}
    for nic in nics:
        for port in nic.ports:
            state = f"active, {port.rate}" if port.is_active else "not active"
            groups.setdefault(state, []).append(nic.name + (f"/{port.number}" if len(nic.ports) > 1 else ""))
    down = [nic for nic in nics if nic.active_port is None]
    state = "fail" if len(down) == len(nics) else "warn" if down else "ok"
    interfaces = [name for nic in down for name in nic.interfaces]
    remedy = "; ".join(f"ip link set {name} up" for name in interfaces) or "check the cable and the switch; ibv_devinfo"
    yield Finding("link", state, "; ".join(f"{k}: {', '.join(v)}" for k, v in groups.items()), remedy if down else "")


def check_gid(sysfs: Path, env: Mapping[str, str]) -> Iterator[Finding]:
    """Which address each NIC would use; on Ethernet it must be a RoCE v2 one, and a routable one to leave the network."""
    index = env.get("KVCACHE_RDMA_GID_INDEX", "").strip()
    chosen, wrong, is_local = [], [], False
    for nic, port in active_ports(sysfs):
        try:
            gid = choose_gid(port, int(index) if index.isdecimal() else None)
        except RdmaUnavailable as error:
            wrong.append(f"{nic.name}: {error}")
            continue
        is_local |= port.is_ethernet and gid.address.is_link_local
        address = gid.address.ipv4_mapped or gid.address
        kind = gid.type if port.is_ethernet else "InfiniBand"
        chosen.append(f"{nic.name}: index {gid.index}, {address}, {kind}")
    detail = "; ".join(wrong + chosen)
    remedy = "ip address add ADDRESS/24 dev INTERFACE" + ("; unset KVCACHE_RDMA_GID_INDEX" if index else "")
    if not detail:
        yield Finding("gid", "absent", "no active RDMA port")
    elif wrong:
        yield Finding("gid", "fail", detail, remedy)
    elif is_local:
        yield Finding("gid", "warn", f"{detail}; a link-local address reaches this network segment alone", remedy)
    else:
        yield Finding("gid", "ok", detail)


def check_mtu(sysfs: Path) -> Iterator[Finding]:
    """Whether Ethernet under RDMA has room for RDMA's largest packets."""
    told, small = [], []
    for nic, port in active_ports(sysfs):
        for interface in nic.interfaces if port.is_ethernet else ():
            try:
                mtu = int((sysfs / "class/net" / interface / "mtu").read_text())
            except (OSError, ValueError):
                told.append(f"{interface} unknown")
                continue
            fitting = next((m for m in RDMA_MTUS if mtu >= m + FULL_RDMA_MTU - RDMA_MTUS[0]), RDMA_MTUS[-1])
            told.append(f"{interface} {mtu}: {fitting} bytes an RDMA packet")
            if mtu < FULL_RDMA_MTU:
                small.append(interface)
    if not active_ports(sysfs):
        yield Finding("mtu", "absent", "no active RDMA port")
    elif not told:
        yield Finding("mtu", "ok", "no Ethernet under RDMA; InfiniBand's subnet manager sets it")
    else:
        remedy = "; ".join(f"ip link set {name} mtu 9000" for name in small) + " (on both machines and the switch)"
        yield Finding("mtu", "warn" if small else "ok", "; ".join(told), remedy if small else "")


def check_distance(sysfs: Path, env: Mapping[str, str]) -> Iterator[Finding]:
    """Which NIC is nearest to each GPU."""
    nics, gpus = [nic for nic, _ in active_ports(sysfs)], list_gpus(sysfs, env.get("CUDA_VISIBLE_DEVICES"))
    if not nics or not gpus:
        yield Finding("gpu-nic distance", "absent", f"GPUs: {len(gpus)}, NICs with an active port: {len(nics)}")
        return
    nearest = [(gpu, min(nics, key=lambda nic: (distance(nic, gpu), nic.name))) for gpu in gpus]
    far = any(-1 not in (gpu.numa, nic.numa) and gpu.numa != nic.numa for gpu, nic in nearest)
    detail = "; ".join(f"{gpu.address} {nic.name}, {_hops(gpu, nic)}" for gpu, nic in nearest)
    remedy = "use the GPUs of the NIC's NUMA node: export CUDA_VISIBLE_DEVICES=..." if far else ""
    yield Finding("gpu-nic distance", "warn" if far else "ok", detail, remedy)


def _hops(gpu: Gpu, nic: Nic) -> str:
    hops = distance(gpu, nic)
    return f"{hops} hops" if hops < 50 else f"NUMA nodes {gpu.numa} and {nic.numa}"


def check_gpus(sysfs: Path) -> Iterator[Finding]:
    """Which GPUs the CUDA driver has, and which reach each other's memory."""
    seen = len(list_gpus(sysfs))
    try:
        cuda = driver()
    except CudaUnavailable as error:
        if seen:
            yield Finding(
                "gpus", "warn", f"{seen} NVIDIA GPUs on the PCI bus, but no CUDA driver: {error}", DRIVER_REMEDY
            )
        else:
            yield Finding("gpus", "absent", f"no CUDA driver: {error}")
        return
    count, names = _value("cuDeviceGetCount"), []
    for ordinal in range(count):
        name = ctypes.create_string_buffer(100)
        cuda.call("cuDeviceGetName", name, c_int(100), c_int(ordinal))
        names.append(name.value.decode(errors="replace"))
    yield Finding(
        "gpus", "ok", f"{count}: {', '.join(sorted(set(names)))}; CUDA {_value('cuDriverGetVersion') / 1000:.1f}"
    )
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [f"{a}-{b}" for a, b in pairs if not _value("cuDeviceCanAccessPeer", a, b)]
    if not pairs:
        yield Finding("gpu peer access", "absent", f"{count} GPU here")
    elif apart:
        remedy = "nvidia-smi topo -p2p r (it needs NVLink, or PCI without ACS and IOMMU translation)"
        yield Finding("gpu peer access", "warn", f"`ipc` cannot join GPUs {', '.join(apart)}", remedy)
    else:
        yield Finding("gpu peer access", "ok", "every GPU reaches every other")


def check_gpu_memory(sysfs: Path) -> Iterator[Finding]:
    """Whether a NIC can register a GPU's memory."""
    name = "gpu memory registration"
    if not list_gpus(sysfs) or not list_nics(sysfs):
        yield Finding(name, "absent", "it takes a GPU and a NIC")
        return
    module = next((m for m in ("nvidia_peermem", "nv_peer_mem") if (sysfs / "module" / m).exists()), "")
    has_dmabuf = has_cuda() and bool(_value("cuDeviceGetAttribute", ATTRIBUTE_DMA_BUF_SUPPORTED, 0))
    ways = [*([module] if module else []), *(["dmabuf"] if has_dmabuf else [])]
    if ways:
        yield Finding(name, "ok", f"by {' or '.join(ways)}")
    else:
        detail = "neither the module nvidia-peermem nor dmabuf: NICs reach host memory alone"
        yield Finding(name, "warn", detail, "modprobe nvidia-peermem")


def _value(call: str, *arguments: int) -> int:
    """Returns: the int that a driver call writes to its first argument. Raises: CudaUnavailable, CudaError."""
    value = c_int()
    driver().call(call, byref(value), *(c_int(a) for a in arguments))
    return value.value
