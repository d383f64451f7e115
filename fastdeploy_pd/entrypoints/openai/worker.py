"""One API process: the front end's event loop with its links, its view of the members, the HTTP server and the Redis consumer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.links import AsyncLinks
from fastdeploy_pd.cluster.messages import PROTOCOL_VERSION, Peer
from fastdeploy_pd.cluster.prefixes import PrefixFollower, Repeater
from fastdeploy_pd.cluster.registry import MemberRecord, MemberWatcher, RedisRegistry
from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.engine.admin import InstanceAdmin
from fastdeploy_pd.engine.build import redis_options
from fastdeploy_pd.engine.client import ClusterClient
from fastdeploy_pd.engine.frontend import FrontEnd, FrontEndOptions, Instance
from fastdeploy_pd.engine.policies import placement_policy
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.entrypoints.openai.app import create_app
from fastdeploy_pd.entrypoints.openai.http_protocol import BoundedHttpProtocol
from fastdeploy_pd.entrypoints.openai.limits import KEEP_ALIVE_S
from fastdeploy_pd.entrypoints.openai.signals import SIGNALS, Signals
from fastdeploy_pd.entrypoints.queue_consumer import QueueConsumer
from fastdeploy_pd.entrypoints.serving import Serving, serving_options_from_directory
from fastdeploy_pd.entrypoints.tokenizer import NoTokenizer, Tokenizer
from fastdeploy_pd.errors import ConfigError, CoordinatorLost, NoCapacity
from fastdeploy_pd.model.weights import model_directory
from fastdeploy_pd.observe.metrics import FrontEndMetrics, enable_multiprocess, render

log = logging.getLogger("fastdeploy_pd.api")

LOCAL_POLL_S = 0.25
DRAIN_S = 30.0  # how long SIGTERM waits for answers to end
GIVE_UP_EVERY_S = 0.05
LAST_WORDS_S = 1.0  # before that, for answers that have not: an error, rather than an end in the middle


def fitting_instances(records: tuple[MemberRecord, ...], fingerprint: str) -> list[Instance]:
    """Returns: the members that serve our model and speak our protocol; others are another cluster's, or another version's."""
    return [
        Instance(
            Peer(r.instance_id, r.links_address),
            Role(r.role).can_prefill,
            Role(r.role).can_decode,
            r.outstanding_tokens,
            r.is_draining,
            block_size_of(r),
        )
        for r in records
        if r.fingerprint == fingerprint and r.protocol_version == PROTOCOL_VERSION
    ]


def block_size_of(record: MemberRecord) -> int:
    """Returns: tokens a block of a member's KV pool; 0 if it does not say."""
    size = record.kv_layout.get("block_size", 0)
    return size if isinstance(size, int) and size > 0 else 0


