"""The front end's shell: runs the `FrontEnd` machine in an API process's event loop, between links, members and HTTP handlers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from typing import Protocol

from fastdeploy_pd.clock import Clock
from fastdeploy_pd.cluster.links import AsyncLinks, PeerLost, PeerUp
from fastdeploy_pd.cluster.messages import Command, Peer, Standing
from fastdeploy_pd.engine.client_api import HealthReport
from fastdeploy_pd.engine.frontend import Failed, FrontEnd, Instance
from fastdeploy_pd.engine.outbox import Connect
from fastdeploy_pd.errors import FastDeployPDError, NoCapacity
from fastdeploy_pd.request import Request, TokenChunk

log = logging.getLogger("fastdeploy_pd.front_end")

TICK_S = 0.02
LACK_S = 5.0  # what a topic lacks for so long is warned of: instances that start together need some seconds
COMMAND_RESEND_S = 0.5
COMMAND_TIMEOUT_S = 20.0  # a step of a long prompt on a busy CPU takes seconds


class FrontEndObserver(Protocol):
    """Receives what the front end's metrics are made of."""

    def retried(self, reason: str, count: int = 1) -> None:
        """Requests were placed again."""
        ...


class Mailbox:
    """The chunks of one request that its handler has not taken yet; bounded by the request's max_tokens.

    A queue for one reader, and for one token less work than asyncio's.
    """

    def __init__(self) -> None:
        self._chunks: list[TokenChunk] = []
        self._error: FastDeployPDError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, chunk: TokenChunk) -> None:
        """Add a chunk."""
        self._chunks.append(chunk)
        self._wake()

    def fail(self, error: FastDeployPDError) -> None:
        """Raise an error once the chunks are taken."""
        self._error = error
        self._wake()

    async def take(self) -> list[TokenChunk]:
        """Returns: all chunks that are there, at least one, in order. Raises: FastDeployPDError: what `fail` was given."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunks, self._chunks = self._chunks, []
        return chunks

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class ClusterClient:
    """Implements `EngineClient` over the instances of a topic. Everything runs in one event loop."""

    def __init__(
        self, front_end: FrontEnd, links: AsyncLinks, clock: Clock, observer: FrontEndObserver | None = None
    ) -> None:
        self.front_end = front_end
        self._observer = observer
        self._num_retries: dict[str, int] = {}
        self._links = links
        self._clock = clock
        self._mailboxes: dict[str, Mailbox] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._members: set[str] = set()
        self._connected: dict[str, str] = {}  # peer id -> address
        self._commands: dict[tuple[str, str], asyncio.Future[Standing]] = {}  # by peer id and command id
        self.topic = ""  #: as the log names it
        self._lack, self._lack_since_s, self._has_said_lack = "", 0.0, True

    async def start(self) -> None:
        """Begin to receive and to tick."""
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._tick())]

    async def stop(self) -> None:
        """Stop; requests that are still running are aborted."""
        for request_id in list(self._mailboxes):
            self.front_end.abort(request_id, self._clock.now_s())
        self._flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def set_members(self, members: Iterable[Instance]) -> None:
        """Take the newest members of the topic; call it in the event loop."""
        members = list(members)
        present = {m.instance_id for m in members}
        for change, ids in (("joined", present - self._members), ("left", self._members - present)):
            for instance_id in sorted(ids):
                log.info("%s %s; %d members", instance_id, change, len(present))
        self._members = present
        self.front_end.set_members(members, self._clock.now_s())
        self._flush()
        served = {t.decode_id for t in self.front_end.requests.values()}
        for peer_id in [p for p in self._connected if p not in present and p not in served]:
            self._links.disconnect(peer_id)
            del self._connected[peer_id]

    def give_up(self, error: FastDeployPDError) -> None:
        """End every request that is still running with an error."""
        for request_id, mailbox in self._mailboxes.items():
            self.front_end.abort(request_id, self._clock.now_s())
            mailbox.fail(error)
        self._flush()

    async def health(self) -> HealthReport:
        """Returns: ready when a request submitted now would find an instance."""
        instances = [i.instance_id for i in self.front_end.live_instances()]
        lack = self.front_end.lack()
        detail: dict[str, object] = {"instances": instances, **({"missing": lack} if lack else {})}
        return HealthReport(self.front_end.is_serving_possible(), detail)

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenChunk], None]:
        """Yield the request's chunks in order, all that are there at once, each token once; closing it early aborts the request.

        Raises: FastDeployPDError: the terminal answer is an error.
        """
        mailbox = self._mailboxes[request.request_id] = Mailbox()
        try:
            while self.front_end.look_up(request):
                await asyncio.sleep(0)
            self.front_end.submit(request, self._clock.now_s())
            self._flush()
            while True:
                chunks = await mailbox.take()
                yield chunks
                if chunks[-1].finish_reason is not None:
                    return
        finally:
            del self._mailboxes[request.request_id]
            self.front_end.abort(request.request_id, self._clock.now_s())
            self._flush()

    async def command(self, peer: Peer, command: Command) -> Standing:
        """Have an engine obey. Returns: how it stands then. Raises: NoCapacity: it does not answer."""
        answer: asyncio.Future[Standing] = asyncio.get_running_loop().create_future()
        key = peer.instance_id, command.command_id
        self._commands[key] = answer
        deadline_s = self._clock.now_s() + COMMAND_TIMEOUT_S
        try:
            while not answer.done() and self._clock.now_s() < deadline_s:
                self._links.connect(peer.instance_id, peer.address)
                self._links.send(peer.instance_id, command)
                await asyncio.wait({answer}, timeout=COMMAND_RESEND_S)
            if answer.done():
                return answer.result()
            raise NoCapacity(f"The engine {peer.instance_id} has not answered for {COMMAND_TIMEOUT_S:g} s.")
        finally:
            del self._commands[key]

    async def _receive(self) -> None:
        while True:
            for sender_id, item in await self._links.receive_async():
                now_s = self._clock.now_s()
                if isinstance(item, PeerLost):
                    self._connected.pop(sender_id, None)
                    if not item.why_refused:  # else `Links` has said so, once: it is called again and again
                        log.info("the link to %s has ended", sender_id)
                    for peer_id, command_id in self._commands:
                        if peer_id == sender_id:
                            self._answer(peer_id, command_id, NoCapacity(f"The engine {peer_id} has ended."))
                    self.front_end.peer_lost(sender_id, now_s, item.why_refused)
                elif isinstance(item, Standing):
                    self._answer(sender_id, item.command_id, item)
                elif not isinstance(item, PeerUp):
                    self.front_end.receive(sender_id, item, now_s)
            self._flush()

    def _answer(self, peer_id: str, command_id: str, answer: Standing | NoCapacity) -> None:
        waiting = self._commands.get((peer_id, command_id))
        if waiting is None or waiting.done():
            return
        if isinstance(answer, Standing):
            waiting.set_result(answer)
        else:
            waiting.set_exception(answer)

    async def _tick(self) -> None:
        while True:
            self.front_end.tick(self._clock.now_s())
            self._flush()
            self._count_retries()
            self._say_what_lacks(self._clock.now_s())
            await asyncio.sleep(TICK_S)

    def _say_what_lacks(self, now_s: float) -> None:
        """Warn of what the topic lacks, once, when that has lasted for LACK_S."""
        lack = self.front_end.lack()
        if lack != self._lack:
            self._lack, self._lack_since_s, self._has_said_lack = lack, now_s, not lack
        elif not self._has_said_lack and now_s - self._lack_since_s >= LACK_S:
            self._has_said_lack = True
            log.warning("topic '%s': %s", self.topic, lack)

    def _count_retries(self) -> None:
        if self._observer is None:
            return
        for reason, count in self.front_end.num_retries.items():
            added = count - self._num_retries.get(reason, 0)
            if added:
                self._observer.retried(reason, added)
                self._num_retries[reason] = count

    def _flush(self) -> None:
        """Send what the machine wants sent, deliver what it has for clients."""
        for action in self.front_end.outbox.take():
            if isinstance(action, Connect):
                self._links.connect(action.peer.instance_id, action.peer.address)
                self._connected[action.peer.instance_id] = action.peer.address
            else:
                self._links.send(action.peer_id, action.message)
        for event in self.front_end.take_events():
            mailbox = self._mailboxes.get(event.request_id)
            if mailbox is None:
                continue
            if isinstance(event, Failed):
                log.warning("request %s failed: %s", event.request_id, event.error.message)
                mailbox.fail(event.error)
            else:
                mailbox.put(event.chunk)
