"""What Mooncake's engine needs and is allowed; the rest is in test_contract.py and test_two_processes.py."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError, TransferUnavailable
from fastdeploy_pd.transfer.base import EpochArrived
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.mooncake import P2P, Options
from fastdeploy_pd.transfer.select import build
from rdma_comm.devices import list_nics
from tests.transfer.optional import has_mooncake
from tests.transfer.test_ipc import SECRET, events

LAYOUT = KVLayout(num_layers=2, num_blocks=8, num_kv_heads=2, block_size=16, head_dim=8, dtype="float32")
needs_mooncake = pytest.mark.skipif(not has_mooncake(), reason="no Mooncake here")


def test_the_environment() -> None:
    assert Options.from_environment({}) == Options(P2P, "tcp", "", False)
    env = {
        "FD_MOONCAKE_METADATA": "etcd://10.0.0.1:2379",
        "FD_MOONCAKE_PROTOCOL": "rdma",
        "FD_MOONCAKE_ALLOW_OPEN_PORTS": "1",
        "KVCACHE_RDMA_NICS": "mlx5_0",
    }
    assert Options.from_environment(env) == Options("etcd://10.0.0.1:2379", "rdma", "mlx5_0", True)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("FD_MOONCAKE_METADATA", "10.0.0.1:2379", "etcd://HOST:PORT"),
        ("FD_MOONCAKE_PROTOCOL", "udp", "tcp, rdma"),
        ("FD_MOONCAKE_ALLOW_OPEN_PORTS", "yes", "0 or 1"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed) as caught:
        Options.from_environment({name: value})
    assert f"{name}={value!r}" in caught.value.message


def test_no_open_ports_without_a_secret() -> None:
    with pytest.raises(TransferUnavailable, match="FD_MOONCAKE_ALLOW_OPEN_PORTS"):
        build("mooncake", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m")


@needs_mooncake
@pytest.mark.parametrize("names", ["", "no_such_nic"])
def test_rdma_that_is_not_here_does_not_become_tcp(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if list_nics() and not names:
        pytest.skip("there is RDMA here")
    monkeypatch.setenv("FD_MOONCAKE_PROTOCOL", "rdma")
    monkeypatch.setenv("KVCACHE_RDMA_NICS", names)
    with pytest.raises(TransferUnavailable, match=f"FD_MOONCAKE_PROTOCOL is 'rdma' and KVCACHE_RDMA_NICS '{names}'"):
        build("mooncake", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m", secret=SECRET)


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(TransferUnavailable, match=r"not installed: pip install 'fastdeploy-pd\[mooncake-cpu\]'"):
        build("mooncake", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m", secret=SECRET)


@needs_mooncake
def test_it_warns_of_its_ports_and_the_switch_allows_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FD_MOONCAKE_ALLOW_OPEN_PORTS", "1")
    with caplog.at_level(logging.WARNING, "fastdeploy_pd.transfer"):
        build("mooncake", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m").close()
    assert "listens on all interfaces" in caplog.text


@needs_mooncake
def test_metadata_from_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mooncake.http_metadata_server", "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port)
        monkeypatch.setenv("FD_MOONCAKE_METADATA", f"http://127.0.0.1:{port}/metadata")
        monkeypatch.setenv("MC_TCP_BIND_ADDRESS", "127.0.0.1")
        pools = KVPool(LAYOUT), KVPool(LAYOUT)
        pools[0].array[:] = np.arange(LAYOUT.pool_bytes, dtype=np.uint8)
        ends = [build("mooncake", pool=pool, layout=LAYOUT, fingerprint="m", secret=SECRET) for pool in pools]
        assert "metadata: http" in ends[0].reaches({**ends[1].descriptor(), "metadata": P2P})
        ends[1].open_epoch("e", [1], 5)
        ends[0].start("e", 5, ends[1].descriptor(), [1])
        for layer in range(2):
            ends[0].write("e", [layer], [2], [1])
        ends[0].finish("e")
        assert isinstance(events(ends[1])[0], EpochArrived)
        assert pools[1].block(1, 1) == pools[0].block(1, 2)
        for end in ends:
            end.close()
    finally:
        server.kill()
        server.wait()


@needs_mooncake
def test_metadata_that_ends_the_engine_does_not_end_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_MOONCAKE_METADATA", "redis://127.0.0.1:1")
    with pytest.raises(TransferUnavailable, match="FD_MOONCAKE_METADATA=redis"):
        build("mooncake", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m", secret=SECRET)


def wait_for(port: int) -> None:
    deadline_s = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
