"""RDMACommunicator: FastDeploy's calls, between two of them in one process."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rdma_comm import RDMACommunicator

LAYERS, BLOCKS, BLOCK_BYTES = 3, 64, 16384
SECRET = b"a secret"
NUM_CONNECTS = 1000


class Cache:
    """Key and value caches of one rank."""

    def __init__(self, num_slices: int, seed: int | None = None) -> None:
        shape = (BLOCKS, num_slices, BLOCK_BYTES)
        rng = np.random.default_rng(seed)
        self.arrays = [
            np.zeros(shape, np.uint8) if seed is None else rng.integers(0, 256, shape, dtype=np.uint8)
            for _ in range(2 * LAYERS)
        ]
        self.keys = [a.ctypes.data for a in self.arrays[:LAYERS]]
        self.values = [a.ctypes.data for a in self.arrays[LAYERS:]]


@pytest.fixture
def decode() -> Iterator[tuple[RDMACommunicator, Cache]]:
    cache = Cache(2)
    communicator = RDMACommunicator(
        "decode", 0, "0", cache.keys, cache.values, BLOCKS, 2 * BLOCK_BYTES, secret=SECRET, host="127.0.0.1"
    )
    yield communicator, cache
    communicator.close()


def prefill(cache: Cache, rank: int, secret: bytes = SECRET, num_values: int = LAYERS) -> RDMACommunicator:
    return RDMACommunicator(
        "prefill", 0, "0", cache.keys, cache.values[:num_values], BLOCKS, BLOCK_BYTES,
        prefill_tp_size=2, prefill_tp_idx=rank, secret=secret,
    )  # fmt: skip


def test_two_prefill_ranks_write_their_slices(decode: tuple[RDMACommunicator, Cache]) -> None:
    communicator, target = decode
    for rank in (0, 1):
        source = Cache(1, seed=rank + 1)
        sender = prefill(source, rank)
        assert not sender.is_connected("127.0.0.1", communicator.port)
        assert sender.connect("127.0.0.1", communicator.port) == 0, sender.last_error
        assert sender.connect("127.0.0.1", communicator.port) == 0
        assert sender.is_connected("127.0.0.1", communicator.port)
        for layer in range(LAYERS):
            assert sender.write_cache("127.0.0.1", communicator.port, [1, 2, 3], [30, 10, 20], layer) == 0
        for have, sent in zip(target.arrays, source.arrays, strict=True):
            assert np.array_equal(have[[30, 10, 20], rank], sent[[1, 2, 3], 0])
        sender.close()
        sender.close()
    for have in target.arrays:
        assert not have[[i for i in range(BLOCKS) if i not in (10, 20, 30)]].any()


def test_scales_travel_with_their_blocks() -> None:
    def scales(seed: int | None) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [
            np.zeros((BLOCKS, 256), np.uint8) if seed is None else rng.integers(0, 256, (BLOCKS, 256), dtype=np.uint8)
            for _ in range(2 * LAYERS)
        ]

    target, source, target_scales, source_scales = Cache(1), Cache(1, seed=4), scales(None), scales(5)
    ends = []
    for role, cache, own in (("decode", target, target_scales), ("prefill", source, source_scales)):
        addresses = [a.ctypes.data for a in own]
        ends.append(
            RDMACommunicator(
                role, 0, "0", cache.keys, cache.values, BLOCKS, BLOCK_BYTES, addresses[:LAYERS], addresses[LAYERS:], 256, secret=SECRET
            )
        )  # fmt: skip
    ends[1].connect_or_raise("127.0.0.1", ends[0].port)
    ends[1].write_cache_or_raise("127.0.0.1", ends[0].port, [5, 6], [7, 9], 1)
    for have, sent in zip([*target.arrays, *target_scales], [*source.arrays, *source_scales], strict=True):
        written = have[[7, 9]]
        assert np.array_equal(written, sent[[5, 6]]) or not written.any()
    assert all(
        a.any() for a in (target.arrays[1], target.arrays[1 + LAYERS], target_scales[1], target_scales[1 + LAYERS])
    )
    assert not any(a.any() for a in (target.arrays[0], target_scales[0], target_scales[2]))
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"splitwise_role": "both"}, "must be 'prefill' or 'decode'"),
        ({"value_cache_ptrs": [1]}, "value_cache_ptrs has 1 addresses"),
        ({"key_scale_ptrs": [1, 2, 3]}, "scale_block_bytes is 0"),
        ({"prefill_tp_idx": 2}, "prefill_tp_idx is 2"),
        ({"block_number": 0}, "block_number 0"),
    ],
)
def test_wrong_constructor_arguments_are_named(changes: dict[str, object], text: str) -> None:
    arguments: dict[str, object] = {
        "splitwise_role": "prefill", "gpu_idx": 0, "port": "0", "key_cache_ptrs": [1, 2, 3], "value_cache_ptrs": [], "block_number": 1, "block_bytes": 1
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        RDMACommunicator(**{**arguments, **changes})


def test_arguments_that_cannot_be_meant_are_refused(decode: tuple[RDMACommunicator, Cache]) -> None:
    communicator, target = decode
    sender = prefill(Cache(1, seed=1), 0)
    assert sender.write_cache("127.0.0.1", communicator.port, [1], [1], 0) == -1
    assert "not connected" in str(sender.last_error)
    assert sender.connect("127.0.0.1", communicator.port) == 0
    for local, remote, layer, text in (
        ([64], [0], 0, "local_block_ids has 64"),
        ([0], [64], 0, "remote_block_ids has 64"),
        ([-1], [0], 0, "local_block_ids has -1"),
        ([0, 1], [0], 0, "equally many"),
        ([0], [0], 3, "layer_idx is 3"),
    ):
        assert sender.write_cache("127.0.0.1", communicator.port, local, remote, layer) == -1
        assert text in str(sender.last_error)
    assert not any(a.any() for a in target.arrays)
    assert communicator.connect("127.0.0.1", "1") == 4
    assert sender.connect("127.0.0.1", "1") == 2
    sender.close()


def test_who_differs_is_told_in_what(decode: tuple[RDMACommunicator, Cache]) -> None:
    communicator, _ = decode
    for changes, text in (({"secret": b"another"}, "secret"), ({"num_values": 0}, "num_caches: 3 here, 6 there")):
        sender = prefill(Cache(1, seed=1), 0, **changes)
        assert sender.connect("127.0.0.1", communicator.port) == 2
        assert text in str(sender.last_error)
        sender.close()


def test_a_peer_that_vanishes_is_seen(decode: tuple[RDMACommunicator, Cache]) -> None:
    communicator, _ = decode
    sender = prefill(Cache(1, seed=1), 0)
    assert sender.connect("127.0.0.1", communicator.port) == 0
    communicator.close()
    assert sender.write_cache("127.0.0.1", communicator.port, [1], [1], 0) == -1
    assert not sender.is_connected("127.0.0.1", communicator.port)
    sender.close()


def test_a_peer_that_says_nothing_delays_no_other(decode: tuple[RDMACommunicator, Cache]) -> None:
    communicator, target = decode
    source = Cache(1, seed=1)
    sender = prefill(source, 0)
    assert sender.connect("127.0.0.1", communicator.port) == 0, sender.last_error
    with socket.create_server(("127.0.0.1", 0)) as mute, ThreadPoolExecutor(2) as pool:
        connecting = pool.submit(sender.connect, "127.0.0.1", str(mute.getsockname()[1]))
        channel, _ = mute.accept()
        began_s = time.monotonic()
        assert sender.write_cache("127.0.0.1", communicator.port, [1], [1], 0) == 0
        assert time.monotonic() - began_s < 3 and not connecting.done()
        closing = pool.submit(sender.close)
        channel.close()
        assert connecting.result() == 2
        closing.result()
    assert np.array_equal(target.arrays[0][1, 0], source.arrays[0][1, 0])
    assert sender.write_cache("127.0.0.1", communicator.port, [1], [1], 0) == -1
    assert sender.connect("127.0.0.1", communicator.port) == 2 and "closed" in str(sender.last_error)


def test_a_listener_without_files_goes_on(decode: tuple[RDMACommunicator, Cache]) -> None:
    communicator, _ = decode
    sender = prefill(Cache(1, seed=1), 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as stranger:
        resource.setrlimit(resource.RLIMIT_NOFILE, (stranger.fileno() + 1, limits[1]))
        try:
            stranger.connect(("127.0.0.1", int(communicator.port)))
            time.sleep(0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sender.connect("127.0.0.1", communicator.port) == 0, sender.last_error
    sender.close()


def test_connects_and_disconnects_leave_nothing(decode: tuple[RDMACommunicator, Cache]) -> None:
    communicator, _ = decode
    sender = prefill(Cache(1, seed=1), 0)

    def used() -> tuple[int, str]:
        shown = subprocess.run(["rdma", "resource", "show"], capture_output=True, text=True, check=False).stdout
        return len(os.listdir("/proc/self/fd")), shown

    def connect_once() -> None:
        assert sender.connect("127.0.0.1", communicator.port) == 0, sender.last_error
        sender._drop(("127.0.0.1", communicator.port))

    connect_once()
    time.sleep(0.5)
    before, began_s = used(), time.monotonic()
    for _ in range(NUM_CONNECTS):
        connect_once()
    sys.stdout.write(f"{(time.monotonic() - began_s) / NUM_CONNECTS * 1e3:.1f} ms a connection\n")
    end_s = time.monotonic() + 20
    while used() != before and time.monotonic() < end_s:
        time.sleep(0.1)
    assert used() == before
    sender.close()


def frame(value: object) -> bytes:
    data = json.dumps(value).encode()
    return struct.pack("<I", len(data)) + data


HELLO = {"magic": "rdma_comm", "version": 1, "nonce": "0" * 64}


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x00",
        struct.pack("<I", 500) + b"half",
        struct.pack("<I", 2**32 - 1),
        b"GET / HTTP/1.1\r\n\r\n",
        frame([1, 2]),
        frame({"magic": "other"}),
        frame({**HELLO, "version": 2}),
        frame({**HELLO, "nonce": "short"}),
        frame(HELLO) + frame({"facts": "{}", "proof": "0" * 64}),
        frame(HELLO) + frame({"facts": 7, "proof": None}),
        frame(HELLO) + struct.pack("<I", 100) + b"cut",
    ],
)
def test_a_truncated_or_forged_handshake_gets_nothing(decode: tuple[RDMACommunicator, Cache], said: bytes) -> None:
    communicator, target = decode
    num_fds = len(os.listdir("/proc/self/fd"))
    with socket.create_connection(("127.0.0.1", int(communicator.port))) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(20)
        with contextlib.suppress(ConnectionResetError):  # what was not read is thrown away with the connection
            while stranger.recv(65536):
                pass
    sender = prefill(Cache(1, seed=1), 0)  # and the next one is served
    assert sender.connect("127.0.0.1", communicator.port) == 0, sender.last_error
    assert not any(a.any() for a in target.arrays)
    sender.close()
    assert len(os.listdir("/proc/self/fd")) <= num_fds + 8
