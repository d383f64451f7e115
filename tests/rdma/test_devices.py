"""Which NICs are found and in what order, on trees of known machines: rdma_comm.devices and scripts/get_rdma_nics.sh agree."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("rdma_comm._verbs", reason="needs the compiled part: a C compiler and Python.h")

from rdma_comm.devices import choose_gid, list_gpus, list_nics, order_nics
from rdma_comm.endpoint import MAX_RAILS, Options, choose_nics
from rdma_comm.errors import RdmaUnavailable
from tests.rdma.trees import ACTIVE, DOWN, Function, Interface, build, dgx_h100

SCRIPT = Path(__file__).parents[2] / "scripts" / "get_rdma_nics.sh"
STATES = ("5: ACTIVE_DEFER", ACTIVE, "2: INIT")
LOOPBACK = Interface("lo", type=772)


def script(root: Path, kind: str, visible: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {
        "SYSFS_ROOT": str(root),
        "PROC_ROOT": str(root / "proc"),
    }
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    with open("/dev/zero") as endless:  # it asks nobody
        return subprocess.run(
            [str(SCRIPT), kind], env=env, stdin=endless, capture_output=True, text=True, timeout=20, check=False
        )


def nics(root: Path, visible: str | None = None) -> list[str]:
    """Found by both; they must agree."""
    found = [n.name for n in order_nics(list_nics(root), list_gpus(root, visible))]
    done = script(root, "gpu", visible)
    if found:
        assert (done.returncode, done.stdout, done.stderr) == (0, f"KVCACHE_RDMA_NICS={','.join(found)}\n", "")
    else:
        assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    return found


def test_dgx_h100(tmp_path: Path) -> None:
    root = build(tmp_path, dgx_h100(), [LOOPBACK])
    found = nics(root)
    assert len(found) == 12
    assert set(found[8:]) == {"mlx5_1", "mlx5_2", "mlx5_7", "mlx5_8"}  # storage last
    gpu_nics = ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11")
    for index, name in enumerate(gpu_nics):
        assert nics(root, str(index))[0] == name
    assert set(nics(root, "4,5")[:2]) == {"mlx5_6", "mlx5_9"}
    assert script(root, "cpu").stdout == "KVCACHE_SOCKET_IFNAME=enp41s0f0\n"  # not a GPU's NIC


def test_a_gpu_s_memory_goes_by_the_nics_nearest_to_it(tmp_path: Path) -> None:
    root = build(tmp_path, dgx_h100())
    gpus = list_gpus(root)
    nearest = [[n.name for n in choose_nics((), root, gpu.address)] for gpu in gpus]
    assert nearest == [[n] for n in ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11")]
    assert len(choose_nics((), root, "0000:ff:00.0")) == len(choose_nics((), root)) == 12
    assert [n.name for n in choose_nics(("mlx5_9", "mlx5_0"), root, gpus[0].address)] == ["mlx5_9", "mlx5_0"]


def test_two_ports_a_nic(tmp_path: Path) -> None:
    card = Function("0000:00:01.0/0000:81:00.0", rdma="mlx5_0", states=(DOWN, ACTIVE))
    root = build(tmp_path, [card, Function("0000:00:02.0/0000:82:00.0", rdma="mlx5_1", states=(DOWN, DOWN))])
    assert nics(root) == ["mlx5_0"]
    port = list_nics(root)[0].active_port
    assert port is not None and port.number == 2


def test_bond(tmp_path: Path) -> None:
    ports = [
        Function(
            f"0000:00:01.0/0000:3b:00.{n}", rdma="mlx5_bond_0" if n == 0 else "", net=f"ens1f{n}np{n}", is_ethernet=True
        )
        for n in (0, 1)
    ]
    functions = [*ports, Function("0000:00:02.0/0000:af:00.0", net="eno1")]
    root = build(tmp_path, functions, [LOOPBACK, Interface("bond0", "bonding"), Interface("docker0", "bridge"), Interface("tap0", "tun")],
                 bonded=("ens1f0np0", "ens1f1np1"))  # fmt: skip
    assert nics(root) == ["mlx5_bond_0"]
    assert list_nics(root)[0].interfaces == ("ens1f0np0",)
    assert script(root, "cpu").stdout == "KVCACHE_SOCKET_IFNAME=bond0\n"


def test_virtual_machine_with_one_nic_in_another_pci_domain(tmp_path: Path) -> None:
    functions = [
        Function("0001:00:00.0", root="pci0001:00", gpu=True),
        Function("0101:00:00.0", root="pci0101:00", rdma="mlx5_0", net="enP257s0"),
        Function("0002:00:00.0", root="pci0002:00", net="eth0"),
    ]
    root = build(tmp_path, functions, [LOOPBACK])
    assert nics(root) == ["mlx5_0"]
    assert nics(root, "0") == ["mlx5_0"]
    assert nics(root, "7") == ["mlx5_0"]  # no such GPU


@pytest.mark.parametrize("functions", [[], [Function("0000:00:02.0", net="eth0")]], ids=["bare", "Ethernet only"])
def test_no_rdma(tmp_path: Path, functions: Sequence[Function]) -> None:
    root = build(tmp_path, functions, [LOOPBACK])
    assert nics(root) == []
    assert "no RDMA device" in script(root, "gpu").stderr
    done = script(root, "cpu")
    if functions:
        assert done.stdout == "KVCACHE_SOCKET_IFNAME=eth0\n"
    else:
        assert done.returncode == 1 and "is up" in done.stderr


def test_all_ports_down(tmp_path: Path) -> None:
    root = build(tmp_path, [Function("0000:00:02.0", rdma="mlx5_0", states=(DOWN,))])
    assert nics(root) == []
    assert "no RDMA device has an active port (mlx5_0)" in script(root, "gpu").stderr
    with pytest.raises(RdmaUnavailable, match="'mlx5_0', which has no active port"):
        choose_nics(["mlx5_0"], root)


def test_a_device_without_ports(tmp_path: Path) -> None:
    root = build(tmp_path, [Function(f"0000:00:0{n + 2}.0", rdma=f"mlx5_{n}") for n in (0, 1)])
    shutil.rmtree(root / "class/infiniband/mlx5_0/ports")
    assert [n.name for n in list_nics(root)] == ["mlx5_0", "mlx5_1"]
    assert nics(root) == ["mlx5_1"]


def test_a_port_that_defers_is_not_active(tmp_path: Path) -> None:
    functions = [Function(f"0000:00:0{n + 2}.0", rdma=f"mlx5_{n}", states=(DOWN, s)) for n, s in enumerate(STATES)]
    assert nics(build(tmp_path, functions)) == ["mlx5_1"]


@pytest.mark.parametrize("visible", ["7, 6", " 3", "0,1,", "0,-1", "GPU-8a1b,3"])
def test_indices_of_visible_gpus_count_whatever_stands_beside_them(tmp_path: Path, visible: str) -> None:
    found = nics(build(tmp_path, dgx_h100(), [LOOPBACK]), visible)
    assert found[0] == {"7": "mlx5_10", "3": "mlx5_5", "0": "mlx5_0", "G": "mlx5_5"}[visible.strip()[0]]


def test_no_more_nics_are_taken_than_a_transfer_has_rails(tmp_path: Path) -> None:
    root = build(tmp_path, [Function(f"0000:00:{n:02x}.0", rdma=f"mlx5_{n:02}") for n in range(MAX_RAILS + 2)])
    assert [n.name for n in choose_nics([], root)] == [f"mlx5_{n:02}" for n in range(MAX_RAILS)]
    with pytest.raises(RdmaUnavailable, match=f"names 17 devices; there may be {MAX_RAILS}"):
        choose_nics([f"mlx5_{n:02}" for n in range(17)], root)
    assert f"MAX_RAILS = {MAX_RAILS}," in (SCRIPT.parents[1] / "rdma_comm/_transfer.c").read_text()


@pytest.mark.parametrize("visible", ["08", "0,08", "", "-1", "GPU-8a1b", "0,0", ","])
def test_odd_names_of_visible_gpus(tmp_path: Path, visible: str) -> None:
    root = build(tmp_path, dgx_h100(), [LOOPBACK])
    assert len(nics(root, visible)) == 12
    assert nics(root, "9" * 30) == nics(root, "99")


def test_an_interface_whose_driver_does_not_tell_its_state(tmp_path: Path) -> None:
    root = build(tmp_path, [Function("0000:00:02.0", net="eth0"), Function("0000:00:03.0", net="eth1")], [LOOPBACK])
    (root / "class/net/eth0/operstate").write_text("unknown\n")
    assert script(root, "cpu").stdout == "KVCACHE_SOCKET_IFNAME=eth1\n"
    (root / "class/net/eth1/operstate").write_text("down\n")
    assert script(root, "cpu").stdout == "KVCACHE_SOCKET_IFNAME=eth0\n"


ROUTES = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT" + " " * 55
ETH2_IPV4 = [
    "eth2\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0",
    "eth2\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0",
]
ETH1_LINK_LOCAL = ["eth1\t0000FEA9\t00000000\t0001\t0\t0\t1000\t0000FFFF\t0\t0\t0"]
IPV6 = [
    "00000000000000000000000000000001 01 80 10 80       lo",
    "fe80000000000000505400fffe120001 02 40 20 80     eth0",
    "fe80000000000000505400fffe120002 03 40 20 80     eth1",
]
ETH1_IPV6 = ["20010db8000000000000000000000005 03 40 00 80     eth1"]


@pytest.mark.parametrize(
    ("routes", "ipv6", "chosen"),
    [
        (None, None, "eth0"),
        ([], IPV6, "eth0"),
        (ETH2_IPV4, IPV6, "eth2"),
        (ETH2_IPV4, None, "eth2"),
        (ETH1_LINK_LOCAL, IPV6, "eth0"),
        (ETH1_LINK_LOCAL + ETH2_IPV4, IPV6, "eth2"),
        ([], IPV6 + ETH1_IPV6, "eth1"),
        (None, IPV6 + ETH1_IPV6, "eth1"),
        (ETH2_IPV4, IPV6 + ETH1_IPV6, "eth2"),
    ],
)
def test_an_interface_with_an_address_comes_first(
    tmp_path: Path, routes: list[str] | None, ipv6: list[str] | None, chosen: str
) -> None:
    """Files as Linux 6.1 writes them; without them, or where no interface has an address, the order is the old one."""
    root = build(tmp_path, [Function(f"0000:00:0{n + 2}.0", net=f"eth{n}") for n in range(3)], [LOOPBACK])
    (root / "proc/net").mkdir(parents=True)
    if routes is not None:
        (root / "proc/net/route").write_text("".join(f"{line}\n" for line in (ROUTES, *routes)))
    if ipv6 is not None:
        (root / "proc/net/if_inet6").write_text("".join(f"{line}\n" for line in ipv6))
    assert script(root, "cpu").stdout == f"KVCACHE_SOCKET_IFNAME={chosen}\n"
    (root / "class/net" / chosen / "operstate").write_text("unknown\n")  # one with an address, all the same
    if chosen != "eth0":
        assert script(root, "cpu").stdout == f"KVCACHE_SOCKET_IFNAME={chosen}\n"


@pytest.mark.parametrize("arguments", [[], ["tpu"], ["gpu", "cpu"]])
def test_wrong_calls(arguments: list[str]) -> None:
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "usage" in done.stderr and not done.stdout


def test_help_says_what_is_printed() -> None:
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: get_rdma_nics.sh cpu|gpu\n") and not done.stderr
    assert "KVCACHE_RDMA_NICS=" in done.stdout and "KVCACHE_SOCKET_IFNAME=" in done.stdout and "#" not in done.stdout


def test_named_nics_keep_their_order_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    root = build(tmp_path, dgx_h100())
    assert [n.name for n in choose_nics(["mlx5_9", "mlx5_0"], root)] == ["mlx5_9", "mlx5_0"]
    with pytest.raises(RdmaUnavailable, match="'mlx5_77'; there are mlx5_0"):
        choose_nics(["mlx5_77"], root)


def test_gid_is_routable_roce_v2_on_ethernet(tmp_path: Path) -> None:
    found = {n.name: n for n in list_nics(build(tmp_path, dgx_h100()))}
    ethernet, infiniband = found["mlx5_1"].active_port, found["mlx5_0"].active_port
    assert ethernet is not None and infiniband is not None
    assert choose_gid(ethernet).index == 3
    assert choose_gid(infiniband).index == 0
    assert choose_gid(ethernet, 1).index == 1
    with pytest.raises(RdmaUnavailable, match="KVCACHE_RDMA_GID_INDEX is 9; the port has 0, 1, 2, 3"):
        choose_gid(ethernet, 9)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("KVCACHE_IB_TIMEOUT", "32", "8 to 31"),
        ("KVCACHE_RDMA_GID_INDEX", "-1", "0 to 255"),
        ("KVCACHE_RELAX_ORDERING", "yes", "0 to 1"),
    ],
)
def test_wrong_variables_are_named(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is '{value}'; it must be a number from {allowed}"):
        Options.from_environment({name: value})