class Membership:
    """Feeds the client with members: from Redis, or, with --scheduler-name local, its own engine alone."""

    def __init__(self, config: InstanceConfig, run_dir: Path, client: ClusterClient, fingerprint: str) -> None:
        self._config = config
        self._run_dir = run_dir
        self._client = client
        self._fingerprint = fingerprint
        self._watcher: MemberWatcher | None = None
        self._follower: Repeater | None = None
        self._strangers: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        is_alone = config.cluster.scheduler_name == "local"
        self._registry = None if is_alone else RedisRegistry(redis_options(config.cluster))

    async def read(self) -> list[Instance] | None:
        """Returns: the members as Redis has them now; None: it is away, or the instance is alone."""
        if self._registry is None:
            return None
        try:
            return fitting_instances(await asyncio.to_thread(self._registry.members), self._fingerprint)
        except (CoordinatorLost, ConfigError):
            return None

    async def begin_flip(self, flip_id: str) -> bool:
        """Returns: whether no other flip of the topic is under way; also if Redis is away: nobody knows then."""
        if self._registry is None:
            return True
        try:
            return await asyncio.to_thread(self._registry.begin_flip, flip_id)
        except (CoordinatorLost, ConfigError):
            return True

    async def end_flip(self, flip_id: str) -> None:
        """Let others flip."""
        if self._registry is not None:
            with contextlib.suppress(CoordinatorLost, ConfigError):  # the lease lapses
                await asyncio.to_thread(self._registry.end_flip, flip_id)

    def _warn_of_strangers(self, records: tuple[MemberRecord, ...]) -> None:
        strangers = {r.instance_id for r in records if r.fingerprint != self._fingerprint}
        if strangers - self._strangers:
            log.warning(
                "%s serve another model in this topic; requests that are submitted through Redis may be claimed by them. "
                "Give each model a topic of its own (--scheduler-topic)",
                ", ".join(sorted(strangers)),
            )
        self._strangers = strangers

    def start(self) -> None:
        """Begin to watch; call it in the event loop."""
        loop = asyncio.get_running_loop()
        if self._registry is None:
            self._task = loop.create_task(self._follow_own_engine())
            return
        options = redis_options(self._config.cluster)

        def on_change(records: tuple[MemberRecord, ...]) -> None:
            self._warn_of_strangers(records)
            loop.call_soon_threadsafe(self._client.set_members, fitting_instances(records, self._fingerprint))

        self._watcher = watcher = MemberWatcher(self._registry, on_change)
        self._watcher.start()
        index = self._client.front_end.prefixes
        follower = PrefixFollower(
            options,
            index,
            lambda: [r.instance_id for r in watcher.snapshot() if r.fingerprint == self._fingerprint],
        )
        self._follower = Repeater("prefix-follower", follower.follow, follower.close)
        self._follower.start()

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
        if self._follower is not None:
            await asyncio.to_thread(self._follower.stop)
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.stop)

    async def _follow_own_engine(self) -> None:
        """The engine may be restarted under a new id."""
        known = None
        while True:
            with contextlib.suppress(FileNotFoundError):
                facts = json.loads((self._run_dir / "engine.json").read_text())
                if facts["instance_id"] != known:
                    known = facts["instance_id"]
                    peer = Peer(facts["instance_id"], facts["links_address"])
                    self._client.set_members([Instance(peer, can_prefill=True, can_decode=True)])
            await asyncio.sleep(LOCAL_POLL_S)


class _Server(uvicorn.Server):
    """A server that leaves signals to its process: a drain is more than the end of HTTP."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def uvicorn_server(app: ASGIApp) -> uvicorn.Server:
    """Returns: a server with the fast event loop and parser."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=BoundedHttpProtocol,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=int(KEEP_ALIVE_S),
        timeout_graceful_shutdown=int(DRAIN_S),
        lifespan="off",
        log_config=None,
    )
    return _Server(config)


def front_end_options(config: InstanceConfig) -> FrontEndOptions:
    """Returns: limits and defaults, from the flags."""
    slo = config.slo
    return FrontEndOptions(
        deadline_s=config.cluster.scheduler_ttl,
        instance_timeout_s=config.cluster.peer_timeout,
        slo_ttft_x=slo.slo_ttft_x,
        slo_ttft_s=None if slo.slo_ttft_ms is None else slo.slo_ttft_ms / 1e3,
        slo_tpot_s=None if slo.slo_tpot_ms is None else slo.slo_tpot_ms / 1e3,
    )


