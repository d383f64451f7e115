"""What `tcp` and `shm` share: listening, connections to peers, queues of writes, epochs, threads. They differ in how bytes travel.

Threads: one that accepts, one a connection that receives, two a connection that sends (one writes, one hears refusals). They spend
nearly all their time in system calls and copies, without the GIL. One peer's threads never wait for another's.
"""

from __future__ import annotations

import errno
import itertools
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import TransferError
from fastdeploy_pd.transfer.base import CLOSED, EpochArrived, EpochFailed, EpochSent, TransferEvent
from fastdeploy_pd.transfer.epochs import EpochBook, Incoming
from fastdeploy_pd.transfer.frames import EndFrame, Notice, RepeatFrame, WriteFrame
from fastdeploy_pd.transfer.handshake import Handshake, decode, describe, difference, receive_frame, send_frame
from fastdeploy_pd.transfer.layout import KVPool, pack_ids
from fastdeploy_pd.transfer.outgoing import LEAST_BYTES_PER_S, Outgoing, Pace
from rdma_comm.strangers import MAX_STRANGERS, Strangers, shut

_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)
ACCEPT_PAUSE_S = 0.1
log = logging.getLogger("fastdeploy_pd.transfer")

STALL_TIMEOUT_S = 10.0  # a peer that takes no byte for so long has failed
CONNECT_TIMEOUT_S = 3.0
CLOSE_TIMEOUT_S = 5.0  # for all threads: gloo gives up half a message after STALL_TIMEOUT_S only
MAX_CONNECTIONS = 1024  # besides strangers'


_FRAMES = msgspec.msgpack.Decoder(WriteFrame | RepeatFrame | EndFrame)
_NOTICES = msgspec.msgpack.Decoder(Notice)


class PeerConnections:
    """The connections to one peer, made by their own threads."""

    def __init__(self, transfer: StreamTransfer, descriptor: dict[str, Any], num_connections: int) -> None:
        self.descriptor = descriptor
        self.is_dead = False
        self.pace = Pace(STALL_TIMEOUT_S)
        self.judged_s = 0.0  # when its pace was looked at, and ...
        self.num_taken = 0  # ... bytes that were done since then
        self._transfer = transfer
        self._queues: list[queue.SimpleQueue[WriteFrame | EndFrame | None]] = []
        self._next = itertools.count()
        try:
            for number in range(num_connections):
                frames: queue.SimpleQueue[WriteFrame | EndFrame | None] = queue.SimpleQueue()
                self._queues.append(frames)
                transfer.spawn(lambda f=frames: self._run(f), f"kv-send-{number}")
        except RuntimeError:  # no more threads for now: those that have begun end
            self.close()
            raise

    def put(self, frame: WriteFrame | EndFrame) -> None:
        """Queue a frame on the next connection."""
        self._queues[next(self._next) % len(self._queues)].put(frame)

    def close(self) -> None:
        """End the threads."""
        self.is_dead = True
        for frames in self._queues:
            frames.put(None)

    def _run(self, frames: queue.SimpleQueue[WriteFrame | EndFrame | None]) -> None:
        transfer, connection, reason = self._transfer, None, "a fault of this end"
        try:
            connection = transfer.dial(self.descriptor)
            transfer.spawn(lambda c=connection: self._hear(c), "kv-hear")
            last: WriteFrame | None = None
            held: WriteFrame | EndFrame | None = None
            while (frame := held or frames.get()) is not None:
                held = self._join_layers(frame, frames) if isinstance(frame, WriteFrame) else None
                if transfer.send(connection, frame, last) and isinstance(frame, WriteFrame):
                    last = frame
            reason = "closed"
        except (
            OSError,
            TransferError,
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
        ) as error:  # the last four: its descriptor is wrong
            reason = error.message if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
        finally:
            transfer.peer_failed(self, reason)
            if connection is not None:
                transfer.drop(connection)

    def _join_layers(
        self, frame: WriteFrame, frames: queue.SimpleQueue[WriteFrame | EndFrame | None]
    ) -> WriteFrame | EndFrame | None:
        """Take further layers of the same blocks that wait already into a frame. Returns: what came instead."""
        most = self._transfer.piece_bytes // frame.block_bytes
        while frame.num_blocks + frame.num_blocks // len(frame.layers) <= most:
            try:
                following = frames.get_nowait()
            except queue.Empty:
                return None
            if following is None:
                frames.put(None)
            if not isinstance(following, WriteFrame) or not following.has_blocks_of(frame):
                return following
            if frame.num_blocks + following.num_blocks > most:
                return following
            frame.layers += following.layers
        return None

    def _hear(self, connection: socket.socket) -> None:
        reason, clock = "a fault of this end", WallClock()
        try:
            while True:
                try:
                    connection.recv(1, socket.MSG_PEEK)
                except TimeoutError:
                    self._transfer.on_silence(self)
                    continue
                self._transfer.on_notice(
                    self, decode(receive_frame(connection, clock.now_s() + STALL_TIMEOUT_S), _NOTICES)
                )
        except (OSError, TransferError) as error:
            reason = f"the peer ended the connection ({error})"
        finally:  # a connection that nobody listens to any more must not be used; who is sending is woken
            self._transfer.peer_failed(self, reason)
            self._transfer.drop(connection)


