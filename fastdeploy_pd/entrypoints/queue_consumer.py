"""Serves requests that were submitted through Redis: claims them, generates, writes their output streams.

A claim is renewed while it is served. When this process dies, another front end reclaims the request, reads what the client has
already, and goes on from there with the same seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from fastdeploy_pd.cluster.queue import CLAIM_LEASE_S, MAX_ENTRIES, Claimed, OutputEntry, RedisQueue
from fastdeploy_pd.cluster.redis_connection import Outage, RedisOptions
from fastdeploy_pd.engine.client_api import EngineClient
from fastdeploy_pd.entrypoints.openai.protocol import ChatBody, CompletionBody
from fastdeploy_pd.entrypoints.openai.validation import parse_body
from fastdeploy_pd.entrypoints.serving import Choice, Delta, Serving, new_id
from fastdeploy_pd.errors import ConfigError, CoordinatorLost, FastDeployPDError, ForeignData, InvalidRequest

log = logging.getLogger("fastdeploy_pd.queue")
Result = TypeVar("Result")

MAX_CLAIMED = 256  # of one front end at a time: the rest is for others, or waits
CLAIM_BLOCK_S = 0.5
PAUSE_S = 0.5
RENEW_S = CLAIM_LEASE_S / 4
BODIES: dict[str, type[ChatBody] | type[CompletionBody]] = {"chat": ChatBody, "completions": CompletionBody}


class Submission(msgspec.Struct):
    """What `client.RedisClient` puts into the queue."""

    version: int
    endpoint: str
    body: bytes  #: the JSON body, as it would be posted
    seed: int  #: for a body without one; fixed at submission, so that whoever resumes it draws the same tokens


class OutputChunk(msgspec.Struct, omit_defaults=True):
    """One entry of an output stream."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    error: dict[str, str | int | None] | None = None
    usage: dict[str, int] | None = None


