"""The CUDA driver's calls that this package needs, over ctypes; each failed one raises `CudaError` with its name."""

from __future__ import annotations

import ctypes
import threading
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from rdma_comm.errors import RdmaError, RdmaUnavailable

ENABLE_PEER_ACCESS_ALREADY = 704
LAZY_PEER_ACCESS = 1
STREAM_NON_BLOCKING = 1
EVENT_DISABLE_TIMING = 2
HANDLE_BYTES = 64
ATTRIBUTE_DMA_BUF_SUPPORTED = 124
ATTRIBUTE_RDMA_FLUSH_OPTIONS, ATTRIBUTE_RDMA_WRITES_ORDERING = 117, 118
SCOPE_OWNER = 100
FLUSH_BY_HOST = 1
ORDER_OF_STREAM = 1
BESIDE_COMPUTE = 1
ATTRIBUTE_DEVICE_ORDINAL, ATTRIBUTE_RANGE_START, ATTRIBUTE_RANGE_SIZE = 9, 11, 12
HANDLE_TYPE_DMA_BUF_FD = 1
NAMES = {"cuMemAlloc": "cuMemAlloc_v2", "cuMemFree": "cuMemFree_v2", "cuIpcOpenMemHandle": "cuIpcOpenMemHandle_v2",
         "cuMemcpyHtoDAsync": "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync": "cuMemcpyDtoHAsync_v2", "cuStreamDestroy": "cuStreamDestroy_v2",
         "cuEventDestroy": "cuEventDestroy_v2"}  # fmt: skip
# They queue something, and wait only where the device's queue is full. To give the GIL up for so short a time makes each of them wait for the
# thread that computes, and that one for them.
QUICK = frozenset(
    ("cuCtxSetCurrent", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemsetD8Async", "cuLaunchKernel", "cuEventRecord")
)


class CudaUnavailable(RdmaUnavailable):
    """This machine has no usable GPU; the text says why."""


class CudaError(RdmaError):
    """A driver call failed."""

    def __init__(self, call: str, status: int, name: str) -> None:
        self.call, self.status = call, status
        super().__init__(f"{call} failed: {name} ({status})")


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * HANDLE_BYTES),)


class _CopyAttributes(ctypes.Structure):
    """cuda.h's CUmemcpyAttributes."""

    _fields_ = (
        ("order", c_int),
        ("source_type", c_int),
        ("source_id", c_int),
        ("target_type", c_int),
        ("target_id", c_int),
        ("flags", c_uint),
    )


class _Driver:
    """libcuda, loaded and initialised."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
            self._with_gil = ctypes.PyDLL("libcuda.so.1")
        except OSError as error:
            raise CudaUnavailable(f"the NVIDIA driver is not here ({error})") from error
        self.quick = QUICK
        self._get_name = self._library.cuGetErrorName
        try:
            self.call("cuInit", c_uint(0))
        except CudaError as error:
            raise CudaUnavailable(f"the NVIDIA driver finds no GPU: {error}") from error

    def status(self, name: str, *arguments: Any) -> int:
        """Returns: what the call returned. The GIL is released meanwhile, unless it is a QUICK one; see `release_gil`."""
        library = self._with_gil if name in self.quick else self._library
        return int(getattr(library, NAMES.get(name, name))(*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Raises: CudaError."""
        status = self.status(name, *arguments)
        if status:
            raise CudaError(name, status, self.error_name(status))

    def has(self, name: str) -> bool:
        """Whether this driver has a call."""
        return hasattr(self._library, name)

    def error_name(self, status: int) -> str:
        """Returns: e.g. CUDA_ERROR_OUT_OF_MEMORY."""
        text = ctypes.c_char_p()
        self._get_name(status, byref(text))
        return (text.value or b"unknown").decode()


@cache
def driver() -> _Driver:
    """Returns: the driver. Raises: CudaUnavailable: there is none, or it has no GPU."""
    return _Driver()


def release_gil() -> None:
    """From now on every call of this process releases the GIL: where ranks' kernels wait for each other, a full queue waits for another
    process, which may wait for an answer of a thread of this one. Raises: CudaUnavailable.
    """
    driver().quick = frozenset()


def num_gpus() -> int:
    """Returns: how many this process sees. Raises: CudaUnavailable: there is no driver; CudaError."""
    count = c_int()
    driver().call("cuDeviceGetCount", byref(count))
    return count.value


