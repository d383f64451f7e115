"""What each check says: of recorded machines, of this one, of real Redis servers, and of checks that hang or raise."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from fastdeploy_pd.cluster.redis_connection import RedisOptions
from fastdeploy_pd.doctor import hardware, system
from fastdeploy_pd.doctor.backends import check_backend, known_backends
from fastdeploy_pd.doctor.coordinator import check_redis, clock_finding
from fastdeploy_pd.doctor.finding import REPORT, Check, Finding, run_checks
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis, free_port
from rdma_comm.devices import list_nics
from tests.rdma.trees import ACTIVE, DOWN, Function, build, dgx_h100
from tests.transfer.gpu import has_gpu

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "own_backend"
CARD = "0000:00:01.0/0000:81:00.0"


def one(findings: Iterable[Finding]) -> Finding:
    """The only finding; what is not well, but could be, says what mends it."""
    (found,) = findings
    assert found.remedy or found.state in ("ok", "absent")
    assert not (found.remedy and found.state == "ok")
    return found


def states(findings: Iterable[Finding]) -> dict[str, str]:
    return {f.name: f.state for f in findings}


# the machines of tests/rdma/trees.py


def test_dgx_h100(tmp_path: Path) -> None:
    root = build(tmp_path, dgx_h100())
    assert one(hardware.check_nics(root)).detail.startswith("12: mlx5_0, mlx5_1, ")
    assert one(hardware.check_link(root)).state == "ok"
    gid = one(hardware.check_gid(root, {}))
    assert gid.state == "ok" and "mlx5_1: index 3, 10.0.0.1, RoCE v2" in gid.detail
    found = one(hardware.check_distance(root, {}))
    assert found.state == "ok" and found.detail.count("4 hops") == 8 and "0000:1b:00.0 mlx5_0, 4 hops" in found.detail
    assert "0000:43:00.0 mlx5_3" in one(hardware.check_distance(root, {"CUDA_VISIBLE_DEVICES": "1"})).detail
    memory = one(hardware.check_gpu_memory(root))
    if not has_gpu():
        assert (memory.state, memory.remedy) == ("warn", "modprobe nvidia-peermem")
        assert one(hardware.check_gpus(root)).state == "warn"  # GPUs on the bus, no driver
    (root / "module/nvidia_peermem").mkdir(parents=True)
    assert one(hardware.check_gpu_memory(root)).state == "ok"


def test_a_gpu_and_a_nic_of_two_numa_nodes(tmp_path: Path) -> None:
    functions = [
        Function("0000:00:01.0/0000:1b:00.0", gpu=True),
        Function(CARD, root="pci0000:80", numa=1, rdma="mlx5_0"),
    ]
    found = one(hardware.check_distance(build(tmp_path, functions), {}))
    assert found.state == "warn" and "NUMA nodes 0 and 1" in found.detail


@pytest.mark.parametrize(("mtu", "state", "packet"), [(1500, "warn", 1024), (4200, "ok", 4096), (9000, "ok", 4096)])
def test_mtu(tmp_path: Path, mtu: int, state: str, packet: int) -> None:
    root = build(tmp_path, [Function(CARD, rdma="mlx5_0", net="eth7", is_ethernet=True)])
    (root / "class/net/eth7/mtu").write_text(f"{mtu}\n")
    found = one(hardware.check_mtu(root))
    assert found.state == state and f"eth7 {mtu}: {packet} bytes" in found.detail
    assert ("ip link set eth7 mtu 9000" in found.remedy) == (state == "warn")


@pytest.mark.parametrize(("ports", "state"), [((DOWN,), "fail"), ((DOWN, ACTIVE), "ok"), ((ACTIVE,), "ok")])
def test_link(tmp_path: Path, ports: tuple[str, ...], state: str) -> None:
    root = build(tmp_path, [Function(CARD, rdma="mlx5_0", net="eth7", is_ethernet=True, states=ports)])
    found = one(hardware.check_link(root))
    assert found.state == state and (state == "ok" or found.remedy == "ip link set eth7 up")


def test_one_nic_of_two_is_down(tmp_path: Path) -> None:
    functions = [Function(CARD, rdma="mlx5_0"), Function("0000:00:02.0", rdma="mlx5_1", states=(DOWN,))]
    found = one(hardware.check_link(build(tmp_path, functions)))
    assert found.state == "warn" and "not active: mlx5_1" in found.detail


def test_gid(tmp_path: Path) -> None:
    root = build(tmp_path, [Function(CARD, rdma="mlx5_0", net="eth7", is_ethernet=True)])
    assert "has 0, 1, 2, 3" in one(hardware.check_gid(root, {"KVCACHE_RDMA_GID_INDEX": "9"})).detail
    gids = root / "class/infiniband/mlx5_0/ports/1/gids"
    for index in ("2", "3"):
        (gids / index).unlink()
    found = one(hardware.check_gid(root, {}))
    assert found.state == "warn" and "link-local" in found.detail
    (gids / "1").unlink()
    found = one(hardware.check_gid(root, {}))
    assert found.state == "fail" and "no RoCE v2 GID" in found.detail


def test_a_bare_machine_fails_at_nothing(tmp_path: Path) -> None:
    found = [
        *hardware.check_nics(tmp_path), *hardware.check_link(tmp_path), *hardware.check_gid(tmp_path, {}),
        *hardware.check_mtu(tmp_path), *hardware.check_distance(tmp_path, {}), *hardware.check_gpu_memory(tmp_path),
    ]  # fmt: skip
    assert len(found) == 6 and {f.state for f in found} == {"absent"}


# this machine's limits


def run_limited(code: str) -> str:
    """Run code in a child without capabilities, after `set` has limited it."""
    drop = (
        "import ctypes, resource, sys; from pathlib import Path; from fastdeploy_pd.doctor import system\n"
        "header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert ctypes.CDLL(None).capset(header, none) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", drop + code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memlock(tmp_path: Path) -> None:
    root = build(tmp_path, [Function(CARD, rdma="mlx5_0")])
    code = (
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 22, 1 << 22))\n"
        f"for root in ({str(root)!r}, '/nowhere'): print(*(f.line() for f in system.check_memlock(Path(root))))"
    )
    with_nic, without = run_limited(code).splitlines()
    assert with_nic.startswith("fail    memlock: 4 MiB") and "ulimit -l unlimited" in with_nic
    assert without.startswith("ok      memlock: 4 MiB")


@pytest.mark.parametrize(("limit", "state"), [(300, "fail"), (1024, "warn"), (8192, "ok")])
def test_file_descriptors(limit: int, state: str) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < limit:
        pytest.skip(f"the hard limit is {hard}")
    code = (
        "import resource\nfrom fastdeploy_pd.doctor import system\nfrom fastdeploy_pd.engine.lifetime import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (200, {limit}))\n"
        "print(*(f.state for f in system.check_files()))\nraise_file_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert run_limited(code).splitlines() == [state, f"({limit}, {limit})"]


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(system, "USUAL_PORTS", {"--pd-comm-port": port})
        found = one(system.check_ports())
        assert found.state == "warn" and f"in use: --pd-comm-port {port}" in found.detail and str(port) in found.remedy
    assert one(system.check_ports()).state == "ok"


def test_shared_memory_and_versions(tmp_path: Path) -> None:
    assert "memfd" in one(system.check_shared_memory()).detail
    (tmp_path / "module/nvidia").mkdir(parents=True)
    (tmp_path / "module/nvidia/version").write_text("580.65.06\n")
    detail = one(system.check_versions(tmp_path)).detail
    assert "NVIDIA driver 580.65.06" in detail and f"python {sys.version.split()[0]}" in detail


# backends


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_a_backend_that_works_hands_blocks_over(name: str) -> None:
    found = one(check_backend(name, Path("/sys"), {}))
    assert (found.state, found.detail) == ("ok", "3 blocks handed over, checksums equal")


@pytest.mark.skipif(bool(list_nics()), reason="there is an RDMA device here")
def test_rdma_is_absent_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = one(check_backend("rdma", Path("/sys"), {}))
    assert found.state == "absent" and found.remedy
    monkeypatch.setenv("KVCACHE_RDMA_NICS", " ")  # names none
    assert one(check_backend("rdma", Path("/sys"), os.environ)).state == "absent"
    monkeypatch.setenv("KVCACHE_RDMA_NICS", "mlx5_77")
    found = one(check_backend("rdma", Path("/sys"), os.environ))
    assert found.state == "fail" and found.remedy


def test_another_package_s_backend_is_not_missed_where_nobody_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of docs/transfer_backends.md, as pip leaves it behind."""
    (tmp_path / "kv_files.py").write_text((EXAMPLE / "kv_files.py").read_text())
    (tmp_path / "kv_files-1.dist-info").mkdir()
    (tmp_path / "kv_files-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kv-files\nVersion: 1\n")
    entry = "[fastdeploy_pd.transfers]\nfiles = kv_files:FilesTransfer\n"
    (tmp_path / "kv_files-1.dist-info/entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("KV_FILES_DIR", raising=False)
    assert "files" in known_backends()
    found = one(check_backend("files", Path("/sys"), {}))
    assert (found.state, found.remedy) == ("absent", "") and "KV_FILES_DIR=None" in found.detail
    monkeypatch.setenv("KV_FILES_DIR", str(tmp_path))
    assert one(check_backend("files", Path("/sys"), os.environ)).state == "ok"


@pytest.mark.parametrize(
    ("module", "remedy"),
    [(None, "pip install "), ("raise ImportError('libnuma.so.1: cannot open shared object file')", "apt-get install ")],
)
def test_mooncake_s_remedy_is_what_is_missing(
    module: str | None, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mooncake"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake/__init__.py").write_text("")
    if module is not None:
        (tmp_path / "mooncake/engine.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FD_MOONCAKE_ALLOW_OPEN_PORTS", "1")
    found = one(check_backend("mooncake", Path("/sys"), os.environ))
    assert found.state == "absent" and found.remedy.startswith(remedy) and found.remedy in found.detail


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_ipc_without_a_gpu_is_absent() -> None:
    found = one(check_backend("ipc", Path("/nowhere"), {}))
    assert found.state == "absent" and "NVIDIA driver" in found.detail


# Redis


def redis_findings(server: EmbeddedRedis, **changes: object) -> dict[str, Finding]:
    return {f.name: f for f in check_redis(RedisOptions.from_url(server.url, **changes), True)}


def test_redis_is_well(redis_server: EmbeddedRedis) -> None:
    found = redis_findings(redis_server)
    names = ["redis", "redis memory policy", "redis persistence", "redis latency", "clock"]
    assert list(found) == names
    assert {f.state for f in found.values()} <= {"ok", "warn"} and found["clock"].state == "ok"
    assert "P50" in found["redis latency"].detail


def test_redis_with_the_documented_user(redis_server: EmbeddedRedis) -> None:
    with RedisOptions.from_url(redis_server.url).client() as client:
        rights = "on >secret ~{fd:T}:* &{fd:T}:* +@all -@dangerous +info".split()
        client.execute_command("ACL", "SETUSER", "doctor", *rights)
    found = redis_findings(redis_server, username="doctor", password="secret")
    assert len(found) == 5 and found["redis persistence"].state == "ok"


def test_redis_that_evicts_or_is_a_replica() -> None:
    with EmbeddedRedis(extra=("--maxmemory-policy", "allkeys-lru", "--replicaof", "127.0.0.1 1")) as server:
        found = redis_findings(server)
        assert states(found.values()) | {"redis latency": "", "clock": ""} == {
            "redis": "fail", "redis memory policy": "fail", "redis persistence": "ok", "redis latency": "", "clock": "",
        }  # fmt: skip
        assert "replica" in found["redis"].detail and "allkeys-lru" in found["redis memory policy"].detail


def test_redis_that_cannot_save() -> None:
    with EmbeddedRedis(extra=("--save", "3600 1")) as server:
        assert "snapshots (3600 1)" in redis_findings(server)["redis persistence"].detail
        shutil.rmtree(server._directory.path)
        with RedisOptions.from_url(server.url).client() as client:
            client.bgsave()
            deadline_s = time.monotonic() + 10
            while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
        assert redis_findings(server)["redis persistence"].state == "fail"


def test_redis_that_refuses_us_is_silent_or_away() -> None:
    with EmbeddedRedis(password="the right one") as server:
        found = redis_findings(server, password="a wrong one")
        assert list(found) == ["redis"] and found["redis"].state == "fail"
        assert "wrong one" not in found["redis"].line() and "FD_SCHEDULER_PASSWORD" in found["redis"].remedy
        server.pause()
        began_s = time.monotonic()
        assert redis_findings(server)["redis"].state == "fail"
        assert time.monotonic() - began_s < 4
        server.resume()
    options = RedisOptions(port=free_port())
    assert [one(check_redis(options, is_asked)).state for is_asked in (True, False)] == ["fail", "absent"]


def test_clocks_apart() -> None:
    assert clock_finding("clock", "Redis", 5.0, 0.001).state == "warn"
    assert clock_finding("clock", "Redis", -5.0, 0.001).detail.startswith("Redis is 5000.00 ms behind")
    assert clock_finding("clock", "Redis", 5.0, 12.0).state == "ok"  # it cannot be told


# running


def test_checks_that_hang_or_raise_do_not_end_the_others() -> None:
    forever = threading.Event()

    def hang() -> Iterator[Finding]:
        yield Finding("before", "ok", "")
        forever.wait()

    def fail() -> Iterator[Finding]:
        raise RuntimeError("two\nlines")
        yield

    shown: list[Finding] = []
    last = Finding("last", "ok", "")
    checks = [Check("hang", hang, 0.2, "dmesg"), Check("fail", fail), Check("last", lambda: [last])]
    found = run_checks(checks, shown.append)
    forever.set()
    assert [f.line() for f in found] == [
        "ok      before:", "fail    hang: no answer within 0.2 s; mend: dmesg", f"fail    fail: RuntimeError: two lines; mend: {REPORT}", "ok      last:",
    ]  # fmt: skip
    assert shown == found


@pytest.mark.parametrize("change", [{"state": "fine"}, {"detail": 5}, {"remedy": None}, {"name": ["x"]}])
def test_a_peer_s_finding_is_checked(change: dict[str, object]) -> None:
    finding = Finding("nics", "warn", "\x1b[31mred", "x" * 10_000)
    assert "\x1b" not in finding.line() and len(Finding.from_wire(finding.to_wire()).remedy) == 2000
    with pytest.raises(ValueError, match="no finding"):
        Finding.from_wire({**finding.to_wire(), **change})
