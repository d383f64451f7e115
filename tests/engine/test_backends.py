"""Which backends an instance builds from its flags, and on which ports."""

from __future__ import annotations

import contextlib
import logging
import socket

import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.engine.build import build_backends
from fastdeploy_pd.transfer.layout import KVPool

LAYOUT = KVLayout(num_layers=2, num_blocks=8, num_kv_heads=2, block_size=16, head_dim=8, dtype="float32")


def test_the_first_that_listens_has_the_port_that_was_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for protocols, holder in (("shm,nccl,tcp", "nccl"), ("tcp,nccl", "tcp")):
        flags = [
            "--scheduler-name",
            "splitwise",
            "--cache-transfer-protocol",
            protocols,
            "--cache-queue-port",
            str(port),
        ]
        backends = build_backends(InstanceConfig.from_args(flags, {}), KVPool(LAYOUT), LAYOUT, "m", None)
        assert list(backends) == protocols.split(",")
        found = {name: b.descriptor().get("port") for name, b in backends.items() if not isinstance(b, str)}
        assert [name for name, used in found.items() if used == port] == [holder]
        for backend in backends.values():
            assert not isinstance(backend, str)
            backend.close()


def two_free_ports() -> int:
    """The first of two neighbours; below those that the kernel gives to whoever asks for any."""
    for port in range(20000, 30000, 2):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            with socket.create_server(("127.0.0.1", port + 1)):
                return port
    raise AssertionError("no two ports are free")


def test_each_rank_has_a_port_of_its_own() -> None:
    port = two_free_ports()
    flags = ["--scheduler-name", "splitwise", "--tensor-parallel-size", "2", "--cache-transfer-protocol", "tcp"]
    config = InstanceConfig.from_args([*flags, "--cache-queue-port", str(port)], {})
    backends = [build_backends(config, KVPool(LAYOUT), LAYOUT, "m", None, rank)["tcp"] for rank in (0, 1)]
    for rank, backend in enumerate(backends):
        assert not isinstance(backend, str) and backend.descriptor()["port"] == port + rank
        backend.close()


def test_a_port_that_nobody_takes_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHE_RDMA_NICS", "mlx5_0")
    flags = ["--scheduler-name", "splitwise", "--cache-transfer-protocol", "shm", "--cache-queue-port", "5001"]
    config = InstanceConfig.from_args([*flags, "--rdma-comm-ports", "5002"], {})
    with caplog.at_level(logging.WARNING):
        (backend,) = build_backends(config, KVPool(LAYOUT), LAYOUT, "m", None).values()
    assert not isinstance(backend, str)
    backend.close()
    assert "--cache-queue-port 5001 is not used" in caplog.text and "--rdma-comm-ports is not used" in caplog.text
    assert "KVCACHE_RDMA_NICS is not used" in caplog.text
