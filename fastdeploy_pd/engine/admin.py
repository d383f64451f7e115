"""Changes to a running instance, asked for at its own HTTP port: its role, and draining. Runs in an API process's event loop."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fastdeploy_pd.cluster.messages import Command, Peer, RoleName, Standing
from fastdeploy_pd.engine.client import ClusterClient
from fastdeploy_pd.engine.frontend import Instance
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import Conflict, InvalidRequest, NoCapacity

RECORD_WAIT_S = 0.5  # for Redis to have the new role; without Redis the front ends hear of it by the next beat
RECORD_POLL_S = 0.005
TURN_WAIT_S = 2.0  # for another flip of the topic to be over
TURN_POLL_S = 0.02


class Topic(Protocol):
    """The topic's members and flips, as Redis has them."""

    async def read(self) -> Sequence[Instance] | None:
        """Returns: the members as of now; None while it is away, or the instance is alone."""
        ...

    async def begin_flip(self, flip_id: str) -> bool:
        """Returns: whether no other flip is under way, as far as can be known; none may begin then."""
        ...

    async def end_flip(self, flip_id: str) -> None:
        """Others may flip."""
        ...


class InstanceAdmin:
    """Has the engine that belongs to this API process obey."""

    def __init__(
        self,
        client: ClusterClient,
        run_dir: Path,
        topic: Topic,
        is_alone: bool,
    ) -> None:
        """
        Args:
            run_dir: has engine.json, which names the engine.
            is_alone: the instance is in no topic.
        """
        self._client, self._run_dir, self._topic, self._is_alone = client, run_dir, topic, is_alone

    @property
    def own(self) -> Peer:
        """The engine as of now: one that died was started again under another id. Raises: NoCapacity: it has ended."""
        try:
            facts = json.loads((self._run_dir / "engine.json").read_text())
        except FileNotFoundError as error:
            raise NoCapacity("The engine of this instance has ended, or is being started again.") from error
        return Peer(facts["instance_id"], facts["links_address"])

    async def standing(self) -> Standing:
        """Returns: how the engine stands. Raises: NoCapacity: it does not answer."""
        return await self._tell(None)

    async def set_role(self, name: RoleName, is_forced: bool) -> Standing:
        """Flip the instance's role; returns when the topic's record says so.

        Raises: InvalidRequest: it is alone. Conflict: it drains, or (unless it is forced) nobody else could do what it did, or another
            flip goes on. NoCapacity: the engine does not answer.
        """
        if self._is_alone:
            raise InvalidRequest("with --scheduler-name local an instance is alone, so it must be mixed", param="role")
        own_id, flip_id = self.own.instance_id, uuid.uuid4().hex
        await self._await_turn(flip_id, is_forced)
        is_settled = True  # else the lease has to lapse: the others can't see yet what this instance is, or will be
        try:
            await self._check(Role(name), is_forced)
            is_settled = False
            standing = await self._tell(name)
            is_settled = await self._is_recorded(Role(name))
        finally:
            if is_settled or own_id not in {i.instance_id for i in self._client.front_end.live_instances()}:
                await self._topic.end_flip(flip_id)
        return standing

    async def drain(self, timeout_s: float) -> Standing:
        """Leave the topic; the instance ends when nothing is served any more. Raises: NoCapacity: the engine does not answer."""
        return await self._tell(None, timeout_s)

    async def _await_turn(self, flip_id: str, is_forced: bool) -> None:
        """One flip at a time: else two could each count on the other's instance. Raises: Conflict."""
        for _ in range(int(TURN_WAIT_S / TURN_POLL_S)):
            if await self._topic.begin_flip(flip_id):
                return
            await asyncio.sleep(TURN_POLL_S)
        if not is_forced:
            raise Conflict(
                "another instance of the topic is changing its role; try again in some seconds", param="role"
            )

    async def _check(self, role: Role, is_forced: bool) -> None:
        """Raises: Conflict."""
        own, before = self.own, await self.standing()
        if before.drain_left_s is not None:
            raise Conflict("the instance drains; it takes no work in any role")
        if not is_forced:
            await self._check_others(own.instance_id, Role(before.role), role)

    async def _is_recorded(self, role: Role) -> bool:
        """Wait until Redis has the role. Returns: whether it does; also if it is away."""
        own = self.own
        for _ in range(int(RECORD_WAIT_S / RECORD_POLL_S)):
            members = await self._topic.read()
            present = {m.instance_id: (m.can_prefill, m.can_decode) for m in members or ()}
            if members is None or present.get(own.instance_id) == (role.can_prefill, role.can_decode):
                return True
            await asyncio.sleep(RECORD_POLL_S)
        return False

    async def _tell(self, role: RoleName | None, drain_s: float | None = None) -> Standing:
        return await self._client.command(self.own, Command(uuid.uuid4().hex, role, drain_s))

    async def _check_others(self, own_id: str, before: Role, after: Role) -> None:
        live = self._client.front_end.live_instances()
        fresh = await self._topic.read()
        ids = {i.instance_id for i in live}
        members = live if fresh is None else [m for m in fresh if m.instance_id in ids]
        others = [m for m in members if m.instance_id != own_id and not m.is_draining]
        for what, is_lost, is_served in (
            ("prefill", before.can_prefill and not after.can_prefill, any(o.can_prefill for o in others)),
            ("decode", before.can_decode and not after.can_decode, any(o.can_decode for o in others)),
        ):
            if is_lost and not is_served:
                raise Conflict(
                    f"{own_id} is the only instance of its topic that can {what}; as {after.value} it would leave nobody. "
                    'Start or flip another one first, or give --force ("force": true)',
                    param="role",
                    code=f"last_{what}",
                )
