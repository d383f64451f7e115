"""What the contract suite needs to run on a GPU."""

from __future__ import annotations

from ctypes import c_size_t, c_uint, c_void_p
from functools import cache

from fastdeploy_pd.transfer.device_pool import DevicePool
from fastdeploy_pd.transfer.layout import KVPool
from rdma_comm.cuda.driver import CudaUnavailable, Gpu

PORTABLE_AND_MAPPED = 3
_seen: dict[int, DevicePool] = {}


@cache
def has_gpu() -> bool:
    """Whether this process can use one."""
    try:
        Gpu(0)
    except CudaUnavailable:
        return False
    return True


@cache
def num_gpus() -> int:
    """How many this process sees."""
    count = 0
    while True:
        try:
            Gpu(count)
        except CudaUnavailable:
            return count
        count += 1


class _Seen(DevicePool):
    def export(self) -> tuple[bytes, int]:
        return bytes(64), 0  # host memory has no handle; both ends are in this process


def seen_by_gpu(pool: KVPool) -> DevicePool:
    """Returns: a pool of host memory as a GPU's, so that a test can look into it."""
    if id(pool) not in _seen:
        gpu, pointer = Gpu(0), int(pool.array.ctypes.data)
        gpu.call(
            "cuMemHostRegister_v2", c_void_p(pointer), c_size_t(pool.layout.pool_bytes), c_uint(PORTABLE_AND_MAPPED)
        )
        _seen[id(pool)] = _Seen(pool.layout, gpu, pointer)
        _seen[id(pool)].host = pool  # type: ignore[attr-defined]  # keeps it alive
    return _seen[id(pool)]
