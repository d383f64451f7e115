"""Every Redis key: name, type, TTL, writer, readers. docs/redis_keys.md says the same at length; a test holds them together.

All keys of a topic share the hash tag {fd:TOPIC}: one slot, so that scripts stay atomic in a Redis Cluster.

| key                    | type          | TTL            | written by             | read by      |
|------------------------|---------------|----------------|------------------------|--------------|
| {fd:T}:members         | set           | none           | engines (heartbeat)    | front ends   |
| {fd:T}:member:ID       | string (JSON) | 2 s, renewed   | engine ID              | front ends   |
| {fd:T}:changes         | pub/sub       | -              | engines                | front ends   |
| {fd:T}:leader          | string        | 3 s, renewed   | the engine that leads  | engines      |
| {fd:T}:flip            | string        | 30 s           | who flips a role       | the same     |
| {fd:T}:requests        | stream        | none, bounded  | clients                | front ends   |
| {fd:T}:out:REQUEST     | stream        | scheduler-ttl  | claiming front end     | its client   |
| {fd:T}:cancel:REQUEST  | string        | scheduler-ttl  | its client             | front ends   |
| {fd:T}:prefixes:ID     | string        | 60 s, renewed  | engine ID              | front ends   |
| {fd:T}:prefix_changes:ID | stream      | 60 s, bounded  | engine ID              | front ends   |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastdeploy_pd.errors import ConfigError

TOPIC_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
GROUP = "front_ends"  # the consumer group of {fd:T}:requests


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one topic."""

    topic: str

    def __post_init__(self) -> None:
        """Raises: ConfigError: the topic has characters that keys may not have."""
        if not TOPIC_PATTERN.fullmatch(self.topic):
            raise ConfigError(f"--scheduler-topic is {self.topic!r}; it must be 1 to 64 of A-Z a-z 0-9 . _ -")

    @property
    def members(self) -> str:
        """Ids of all members."""
        return f"{{fd:{self.topic}}}:members"

    def member(self, instance_id: str) -> str:
        """One member's record; its TTL is the lease."""
        return f"{{fd:{self.topic}}}:member:{instance_id}"

    @property
    def changes(self) -> str:
        """Channel: a member came, went or changed its state. Only a hint; polling finds the same."""
        return f"{{fd:{self.topic}}}:changes"

    @property
    def leader(self) -> str:
        """Id of the engine that decides on flips of roles (--elastic auto); its TTL is the lease."""
        return f"{{fd:{self.topic}}}:leader"

    @property
    def flip(self) -> str:
        """Id of the flip of a role that is under way; its TTL is the lease."""
        return f"{{fd:{self.topic}}}:flip"

    @property
    def requests(self) -> str:
        """Submitted requests that have not ended."""
        return f"{{fd:{self.topic}}}:requests"

    def out(self, request_id: str) -> str:
        """One request's output; entry N-0 starts at token index N - 1."""
        return f"{{fd:{self.topic}}}:out:{request_id}"

    def cancel(self, request_id: str) -> str:
        """Exists when the client wants the request no more."""
        return f"{{fd:{self.topic}}}:cancel:{request_id}"

    def prefixes(self, instance_id: str) -> str:
        """Snapshot of the blocks that an instance can find."""
        return f"{{fd:{self.topic}}}:prefixes:{instance_id}"

    def prefix_changes(self, instance_id: str) -> str:
        """What has changed since; entry N-0 is increment N."""
        return f"{{fd:{self.topic}}}:prefix_changes:{instance_id}"
