"""What an authenticated peer that has gone mad can say, and what strangers can: no thread, connection or epoch is lost to them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import TransferError
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, TransferEvent
from fastdeploy_pd.transfer.frames import EndFrame, Notice, RepeatFrame, WriteFrame
from fastdeploy_pd.transfer.handshake import receive_frame, send_frame
from fastdeploy_pd.transfer.layout import KVPool, pack_ids
from fastdeploy_pd.transfer.select import build
from fastdeploy_pd.transfer.shm import check_user
from fastdeploy_pd.transfer.stream import StreamTransfer
from fastdeploy_pd.transfer.tcp import TcpTransfer
from rdma_comm.strangers import Strangers
from tests.transfer.optional import has_mooncake

LAYOUT = KVLayout(num_layers=3, num_blocks=40, num_kv_heads=2, block_size=16, head_dim=8, dtype="float32")
SIZE = LAYOUT.block_bytes
SECRET = b"a secret that all instances know"
BACKENDS = ["tcp", "shm", "nccl", *(["mooncake"] if has_mooncake() else [])]
TCP_REPAIR = 19  # tcp(7): close() then says nothing to the peer
IDS = pack_ids([1, 2])
DEEP = b"\x91" * 100_000  # a list in a list in a list ...


def until(is_so: Callable[[], Any], timeout_s: float = 5.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (value := is_so()):
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    return value


def hand_over(source: StreamTransfer, target: StreamTransfer, epoch: str, pause_s: float = 0.0) -> list[TransferEvent]:
    """Returns: one event of each end."""
    target.open_epoch(epoch, [1, 2], 5)
    source.start(epoch, 5, target.descriptor(), [1, 2])
    for layer in range(LAYOUT.num_layers):
        source.write(epoch, [layer], [3, 4], [1, 2])
        time.sleep(pause_s)
    source.finish(epoch)
    found = [until(source.poll), until(target.poll)]
    target.revoke(epoch)
    assert all(len(events) == 1 for events in found), found
    return [events[0] for events in found]


@dataclasses.dataclass
class Ends:
    source: Any
    target: Any
    pools: list[KVPool]

    def rogue(self) -> socket.socket:
        """Returns: a connection that has passed all that the source passes, for frames of one's own."""
        return self.source.dial(self.target.descriptor())

    def check_still_well(self) -> None:
        events = hand_over(self.source, self.target, "afterwards")
        assert isinstance(events[0], EpochSent) and isinstance(events[1], EpochArrived), events
        assert events[0].digests == events[1].digests


@pytest.fixture(params=BACKENDS)
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setenv("GLOG_minloglevel", "3")
    pools = [KVPool(LAYOUT), KVPool(LAYOUT)]
    pools[0].array[:] = 90
    made = [build(request.param, pool=p, layout=LAYOUT, fingerprint="m", secret=SECRET) for p in pools]
    yield Ends(*made, pools)
    for end in made:
        end.close()


WRITE = WriteFrame("e", 5, [0], IDS, IDS, SIZE)
MALFORMED = {
    "negative size": msgspec.structs.replace(WRITE, block_bytes=-SIZE),
    "no size": msgspec.structs.replace(WRITE, block_bytes=0),
    "huge size": msgspec.structs.replace(WRITE, block_bytes=2**63),
    "no layer": msgspec.structs.replace(WRITE, layers=[]),
    "no block": msgspec.structs.replace(WRITE, local=b"", remote=b""),
    "many layers": msgspec.structs.replace(WRITE, layers=[0] * 100_000),
    "layers that are huge numbers": msgspec.structs.replace(WRITE, layers=[2**63]),
    "half an id": msgspec.structs.replace(WRITE, local=IDS[:-1], remote=IDS[:-1]),
    "a repeat first": RepeatFrame([1]),
}


@pytest.mark.parametrize("nonce", [5, 6], ids=["with the nonce", "without"])
@pytest.mark.parametrize("case", [*MALFORMED, "nested"])
def test_a_malformed_frame_lands_nowhere_and_leaves_nothing_behind(ends: Ends, case: str, nonce: int) -> None:
    frame = MALFORMED.get(case, WRITE)
    if isinstance(frame, WriteFrame):
        frame = msgspec.structs.replace(frame, nonce=nonce)
    data = msgspec.msgpack.encode(frame)
    if case == "nested":
        data = b"\x97" + data[1:] + DEEP + b"\x00"  # a field more than it has
    ends.target.open_epoch("e", [1, 2], 5)
    num_threads, num_connections = threading.active_count(), len(ends.target._connections)
    rogue = ends.rogue()
    send_frame(rogue, data)
    rogue.settimeout(0.3)  # a frame that makes sense is refused when its bytes have come
    with contextlib.suppress(OSError, TransferError):
        assert msgspec.msgpack.decode(receive_frame(rogue), type=Notice).refusal
    ends.source.drop(rogue)
    until(lambda: len(ends.target._connections) == num_connections and threading.active_count() <= num_threads)
    assert not ends.pools[1].array.any()
    assert len(ends.target.poll()) <= 1
    ends.target.revoke("e")
    ends.check_still_well()


