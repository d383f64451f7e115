"""The command: reads flags, runs the checks, prints lines or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from fastdeploy_pd.cluster.redis_connection import RedisOptions
from fastdeploy_pd.config import is_loopback, read_secret
from fastdeploy_pd.doctor import hardware, system
from fastdeploy_pd.doctor.backends import BACKEND_S, check_backend, known_backends
from fastdeploy_pd.doctor.coordinator import check_redis
from fastdeploy_pd.doctor.exchange import DEFAULT_PORT
from fastdeploy_pd.doctor.finding import Check, Finding, run_checks
from fastdeploy_pd.doctor.listener import Listener, check_address
from fastdeploy_pd.doctor.pair import Pair
from fastdeploy_pd.errors import ConfigError
from rdma_comm.devices import SYSFS

OK, FAILED, BAD_FLAGS = 0, 1, 2  # exit status
HANG_REMEDY = "dmesg | tail (a driver hangs)"


def local_checks(
    options: RedisOptions, is_asked_for: bool, env: Mapping[str, str], sysfs: Path = SYSFS, secret: bytes | None = None
) -> list[Check]:
    """
    Args:
        options: which Redis; is_asked_for: it was given, so it must be there.
        secret: the cluster's.
    Returns: what to find out about this machine.
    """
    return [
        Check("versions", partial(system.check_versions, sysfs)),
        Check("file descriptors", system.check_files),
        Check("shared memory", system.check_shared_memory, 20.0),
        Check("ports", system.check_ports),
        Check("memlock", partial(system.check_memlock, sysfs)),
        Check("nics", partial(hardware.check_nics, sysfs)),
        Check("link", partial(hardware.check_link, sysfs)),
        Check("gid", partial(hardware.check_gid, sysfs, env)),
        Check("mtu", partial(hardware.check_mtu, sysfs)),
        Check("gpus", partial(hardware.check_gpus, sysfs), 40.0, "nvidia-smi; " + HANG_REMEDY),
        Check("gpu memory registration", partial(hardware.check_gpu_memory, sysfs), 40.0, HANG_REMEDY),
        Check("gpu-nic distance", partial(hardware.check_distance, sysfs, env)),
        *(
            Check(f"backend {name}", partial(check_backend, name, sysfs, env, secret), BACKEND_S, HANG_REMEDY)
            for name in known_backends()
        ),
        Check("redis", partial(check_redis, options, is_asked_for), 10.0, "redis-cli PING; ss -ltnp"),
    ]


def run(args: argparse.Namespace) -> int:
    """Returns: exit status: 0 nothing failed, 1 something did, 2 a flag is wrong."""
    _open_streams()
    env = dict(os.environ)
    try:
        secret = read_secret(args.cluster_secret_file, env)
        options = _redis_options(args.redis_url, env)
        own_address = _listen_address(args.listen, secret) if args.listen is not None else None
        peer = _address("--peer", args.peer, DEFAULT_PORT) if args.peer is not None else None
        if peer and secret is None and not is_loopback(peer[0]):
            raise ConfigError(
                f"--peer {args.peer} is another machine; that needs the cluster secret (--cluster-secret-file or FD_CLUSTER_SECRET)"
            )
    except ConfigError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return BAD_FLAGS
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.CRITICAL)
    report = Report(is_json=args.json)
    own = report.examine("this machine", local_checks(options, args.redis_url is not None, env, secret=secret))
    versions = system.versions(SYSFS)
    if peer is not None:
        _examine_pair(report, Pair(*peer, secret, versions, env))
    report.end()
    if own_address is not None:
        facts = {"host": socket.gethostname(), "versions": versions, "findings": [f.to_wire() for f in own]}
        _serve(Listener(*own_address, secret, facts, env), args.json)
    return report.status


class Report:
    """What was found, in sections, printed as it comes or as JSON at the end."""

    def __init__(self, is_json: bool) -> None:
        self._is_json = is_json
        self._is_lost = False  # could not be written
        self._sections: dict[str, list[Finding]] = {}

    @property
    def status(self) -> int:
        """The exit status."""
        return FAILED if self._is_lost or any(f.state == "fail" for s in self._sections.values() for f in s) else OK

    def examine(self, title: str, checks: Sequence[Check]) -> list[Finding]:
        """Run a section's checks. Returns: what they found."""
        # The last resort against a driver that hangs without giving the GIL back.
        faulthandler.dump_traceback_later(sum(check.deadline_s for check in checks) + 10, exit=True)
        self._begin(title)
        found = run_checks(checks, self._show)
        faulthandler.cancel_dump_traceback_later()
        self._sections[title] = found
        return found

    def add(self, title: str, findings: Sequence[Finding]) -> None:
        """A section that was found out elsewhere."""
        self._begin(title)
        for finding in findings:
            self._show(finding)
        self._sections[title] = list(findings)

    def end(self) -> None:
        """Print what is left to print."""
        if self._is_json:
            state = "fail" if self.status else "ok"
            sections = {title: [f.to_wire() for f in found] for title, found in self._sections.items()}
            self._write(json.dumps({"host": socket.gethostname(), "state": state, "sections": sections}))

    def _begin(self, title: str) -> None:
        if not self._is_json:
            self._write(f"{title}:")

    def _show(self, finding: Finding) -> None:
        if not self._is_json:
            self._write(finding.line())

    def _write(self, line: str) -> None:
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):  # which only says that somebody has read enough: `| head`
                sys.stderr.write(f"error: the report cannot be written: {error.strerror}\n")
                self._is_lost = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Where the caller has closed stdout or stderr: otherwise the next socket would have its number, and get what libraries print."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _examine_pair(report: Report, pair: Pair) -> None:
    checks = pair.checks()
    report.examine("the pair", checks)
    try:
        theirs = [Finding.from_wire(values) for values in pair.report.get("findings", [])]
    except (ValueError, AttributeError, TypeError) as error:
        theirs = [Finding("findings", "fail", str(error), "install one version of fastdeploy-pd on both")]
    pair.close()
    if theirs:
        report.add("the peer", theirs)


