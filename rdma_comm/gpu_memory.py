"""How NICs get at a GPU's memory: registered by dmabuf, or as nvidia-peermem lets them, and flushed where the GPU needs it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rdma_comm import _verbs
from rdma_comm.errors import RdmaError, RdmaUnavailable, VerbsError

if TYPE_CHECKING:
    from rdma_comm.cuda.driver import Gpu

PAGE_BYTES = 65536  # a dmabuf begins and ends at a page, whatever the host's page size; allocations are of 2 MiB


class GpuMemory:
    """One piece of one GPU's memory."""

    def __init__(self, gpu: Gpu, address: int, length: int, is_flushed: bool | None = None) -> None:
        """
        Args:
            address, length: bytes, inside one allocation.
            is_flushed: whether `flush` does anything; None: if the GPU does not order NICs' writes by itself.
        Raises: RdmaUnavailable: it needs flushing and has no way to do it.
        """
        self._gpu, self._address, self._length = gpu, address, length
        self._start = address - address % PAGE_BYTES
        self._descriptor, self._why_not = -1, ""
        self.is_flushed = not gpu.orders_nic_writes if is_flushed is None else is_flushed
        if self.is_flushed and not gpu.can_flush_nic_writes:
            raise RdmaUnavailable(
                f"GPU {gpu.ordinal} neither orders what NICs write to it nor can be told to flush it; KVCACHE_GDRCOPY_FLUSH_ENABLE=0 goes "
                "on all the same (checksums tell bytes that are not there yet)"
            )
        try:
            end = address + length
            self._descriptor = gpu.dmabuf(self._start, end + -end % PAGE_BYTES - self._start)
        except RdmaError as error:
            self._why_not = str(error)

    def register(self, nic: str, domain: _verbs.ProtectionDomain, access: int, owner: object) -> _verbs.MemoryRegion:
        """Returns: the memory, registered with one NIC. Raises: RdmaUnavailable: in neither way; says why, and what mends it."""
        if self._descriptor >= 0:
            offset = self._address - self._start
            try:
                return _verbs.MemoryRegion(
                    domain, self._address, self._length, access, owner, self._descriptor, dmabuf_offset=offset
                )
            except VerbsError as error:
                self._why_not = str(error)
        try:
            return _verbs.MemoryRegion(domain, self._address, self._length, access, owner)
        except VerbsError as error:
            raise RdmaUnavailable(
                f"{nic} cannot register the memory of GPU {self._gpu.ordinal}: by dmabuf: {self._why_not}; by nvidia-peermem (`modprobe "
                f"nvidia-peermem` loads it where the driver has it): {error}"
            ) from error

    def flush(self) -> None:
        """What NICs have written so far is seen by kernels that start from now on. Raises: CudaError."""
        if self.is_flushed:
            self._gpu.flush_nic_writes()

    def close(self) -> None:
        """Idempotent; regions live on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