class StreamTransfer:
    """A backend over byte streams; see transfer/base.py for the contract."""

    name = "stream"
    num_connections = 1
    piece_bytes = 4 << 20  #: of a frame at most: a revocation waits for one

    def __init__(
        self, pool: KVPool, layout: KVLayout, fingerprint: str, secret: bytes | None, listener: socket.socket
    ) -> None:
        self._pool, self._layout = pool, layout
        self._facts = describe(fingerprint, layout)
        self._handshake = Handshake(self._facts, secret)
        self._book = EpochBook(layout)
        self._events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        self._peers: dict[str, PeerConnections] = {}
        self._out: dict[str, Outgoing] = {}
        self._lock = threading.RLock()
        self._threads: set[threading.Thread] = set()
        self._spawning = threading.Lock()  # guards it
        self._connections: set[socket.socket] = set()
        self._strangers = Strangers()
        self._is_closed = False
        self._clock = WallClock()
        self.num_rejected = 0  #: connections that were refused
        self._listener = listener
        self.spawn(self._accept, f"kv-{self.name}-accept")

    # the contract, receiving side

    def descriptor(self) -> dict[str, Any]:
        """See base."""
        return {"backend": self.name, **self._facts, **self.address()}

    def reaches(self, peer: dict[str, Any]) -> str:
        """See base."""
        return difference(self._facts, peer)

    def open_epoch(self, epoch: str, block_ids: Sequence[int], nonce: int, parts: int = 1) -> None:
        """See base."""
        self._book.open(epoch, block_ids, nonce, parts)

    def revoke(self, epoch: str) -> None:
        """See base."""
        self._book.close(epoch)

    def poll(self) -> list[TransferEvent]:
        """See base."""
        events: list[TransferEvent] = []
        while True:
            try:
                events.append(self._events.get_nowait())
            except queue.Empty:
                return events

    # the contract, sending side

    def start(
        self, epoch: str, nonce: int, peer: dict[str, Any], remote_block_ids: Sequence[int], parts: int = 1
    ) -> None:
        """See base."""
        layout = self._layout.cut(parts)
        key = str(sorted((k, str(v)) for k, v in peer.items()))
        with self._lock:
            connections = self._peers.get(key)
            if connections is None or connections.is_dead:
                try:
                    connections = self._peers[key] = PeerConnections(self, peer, self.num_connections)
                except RuntimeError as error:  # the machine's limit, for this moment: the engine lives on
                    self._events.put(EpochFailed(epoch, f"no connection to the peer: {error}"))
                    return
            self._out[epoch] = Outgoing(
                epoch, nonce, connections, list(remote_block_ids), layout, start_s=self._clock.now_s()
            )

    def write(
        self, epoch: str, layers: Sequence[int], local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """See base."""
        with self._lock:
            outgoing = self._out.get(epoch)
            if outgoing is None or outgoing.is_over:
                return
            if layers[0] == 0:  # the others repeat it
                outgoing.pairs.append((remote_block_ids, local_block_ids))
            size = outgoing.layout.block_bytes
            outgoing.num_queued += len(layers) * len(local_block_ids) * size
        if outgoing.lists != (remote_block_ids, local_block_ids):
            outgoing.lists = remote_block_ids, local_block_ids
            try:
                outgoing.packed = pack_ids(remote_block_ids), pack_ids(local_block_ids)
            except OverflowError as error:  # whoever ordered the blocks made them up
                return self._fail_outgoing(epoch, f"no block ids: {error}")
        whole = WriteFrame(epoch, outgoing.nonce, list(layers), *outgoing.packed, size)
        for frame in whole.cut(self.piece_bytes // size, self.num_connections):
            outgoing.peer.put(frame)

    def finish(self, epoch: str) -> None:
        """See base."""
        with self._lock:
            outgoing = self._out.get(epoch)
            if outgoing is None or outgoing.is_over:
                return
        outgoing.peer.put(EndFrame(epoch, outgoing.nonce, outgoing.num_queued))

    def cancel(self, epoch: str) -> None:
        """See base."""
        self._fail_outgoing(epoch, "cancelled")

    def close(self) -> None:
        """See base."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            peers, connections = list(self._peers.values()), list(self._connections)
        for peer in peers:
            peer.close()
        for connection in (self._listener, *connections):
            self.drop(connection)
        with self._spawning:
            threads = list(self._threads)
        end_s = self._clock.now_s() + CLOSE_TIMEOUT_S
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end_s - self._clock.now_s()))

    # for the connections

    def spawn(self, target: Any, name: str) -> None:
        """Run target in a thread that `close` joins."""

        def run() -> None:
            try:
                target()
            finally:
                with self._spawning:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._spawning:  # `close` joins what is here: nothing that has not begun
            thread.start()
            self._threads.add(thread)

    def dial(self, descriptor: dict[str, Any]) -> socket.socket:
        """Returns: a connection that has passed the handshake. Raises: TransferError, OSError."""
        connection = self.connect_socket(descriptor)
        with self._lock:
            self._connections.add(connection)
            is_closed = self._is_closed
        if is_closed:
            self.drop(connection)
            raise TransferError("this end is closed")
        with ExitStack() as failure:
            failure.callback(self.drop, connection)
            self._handshake.connect(connection)
            self.after_handshake(connection)
            connection.settimeout(STALL_TIMEOUT_S)
            failure.pop_all()
        return connection

    def drop(self, connection: socket.socket) -> None:
        """Close a connection, waking whoever waits in it."""
        with self._lock:
            self._connections.discard(connection)
        shut(connection)
        connection.close()

    def send(self, connection: socket.socket, frame: WriteFrame | EndFrame, last: WriteFrame | None) -> bool:
        """Send a frame, unless its epoch is over.

        Args:
            last: the write that was sent last on this connection.
        Returns: whether it was sent. Raises: OSError.
        """
        outgoing = self._out.get(frame.epoch)
        if outgoing is None or outgoing.is_over:
            return False
        if isinstance(frame, WriteFrame):
            with self._lock:
                if outgoing.num_sent <= outgoing.num_done:
                    outgoing.owed_since_s = self._clock.now_s()
                outgoing.num_sent += frame.num_bytes
            return self.send_write(connection, frame, last)
        send_frame(connection, msgspec.msgpack.encode(frame))
        outgoing.is_end_sent = True
        self.add_done(frame.epoch, 0)
        return True

    def add_done(self, epoch: str, num_bytes: int) -> None:
        """Count bytes that need their source no more; the last of them completes the epoch."""
        with self._lock:
            outgoing = self._out.get(epoch)
            if outgoing is None or outgoing.is_over:
                return
            outgoing.num_done += num_bytes
            outgoing.peer.num_taken += num_bytes
            if not outgoing.is_end_sent or outgoing.num_done < outgoing.num_queued or outgoing.num_readers:
                return
            outgoing.is_over = True
            del self._out[epoch]
        wire_s = self._clock.now_s() - outgoing.start_s
        event: TransferEvent = EpochFailed(epoch, "its checksums could not be computed")
        try:
            event = EpochSent(epoch, self.digests_sent(outgoing), outgoing.num_done, wire_s)
        except KeyError as error:
            event = EpochFailed(epoch, f"block {error} of the epoch was not written")
        finally:
            self._events.put(event)

    def on_notice(self, peer: PeerConnections, notice: Notice) -> None:
        """The receiver has taken bytes, or refuses. Raises: TransferError: it took too few until now."""
        self._judge(peer)
        outgoing = self._out.get(notice.epoch)
        if outgoing is None or outgoing.peer is not peer:
            return
        if notice.refusal:
            self._fail_outgoing(notice.epoch, notice.refusal)
        else:
            self.add_done(notice.epoch, notice.num_bytes)

    def on_silence(self, peer: PeerConnections) -> None:
        """The receiver has said nothing for STALL_TIMEOUT_S. Raises: TransferError: it takes too little, or nobody needs the connection."""
        with self._lock:
            if not any(o.peer is peer for o in self._out.values()):
                peer.is_dead = True  # the next epoch connects anew
                raise TransferError("idle")
        self._judge(peer)

    def _judge(self, peer: PeerConnections) -> None:
        """Raises: TransferError: it keeps too long what it owes: blocks here are pinned meanwhile."""
        now_s = self._clock.now_s()
        with self._lock:
            owing = [o for o in self._out.values() if o.peer is peer and o.num_done < o.num_sent]
            since_s = max(peer.judged_s, min((o.owed_since_s for o in owing), default=now_s))
            num_taken, peer.num_taken, peer.judged_s = peer.num_taken, 0, now_s
            if peer.pace.has_patience(now_s - since_s, num_taken):
                return
        what = f"less than {LEAST_BYTES_PER_S} bytes a second" if num_taken else "nothing"
        raise TransferError(f"the peer has taken {what} for {STALL_TIMEOUT_S:g} s")

    def peer_failed(self, peer: PeerConnections, reason: str) -> None:
        """A connection ended: every unfinished epoch of the peer fails, the next one connects anew."""
        with self._lock:
            peer.is_dead = True
            self._peers = {key: p for key, p in self._peers.items() if p is not peer}
            lost = [o.epoch for o in self._out.values() if o.peer is peer]
        peer.close()
        for epoch in lost:
            self._fail_outgoing(epoch, reason)

    def _fail_outgoing(self, epoch: str, reason: str) -> None:
        with self._lock:
            outgoing = self._out.pop(epoch, None)
            if outgoing is None:
                return
            outgoing.is_over, outgoing.failure = True, reason
            if outgoing.num_readers:
                return  # told by `reading` when the piece that is being sent is gone
        self._events.put(EpochFailed(epoch, reason))

    @contextmanager
    def reading(self, epoch: str) -> Iterator[Outgoing | None]:
        """Inside the block the epoch's source blocks stay pinned. Yields: the epoch, if it is still wanted."""
        with self._lock:
            outgoing = self._out.get(epoch)
            if outgoing is not None:
                outgoing.num_readers += 1
        try:
            yield outgoing
        finally:
            if outgoing is not None:
                with self._lock:
                    outgoing.num_readers -= 1
                    is_last = outgoing.failure and not outgoing.num_readers
                if is_last:
                    self._events.put(EpochFailed(epoch, outgoing.failure))
                self.add_done(epoch, 0)  # it may have been all that was waited for

    # receiving threads

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._is_closed or error.errno not in _PASSING:
                    return
                log.warning("cannot take a connection: %s", error.strerror)
                time.sleep(ACCEPT_PAUSE_S)
                continue
            with self._lock:
                if self._is_closed or len(self._connections) >= MAX_CONNECTIONS + MAX_STRANGERS:
                    connection.close()
                    continue
                self._connections.add(connection)
            self._strangers.admit(connection)
            try:
                self.spawn(lambda c=connection: self._serve(c), f"kv-{self.name}-receive")
            except RuntimeError as error:  # no more threads for now
                log.warning("cannot take a connection: %s", error)
                self._strangers.leave(connection)
                self.drop(connection)

    def _serve(self, connection: socket.socket) -> None:
        reason = "a fault of this end"
        try:
            self._handshake.accept(connection)
            self._strangers.leave(connection)
            state = self.accepted(connection)
            try:
                connection.settimeout(None)
                reason = self._receive(connection, state)
            finally:
                self.drop(connection)
                self.released(state)
                for incoming in self._book.carried_by(id(connection)):
                    self._tell(incoming, EpochFailed(incoming.epoch, f"the sender is gone ({reason})"))
        except (TransferError, OSError) as error:
            self.num_rejected += 1
            log.warning("refused a connection: %s", error)
        finally:
            self.drop(connection)
            self._strangers.leave(connection)

    def _receive(self, connection: socket.socket, state: Any) -> str:
        """Returns: why the connection ended."""
        last: WriteFrame | None = None
        try:
            while True:
                frame = decode(receive_frame(connection), _FRAMES)
                if isinstance(frame, EndFrame):
                    self._on_end(connection, frame)
                    continue
                if isinstance(frame, RepeatFrame):
                    if last is None:
                        raise TransferError("there is no write to repeat")
                    frame = msgspec.structs.replace(last, layers=frame.layers)
                if not 0 < frame.num_bytes <= max(self.piece_bytes, self._layout.block_bytes):
                    raise TransferError(f"a write of {frame.num_bytes} bytes")
                last = frame
                self._on_write(connection, frame, state)
        except (OSError, TransferError) as error:
            return str(error)

    def _on_write(self, connection: socket.socket, frame: WriteFrame, state: Any) -> None:
        incoming = self._book.find(frame.epoch, frame.nonce)
        refusal = CLOSED if incoming is None else ""
        if incoming is not None:
            with incoming.lock:
                try:
                    if frame.block_bytes != incoming.layout.block_bytes:
                        raise TransferError(
                            f"blocks of {frame.block_bytes} bytes, not of {incoming.layout.block_bytes}"
                        )
                    incoming.admit(frame.layers, frame.remote, frame.nonce)
                    incoming.connections.add(id(connection))
                except TransferError as error:
                    refusal = error.message
        if refusal or incoming is None:
            try:  # first: once our own side is told it closes the epoch, and its sender would hear of that instead of why
                self.skip(connection, frame)
                self._notify(connection, Notice(frame.epoch, 0, refusal))
            finally:
                if incoming is not None and incoming.nonce == frame.nonce:
                    # Its own writer breaks the rules: it can't complete any more, and nobody should wait for it.
                    self._tell(incoming, EpochFailed(frame.epoch, refusal))
            return
        self.land(connection, incoming, frame, state)
        with incoming.lock:
            incoming.num_bytes += frame.num_bytes
        try:
            if self.acknowledges:
                self._notify(connection, Notice(frame.epoch, frame.num_bytes, ""))
        finally:  # the sender may be gone by now, and its end have come over another connection
            self._complete(incoming)

    def _on_end(self, connection: socket.socket, frame: EndFrame) -> None:
        incoming = self._book.find(frame.epoch, frame.nonce)
        if incoming is None or incoming.nonce != frame.nonce:
            self._notify(connection, Notice(frame.epoch, 0, CLOSED))
            return
        with incoming.lock:
            incoming.connections.add(id(connection))
            incoming.announced_bytes = frame.num_bytes
        if frame.num_bytes != incoming.expected_bytes:
            reason = f"{frame.num_bytes} of {incoming.expected_bytes} bytes were written"
            self._tell(incoming, EpochFailed(frame.epoch, reason))
            return
        self._complete(incoming)

    def _complete(self, incoming: Incoming) -> None:
        with incoming.lock:
            if not incoming.is_complete or not incoming.is_open or incoming.is_told:
                return
            incoming.is_told = True
        event: TransferEvent = EpochFailed(incoming.epoch, "its checksums could not be computed")
        try:
            digests = self.digests_arrived(incoming)  # without the lock, which a revocation waits for
            event = EpochArrived(incoming.epoch, digests, incoming.num_bytes)
        finally:
            if incoming.is_open:
                self._events.put(event)

    def _tell(self, incoming: Incoming, event: EpochFailed) -> None:
        """Report an epoch's end, unless it was reported."""
        with incoming.lock:
            is_told, incoming.is_told = incoming.is_told, True
        if not is_told:
            self._events.put(event)

    def _notify(self, connection: socket.socket, notice: Notice) -> None:
        send_frame(connection, msgspec.msgpack.encode(notice))

    # what a backend defines

    acknowledges = False  #: whether the receiver tells what it has taken

    def address(self) -> dict[str, Any]:
        """Returns: the descriptor's part that says where we listen."""
        raise NotImplementedError

    def connect_socket(self, descriptor: dict[str, Any]) -> socket.socket:
        """Returns: a fresh connection to a peer."""
        raise NotImplementedError

    def after_handshake(self, connection: socket.socket) -> None:
        """The dialling end's extra step."""

    def accepted(self, connection: socket.socket) -> Any:
        """The listening end's extra step. Returns: what `land` needs."""
        return None

    def released(self, state: Any) -> None:
        """The connection ended; give back what `accepted` made."""

    def send_write(self, connection: socket.socket, frame: WriteFrame, last: WriteFrame | None) -> bool:
        """Send a write; its bytes are counted by add_done when their source is not needed any more (here: when the receiver says so).

        Returns: whether it was sent.
        """
        send_frame(connection, msgspec.msgpack.encode(frame.after(last)))
        return True

    def digests_sent(self, outgoing: Outgoing) -> tuple[int, ...]:
        """Returns: checksums of a complete epoch's source blocks, in the order of its remote blocks."""
        return self._pool.digest(outgoing.local_blocks(), outgoing.nonce, outgoing.layout.parts)

    def digests_arrived(self, incoming: Incoming) -> tuple[int, ...]:
        """Returns: checksums of what has landed, in the order of the epoch's blocks."""
        return self._pool.digest(incoming.block_ids, incoming.nonce, incoming.layout.parts)

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: Any) -> None:
        """Bring an admitted write's bytes into the pool, piece by piece inside incoming.landing."""
        raise NotImplementedError

    def skip(self, connection: socket.socket, frame: WriteFrame) -> None:
        """Let a refused write's bytes pass without landing."""
        raise NotImplementedError
