"""Messages between processes over ZeroMQ: a ROUTER where others call us, a DEALER to each peer that we call.

Nothing here blocks and nothing is waited for without a limit: a peer that doesn't read only fills its own queue, after which `send`
says so. A link's end (the peer's death, usually within milliseconds) is reported as PeerLost; its queue is thrown away with it, so
that a successor on the same address never gets messages meant for the dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.codec import MAX_MESSAGE_BYTES, decode, encode
from fastdeploy_pd.cluster.link_auth import KeyPair, key_pair, refuse_open_bind
from fastdeploy_pd.cluster.messages import Message
from fastdeploy_pd.errors import ConfigError, ProtocolError

log = logging.getLogger("fastdeploy_pd.links")

QUEUE_MESSAGES = 10_000  # high-water mark of each direction of each link
DRAIN_MESSAGES = 1_000  # most messages of one socket taken in one call, so that none starves another
RECONNECT_MS = 20
UNREACHED_S = 60.0  # a peer that was not reached for so long is called no more
MAX_SOCKETS = 3 * 8192  # ZeroMQ's; a link takes three

_REFUSED_EVENTS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
_LOST_EVENTS = zmq.EVENT_DISCONNECTED | _REFUSED_EVENTS
_UP_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED

WHY_REFUSED = "it ended the link before it was established: its cluster secret differs, or it has just died"
_CLOCK = WallClock()
_TO = ">"  # between the names of caller and called


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A link to a peer that we called is established."""


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A link to a peer that we called has ended."""

    why_refused: str = ""  #: it was never established: why, as far as can be known


Item = Message | PeerUp | PeerLost


class _ClusterClients:
    """ZAP's view of who may call: the holder of the cluster's client key."""

    def __init__(self, public: bytes) -> None:
        self._public = public
        self._has_warned = False

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this public key is let in."""
        is_ours = key == self._public
        if not is_ours and not self._has_warned:
            self._has_warned = True
            log.warning("refused a caller that has another cluster secret (--cluster-secret-file, FD_CLUSTER_SECRET)")
        return is_ours


@dataclass(slots=True)
class _Dealer:
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    address: str
    since_s: float
    is_up: bool = False


