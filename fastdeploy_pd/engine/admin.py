"""Changes to a running instance, asked for at its own HTTP port: its role, and draining. Runs in an API process's event loop."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastdeploy_pd.cluster.messages import Command, Peer, RoleName, Standing
from fastdeploy_pd.engine.client import ClusterClient
from fastdeploy_pd.engine.frontend import Instance
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import Conflict, InvalidRequest, NoCapacity

RECORD_WAIT_S = 0.5  # for Redis to have the new role; without Redis the front ends hear of it by the next beat
RECORD_POLL_S = 0.005


class InstanceAdmin:
    """Has the engine that belongs to this API process obey."""

    def __init__(
        self,
        client: ClusterClient,
        run_dir: Path,
        read_members: Callable[[], Awaitable[list[Instance] | None]],
        is_alone: bool,
    ) -> None:
        """
        Args:
            run_dir: has engine.json, which names the engine.
            read_members: the topic's members as Redis has them now; None while it is away.
            is_alone: the instance is in no topic.
        """
        self._client, self._run_dir, self._read_members, self._is_alone = client, run_dir, read_members, is_alone

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

        Raises: InvalidRequest: it is alone. Conflict: it drains, or nobody else could do what it did (and it is not forced).
            NoCapacity: the engine does not answer.
        """
        if self._is_alone:
            raise InvalidRequest("with --scheduler-name local an instance is alone, so it must be mixed", param="role")
        own, role, before = self.own, Role(name), await self.standing()
        if before.drain_left_s is not None:
            raise Conflict("the instance drains; it takes no work in any role")
        if not is_forced:
            await self._check_others(own.instance_id, Role(before.role), role)
        standing = await self._tell(name)
        for _ in range(int(RECORD_WAIT_S / RECORD_POLL_S)):
            members = await self._read_members()
            present = {m.instance_id: (m.can_prefill, m.can_decode) for m in members or ()}
            if members is None or present.get(own.instance_id) == (role.can_prefill, role.can_decode):
                break
            await asyncio.sleep(RECORD_POLL_S)
        return standing

    async def drain(self, timeout_s: float) -> Standing:
        """Leave the topic; the instance ends when nothing is served any more. Raises: NoCapacity: the engine does not answer."""
        return await self._tell(None, timeout_s)

    async def _tell(self, role: RoleName | None, drain_s: float | None = None) -> Standing:
        return await self._client.command(self.own, Command(uuid.uuid4().hex, role, drain_s))

    async def _check_others(self, own_id: str, before: Role, after: Role) -> None:
        live = self._client.front_end.live_instances()
        fresh = await self._read_members()
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
                    'Start or flip another one first, or send "force": true',
                    param="role",
                    code=f"last_{what}",
                )