class Gpu:
    """One GPU of this process, in its primary context: the one that frameworks use."""

    def __init__(self, ordinal: int = 0) -> None:
        """
        Args:
            ordinal: among those that CUDA_VISIBLE_DEVICES leaves.
        Raises: CudaUnavailable: there is none of that number; CudaError.
        """
        self._driver = driver()
        count, self._device = num_gpus(), c_int()
        if not 0 <= ordinal < count:
            raise CudaUnavailable(f"there is no GPU {ordinal}; this process sees {count}")
        self.ordinal = ordinal
        self._driver.call("cuDeviceGet", byref(self._device), c_int(ordinal))
        self._context = c_void_p()
        self._driver.call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self._lock = threading.Lock()
        self._peers: set[int] = set()
        self._functions: dict[str, c_void_p] = {}
        self._module = c_void_p()

    def call(self, name: str, *arguments: Any) -> None:
        """A driver call in this GPU's context, from any thread. Raises: CudaError."""
        self._driver.call("cuCtxSetCurrent", self._context)
        self._driver.call(name, *arguments)

    @property
    def uuid(self) -> str:
        """What it is called by every process, whichever it sees."""
        raw = (ctypes.c_ubyte * 16)()
        self._driver.call("cuDeviceGetUuid", byref(raw), self._device)
        return bytes(raw).hex()

    @property
    def name(self) -> str:
        """The kind of GPU, e.g. NVIDIA H200."""
        text = ctypes.create_string_buffer(256)
        self._driver.call("cuDeviceGetName", text, c_int(256), self._device)
        return text.value.decode()

    @property
    def pci_address(self) -> str:
        """As sysfs writes it: 0000:1b:00.0."""
        text = ctypes.create_string_buffer(32)
        self._driver.call("cuDeviceGetPCIBusId", text, c_int(32), self._device)
        return text.value.decode().lower()

    # memory

    def allocate(self, num_bytes: int) -> int:
        """Returns: the address of zeroed memory. Raises: CudaError."""
        pointer = c_ulonglong()
        self.call("cuMemAlloc", byref(pointer), c_size_t(num_bytes))
        self.call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), c_size_t(num_bytes))
        return int(pointer.value)

    def memory(self) -> tuple[int, int]:
        """Returns: (free, total) bytes. Raises: CudaError."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def free(self, pointer: int) -> None:
        """Give memory back. Raises: CudaError."""
        self.call("cuMemFree", c_ulonglong(pointer))

    def write(self, pointer: int, data: Any) -> None:
        """Copy a buffer's bytes to the GPU. Raises: CudaError."""
        view = memoryview(data).cast("B")
        holder = (
            (ctypes.c_char * view.nbytes).from_buffer_copy(view)
            if view.readonly
            else (ctypes.c_char * view.nbytes).from_buffer(view)
        )
        self.call("cuMemcpyHtoD_v2", c_ulonglong(pointer), holder, c_size_t(view.nbytes))

    def read(self, pointer: int, num_bytes: int) -> bytearray:
        """Returns: bytes of GPU memory. Raises: CudaError."""
        data = bytearray(num_bytes)
        self.call(
            "cuMemcpyDtoH_v2", (ctypes.c_char * num_bytes).from_buffer(data), c_ulonglong(pointer), c_size_t(num_bytes)
        )
        return data

    # sharing

    def export(self, pointer: int) -> tuple[bytes, int]:
        """Returns: (IPC handle of the allocation, offset of pointer in it). Raises: CudaError: e.g. it is not from cuMemAlloc."""
        handle, start = _Handle(), c_ulonglong()
        self.call("cuPointerGetAttribute", byref(start), c_int(ATTRIBUTE_RANGE_START), c_ulonglong(pointer))
        self.call("cuIpcGetMemHandle", byref(handle), c_ulonglong(start.value))
        return ctypes.string_at(byref(handle), HANDLE_BYTES), pointer - int(start.value)

    def open(self, handle: bytes) -> int:
        """Map another process's allocation. Returns: where it begins here; `close_handle` ends it. Raises: CudaError."""
        pointer = c_ulonglong()
        self.call("cuIpcOpenMemHandle", byref(pointer), _Handle.from_buffer_copy(handle), c_uint(LAZY_PEER_ACCESS))
        return int(pointer.value)

    def close_handle(self, pointer: int) -> None:
        """Unmap what `open` returned. Raises: CudaError."""
        self.call("cuIpcCloseMemHandle", c_ulonglong(pointer))

    def reach(self, other: Gpu) -> None:
        """Let this GPU's kernels use the other's memory, in this process. Raises: CudaError: they have no way to each other."""
        if other.ordinal == self.ordinal or other.ordinal in self._peers:
            return
        self._driver.call("cuCtxSetCurrent", self._context)
        status = self._driver.status("cuCtxEnablePeerAccess", other._context, c_uint(0))
        if status not in (0, ENABLE_PEER_ACCESS_ALREADY):
            raise CudaError("cuCtxEnablePeerAccess", status, self._driver.error_name(status))
        self._peers.add(other.ordinal)

    def dmabuf(self, pointer: int, num_bytes: int) -> int:
        """Returns: a descriptor by which a NIC can register this memory; the caller closes it.

        Raises: CudaError: the driver or kernel has no dmabuf for it (nvidia-peermem is the other way).
        """
        descriptor = c_int(-1)
        self.call(
            "cuMemGetHandleForAddressRange", byref(descriptor), c_ulonglong(pointer), c_size_t(num_bytes), c_int(HANDLE_TYPE_DMA_BUF_FD), c_ulonglong(0)
        )  # fmt: skip
        return int(descriptor.value)

    def attribute(self, number: int) -> int:
        """Returns: a device attribute (cuda.h's CUdevice_attribute). Raises: CudaError."""
        value = c_int()
        self._driver.call("cuDeviceGetAttribute", byref(value), c_int(number), self._device)
        return value.value

    @property
    def orders_nic_writes(self) -> bool:
        """Whether kernels that start after a NIC has reported its writes see them."""
        return self.attribute(ATTRIBUTE_RDMA_WRITES_ORDERING) >= SCOPE_OWNER

    @property
    def can_flush_nic_writes(self) -> bool:
        """Whether `flush_nic_writes` works."""
        return bool(self.attribute(ATTRIBUTE_RDMA_FLUSH_OPTIONS) & FLUSH_BY_HOST)

    def flush_nic_writes(self) -> None:
        """Let this GPU's kernels see what NICs have written to it so far. Raises: CudaError."""
        self.call("cuFlushGPUDirectRDMAWrites", c_int(0), c_int(SCOPE_OWNER))

    # copies and kernels

    def has(self, name: str) -> bool:
        """Whether the driver has a call: younger ones are missing in older drivers."""
        return self._driver.has(name)

    def copy_batch(self, sources: Any, targets: Any, sizes: Any, stream: Stream) -> None:
        """Queue copies of many pieces by the copy engines: cuMemcpyBatchAsync, of CUDA 12.8 and later.

        Args:
            sources, targets: [n] uint64 addresses; sizes: [n] uint64 bytes.
        Raises: CudaError.
        """
        attributes, first, failed = _CopyAttributes(order=ORDER_OF_STREAM, flags=BESIDE_COMPUTE), c_size_t(), c_size_t()
        lists = (c_void_p(a.ctypes.data) for a in (targets, sources, sizes))
        self.call(
            "cuMemcpyBatchAsync", *lists, c_size_t(len(sizes)), byref(attributes), byref(first), c_size_t(1), byref(failed), stream.handle
        )  # fmt: skip

    def function(self, name: str) -> c_void_p:
        """Returns: one of blocks.cu's kernels, compiled for this GPU. Raises: CudaError."""
        with self._lock:
            if not self._module:
                text = (Path(__file__).parent / "blocks.ptx").read_bytes()
                self.call("cuModuleLoadData", byref(self._module), ctypes.c_char_p(text))
            if name not in self._functions:
                function = c_void_p()
                self.call("cuModuleGetFunction", byref(function), self._module, name.encode())
                self._functions[name] = function
        return self._functions[name]

    def launch(self, name: str, num_ctas: int, num_threads: int, stream: c_void_p, *arguments: Any) -> None:
        """Queue a kernel; arguments are ctypes values. Raises: CudaError."""
        pointers = (c_void_p * len(arguments))(*(ctypes.cast(byref(a), c_void_p) for a in arguments))
        self.call(
            "cuLaunchKernel", self.function(name), c_uint(num_ctas), c_uint(1), c_uint(1), c_uint(num_threads), c_uint(1), c_uint(1),
            c_uint(0), stream, ctypes.cast(pointers, POINTER(c_void_p)), None,
        )  # fmt: skip