def _serve(listener: Listener, is_json: bool) -> None:
    logging.getLogger("fastdeploy_pd.doctor").setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job is started with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    out = sys.stderr if is_json else sys.stdout
    out.write(f"listening on {listener.host}:{listener.port}\n")
    out.flush()
    try:
        listener.run()
    except KeyboardInterrupt:
        pass


def _redis_options(url: str | None, env: Mapping[str, str]) -> RedisOptions:
    options = RedisOptions.from_url(url) if url else RedisOptions()
    return dataclasses.replace(options, password=options.password or env.get("FD_SCHEDULER_PASSWORD") or None)


def _listen_address(text: str, secret: bytes | None) -> tuple[str, int]:
    default = "127.0.0.1" if secret is None else "0.0.0.0"
    host, port = _address("--listen", text if ":" in text else f"{default}:{text}", None)
    check_address(host, port, secret)
    return host, port


def _address(flag: str, text: str, default_port: int | None) -> tuple[str, int]:
    """Returns: (host, port) of HOST:PORT or [IPv6]:PORT, or of HOST where there is a default. Raises: ConfigError."""
    host, colon, port = text.rpartition(":")
    is_whole = not colon or text.endswith("]") or (":" in host and not host.startswith("["))  # IPv6 without a port
    if default_port is not None and is_whole:
        host, port = text, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    lowest = 0 if default_port is None else 1  # to listen on 0 is to choose a free one
    if not host or not port.isdecimal() or not lowest <= int(port) <= 65535:
        shape = "[HOST:]PORT" if default_port is None else "HOST[:PORT]"
        raise ConfigError(f"{flag} is {text!r}; it must be {shape} with a port from {lowest} to 65535")
    return host, int(port)
