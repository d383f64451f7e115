"""Which transfer backends work here: two ends of each are made, as instances make theirs, and hand blocks over."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.doctor.finding import REPORT, Finding
from fastdeploy_pd.doctor.hardware import DRIVER_REMEDY, NO_NIC_REMEDY, active_ports, has_cuda
from fastdeploy_pd.errors import ConfigError, TransferError, TransferUnavailable
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, Transfer
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.select import build
from rdma_comm.devices import list_gpus
from rdma_comm.errors import RdmaError

OPTIONAL = ("nccl", "mooncake")  # nobody misses them who does not name them
NAMES = ("ipc", "shm", "rdma", "tcp", *OPTIONAL)
LAYOUT = KVLayout(num_layers=2, num_blocks=8, num_kv_heads=2, block_size=64, head_dim=64, dtype="float32")
FINGERPRINT = "fastdeploy-pd doctor"
BLOCKS = (6, 1, 3)
NONCE = 7
HAND_OVER_S = 8.0
BACKEND_S = 90.0  # importing torch alone takes a slow disk half a minute
#: what mends it, by what is said
REMEDIES = (
    ("Mooncake is not installed", "pip install 'fastdeploy-pd[mooncake-cpu]' (or [mooncake], where there is CUDA 12)"),
    ("Mooncake cannot be loaded", "apt-get install libibverbs1 libnuma1 libcurl4"),
    ("compiled part", "apt-get install gcc python3-dev, then: pip install --force-reinstall --no-deps ."),
    ("libibverbs", "apt-get install libibverbs1 ibverbs-providers"),
    ("ib_uverbs", NO_NIC_REMEDY),
    ("no active port", "ip link set INTERFACE up"),
    ("has an active port", NO_NIC_REMEDY),
    ("KVCACHE_RDMA", "unset KVCACHE_RDMA_NICS KVCACHE_RDMA_GID_INDEX"),
    ("KVCACHE_IB", "unset KVCACHE_IB_TIMEOUT"),
    ("KVCACHE_RELAX", "unset KVCACHE_RELAX_ORDERING"),
    ("GID", "ip address add ADDRESS/24 dev INTERFACE"),
    ("locked memory", "ulimit -l unlimited"),
    ("NVIDIA", DRIVER_REMEDY),
    ("torch is not here", "pip install 'fastdeploy-pd[torch]'"),
)


def remedy_for(reason: str) -> str:
    """Returns: the command that mends it; "" if none is known."""
    return next((command for text, command in REMEDIES if text in reason), "")


def known_backends() -> list[str]:
    """Returns: ours, and those that other packages offer."""
    return [*NAMES, *(point.name for point in entry_points(group="fastdeploy_pd.transfers"))]


def open_backend(name: str, stack: ExitStack, host: str = "127.0.0.1", secret: bytes | None = None) -> Transfer:
    """Returns: a backend over a small pool of random bytes, which the stack closes. Raises: TransferUnavailable, ConfigError."""
    if name == "ipc":
        pool = _gpu_pool()
    else:
        pool = KVPool(LAYOUT)
        pool.view[:] = os.urandom(LAYOUT.pool_bytes)
    stack.callback(pool.close)
    transfer = build(name, pool=pool, layout=LAYOUT, fingerprint=FINGERPRINT, host=host, port=0, secret=secret)
    stack.callback(transfer.close)
    return transfer


def _gpu_pool() -> Any:
    from fastdeploy_pd.transfer.device_pool import DevicePool
    from rdma_comm.cuda.driver import Gpu

    try:
        pool = DevicePool(LAYOUT, Gpu(0))
        pool.gpu.write(pool.pointer, os.urandom(LAYOUT.pool_bytes))
    except RdmaError as error:
        raise TransferUnavailable(str(error)) from error
    return pool


def check_backend(name: str, sysfs: Path, env: Mapping[str, str], secret: bytes | None = None) -> Iterator[Finding]:
    """Whether a backend moves blocks between two ends in this process, which have the secret as instances have it."""
    title = f"backend {name}"
    is_expected = {
        "rdma": bool(active_ports(sysfs)) or bool(env.get("KVCACHE_RDMA_NICS", "").strip(" ,")),
        "ipc": has_cuda(),
    }.get(name, name in NAMES and name not in OPTIONAL)  # of other packages' none is asked for here
    with ExitStack() as stack:
        try:
            source, target = (open_backend(name, stack, secret=secret) for _ in range(2))
        except ConfigError as error:
            state = "fail" if is_expected or not isinstance(error, TransferUnavailable) else "absent"
            is_mendable = name != "ipc" or bool(list_gpus(sysfs))  # where there is no GPU, a driver is no help
            remedy = remedy_for(error.message) if is_mendable else ""
            remedy = remedy or (REPORT if state == "fail" else "")
            yield Finding(title, state, error.message, remedy)
            return
        try:
            target.open_epoch("doctor", BLOCKS, NONCE)
            begin_hand_over(source, target.descriptor(), "doctor")
            sent, arrived = wait_for_end(source), wait_for_end(target)
        except TransferError as error:
            yield Finding(title, "fail", error.message, remedy_for(error.message) or REPORT)
            return
        if sent != arrived:
            yield Finding(
                title, "fail", "blocks arrive changed: their checksums differ", "memtest; another NIC or cable"
            )
        else:
            yield Finding(title, "ok", f"{len(sent)} blocks handed over, checksums equal")


def begin_hand_over(source: Transfer, descriptor: dict[str, Any], epoch: str) -> None:
    """Send BLOCKS from `source` to the same blocks of the end with that descriptor."""
    source.start(epoch, NONCE, descriptor, BLOCKS)
    source.write(epoch, range(LAYOUT.num_layers), BLOCKS, BLOCKS)
    source.finish(epoch)


def wait_for_end(transfer: Transfer) -> list[int]:
    """Returns: the blocks' checksums at one end of a hand-over. Raises: TransferError: it failed, or does not end."""
    clock = WallClock()
    end_s = clock.now_s() + HAND_OVER_S
    while clock.now_s() < end_s:
        for event in transfer.poll():
            if isinstance(event, EpochFailed):
                raise TransferError(event.reason)
            if isinstance(event, EpochSent | EpochArrived):
                return list(event.digests)
        threading.Event().wait(0.002)
    raise TransferError(f"the hand-over did not end within {HAND_OVER_S:g} s")
