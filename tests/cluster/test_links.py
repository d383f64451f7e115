"""Links between real processes and sockets: delivery, death, strangers, slow peers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_pd.cluster.codec import decode, encode
from fastdeploy_pd.cluster.link_auth import key_pair
from fastdeploy_pd.cluster.links import AsyncLinks, Item, Links, PeerLost, PeerUp
from fastdeploy_pd.cluster.messages import (
    Abort,
    Beat,
    FetchOrder,
    HandOver,
    Message,
    Peer,
    PrefillOrder,
    Reserve,
    Tokens,
)
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.errors import ConfigError, ProtocolError
from fastdeploy_pd.request import FinishReason, Request, TokenChunk, TokenLogprobs

SECRET = b"a cluster secret of many bytes"
CHUNK = TokenChunk("r", 2, 5, (7, 8), FinishReason.STOP, (TokenLogprobs(7, -0.5, ((7, -0.5), (8, -1.5))),), (None,), 64)

ECHO = """
import sys
from fastdeploy_pd.cluster.links import Links
links = Links(sys.argv[1], ["tcp://127.0.0.1:*"], secret=sys.argv[2].encode() if len(sys.argv) > 2 else None)
print(links.addresses[0], flush=True)
while True:
    for sender, item in links.receive(1.0):
        links.send(sender, item)
