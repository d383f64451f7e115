"""What a machine wants done: messages to send and peers to connect. The shell around it owns the sockets and does it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastdeploy_pd.cluster.messages import Message, Peer, Tokens
from fastdeploy_pd.request import TokenChunk


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message; whether it arrives is not known."""

    peer_id: str
    message: Message


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a link to a peer unless there is one."""

    peer: Peer


Action = Send | Connect


@dataclass(slots=True)
class Outbox:
    """Collects actions; token chunks are gathered so that a step sends one message to each front end."""

    actions: list[Action] = field(default_factory=list)
    _chunks: dict[str, list[TokenChunk]] = field(default_factory=dict)

    def send(self, peer_id: str, message: Message) -> None:
        """Queue a message."""
        self.actions.append(Send(peer_id, message))

    def connect(self, peer: Peer) -> None:
        """Queue a connection."""
        self.actions.append(Connect(peer))

    def emit(self, front_end_id: str, chunk: TokenChunk) -> None:
        """Add new tokens for a front end."""
        self._chunks.setdefault(front_end_id, []).append(chunk)

    def take(self) -> list[Action]:
        """Returns: everything collected since the last call, in order, the token messages last."""
        actions = self.actions
        actions.extend(Send(peer_id, Tokens(tuple(chunks))) for peer_id, chunks in self._chunks.items())
        self.actions, self._chunks = [], {}
        return actions
