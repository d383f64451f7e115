"""Who may change an instance, and what is said to who may not or asks for nonsense."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.links import AsyncLinks, Links
from fastdeploy_pd.cluster.memory import MemoryRegistry
from fastdeploy_pd.cluster.messages import Beat, Command, Peer, Standing
from fastdeploy_pd.engine import admin
from fastdeploy_pd.engine.admin import InstanceAdmin
from fastdeploy_pd.engine.client import ClusterClient
from fastdeploy_pd.engine.frontend import FrontEnd, Instance
from fastdeploy_pd.entrypoints.openai.app import create_app
from fastdeploy_pd.errors import Conflict
from tests.entrypoints.stub_engine import default_options, demo_tokenizer

REMOTE, LOCAL = ("10.1.2.3", 4567), ("127.0.0.1", 4567)
ROLE, DRAIN = "/v1/admin/role", "/v1/admin/drain"


class Cluster:
    """An API process's admin side over real links to engines that only obey."""

    def __init__(self, run_dir: Path, roles: dict[str, str], is_alone: bool = False) -> None:
        self.roles = roles
        self.front_end = FrontEnd("front", random.Random(0))
        self.links = AsyncLinks("front")
        self.engines = {i: Links(i, [f"ipc://{run_dir}/{i}.sock"]) for i in roles}
        self.peers = {i: Peer(i, links.addresses[0]) for i, links in self.engines.items()}
        self.client = ClusterClient(self.front_end, self.links, WallClock())
        self.registry = MemoryRegistry(WallClock())
        self.admin = InstanceAdmin(self.client, run_dir, self, is_alone)
        first = next(iter(roles), None)
        if first is not None:
            facts = {"instance_id": first, "links_address": self.peers[first].address}
            (run_dir / "engine.json").write_text(json.dumps(facts))

    async def read(self) -> list[Instance]:
        return [Instance(self.peers[i], r != "decode", r != "prefill") for i, r in self.roles.items()]

    async def begin_flip(self, flip_id: str) -> bool:
        return self.registry.begin_flip(flip_id)

    async def end_flip(self, flip_id: str) -> None:
        self.registry.end_flip(flip_id)

    async def obey(self) -> None:
        while True:
            for instance_id, links in self.engines.items():
                for sender, item in links.receive(0.0):
                    if isinstance(item, Command):
                        self.roles[instance_id] = item.role or self.roles[instance_id]
                        links.send(sender, Standing(item.command_id, self.roles[instance_id], 5.0, 3, 4, item.drain_s))
                    elif isinstance(item, Beat):
                        links.send(sender, Beat(1))
            await asyncio.sleep(0.001)

    def run(
        self,
        ask: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]],
        caller: tuple[str, int] = LOCAL,
        api_keys: tuple[str, ...] = (),
        own: str = "one",
    ) -> httpx.Response:
        """The answer to one request."""
        app = create_app(self.client, demo_tokenizer(), default_options(api_keys=api_keys), admin=self.admin)

        async def go() -> httpx.Response:
            await self.client.start()
            obeying = asyncio.create_task(self.obey())
            self.client.set_members(await self.read())
            transport = httpx.ASGITransport(app, client=caller)
            try:
                async with httpx.AsyncClient(transport=transport, base_url=f"http://{own}") as http:
                    return await ask(http)
            finally:
                obeying.cancel()
                await self.client.stop()
                for links in (self.links, *self.engines.values()):
                    links.close()

        return asyncio.run(go())


@pytest.mark.parametrize("path", [ROLE, DRAIN])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_may_ask(tmp_path: Path, path: str, method: str) -> None:
    def status(
        caller: tuple[str, int], keys: tuple[str, ...] = (), own: str = "127.0.0.1", **headers: str
    ) -> tuple[int, str]:
        cluster = Cluster(tmp_path, {"one": "mixed"})
        answer = cluster.run(lambda c: c.request(method, path, json={"role": 5}, headers=headers), caller, keys, own)
        return answer.status_code, answer.text

    allowed = 200 if (method, path) == ("GET", path) else 400
    assert status(LOCAL)[0] == allowed
    assert status(REMOTE)[0] == 403 and "--api-key" in status(REMOTE)[1]
    for own, expected in ((REMOTE[0], allowed), ("10.9.9.9", 403)):  # started with --host, and called from there
        assert status(REMOTE, own=own)[0] == expected
        assert status(REMOTE, own=own, origin="http://somewhere.example")[0] == 403
    assert status(LOCAL, origin="http://somewhere.example")[0] == 403
    assert status(LOCAL, ("k",))[0] == status(REMOTE, ("k",), authorization="Bearer no")[0] == 401
    assert status(REMOTE, ("k",), authorization="Bearer k")[0] == allowed