"""


def wait_for(links: Links, wanted: type, timeout_s: float = 5.0) -> tuple[str, Item]:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        for peer_id, item in links.receive(0.05):
            if isinstance(item, wanted):
                return peer_id, item
    raise AssertionError(f"no {wanted.__name__} within {timeout_s} s")


@pytest.mark.parametrize(
    "message",
    [
        Beat(
            3,
            10,
            0.5,
            True,
            Load(Predictor((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), ((0.5, 0.1),), 0.2, 3, 99, 640),
        ),
        Tokens((CHUNK, CHUNK)),
        Reserve(Request("r", [1, 2]).to_wire(), Peer("p", "tcp://127.0.0.1:1")),
        HandOver("g", CHUNK, (2**64 - 1, 0), 12, "tcp", (("wire", 0.5),)),
        PrefillOrder(
            "g", 2**63 - 1, Request("r", [1]).to_wire(), 0, (1, 2), "d", {"tcp": {"address": "x", "layout": {"n": 1}}}
        ),
    ],
    ids=lambda m: type(m).__name__,
)
def test_messages_survive_the_wire(message: Message) -> None:
    received = decode(encode(message))
    assert received == message
    if isinstance(message, Reserve):
        assert Request.from_wire(received.request).prompt_token_ids == [1, 2]


def test_no_grant_has_the_name_of_a_rank_s_part_of_another() -> None:
    with pytest.raises(ProtocolError, match="grant_id"):
        decode(encode(PrefillOrder("g@2.0.0", 1, Request("r", [1]).to_wire(), 0, (1,), "d", {})))


@pytest.mark.parametrize("block_id", [-1, 2**31, 2**62])
def test_blocks_that_no_pool_has_are_refused(block_id: int) -> None:
    order = PrefillOrder("g", 1, Request("r", [1]).to_wire(), 0, (1, block_id), "d", {})
    for message in (order, FetchOrder("g", 1, (b"h", b"i"), (1, block_id), "d", {})):
        with pytest.raises(ProtocolError, match="block_ids"):
            decode(encode(message))


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**63])
def test_tokens_that_no_model_has_are_refused(token_id: int) -> None:
    chunk = replace(CHUNK, token_ids=(5, token_id))
    for message in (Tokens((CHUNK, chunk)), HandOver("g", chunk, (1,), 12, "tcp")):
        with pytest.raises(ProtocolError, match=f"token id {token_id}; it must be from 0 to 4294967295"):
            decode(encode(message))


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@given(st.integers(0, 300), st.integers(0, 255))
def test_a_damaged_message_is_refused_or_still_a_message(place: int, value: int) -> None:
    data = bytearray(encode(Tokens((CHUNK,))))
    data[place % len(data)] = value
    with contextlib.suppress(ProtocolError):
        assert decode(bytes(data)) is not None


def test_an_address_that_is_none_gives_no_link() -> None:
    links = Links("client")
    for address in ("nonsense", "tcp://no port", ""):
        links.connect("peer", address)
        assert not links.send("peer", Abort("r", 1))
    links.close()


def test_a_name_that_is_too_long_gives_no_link() -> None:
    links = Links("a", ["tcp://127.0.0.1:*"])
    links.connect("x" * 300, links.addresses[0])
    assert not links.send("x" * 300, Beat(1))
    links.close()


def test_a_thousand_peers() -> None:
    links = Links("a", ["tcp://127.0.0.1:*"])
    for number in range(1000):
        links.connect(f"peer-{number}", links.addresses[0])
    assert all(links.send(f"peer-{number}", Beat(1)) for number in range(1000))
    links.close()


def test_more_peers_than_there_may_be_sockets_give_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy_pd.cluster.links.MAX_SOCKETS", 20)
    links = Links("a", ["tcp://127.0.0.1:*"])
    for number in range(10):
        links.connect(f"peer-{number}", links.addresses[0])
    assert links.send("peer-0", Beat(1)) and not links.send("peer-9", Beat(1))
    links.close()


def test_who_was_never_reached_is_called_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links("a", ["tcp://127.0.0.1:*"])
    links.connect("reached", links.addresses[0])
    wait_for(links, PeerUp)
    links.connect("gone", "tcp://127.0.0.1:1")
    assert links.send("gone", Beat(1))
    monkeypatch.setattr("fastdeploy_pd.cluster.links.UNREACHED_S", 0.0)
    links.connect("other", links.addresses[0])
    assert not links.send("gone", Beat(1)) and links.send("reached", Beat(1)) and links.send("other", Beat(1))
    links.close()


def test_a_link_to_who_had_the_address_before_does_not_take_the_present_one_s_place() -> None:
    server, client = Links("new", ["tcp://127.0.0.1:*"]), Links("client")
    for name in ("new", "old"):  # the record of "old", which died, is known until its lease lapses
        client.connect(name, server.addresses[0])
        wait_for(client, PeerUp)
    client.send("old", Beat(1))
    client.send("new", Beat(2))
    assert wait_for(server, Beat) == ("client", Beat(2))
    assert server.send("client", Beat(3))
    assert wait_for(client, Beat) == ("new", Beat(3))
    client.disconnect("old")
    time.sleep(0.2)
    assert server.send("client", Beat(4))
    assert wait_for(client, Beat) == ("new", Beat(4))
    assert server.num_rejected == 1
    for links in (server, client):
        links.close()


@pytest.mark.parametrize("secret", [None, SECRET])
def test_both_ways(secret: bytes | None) -> None:
    server, client = Links("server", ["tcp://127.0.0.1:*"], secret), Links("client", secret=secret)
    client.connect("server", server.addresses[0])
    assert client.send("server", Abort("r", 1))
    assert wait_for(server, Abort) == ("client", Abort("r", 1))
    assert server.send("client", Beat(1))
    assert wait_for(client, Beat) == ("server", Beat(1))
    assert not server.send("nobody", Beat(1))
    client.close()
    server.close()


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_killed_peer_is_noticed_at_once(secret: bytes | None) -> None:
    arguments = ["server", *([secret.decode()] if secret else [])]
    process = subprocess.Popen([sys.executable, "-c", ECHO, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    links = Links("client", secret=secret)
    links.connect("server", process.stdout.readline().strip())
    wait_for(links, PeerUp)
    process.kill()
    start_s = time.monotonic()
    assert wait_for(links, PeerLost)[1] == PeerLost(why_refused="")
    assert time.monotonic() - start_s < 0.5
    assert not links.send("server", Beat(1)), "its queue must be gone with it"
    process.wait()
    links.close()


def test_strangers_are_not_heard() -> None:
    server = Links("server", ["tcp://127.0.0.1:*"], SECRET)
    stranger = Links("stranger", secret=b"another secret of many bytes")
    stranger.connect("server", server.addresses[0])
    stranger.send("server", Abort("r", 1))
    plain = Links("plain")
    plain.connect("server", server.addresses[0])
    plain.send("server", Abort("r", 1))
    port = int(server.addresses[0].rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"\x80\x04\x95" + os.urandom(3000))
        assert not [i for _ in range(10) for i in server.receive(0.05)]
    good = Links("good", secret=SECRET)
    good.connect("server", server.addresses[0])
    good.send("server", Beat(1))
    assert wait_for(server, Beat)[0] == "good"
    for links in (stranger, plain, good, server):
        links.close()


@pytest.mark.parametrize("secret", [b"another secret of many bytes", None])
def test_a_differing_secret_is_said(secret: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    server = Links("server", ["tcp://127.0.0.1:*"], SECRET)
    stranger = Links("stranger", secret=secret)
    for _ in range(3):
        stranger.connect("server", server.addresses[0])
        lost = []
        for _ in range(10):
            lost += [item for _, item in stranger.receive(0.05) if isinstance(item, PeerLost)]
            server.receive(0.0)
        assert [("secret differs" in item.why_refused) for item in lost] == [True]
    said = [r.getMessage() for r in caplog.records if "Is the cluster secret the same on both sides" in r.getMessage()]
    assert len(said) == 1, "once, not at every attempt"
    for links in (stranger, server):
        links.close()


def test_no_open_port_without_a_secret() -> None:
    with pytest.raises(ConfigError, match="cluster-secret-file"):
        Links("server", ["tcp://0.0.0.0:*"])
    with pytest.raises(ConfigError, match="at least 16"):
        key_pair(b"short", "server")


def test_a_stopped_peer_blocks_no_other() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", ECHO, f"server-{number}"], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    links = Links("client")
    for number, process in enumerate(processes):
        assert process.stdout is not None
        links.connect(f"server-{number}", process.stdout.readline().strip())
    for number in range(2):
        links.send(f"server-{number}", Beat(0))
        wait_for(links, Beat)
    processes[0].send_signal(signal.SIGSTOP)
    big = Abort("x" * 20_000, 1)
    was_refused = False
    for number in range(30_000):
        was_refused = was_refused or not links.send("server-0", big)
        if was_refused and number > 12_000:
            break
    assert was_refused, "a queue without a bound"
    start_s = time.monotonic()
    links.send("server-1", Beat(7))
    assert wait_for(links, Beat) == ("server-1", Beat(7))
    assert time.monotonic() - start_s < 1.0
    for process in processes:
        process.kill()
        process.wait()
    links.close()


@pytest.mark.asyncio
async def test_event_loop() -> None:
    server, client = Links("server", ["tcp://127.0.0.1:*"]), AsyncLinks("client")
    client.connect("server", server.addresses[0])
    client.send("server", Beat(0))
    await asyncio.to_thread(wait_for, server, Beat)
    task = asyncio.create_task(client.receive_async())
    await asyncio.sleep(0.05)
    server.send("client", Beat(5))
    items = await asyncio.wait_for(task, 2.0)
    while not any(isinstance(i, Beat) for _, i in items):
        items = await asyncio.wait_for(client.receive_async(), 2.0)
    assert ("server", Beat(5)) in items
    client.close()
    server.close()


def test_encoding_is_fast() -> None:
    message = Tokens(tuple(TokenChunk(f"request-{i}", 1, i, (i,), served_by="decode-1") for i in range(64)))
    best_s = min(_timed(message) for _ in range(20))
    assert best_s < 0.002


def _timed(message: Message) -> float:
    start_s = time.perf_counter()
    encode(message)
    return time.perf_counter() - start_s
