"""Types of the compiled part; docs/rdma_comm.md says what each call does."""

from typing_extensions import Buffer

LOCAL_WRITE: int
REMOTE_WRITE: int
REMOTE_READ: int
RELAXED_ORDERING: int
WRITE: int
READ: int

def device_names() -> list[str]: ...
def transfer(
    opcode: int,
    rails: tuple[tuple[QueuePair, MemoryRegion, int, int, int], ...],
    local: Buffer,
    remote: Buffer,
    sizes: Buffer,
    timeout_s: float,
) -> tuple[int, list[tuple[int, int, str, int]], bool]: ...

class Device:
    name: str
    def __init__(self, name: str) -> None: ...
    def attributes(self) -> dict[str, int]: ...
    def port(self, number: int) -> dict[str, int]: ...
    def gid(self, port: int, index: int) -> bytes: ...
    def close(self) -> None: ...

class ProtectionDomain:
    def __init__(self, device: Device) -> None: ...
    def close(self) -> None: ...

class MemoryRegion:
    address: int
    length: int
    remote_key: int
    def __init__(
        self,
        domain: ProtectionDomain,
        address: int,
        length: int,
        access: int,
        owner: object = None,
        dmabuf_fd: int = -1,
        dmabuf_offset: int = 0,
    ) -> None: ...
    def close(self) -> None: ...

class CompletionQueue:
    def __init__(self, device: Device, depth: int) -> None: ...
    def poll(
        self, max_completions: int = 64, timeout_s: float = 0.0
    ) -> list[tuple[int, int, int, int, int | None, int]]: ...
    def close(self) -> None: ...

class QueuePair:
    number: int
    def __init__(
        self,
        domain: ProtectionDomain,
        send_queue: CompletionQueue,
        receive_queue: CompletionQueue,
        max_send_wr: int,
        max_recv_wr: int,
        peer: str = "",
    ) -> None: ...
    def connect(
        self,
        port: int,
        gid_index: int,
        is_ethernet: bool,
        mtu: int,
        access: int,
        local_psn: int,
        remote_number: int,
        remote_psn: int,
        remote_lid: int,
        remote_gid: bytes,
        timeout: int = 18,
        retry_count: int = 6,
        rnr_retry: int = 6,
        max_reads: int = 1,
        max_peer_reads: int = 1,
        traffic_class: int = 0,
    ) -> None: ...
    def post_receives(self, count: int) -> None: ...
    def send_immediate(self, value: int, timeout_s: float = 10.0) -> None: ...
    def fail(self) -> None: ...
    def close(self) -> None: ...