class QueueConsumer:
    """One front end's share of the topic's queue."""

    def __init__(self, options: RedisOptions, client: EngineClient, serving: Serving, consumer: str) -> None:
        self._queue = RedisQueue(options)
        self._client, self._serving, self._consumer = client, serving, consumer
        self._active: dict[str, tuple[Claimed, asyncio.Task[None]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_draining = self._is_stopping = False
        self._outage = Outage(log, "claiming requests")

    def start(self) -> None:
        """Begin to claim."""
        self._tasks = [asyncio.create_task(self._claim()), asyncio.create_task(self._keep())]

    async def drain(self, timeout_s: float) -> None:
        """Claim nothing any more and wait until what is being served has ended."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.wait(self._tasks[:1])  # a claim that is under way brings more to serve
                while self._active:
                    await asyncio.wait([t for _, t in self._active.values()])

    async def stop(self) -> None:
        """Stop; what is still being served is left for another front end to reclaim."""
        self._is_stopping = True
        tasks = [*self._tasks, *(t for _, t in self._active.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """After `stop`: leave the queue and close the connections. Takes a second where Redis hangs."""
        with contextlib.suppress(CoordinatorLost, ConfigError):
            self._queue.leave(self._consumer)
        self._queue.close()

    async def _claim(self) -> None:
        with contextlib.suppress(CoordinatorLost, ConfigError):
            await asyncio.to_thread(self._queue.leave)
        while not self._is_draining:
            room = MAX_CLAIMED - len(self._active)
            try:
                if room > 0 and (await self._client.health()).is_ready:
                    for claimed in await asyncio.to_thread(
                        self._queue.claim, self._consumer, min(room, 32), CLAIM_BLOCK_S
                    ):
                        self._begin(claimed)
                    self._outage.over()
                    continue
            except (CoordinatorLost, ConfigError) as error:
                self._outage.failed(error.message)
            await asyncio.sleep(PAUSE_S)

    async def _keep(self) -> None:
        """Renew our claims, take over lapsed ones, stop what was cancelled."""
        while not self._is_stopping:
            await asyncio.sleep(RENEW_S)
            try:
                await asyncio.to_thread(self._queue.renew, self._consumer, list(self._active))
                room = MAX_CLAIMED - len(self._active)
                if not self._is_draining and room > 0 and (await self._client.health()).is_ready:
                    for claimed in await asyncio.to_thread(self._queue.reclaim, self._consumer, min(room, 16)):
                        self._begin(claimed)
                by_request = {c.request_id: t for c, t in self._active.values()}
                for request_id in await asyncio.to_thread(self._queue.cancelled, list(by_request)):
                    by_request[request_id].cancel("cancelled by its client")
            except (CoordinatorLost, ConfigError) as error:
                self._outage.failed(error.message)

    def _begin(self, claimed: Claimed) -> None:
        # A claim that comes while draining is served too: it is ours now, and the drain waits for it.
        if claimed.entry_id in self._active:
            return
        task = asyncio.create_task(self._serve(claimed))
        self._active[claimed.entry_id] = (claimed, task)
        task.add_done_callback(lambda _: self._active.pop(claimed.entry_id, None))

    async def _serve(self, claimed: Claimed) -> None:
        num_known = 0
        try:
            known = await self._known(claimed.request_id)
            if not known:
                log.info("request %s has expired before it was claimed: it is dropped", claimed.request_id)
                await self._with_retries(self._queue.discard, claimed)
                return
            delivered = _tokens(known)
            num_known = len(delivered)
            choice = self._choice(claimed, delivered)
            await self._stream(claimed, choice, num_known)
        except asyncio.CancelledError:
            if not self._is_stopping:
                await self._end(
                    claimed, num_known, {"message": "the request was cancelled", "code": "cancelled"}, "abort"
                )
            raise
        except ForeignData as error:
            log.warning("request %s cannot be answered and is dropped: %s", claimed.request_id, error.message)
            await self._with_retries(self._queue.discard, claimed)
        except FastDeployPDError as error:
            if not isinstance(error, CoordinatorLost):
                await self._end(claimed, num_known, error_record(error), "error")

    async def _known(self, request_id: str) -> list[OutputEntry]:
        """Returns: all that a request's output stream has: one read gives a part of a long one."""
        known: list[OutputEntry] = []
        while True:
            page = await self._with_retries(self._queue.read, request_id, known[-1].entry_id if known else "0", 0.0)
            known += page
            if len(page) < MAX_ENTRIES:
                return known

    def _choice(self, claimed: Claimed, delivered: list[int]) -> Choice:
        try:
            submission = msgspec.msgpack.decode(claimed.payload, type=Submission)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"the submission cannot be read: {error}") from error
        if submission.version != 1 or submission.endpoint not in BODIES:
            raise InvalidRequest(f"unknown submission: version {submission.version}, endpoint {submission.endpoint!r}")
        body = parse_body(BODIES[submission.endpoint], submission.body)
        # A fresh id: engines may still remember the attempts of the front end that died.
        choices = self._serving.choices(body, new_id(claimed.request_id), submission.seed, delivered)
        if len(choices) != 1:
            raise InvalidRequest("a request through Redis has one prompt and one answer; submit several", param="n")
        choice = choices[0]
        self._serving.replay(choice, delivered)
        return choice

    async def _stream(self, claimed: Claimed, choice: Choice, index: int) -> None:
        stream = self._client.generate(choice.request)
        try:
            async for chunks in stream:
                delta = self._serving.push(choice, chunks)
                is_ours = await self._with_retries(
                    self._queue.append,
                    self._consumer,
                    claimed,
                    [(index, self._payload(choice, delta, index))],
                    delta.finish_reason is not None,
                )
                index += len(delta.token_ids)
                if not is_ours or delta.finish_reason is not None:
                    return
        finally:
            await stream.aclose()

    def _payload(self, choice: Choice, delta: Delta, index: int) -> bytes:
        usage = None
        if delta.finish_reason is not None:
            num_prompt, num_output = len(choice.request.prompt_token_ids), index + len(delta.token_ids)
            usage = {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_output,
                "total_tokens": num_prompt + num_output,
            }
        reason = delta.finish_reason.value if delta.finish_reason is not None else None
        return msgspec.msgpack.encode(OutputChunk(index, list(delta.token_ids), delta.text, reason, usage=usage))

    async def _end(self, claimed: Claimed, index: int, error: dict[str, str | int | None], reason: str) -> None:
        payload = msgspec.msgpack.encode(OutputChunk(index, [], "", reason, error))
        # Behind every token there may be: the end has to be the newest entry.
        await self._with_retries(self._queue.append, self._consumer, claimed, [(2**40, payload)], True)

    async def _with_retries(self, action: Callable[..., Result], *arguments: Any) -> Result:
        """Run a queue call until Redis answers; every one of them may be repeated."""
        while True:
            try:
                return await asyncio.to_thread(action, *arguments)
            except CoordinatorLost as error:
                if self._is_stopping or isinstance(error, ForeignData):
                    raise
                await asyncio.sleep(PAUSE_S)


def error_record(error: FastDeployPDError) -> dict[str, str | int | None]:
    """Returns: what an output stream says of a request's failure."""
    record: dict[str, str | int | None] = {"message": error.message, "code": error.code, "param": error.param}
    return {**record, "retry_after_s": error.retry_after_s} if error.retryable else record


def _tokens(entries: Sequence[OutputEntry]) -> list[int]:
    """Returns: the tokens that a request's output stream has. Raises: InvalidRequest: something else is in it."""
    try:
        chunks = [msgspec.msgpack.decode(e.payload, type=OutputChunk) for e in entries if e.payload]
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the output stream holds what is not our output: {error}") from error
    return [token for chunk in chunks for token in chunk.token_ids]
