"""`--elastic auto`: one engine of the topic, the leader, watches the members' loads and has an instance flip its role when that helps.

The leader holds a lease in Redis; when it dies another takes the lease once that has lapsed. Flips, an operator's included, have a lease of
their own, so that each sees what the one before has made of the topic.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Sequence

from fastdeploy_pd.clock import Clock
from fastdeploy_pd.cluster.messages import Command, Peer
from fastdeploy_pd.cluster.registry import FLIP_LEASE_S, MemberRecord, Registry
from fastdeploy_pd.core.elastic import Demand, ElasticOptions, InstanceLoad, decide
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import ConfigError, CoordinatorLost

log = logging.getLogger("fastdeploy_pd.elastic")

LOOK_S = 0.5  #: the leader looks at the members, and the others whether there is one


def load_of(record: MemberRecord) -> InstanceLoad:
    """Returns: a member as the decision sees it."""
    role, load = Role(record.role), record.load
    return InstanceLoad(
        record.instance_id,
        role.can_prefill,
        role.can_decode,
        load.prefill_s,
        load.num_decodes,
        load.num_seats,
        load.num_queued,
        load.kv_usage,
        load.flip_age_s,
        load.is_elastic,
    )


class Elastic:
    """The leader's part: a function of (members, time)."""

    def __init__(self, options: ElasticOptions) -> None:
        self.options = options
        self._demand = Demand()
        self._looked_s: float | None = None
        self._flipped_s = float("-inf")  # a command may be lost, or its record late

    def forget(self) -> None:
        """Somebody else leads: averages begin anew."""
        self._demand, self._looked_s = Demand(), None

    def look(self, members: Sequence[MemberRecord], now_s: float) -> tuple[Peer, Command] | None:
        """Returns: whom to tell what, if a flip helps."""
        present = {m.instance_id: m for m in members if not m.is_draining}
        loads = [load_of(m) for m in present.values()]
        passed_s = now_s - self._looked_s if self._looked_s is not None else 0.0
        self._demand, self._looked_s = self._demand.averaged(loads, passed_s, self.options), now_s
        if now_s - self._flipped_s < self.options.cooldown_s:
            return None
        flip = decide(self._demand, loads, self.options)
        if flip is None:
            return None
        self._flipped_s = now_s
        log.info(
            "%s should %s: prefill would keep %.1f instances busy, decode %.1f",
            flip.instance_id,
            flip.role,
            self._demand.prefill,
            self._demand.decode,
        )
        peer = Peer(flip.instance_id, present[flip.instance_id].links_address)
        return peer, Command(uuid.uuid4().hex, flip.role)


class ElasticThread(threading.Thread):
    """Leads while the lease is ours."""

    def __init__(
        self,
        registry: Registry,
        source: Callable[[], MemberRecord | None],
        tell: Callable[[Peer, Command], None],
        options: ElasticOptions,
        clock: Clock,
    ) -> None:
        """
        Args:
            source: our own record; None while the engine stands still: it must not lead.
            tell: have the engine's loop send a command.
        """
        super().__init__(name="elastic", daemon=True)
        self._registry, self._source, self._tell, self._clock = registry, source, tell, clock
        self._elastic = Elastic(options)
        self._flip: tuple[Peer, Command, float] | None = None  # told when; the lease is ours until the record says so
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Look until stopped. While Redis is away nobody leads."""
        while not self._stop_event.wait(LOOK_S):
            own = self._source()
            try:
                if own is None or own.is_draining or not self._registry.lead(own.instance_id):
                    self._elastic.forget()
                    continue
                self._flip_if_it_helps(own)
            except (CoordinatorLost, ConfigError):
                continue  # the heartbeat says so in the log

    def stop(self) -> None:
        """End. Idempotent."""
        self._stop_event.set()
        if self.is_alive():
            self.join(3.0)

    def _flip_if_it_helps(self, own: MemberRecord) -> None:
        members, now_s = self._fitting(own), self._clock.now_s()
        roles = {m.instance_id: m.role for m in members}
        flip = self._elastic.look(members, now_s)
        if self._flip is not None:
            peer, command, told_s = self._flip
            is_lost = flip is not None or now_s - told_s > FLIP_LEASE_S
            if is_lost or roles.get(peer.instance_id) in (None, command.role):
                self._registry.end_flip(command.command_id)
                self._flip = None
            else:
                self._registry.begin_flip(command.command_id, 6 * LOOK_S)
        if flip is None or not self._registry.begin_flip(flip[1].command_id, 6 * LOOK_S):
            return
        if {m.instance_id: m.role for m in self._fitting(own)} != roles:  # somebody was flipped meanwhile
            self._registry.end_flip(flip[1].command_id)
            return
        self._flip = (*flip, now_s)
        self._tell(*flip)

    def _fitting(self, own: MemberRecord) -> list[MemberRecord]:
        """Members of another model or version are nobody's help."""
        kind = own.fingerprint, own.protocol_version
        return [m for m in self._registry.members() if (m.fingerprint, m.protocol_version) == kind]