def test_the_last_one_of_a_side_is_kept_unless_forced(tmp_path: Path) -> None:
    for roles, wanted, status in (
        ({"a": "prefill", "b": "decode"}, "decode", 409),
        ({"a": "prefill", "b": "decode"}, "mixed", 200),
        ({"a": "decode", "b": "prefill"}, "prefill", 409),
        ({"a": "decode", "b": "mixed"}, "prefill", 200),
        ({"a": "mixed", "b": "prefill"}, "prefill", 409),
        ({"a": "mixed", "b": "prefill"}, "decode", 200),
        ({"a": "mixed"}, "mixed", 200),
    ):
        answer = Cluster(tmp_path, dict(roles)).run(lambda c, w=wanted: c.post(ROLE, json={"role": w}))
        assert answer.status_code == status, (roles, wanted, answer.text)
        if status == 409:
            assert "'a'" not in answer.text and "a is the only instance" in answer.json()["error"]["message"]
            forced = Cluster(tmp_path, dict(roles)).run(
                lambda c, w=wanted: c.post(ROLE, json={"role": w, "force": True})
            )
            assert (forced.status_code, forced.json()["role"]) == (200, wanted)


def test_of_two_flips_at_once_one_sees_what_the_other_has_done(tmp_path: Path) -> None:
    """Each would leave the other as the last one that prefills."""
    cluster = Cluster(tmp_path, {"a": "prefill", "b": "prefill", "c": "decode"})
    other_dir = tmp_path / "b"
    other_dir.mkdir()
    facts = {"instance_id": "b", "links_address": cluster.peers["b"].address}
    (other_dir / "engine.json").write_text(json.dumps(facts))
    other = InstanceAdmin(cluster.client, other_dir, cluster, is_alone=False)

    async def both(http: httpx.AsyncClient) -> httpx.Response:
        flips = [a.set_role("decode", is_forced=False) for a in (cluster.admin, other)]
        done = await asyncio.gather(*flips, return_exceptions=True)
        assert sorted(isinstance(d, Conflict) for d in done) == [False, True], done
        assert cluster.registry.begin_flip("next"), "both have given the lease back"
        return await http.get(ROLE)

    assert cluster.run(both).status_code == 200
    assert sorted(cluster.roles.values()) == ["decode", "decode", "prefill"]


def test_a_flip_waits_for_another_one_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "TURN_WAIT_S", 0.1)
    for is_forced, status in ((False, 409), (True, 200)):
        cluster = Cluster(tmp_path, {"a": "mixed", "b": "mixed"})
        cluster.registry.begin_flip("other")
        answer = cluster.run(lambda c, f=is_forced: c.post(ROLE, json={"role": "decode", "force": f}))
        assert answer.status_code == status, answer.text
        assert status == 200 or "changing its role" in answer.json()["error"]["message"]
        assert not cluster.registry.begin_flip("mine"), "the other's lease is not given back for it"


def test_what_is_left_of_the_old_role(tmp_path: Path) -> None:
    left = {}
    for role in ("prefill", "decode", "mixed"):
        answer = Cluster(tmp_path, {"a": role}).run(lambda c: c.get(ROLE)).json()
        left[role] = tuple(answer["left_of_old_role"].values())
        assert abs(WallClock().unix_s() - 5 - answer["since_unix_s"]) < 2
    assert left == {"prefill": (3, 0), "decode": (0, 4), "mixed": (0, 0)}


def test_drain(tmp_path: Path) -> None:
    answer = Cluster(tmp_path, {"a": "mixed"}).run(lambda c: c.post(DRAIN)).json()
    assert (answer["is_draining"], answer["timeout_s"]) == (True, 30.0)
    answer = Cluster(tmp_path, {"a": "mixed"}).run(lambda c: c.get(DRAIN)).json()
    assert not answer["is_draining"] and answer["left"] == {"requests": 3, "prefill_orders": 4}


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        (ROLE, {"role": "king"}, "'king'"),
        (ROLE, {}, "'role'"),
        (ROLE, {"role": "decode", "force": 1}, "'force'"),
        (ROLE, {"role": "decode", "forced": True}, "'forced'"),
        (DRAIN, {"timeout_s": -1}, "-1"),
        (DRAIN, {"timeout_s": "soon"}, "'soon'"),
        (DRAIN, {"timeout_s": 1e9}, "86400"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, path: str, body: dict[str, object], text: str) -> None:
    answer = Cluster(tmp_path, {"a": "mixed"}).run(lambda c: c.post(path, json=body))
    assert answer.status_code == 400 and text in answer.json()["error"]["message"], answer.text


def test_an_instance_alone_stays_mixed(tmp_path: Path) -> None:
    answer = Cluster(tmp_path, {"a": "mixed"}, is_alone=True).run(
        lambda c: c.post(ROLE, json={"role": "decode", "force": True})
    )
    assert answer.status_code == 400 and "--scheduler-name local" in answer.text


def test_an_engine_that_has_ended(tmp_path: Path) -> None:
    answer = Cluster(tmp_path, {}).run(lambda c: c.get(ROLE))
    assert answer.status_code == 503 and "ended" in answer.text
