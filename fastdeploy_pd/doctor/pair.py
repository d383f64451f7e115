"""The side that connects: what two machines can do together."""

from __future__ import annotations

import ipaddress
import socket
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.doctor.backends import begin_hand_over, open_backend, remedy_for, wait_for_end
from fastdeploy_pd.doctor.coordinator import clock_finding
from fastdeploy_pd.doctor.exchange import RDMA_BYTES, RdmaEnd, handshake, receive_stream, send_stream
from fastdeploy_pd.doctor.finding import Check, Finding, NotTested, size
from fastdeploy_pd.doctor.listener import PAIR_BACKENDS
from fastdeploy_pd.errors import ConfigError, IncompatiblePeer, TransferError, TransferUnavailable
from fastdeploy_pd.transfer.base import Transfer
from fastdeploy_pd.transfer.select import Choice, choose
from rdma_comm.bootstrap import receive_frame, send_frame
from rdma_comm.errors import HandshakeFailed, RdmaError

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 12.0  # the peer may wait for a hand-over
NUM_PINGS = 30
SLOW_ROUND_TRIP_S = 0.005
SLOW_STREAM = 100e6  # bytes a second: less than a gigabit link carries
RDMA_REMEDY = "ping and `rping` between the NICs' addresses; let UDP 4791 through; the same MTU and VLAN on both sides"
NOT_WELL = "fastdeploy-pd doctor on that machine says more"
MUST_BE_EQUAL = ("protocol", "transfer")