class Links:
    """All links of one process; used from one thread (`wake` alone may be called from others)."""

    def __init__(self, own_id: str, binds: Sequence[str] = (), secret: bytes | None = None) -> None:
        """
        Args:
            own_id: what peers know us by.
            binds: endpoints to listen on; a TCP port of `*` or 0 is chosen free and told in `addresses`.
            secret: the cluster secret; with one, TCP links are encrypted and authenticated.
        Raises: ConfigError: an endpoint can't be bound, or may not be without a secret.
        """
        self.own_id = own_id
        self.addresses: list[str] = []
        self._refused_by: set[str] = set()
        self.num_rejected = 0  #: messages that could not be decoded
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._server = key_pair(secret, "server") if secret else None
        self._client = key_pair(secret, "client") if secret else None
        self._authenticator: ThreadAuthenticator | None = None
        self._poller = zmq.Poller()
        self._dealers: dict[str, _Dealer] = {}
        self._router: zmq.Socket[bytes] | None = None
        self._wake_in, self._wake_out = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._wake_out.bind("inproc://wake")
        self._wake_in.connect("inproc://wake")
        self._poller.register(self._wake_out, zmq.POLLIN)
        if binds:
            self._listen(binds)

    def connect(self, peer_id: str, address: str) -> None:
        """Open a link to a peer unless there is one to that address. An address that is none gives no link: `send` says so."""
        known = self._dealers.get(peer_id)
        if known is not None:
            if known.address == address:
                return
            self.disconnect(peer_id)
        self._drop_unreached()
        try:
            socket, monitor = self._dial(peer_id, address)
        except zmq.ZMQError as error:
            if peer_id not in self._refused_by:
                self._refused_by.add(peer_id)
                log.warning("the address %.256r of %.256s cannot be used: %s", address, peer_id, error.strerror)
            return
        self._dealers[peer_id] = _Dealer(socket, monitor, address, _CLOCK.now_s())
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)

    def disconnect(self, peer_id: str) -> None:
        """Drop a link and whatever waits in it. Does nothing if there is none."""
        dealer = self._dealers.pop(peer_id, None)
        if dealer is None:
            return
        self._poller.unregister(dealer.socket)
        self._poller.unregister(dealer.monitor)
        dealer.socket.disable_monitor()
        dealer.monitor.close(0)
        dealer.socket.close(0)

    def send(self, peer_id: str, message: Message) -> bool:
        """Queue a message for a peer that we called, or that has called us.

        Returns: whether it was queued; False if the peer is not there or doesn't read.
        """
        data = encode(message)
        try:
            dealer = self._dealers.get(peer_id)
            if dealer is not None:
                dealer.socket.send(data, zmq.DONTWAIT)
                return True
            if self._router is None:
                return False
            self._router.send_multipart((_routing_id(peer_id, self.own_id), data), zmq.DONTWAIT)
        except (zmq.Again, zmq.ZMQError):
            return False
        return True

    def receive(self, timeout_s: float = 0.0) -> list[tuple[str, Item]]:
        """Returns: (peer id, message or link event) of everything that is there, after waiting at most timeout_s for the first.

        ZeroMQ waits whole milliseconds; less than one is slept through.
        """
        if 0 < timeout_s < 0.001:
            time.sleep(timeout_s)
            timeout_s = 0.0
        ready = dict(self._poller.poll(max(0, round(timeout_s * 1000))))
        items: list[tuple[str, Item]] = []
        if ready.pop(self._wake_out, None):
            while self._take(self._wake_out) is not None:
                pass
        if self._router is not None and self._router in ready:
            self._drain_router(self._router, items)
        for peer_id, dealer in list(self._dealers.items()):
            if dealer.socket in ready:
                self._drain_dealer(peer_id, dealer, items)
            if dealer.monitor in ready:
                self._drain_monitor(peer_id, dealer, items)
        return items

    def wake(self) -> None:
        """End a `receive` that waits, from any thread (from one at a time)."""
        try:
            self._wake_in.send(b"", zmq.DONTWAIT)
        except zmq.Again:
            pass  # it is being woken already

    def close(self) -> None:
        """Close all links; what was not sent yet is dropped. Idempotent."""
        for peer_id in list(self._dealers):
            self.disconnect(peer_id)
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._context.destroy(linger=0)

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """Returns: every socket whose descriptor shows that something has arrived."""
        sockets = [s for d in self._dealers.values() for s in (d.socket, d.monitor)]
        return [*sockets, self._wake_out, *([self._router] if self._router is not None else [])]

    def _dial(self, peer_id: str, address: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Returns: a socket that connects to a peer, and its monitor. Raises: zmq.ZMQError: no address, a name too long, too many."""
        with ExitStack() as failure:
            socket = self._context.socket(zmq.DEALER)
            failure.callback(socket.close, 0)
            _set_queues(socket)
            socket.setsockopt(zmq.ROUTING_ID, _routing_id(self.own_id, peer_id))
            socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
            if self._server is not None and self._client is not None:
                socket.curve_serverkey = self._server.public
                socket.curve_publickey, socket.curve_secretkey = self._client.public, self._client.secret
            monitor = socket.get_monitor_socket(_LOST_EVENTS | _UP_EVENTS)
            failure.callback(monitor.close, 0)
            failure.callback(socket.disable_monitor)
            socket.connect(address)
            failure.pop_all()
        return socket, monitor

    def _drop_unreached(self) -> None:
        """Nobody tells us that a peer is gone which we never reached; ZeroMQ would call it for ever."""
        oldest_s = _CLOCK.now_s() - UNREACHED_S
        for peer_id in [i for i, d in self._dealers.items() if not d.is_up and d.since_s < oldest_s]:
            self.disconnect(peer_id)

    def _listen(self, binds: Sequence[str]) -> None:
        router = self._context.socket(zmq.ROUTER)
        _set_queues(router)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if self._server is not None and self._client is not None:
            self._authenticate(self._client)
            router.curve_server = True
            router.curve_publickey, router.curve_secretkey = self._server.public, self._server.secret
        for endpoint in binds:
            refuse_open_bind(endpoint, self._server is not None)
            try:
                router.bind(endpoint)
            except zmq.ZMQError as error:
                router.close(0)
                raise ConfigError(f"cannot listen on {endpoint}: {error.strerror}") from error
            self.addresses.append(router.get_string(zmq.LAST_ENDPOINT).rstrip("\0"))
        self._router = router
        self._poller.register(router, zmq.POLLIN)

    def _authenticate(self, client: KeyPair) -> None:
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=_ClusterClients(client.public))

    def _take(self, socket: zmq.Socket[bytes]) -> list[bytes] | None:
        try:
            return socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None

    def _drain_router(self, router: zmq.Socket[bytes], items: list[tuple[str, Item]]) -> None:
        for _ in range(DRAIN_MESSAGES):
            frames = self._take(router)
            if frames is None:
                return
            if len(frames) != 2:
                self.num_rejected += 1
                continue
            caller, _, called = frames[0].decode("ascii", "replace").partition(_TO)
            if called == self.own_id:
                self._decode(caller, frames[1], items)
            else:
                self.num_rejected += 1  # meant for who had our address before us

    def _drain_dealer(self, peer_id: str, dealer: _Dealer, items: list[tuple[str, Item]]) -> None:
        for _ in range(DRAIN_MESSAGES):
            frames = self._take(dealer.socket)
            if frames is None:
                return
            self._decode(peer_id, frames[-1], items)

    def _drain_monitor(self, peer_id: str, dealer: _Dealer, items: list[tuple[str, Item]]) -> None:
        while (frames := self._take(dealer.monitor)) is not None:
            event = parse_monitor_message(frames)["event"]
            if event & _UP_EVENTS:
                dealer.is_up = True
                self._refused_by.discard(peer_id)
                items.append((peer_id, PeerUp()))
            elif event & _LOST_EVENTS:
                if not dealer.is_up:
                    self._warn_refused(peer_id, dealer.address)
                self.disconnect(peer_id)
                items.append((peer_id, PeerLost("" if dealer.is_up else WHY_REFUSED)))
                return

    def _warn_refused(self, peer_id: str, address: str) -> None:
        """Once a peer: it is called again and again."""
        if peer_id not in self._refused_by:
            self._refused_by.add(peer_id)
            log.warning(
                "%s at %s ended the link before it was established. Is the cluster secret the same on both sides "
                "(--cluster-secret-file, FD_CLUSTER_SECRET), or has the peer died?",
                peer_id,
                address,
            )

    def _decode(self, peer_id: str, data: bytes, items: list[tuple[str, Item]]) -> None:
        try:
            items.append((peer_id, decode(data)))
        except ProtocolError as error:
            self.num_rejected += 1
            log.warning("dropped a message from %s: %s", peer_id, error.message)


def _routing_id(caller: str, called: str) -> bytes:
    # Both names: two links of one caller that lead to one address (the second for an instance started anew on the port of one that
    # died) must not take each other's place.
    return f"{caller}{_TO}{called}".encode()


def _set_queues(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)


class AsyncLinks(Links):
    """Links for an event loop: `receive_async` sleeps until a socket's descriptor says that something came."""

    #: ZeroMQ's descriptors are edge-triggered and may stay silent about what came while we were sending; look that often anyway
    RECHECK_S = 0.01

    async def receive_async(self) -> list[tuple[str, Item]]:
        """Returns: everything that is there; waits for the first thing as long as it takes."""
        loop = asyncio.get_running_loop()
        while True:
            items = self.receive(0.0)
            if items:
                return items
            arrived = asyncio.Event()
            descriptors = [int(s.getsockopt(zmq.FD)) for s in self.sockets()]
            for descriptor in descriptors:
                loop.add_reader(descriptor, arrived.set)
            try:
                async with asyncio.timeout(self.RECHECK_S):
                    await arrived.wait()
            except TimeoutError:
                continue
            finally:
                for descriptor in descriptors:
                    loop.remove_reader(descriptor)
