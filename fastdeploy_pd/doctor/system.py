"""Limits, memory, ports and versions of this machine."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fastdeploy_pd import __version__
from fastdeploy_pd.cluster.messages import PROTOCOL_VERSION
from fastdeploy_pd.doctor.finding import Finding, size
from fastdeploy_pd.doctor.hardware import active_ports
from fastdeploy_pd.engine.lifetime import allowed_files
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.launch.embedded_redis import find_server, version_of
from fastdeploy_pd.launch.ports import bind_tcp, check_free
from fastdeploy_pd.transfer.base import TRANSFER_VERSION
from rdma_comm import pyverbs

CAP_IPC_LOCK = 14
MIN_FILES, ENOUGH_FILES = 512, 4096  # peers' connections (1024 are taken), clients, and what a framework opens
MIN_FREE_BYTES = 1 << 30
#: those of the README and the documents; an instance that is given none chooses free ones
USUAL_PORTS = {"--port": 8000, "--pd-comm-port": 2334, "--cache-queue-port": 2335, "--rdma-comm-ports": 2336}


def check_memlock(sysfs: Path) -> Iterator[Finding]:
    """Whether `rdma` may register a KV pool."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        yield Finding("memlock", "ok", "unlimited")
    elif _has_capability(CAP_IPC_LOCK):
        yield Finding("memlock", "ok", f"{size(limit)}, which does not bind this user (CAP_IPC_LOCK)")
    elif not active_ports(sysfs):
        yield Finding("memlock", "ok", f"{size(limit)}; only `rdma` needs more")
    else:
        remedy = "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1)"
        yield Finding("memlock", "fail", f"{size(limit)}; `rdma` registers the whole KV pool", remedy)


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def check_files() -> Iterator[Finding]:
    """How many files an instance may have open: it raises what a shell gives it up to the hard limit."""
    limit = allowed_files()
    state = "ok" if limit >= ENOUGH_FILES else "warn" if limit >= MIN_FILES else "fail"
    detail = f"{limit}" if state == "ok" else f"{limit}; every peer and client takes some, {ENOUGH_FILES} are enough"
    yield Finding("file descriptors", state, detail, "" if state == "ok" else "ulimit -n 65536")


def check_shared_memory() -> Iterator[Finding]:
    """Whether `shm` can share a pool; it does so by memfd, which takes memory and nothing of /dev/shm."""
    from fastdeploy_pd.engine.build import DEFAULT_MEMORY_FRACTION, free_memory_bytes

    try:
        os.close(os.memfd_create("fastdeploy-pd-doctor"))
    except OSError as error:
        remedy = "allow memfd_create (docker: the default seccomp profile does)"
        yield Finding("shared memory", "fail", f"memfd_create fails: {error.strerror}; no pool can be made", remedy)
        return
    free = free_memory_bytes()
    try:
        shm = size(shutil.disk_usage("/dev/shm").total)
    except OSError:
        shm = "none"
    pool = f"a KV pool takes up to {DEFAULT_MEMORY_FRACTION:.0%} of it unless told otherwise"
    detail = f"{size(free)} of memory free, {pool}; /dev/shm: {shm}, of which `shm` needs nothing (it uses memfd)"
    is_scarce = free < MIN_FREE_BYTES
    yield Finding(
        "shared memory",
        "warn" if is_scarce else "ok",
        detail,
        "ps -eo pid,rss,comm --sort -rss | head" if is_scarce else "",
    )


def check_ports() -> Iterator[Finding]:
    """Whether ports can be had: any free one, and those that the documents use."""
    bind_tcp("127.0.0.1", 0, "--port").close()
    taken = []
    for flag, port in USUAL_PORTS.items():
        try:
            check_free("0.0.0.0", port, flag)
        except ConfigError:
            taken.append(f"{flag} {port}")
    if taken:
        ports = "|".join(text.split()[1] for text in taken)
        detail = f"in use: {', '.join(taken)}; an instance that is given none takes free ones"
        yield Finding("ports", "warn", detail, f"ss -ltnp | grep -E ':({ports}) '")
    else:
        yield Finding("ports", "ok", f"free: {', '.join(f'{f} {p}' for f, p in USUAL_PORTS.items())}, and any other")


def versions(sysfs: Path) -> dict[str, str]:
    """Returns: what two machines of a cluster are compared by."""
    driver = sysfs / "module/nvidia/version"
    try:
        server = find_server()
        redis = f"{Path(server).name} {'.'.join(map(str, version_of(server)))}"
    except ConfigError:
        redis = "none"
    except (OSError, subprocess.SubprocessError) as error:
        redis = f"unknown ({error})"
    return {
        "fastdeploy-pd": __version__,
        "protocol": str(PROTOCOL_VERSION),
        "transfer": str(TRANSFER_VERSION),
        "python": platform.python_version(),
        "libibverbs": _libibverbs_version(),
        "pyverbs": "none" if pyverbs.find() is None else "here",
        "NVIDIA driver": driver.read_text().strip() if driver.exists() else "none",
        "Redis server": redis,
        "kernel": platform.release(),
    }


def check_versions(sysfs: Path) -> Iterator[Finding]:
    """What is installed; the Redis server is the one that `up` would start."""
    yield Finding("versions", "ok", ", ".join(f"{name} {value}" for name, value in versions(sysfs).items()))


def _libibverbs_version() -> str:
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return "none"
    paths = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libibverbs.so" in line)
    return next((Path(p).name.removeprefix("libibverbs.so.") for p in paths), "unknown")