async def serve_api(
    config: InstanceConfig,
    run_dir: Path,
    facts: dict[str, object],
    sockets: tuple[socket.socket, socket.socket | None],
    signals: Signals,
    on_ready: Callable[[], None],
    on_drain: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        facts: what the engine announced; sockets: of the API, and of metrics alone.
        on_ready: called when the port answers.
        on_drain: called when SIGTERM came, before the answers that are under way have ended.
    """
    enable_multiprocess(run_dir / "metrics")
    options = serving_options_from_directory(
        Path(config.model.model),
        model_names=config.model.served_model_name,
        max_model_len=int(str(facts["max_model_len"])),
        api_keys=config.server.api_keys,
        created_unix_s=int(WallClock().unix_s()),
    )
    tokenizer = (
        NoTokenizer()
        if config.model.skip_tokenizer_init
        else Tokenizer.from_directory(model_directory(Path(config.model.model)))
    )
    front_end_id = f"front-{uuid.uuid4().hex[:12]}"
    front_end = FrontEnd(
        front_end_id,
        random.Random(front_end_id),
        front_end_options(config),
        placement_policy(config.scheduling.placement),
    )
    links = AsyncLinks(front_end_id, secret=config.cluster.secret)
    metrics = FrontEndMetrics(options.model_names[0])
    client = ClusterClient(front_end, links, WallClock(), metrics)
    client.topic = config.cluster.scheduler_topic
    membership = Membership(config, run_dir, client, str(facts["fingerprint"]))
    admin = InstanceAdmin(client, run_dir, membership, config.cluster.scheduler_name == "local")
    app = create_app(client, tokenizer, options, metrics=render, observer=metrics, admin=admin)
    consumer = None
    if config.cluster.scheduler_name != "local":
        serving = Serving(tokenizer, options)
        consumer = QueueConsumer(redis_options(config.cluster), client, serving, front_end_id)
    await client.start()
    membership.start()
    if consumer is not None:
        consumer.start()
    await _serve_http(app, sockets, client, consumer, signals, on_ready, on_drain)
    if consumer is not None:
        await consumer.stop()
        await asyncio.to_thread(consumer.close)
    await membership.stop()
    await client.stop()
    links.close()


async def _serve_http(
    app: ASGIApp,
    sockets: tuple[socket.socket, socket.socket | None],
    client: ClusterClient,
    consumer: QueueConsumer | None,
    signals: Signals,
    on_ready: Callable[[], None],
    on_drain: Callable[[], None],
) -> None:
    """Answer on both ports until a signal comes; after SIGTERM, until every answer has ended; after SIGINT, until each has its last
    words.
    """
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        signals.received.append(number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    if signals.received:
        stop.set()
    servers = [uvicorn_server(app)]
    running = [asyncio.create_task(servers[0].serve(sockets=[sockets[0]]))]
    if sockets[1] is not None:
        servers.append(uvicorn_server(metrics_app()))
        running.append(asyncio.create_task(servers[1].serve(sockets=[sockets[1]])))
    while not servers[0].started and not running[0].done():
        await asyncio.sleep(0.005)
    on_ready()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
    await _end(servers, running, stop, signals, client, consumer, on_drain)
    stopping.cancel()


async def _end(
    servers: list[uvicorn.Server],
    running: list[asyncio.Task[None]],
    stop: asyncio.Event,
    signals: Signals,
    client: ClusterClient,
    consumer: QueueConsumer | None,
    on_drain: Callable[[], None],
) -> None:
    """See `_serve_http`.

    Args:
        running: the servers' tasks, and what else is waited for; stop: set with each signal.
    """
    is_gentle = signals.is_gentle

    def force() -> None:
        for server in servers:
            server.force_exit = True
        for task in running[len(servers) :]:
            task.cancel()

    for server in servers:
        server.should_exit = True
    if is_gentle:
        log.info("draining")
        on_drain()
        if consumer is not None:
            running.append(asyncio.create_task(consumer.drain(DRAIN_S)))
    giving_up = asyncio.create_task(_give_up(client, consumer, DRAIN_S - LAST_WORDS_S if is_gentle else 0.0))
    forcing = None if is_gentle else asyncio.get_running_loop().call_later(LAST_WORDS_S, force)
    ended = asyncio.create_task(_all_ended(running))
    while not ended.done():
        if forcing is None and signals.is_hurried:
            force()
        stop.clear()
        another = asyncio.create_task(stop.wait())
        await asyncio.wait([ended, another], return_when=asyncio.FIRST_COMPLETED)
        another.cancel()
    if forcing is not None:
        forcing.cancel()
    giving_up.cancel()


async def _give_up(client: ClusterClient, consumer: QueueConsumer | None, after_s: float) -> None:
    """Let answers end for so long, then end each with an error; what came through Redis is left for another front end."""
    await asyncio.sleep(after_s)
    if consumer is not None:
        await consumer.stop()
    patience = f", and the answer was not whole within {after_s:g} s" if after_s else " at once"
    error = NoCapacity(f"This instance was told to end{patience}.", code="draining")
    while True:  # a server that ends accepts some requests more
        client.give_up(error)
        await asyncio.sleep(GIVE_UP_EVERY_S)


async def _all_ended(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def metrics_app() -> ASGIApp:
    """Returns: an ASGI application that answers every GET with the metrics."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, content_type = render()
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