class Stream:
    """A stream of its own on a GPU, and an event to wait for it."""

    def __init__(self, gpu: Gpu) -> None:
        """Raises: CudaError."""
        self.gpu, self.handle, self._event = gpu, c_void_p(), c_void_p()
        lowest, highest = c_int(), c_int()
        gpu.call("cuCtxGetStreamPriorityRange", byref(lowest), byref(highest))
        # Copies and checksums are short and a peer waits for them. Whether the priority matters was not compared on one machine.
        gpu.call("cuStreamCreateWithPriority", byref(self.handle), c_uint(STREAM_NON_BLOCKING), highest)
        gpu.call("cuEventCreate", byref(self._event), c_uint(EVENT_DISABLE_TIMING))

    def wait(self) -> None:
        """Wait until everything queued so far is done, without the GIL. Raises: CudaError: it failed.

        It spins: a copy takes milliseconds at most, and an interrupt adds a tenth of one to each.
        """
        self.gpu.call("cuEventRecord", self._event, self.handle)
        self.gpu.call("cuEventSynchronize", self._event)

    def close(self) -> None:
        """Idempotent."""
        if self.handle:
            self.gpu.call("cuStreamDestroy", self.handle)
            self.gpu.call("cuEventDestroy", self._event)
            self.handle = c_void_p()