class Pair:
    """A connection to a `doctor --listen`, and the checks over it. A check that fails half-way ends it for those that follow."""

    def __init__(
        self, host: str, port: int, secret: bytes | None, versions: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        """Connects when the first check runs."""
        self.host, self.port = host, port
        self.report: dict[str, Any] = {}  #: what the peer has found about itself
        self._secret, self._versions, self._env = secret, versions, env
        self._connection: socket.socket | None = None
        self._trouble = "it is not connected"

    def checks(self) -> list[Check]:
        """Returns: what to run, in this order."""
        listen = f"there: fastdeploy-pd doctor --listen {self.port} --cluster-secret-file FILE"
        return [
            Check("peer", self._check_peer, 25.0, listen),
            Check("round trip", self._check_round_trip),
            Check("throughput", self._check_throughput, 25.0),
            Check("peer versions", self._check_versions),
            Check("pair rdma", self._check_rdma, 25.0, RDMA_REMEDY),
            Check("pair backend", self._check_backend, 30.0),
        ]

    def close(self) -> None:
        """Say good-bye. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.settimeout(1.0)
                send_frame(connection, {"do": "end"})
            except OSError:
                pass  # it is away already
            connection.close()

    def _hang_up(self, trouble: str) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._trouble = None, trouble

    def _ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Returns: the answer. Raises: TransferError: a refusal, or the connection is of no use; OSError, HandshakeFailed."""
        with self._exchange() as connection:
            send_frame(connection, {"do": do, **values})
            answer = receive_frame(connection)
        if answer.get("reason"):
            raise TransferError(str(answer["reason"]))
        return answer

    @contextmanager
    def _exchange(self) -> Iterator[socket.socket]:
        """A question and its answer: until both are through, the connection is of no use to another check."""
        if self._connection is None or self._trouble:
            raise NotTested(self._trouble)
        self._trouble = "an earlier check broke off, and the connection with it"
        yield self._connection
        self._trouble = ""

    def _check_peer(self) -> Iterator[Finding]:
        listen = f"there: fastdeploy-pd doctor --listen {self.port} --cluster-secret-file FILE"
        where = f"{self.host}:{self.port}"
        try:
            self._connection = socket.create_connection((self.host, self.port), timeout=CONNECT_TIMEOUT_S)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handshake(self._secret).connect(self._connection, None)
            self._connection.settimeout(ANSWER_TIMEOUT_S)
            self._trouble = ""
            self.report = self._ask("report")
        except HandshakeFailed as error:
            remedy = "the same --cluster-secret-file on both sides (scp -p), the same fastdeploy-pd version"
            self._hang_up("the peer and this machine do not speak to each other")
            yield Finding("peer", "fail", f"{where}: {error}", remedy)
        except OSError as error:
            self._hang_up("the peer does not answer")
            yield Finding("peer", "fail", f"{where}: {error.strerror or error}", listen)
        else:
            yield Finding("peer", "ok", f"{where} is {self.report['host']}")

    def _check_round_trip(self) -> Iterator[Finding]:
        clock, samples = WallClock(), []
        for _ in range(NUM_PINGS):
            began_s, unix_s = clock.now_s(), clock.unix_s()
            theirs_s = float(self._ask("time")["unix_s"])
            took_s = clock.now_s() - began_s
            samples.append((took_s, theirs_s - unix_s - took_s / 2))
        times_s = [took_s for took_s, _ in samples]
        p50_s = statistics.median(times_s)
        is_slow = p50_s > SLOW_ROUND_TRIP_S
        detail = f"P50 {p50_s * 1e3:.2f} ms, longest {max(times_s) * 1e3:.2f} ms of {NUM_PINGS}"
        yield Finding("round trip", "warn" if is_slow else "ok", detail, f"mtr {self.host}" if is_slow else "")
        took_s, offset_s = min(samples)
        yield clock_finding("peer clock", "the peer", offset_s, took_s)

    def _check_throughput(self) -> Iterator[Finding]:
        with self._exchange() as connection:
            send_frame(connection, {"do": "receive"})
            send_stream(connection)
            there = float(receive_frame(connection)["bytes_per_s"])
            send_frame(connection, {"do": "send"})
            back = receive_stream(connection)
            receive_frame(connection)
        is_slow = min(there, back) < SLOW_STREAM
        remedy = f"ethtool INTERFACE; iperf3 -c {self.host}" if is_slow else ""
        detail = f"TCP, one connection: {there / 1e9:.2f} GB/s there, {back / 1e9:.2f} GB/s back"
        yield Finding("throughput", "warn" if is_slow else "ok", detail, remedy)

    def _check_versions(self) -> Iterator[Finding]:
        theirs = self.report.get("versions")
        if not isinstance(theirs, dict):
            raise NotTested(self._trouble or "the peer names no versions")
        apart = {n: (v, theirs.get(n)) for n, v in self._versions.items() if v != theirs.get(n)}
        detail = "; ".join(f"{name}: {own} here, {other} there" for name, (own, other) in apart.items())
        if set(apart) & set(MUST_BE_EQUAL):
            yield Finding(
                "peer versions", "fail", f"{detail}; such a pair refuses each other", "install one version on both"
            )
        elif apart:
            yield Finding("peer versions", "warn", detail, "install the same on both, if they are to behave alike")
        else:
            yield Finding("peer versions", "ok", "the same on both")

    def _check_rdma(self) -> Iterator[Finding]:
        with ExitStack() as stack:
            own, reason = None, ""
            try:
                own = RdmaEnd(self.host, self._env)
                stack.callback(own.close)
            except TransferUnavailable as error:
                reason = f"here: {error.message}"
            try:
                theirs = self._ask("rdma", offer=own.offer if own else None)["offer"]
            except TransferError as error:
                both = "; ".join([*([reason] if reason else []), f"there: {error.message}"])
                state = "absent" if own is None else "warn"
                yield Finding("pair rdma", state, both, remedy_for(both) or NOT_WELL)
                return
            if own is None:
                yield Finding("pair rdma", "warn", f"{reason}; the peer has it", remedy_for(reason) or NOT_WELL)
                return
            yield self._join_rdma(own, theirs)

    def _join_rdma(self, own: RdmaEnd, theirs: Any) -> Finding:
        here, there = own.offer[0], theirs[0]
        ends = f"{here['nic']} ({_address(here['gid'])}) here, {there['nic']} ({_address(there['gid'])}) there"
        try:
            own.connect(theirs)
            written, sent = own.move(is_read=False), own.digest()
            arrived = self._ask("digest")["digest"]
            own.memory[:] = 0
            read = own.move(is_read=True)
        except (RdmaError, TransferError) as error:
            return Finding("pair rdma", "fail", f"{ends}: {error}", RDMA_REMEDY)
        if not sent == arrived == own.digest():
            return Finding("pair rdma", "fail", f"{ends}: what arrives is not what was sent", RDMA_REMEDY)
        detail = (
            f"{ends}: {size(RDMA_BYTES)} written at {written / 1e9:.2f} GB/s and read at {read / 1e9:.2f} GB/s, "
            f"the same bytes; MTU {here['mtu']} here, {there['mtu']} there"
        )
        if here["mtu"] != there["mtu"]:
            return Finding(
                "pair rdma", "warn", f"{detail}: the smaller is used", "ip link set INTERFACE mtu 9000 on both"
            )
        return Finding("pair rdma", "ok", detail)

    def _check_backend(self) -> Iterator[Finding]:
        with ExitStack() as stack:
            with self._exchange() as connection:
                own: dict[str, Transfer | str] = {}
                for name in PAIR_BACKENDS:
                    try:
                        own[name] = open_backend(name, stack, connection.getsockname()[0], self._secret)
                    except ConfigError as error:
                        own[name] = error.message
            descriptors = self._ask("backends")["descriptors"]
            try:
                choice = choose(own, descriptors)
            except IncompatiblePeer as error:
                yield Finding("pair backend", "fail", error.message, "install one version of fastdeploy-pd on both")
                return
            yield self._hand_over(choice, descriptors[choice.name])

    def _hand_over(self, choice: Choice, descriptor: dict[str, Any]) -> Finding:
        passed_over = f" ({'; '.join(choice.passed_over)})" if choice.passed_over else ""
        detail = f"--cache-transfer-protocol {','.join(PAIR_BACKENDS)} takes {choice.name}{passed_over}"
        try:
            self._ask("open", name=choice.name)
            begin_hand_over(choice.transfer, descriptor, choice.name)
            sent = wait_for_end(choice.transfer)
            arrived = self._ask("arrived", name=choice.name)["digests"]
        except TransferError as error:
            remedy = "let its ports through the firewall (--cache-queue-port and --rdma-comm-ports fix them)"
            return Finding(
                "pair backend", "warn", f"{detail}; a hand-over to a free port fails: {error.message}", remedy
            )
        if sent != arrived:
            return Finding("pair backend", "fail", f"{detail}; blocks arrive changed", "another NIC or cable")
        return Finding("pair backend", "ok", f"{detail}; {len(sent)} blocks handed over, checksums equal")


def _address(gid: str) -> str:
    """Returns: a GID's hexadecimal digits as an address. Raises: ValueError: they are none."""
    address = ipaddress.IPv6Address(bytes.fromhex(gid))
    return str(address.ipv4_mapped or address)
