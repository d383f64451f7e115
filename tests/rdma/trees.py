"""Sysfs of machines with known PCI topologies, made again from what their makers publish (`nvidia-smi topo -m`, lspci -t)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ACTIVE, DOWN = "4: ACTIVE", "1: DOWN"


@dataclass(frozen=True)
class Function:
    """One PCI function: its place, and what hangs on it."""

    path: str  #: "0000:15:01.0/0000:18:00.0", from the root port down
    root: str = "pci0000:00"
    numa: int = 0
    gpu: bool = False
    rdma: str = ""
    states: tuple[str, ...] = (ACTIVE,)  #: of the RDMA ports
    net: str = ""
    is_ethernet: bool = False


@dataclass(frozen=True)
class Interface:
    """A network interface that is no PCI function's: bond, bridge, tunnel, loopback."""

    name: str
    kind: str = ""  #: "bonding", "bridge", "tun"
    type: int = 1


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _net(directory: Path, index: int, state: str, type_: int = 1) -> None:
    for file, text in (("type", str(type_)), ("operstate", state), ("ifindex", str(index))):
        _write(directory / file, text)


def build(
    root: Path, functions: Sequence[Function], interfaces: Sequence[Interface] = (), bonded: Sequence[str] = ()
) -> Path:
    """Returns: root, with what the kernel would show: /sys/devices, /sys/bus/pci, /sys/class/infiniband, /sys/class/net."""
    for folder in ("bus/pci/devices", "class/net"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    index = 2
    for function in functions:
        device = root / "devices" / function.root / function.path
        _write(device / "vendor", "0x10de" if function.gpu else "0x15b3")
        _write(device / "class", "0x030200" if function.gpu else "0x020000")
        _write(device / "numa_node", str(function.numa))
        (root / "bus/pci/devices" / device.name).symlink_to(device)
        if function.net:
            directory = device / "net" / function.net
            _net(directory, index, "up")
            (directory / "device").symlink_to(device)
            if function.net in bonded:
                (directory / "master").symlink_to(root)
            (root / "class/net" / function.net).symlink_to(directory)
            index += 1
        if function.rdma:
            _rdma(root, device, function)
    for interface in interfaces:
        directory = root / "devices/virtual/net" / interface.name
        _net(
            directory,
            1 if interface.name == "lo" else index,
            "up" if interface.name != "lo" else "unknown",
            interface.type,
        )
        if interface.kind == "tun":
            _write(directory / "tun_flags", "0x1")
        elif interface.kind:
            (directory / interface.kind).mkdir()
        (root / "class/net" / interface.name).symlink_to(directory)
        index += 1
    return root


def _rdma(root: Path, device: Path, function: Function) -> None:
    directory = device / "infiniband" / function.rdma
    (root / "class/infiniband").mkdir(parents=True, exist_ok=True)
    for number, state in enumerate(function.states, 1):
        port = directory / "ports" / str(number)
        _write(port / "state", state)
        _write(port / "link_layer", "Ethernet" if function.is_ethernet else "InfiniBand")
        _write(port / "rate", "400 Gb/sec (4X NDR)")
        gids = ["fe80:0000:0000:0000:a288:c2ff:fe00:0001"]
        kinds = ["IB/RoCE v1"]
        if function.is_ethernet:
            gids = [
                gids[0],
                gids[0],
                "0000:0000:0000:0000:0000:ffff:0a00:0001",
                "0000:0000:0000:0000:0000:ffff:0a00:0001",
            ]
            kinds = ["IB/RoCE v1", "RoCE v2", "IB/RoCE v1", "RoCE v2"]
        for index, (gid, kind) in enumerate(
            zip([*gids, "0000:0000:0000:0000:0000:0000:0000:0000"], [*kinds, ""], strict=True)
        ):
            _write(port / "gids" / str(index), gid)
            if kind:
                _write(port / "gid_attrs/types" / str(index), kind)
                if function.net:
                    _write(port / "gid_attrs/ndevs" / str(index), function.net)
    (directory / "device").symlink_to(device)
    (root / "class/infiniband" / function.rdma).symlink_to(directory)


def dgx_h100() -> list[Function]:
    """Eight GPUs, each with a ConnectX-7 at its PCIe switch; two dual-port cards for storage and management at roots of their own."""
    functions = []
    gpus = ("1b", "43", "52", "61", "9d", "c3", "d1", "df")
    names = ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11")
    nics = zip(("18", "40", "4f", "5e", "9a", "c0", "ce", "dc"), names, strict=True)
    for index, (gpu, (nic, name)) in enumerate(zip(gpus, nics, strict=True)):
        bus = int(nic, 16) - 3
        switch = f"0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
        place = {"root": f"pci0000:{bus:02x}", "numa": index // 4}
        functions.append(
            Function(f"{switch}/0000:{bus + 2:02x}:00.0/0000:{nic}:00.0", rdma=name, net=f"ibp{nic}s0", **place)
        )
        functions.append(Function(f"{switch}/0000:{bus + 2:02x}:02.0/0000:{gpu}:00.0", gpu=True, **place))
    for bus, first, numa in (("29", 1, 0), ("aa", 7, 1)):
        for port in (0, 1):
            functions.append(
                Function(
                    f"0000:{int(bus, 16) - 1:02x}:01.0/0000:{bus}:00.{port}", root=f"pci0000:{int(bus, 16) - 1:02x}", numa=numa,
                    rdma=f"mlx5_{first + port}", net=f"enp{int(bus, 16)}s0f{port}", is_ethernet=True,
                )
            )  # fmt: skip
    return functions