def test_an_epoch_ends_once_whatever_its_writer_says(ends: Ends) -> None:
    ends.target.open_epoch("e", [1, 2], 5)
    rogue = ends.rogue()
    for num_bytes in (0, 1, 2**62, LAYOUT.num_layers * 2 * SIZE, 0):
        send_frame(rogue, msgspec.msgpack.encode(EndFrame("e", 5, num_bytes)))
    for epoch, nonce in (("e", 6), ("nobody's", 5)):
        send_frame(rogue, msgspec.msgpack.encode(EndFrame(epoch, nonce, 0)))
        assert "closed" in msgspec.msgpack.decode(receive_frame(rogue), type=Notice).refusal
    ends.source.drop(rogue)
    until(lambda: not ends.target._connections)
    (event,) = ends.target.poll()
    assert isinstance(event, EpochFailed) and "0 of 12288 bytes" in event.reason
    ends.target.revoke("e")
    ends.check_still_well()


def test_an_epoch_ends_though_its_sender_hears_no_more(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end came over one connection; the other one is reset while the last bytes that it announced land."""
    has_landed, may_go_on = threading.Event(), threading.Event()
    land = ends.target.land

    def slow(*arguments: Any) -> None:
        land(*arguments)
        has_landed.set()
        assert may_go_on.wait(5)

    monkeypatch.setattr(ends.target, "land", slow)
    ends.target.open_epoch("e", [1, 2], 5)
    ends.source.start("e", 5, ends.target.descriptor(), [1, 2])
    writer, ender = ends.rogue(), ends.rogue()
    send_frame(ender, msgspec.msgpack.encode(EndFrame("e", 5, LAYOUT.num_layers * 2 * SIZE)))
    until(lambda: ends.target._book.find("e").announced_bytes)
    ends.source.send_write(writer, msgspec.structs.replace(WRITE, layers=list(range(LAYOUT.num_layers))), None)
    assert has_landed.wait(5)
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as of a process that was killed
    writer.close()
    may_go_on.set()
    (event,) = until(ends.target.poll)
    assert isinstance(event, EpochArrived), event
    ends.target.revoke("e")
    ends.source.cancel("e")
    ends.source.drop(ender)
    until(ends.source.poll)
    ends.check_still_well()


def test_a_machine_that_vanishes_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 1))
    monkeypatch.setattr("fastdeploy_pd.transfer.tcp.KEEPALIVE", probes)
    pools = KVPool(LAYOUT), KVPool(LAYOUT)
    source, target = (TcpTransfer(p, LAYOUT, "m") for p in pools)
    target.open_epoch("e", [1, 2], 5)
    writer = source.dial(target.descriptor())
    send_frame(writer, msgspec.msgpack.encode(WRITE))
    writer.sendall(bytes(2 * SIZE))
    until(lambda: target._book.find("e").num_bytes)
    (accepted,) = target._connections
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    with contextlib.suppress(PermissionError):  # where we may, it goes without a word
        writer.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    writer.close()
    (event,) = until(target.poll, 10.0)
    assert isinstance(event, EpochFailed) and "the sender is gone" in event.reason
    for end in (source, target):
        end.close()


def test_a_machine_without_threads_for_now_fails_the_epoch_and_no_more(ends: Ends) -> None:
    num_threads, before = threading.active_count(), threading.stack_size(1 << 47)  # no address space has room for it
    try:
        ends.source.start("e", 5, ends.target.descriptor(), [1, 2])
    finally:
        threading.stack_size(before)
    ends.source.write("e", [0], [1, 2], [1, 2])
    ends.source.finish("e")
    (event,) = until(ends.source.poll)
    assert isinstance(event, EpochFailed) and "thread" in event.reason
    assert threading.active_count() == num_threads
    ends.check_still_well()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_checksums_that_cannot_be_computed_leave_no_deaf_connection(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> tuple[int, ...]:
        raise ValueError("as a GPU that has a fault, or a backend of another package, may")

    with monkeypatch.context() as patch:
        patch.setattr(ends.source, "digests_sent", broken)
        ends.target.open_epoch("e", [1, 2], 5)
        ends.source.start("e", 5, ends.target.descriptor(), [1, 2])
        for layer in range(LAYOUT.num_layers):
            ends.source.write("e", [layer], [3, 4], [1, 2])
        ends.source.finish("e")
        (event,) = until(ends.source.poll)
        assert isinstance(event, EpochFailed) and "could not be computed" in event.reason
        until(lambda: not ends.source._peers)
    until(ends.target.poll)
    ends.target.revoke("e")
    ends.check_still_well()


def test_the_end_of_a_peer_with_two_connections_is_told_once() -> None:
    pools = KVPool(LAYOUT), KVPool(LAYOUT)
    source, target = (TcpTransfer(p, LAYOUT, "m", num_connections=2) for p in pools)
    target.open_epoch("e", [1, 2], 5)
    source.start("e", 5, target.descriptor(), [1, 2])
    for layer in range(2):
        source.write("e", [layer], [1, 2], [1, 2])
    until(lambda: target._book.find("e").num_bytes == 4 * SIZE)
    source.close()
    events = until(target.poll)
    until(lambda: not target._connections)
    target.close()  # its threads have ended
    assert [type(e) for e in [*events, *target.poll()]] == [EpochFailed]


def test_what_was_never_written_is_a_failure_told_to_both(ends: Ends) -> None:
    ends.target.open_epoch("e", [1, 2], 5)
    ends.source.start("e", 5, ends.target.descriptor(), [1, 2])
    ends.source.finish("e")
    for end in (ends.source, ends.target):
        assert [type(e) for e in until(end.poll)] == [EpochFailed]
    ends.target.revoke("e")
    ends.check_still_well()


def test_who_calls_is_told_by_the_kernel() -> None:
    """`ipc` takes addresses from its own process as they are; process ids that peers tell repeat from container to container."""
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert check_user(here) == os.getpid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        code = (
            "import socket, sys; c = socket.socket(socket.AF_UNIX); c.connect(chr(0) + sys.argv[1]); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, listener.getsockname()[1:].decode()]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child, listener.accept()[0] as connection:
            assert check_user(connection) == child.pid


def test_a_peer_speaks_for_its_own_epochs_only(ends: Ends) -> None:
    ends.target.open_epoch("e", [1, 2], 5)
    ends.source.start("e", 5, ends.target.descriptor(), [1, 2])
    ends.source.write("e", [0], [1, 2], [1, 2])
    other = ends.source._out["e"].peer.__class__(ends.source, ends.target.descriptor(), 1)
    ends.source.on_notice(other, Notice("e", 0, "refused"))
    ends.source.on_notice(other, Notice("e", 1 << 40, ""))
    assert not ends.source.poll()
    other.close()
    ends.target.revoke("e")


def test_an_epoch_may_take_longer_than_a_stall(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is computed chunk by chunk: nothing is sent, or said, in between."""
    for module in ("stream", "tcp", "torch_link", "mooncake"):
        monkeypatch.setattr(f"fastdeploy_pd.transfer.{module}.STALL_TIMEOUT_S", 0.8)  # to connect may take half of that
    events = hand_over(ends.source, ends.target, "e", pause_s=1.8)
    assert isinstance(events[0], EpochSent) and isinstance(events[1], EpochArrived), events


def test_a_connection_that_nobody_needs_ends_and_comes_back(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("stream", "tcp", "torch_link", "mooncake"):
        monkeypatch.setattr(f"fastdeploy_pd.transfer.{module}.STALL_TIMEOUT_S", 0.3)
    ends.check_still_well()
    until(lambda: not ends.target._connections and not ends.source._connections)
    assert not ends.source._peers
    ends.check_still_well()


def test_a_receiver_that_never_acknowledges_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy_pd.transfer.stream.STALL_TIMEOUT_S", 0.3)
    pools = KVPool(LAYOUT), KVPool(LAYOUT)
    source, target = (build("shm", pool=p, layout=LAYOUT, fingerprint="m") for p in pools)
    target._notify = lambda *_: None
    target.open_epoch("e", [1], 5)
    source.start("e", 5, target.descriptor(), [1])
    source.write("e", [0], [1], [1])
    (event,) = until(source.poll)
    assert isinstance(event, EpochFailed) and "has taken nothing for 0.3 s" in event.reason
    for end in (source, target):
        end.close()


def test_pairs_that_refuse_each_other_keep_nothing_open(ends: Ends) -> None:
    layout = dataclasses.replace(LAYOUT, head_dim=16)
    pool = KVPool(layout)
    other = build(ends.source.name, pool=pool, layout=layout, fingerprint="m", secret=SECRET)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        ends.source.start(f"e{number}", 5, other.descriptor(), [1])
        (event,) = until(ends.source.poll)
        assert isinstance(event, EpochFailed) and "head_dim" in event.reason
    until(lambda: not ends.source._connections and not other._connections)
    assert not ends.source._peers
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    other.close()


@pytest.mark.parametrize(
    "wrong", [{"port": 1 << 80}, {"port": -1}, {"port": None}, {"host": 5}, {"host": "a" * 300}, {"host": "\0"}]
)
def test_a_descriptor_of_nonsense_fails_its_epoch(wrong: dict[str, Any]) -> None:
    source, target = (TcpTransfer(KVPool(LAYOUT), LAYOUT, "m") for _ in range(2))
    source.start("e", 5, {**target.descriptor(), **wrong}, [1])
    (event,) = until(source.poll)
    assert isinstance(event, EpochFailed)
    for end in (source, target):
        end.close()


@pytest.mark.parametrize("step", ["hello", "credentials"])
def test_a_stranger_that_nests_deeply_is_sent_away(step: str) -> None:
    target = TcpTransfer(KVPool(LAYOUT), LAYOUT, "m", secret=SECRET)
    where = (target.descriptor()["host"], target.descriptor()["port"])
    hello = {"magic": b"FDKV", "version": target.descriptor()["version"], "nonce": bytes(32)}
    for _ in range(3):
        with socket.create_connection(where) as stranger:
            if step == "credentials":
                send_frame(stranger, msgspec.msgpack.encode(hello))
                receive_frame(stranger), receive_frame(stranger)
            send_frame(stranger, b"\x81\xa1x" + DEEP + b"\x00")
            stranger.settimeout(3)
            assert stranger.recv(1) == b""
    until(lambda: not target._connections)
    assert target.num_rejected == 3
    target.close()


def test_revoking_does_not_wait_for_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = KVPool(LAYOUT), KVPool(LAYOUT)
    source, target = (TcpTransfer(p, LAYOUT, "m") for p in pools)
    is_computing, may_end = threading.Event(), threading.Event()

    def slow(_: Any) -> tuple[int, ...]:
        is_computing.set()
        assert may_end.wait(5)
        return ()

    monkeypatch.setattr(target, "digests_arrived", slow)  # as those of gigabytes are
    target.open_epoch("e", [1], 5)
    source.start("e", 5, target.descriptor(), [1])
    for layer in range(LAYOUT.num_layers):
        source.write("e", [layer], [1], [1])
    source.finish("e")
    assert is_computing.wait(5)
    revoking = threading.Thread(target=target.revoke, args=("e",))
    revoking.start()
    revoking.join(1)
    was_waiting = revoking.is_alive()
    may_end.set()
    revoking.join()
    source.close()
    target.close()
    assert not was_waiting
    assert not target.poll()


def test_nobody_is_let_in_while_an_end_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TcpTransfer(KVPool(LAYOUT), LAYOUT, "m")
    target._is_closed = True  # as `close` does first
    with socket.create_connection((target.descriptor()["host"], target.descriptor()["port"])) as late:
        late.settimeout(3)
        assert late.recv(1) == b""
    target._is_closed = False
    target.close()


def test_a_pool_that_could_become_smaller_is_not_read() -> None:
    """Reading what was cut off would end the receiver by a signal."""
    pool, target_pool = KVPool(LAYOUT), KVPool(LAYOUT)
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, 4096)
    target = build("shm", pool=target_pool, layout=LAYOUT, fingerprint="m")
    free = os.memfd_create("not sealed")
    os.ftruncate(free, LAYOUT.pool_bytes)
    for descriptor, is_refused in ((pool.fd, False), (free, True)):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        socket.send_fds(ours, [struct.pack("<Q", LAYOUT.pool_bytes)], [descriptor])
        with pytest.raises(TransferError, match="smaller") if is_refused else contextlib.nullcontext():
            assert len(target.accepted(theirs)) == LAYOUT.pool_bytes
        ours.close()
        theirs.close()
    os.close(free)
    target.close()
    pool.close()
    target_pool.close()


class Dripping:
    """Ends that wait for no longer than 0.3 s, and much more to send than sockets hold."""

    layout = dataclasses.replace(LAYOUT, num_blocks=200)

    def __init__(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("stream", "tcp"):
            monkeypatch.setattr(f"fastdeploy_pd.transfer.{module}.STALL_TIMEOUT_S", 0.3)
        monkeypatch.setattr("fastdeploy_pd.transfer.tcp.SOCKET_BUFFER_BYTES", 16384)
        pools = KVPool(self.layout), KVPool(self.layout)
        self.source, self.target = (build(backend, pool=p, layout=self.layout, fingerprint="m") for p in pools)

    def send(self) -> None:
        ids = list(range(200))
        self.target.open_epoch("e", ids, 5)
        self.source.start("e", 5, self.target.descriptor(), ids)
        for layer in range(3):
            self.source.write("e", [layer], ids, ids)
        self.source.finish("e")

    def close(self) -> None:
        self.source.close()
        self.target.close()


def test_a_receiver_that_takes_little_now_and_then_pins_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, is_over = Dripping("tcp", monkeypatch), threading.Event()

    def drip(connection: socket.socket, _: Any) -> str:
        while not is_over.wait(0.1) and connection.recv(16384):
            pass
        return "over"

    monkeypatch.setattr(ends.target, "_receive", drip)
    ends.send()
    (event,) = until(ends.source.poll)
    assert isinstance(event, EpochFailed) and "the peer has taken" in event.reason
    until(lambda: not ends.source._connections and not ends.source._out)
    is_over.set()
    ends.close()


def test_a_receiver_that_acknowledges_little_now_and_then_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, is_over = Dripping("shm", monkeypatch), threading.Event()
    notify = ends.target._notify

    def drip(connection: socket.socket, notice: Notice) -> None:
        while not is_over.wait(0.1):
            notify(connection, msgspec.structs.replace(notice, num_bytes=1))

    monkeypatch.setattr(ends.target, "_notify", drip)
    ends.send()
    (event,) = until(ends.source.poll)
    assert isinstance(event, EpochFailed) and "less than 1048576 bytes a second" in event.reason
    is_over.set()
    ends.close()


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_sender_that_drips_is_sent_away(monkeypatch: pytest.MonkeyPatch, is_wanted: bool) -> None:
    ends = Dripping("tcp", monkeypatch)
    if is_wanted:
        ends.target.open_epoch("e", [1, 2], 5)
    rogue = ends.source.dial(ends.target.descriptor())
    send_frame(rogue, msgspec.msgpack.encode(WRITE))

    def drip() -> None:
        for _ in range(50):
            rogue.sendall(b"1")
            time.sleep(0.1)

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        drip()
    if is_wanted:
        (event,) = until(ends.target.poll)
        assert isinstance(event, EpochFailed) and "the sender stalls" in event.reason
    ends.source.drop(rogue)
    ends.close()


def test_a_notice_that_drips_is_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, is_over = Dripping("shm", monkeypatch), threading.Event()

    def drip(connection: socket.socket, notice: Notice) -> None:
        connection.sendall(struct.pack("<I", 1 << 19))
        with contextlib.suppress(OSError):
            while not is_over.wait(0.1):
                connection.sendall(b"1")

    monkeypatch.setattr(ends.target, "_notify", drip)
    ends.send()
    (event,) = until(ends.source.poll)
    assert isinstance(event, EpochFailed) and "too slow" in event.reason
    is_over.set()
    ends.close()


def test_strangers_are_few_and_push_out_each_other_alone(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy_pd.transfer.handshake.HANDSHAKE_TIMEOUT_S", 60.0)
    ends.target._strangers = Strangers(4)
    peer, num_threads = ends.rogue(), threading.active_count()
    where = ends.target.descriptor()
    strangers = []
    for _ in range(12):
        strangers.append(ends.source.connect_socket(where))
        time.sleep(0.01)  # they are let in in this order
    until(lambda: all(is_ended(s) for s in strangers[:8]))
    assert not any(is_ended(s) for s in [*strangers[8:], peer])
    assert threading.active_count() <= num_threads + 4
    ends.check_still_well()
    assert not is_ended(peer) and sum(not is_ended(s) for s in strangers) < 4
    for connection in (*strangers, peer):
        ends.source.drop(connection)


def is_ended(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
