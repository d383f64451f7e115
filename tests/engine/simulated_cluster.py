"""A whole cluster in one thread: real front ends, engines, schedulers, pools and checksums; simulated network, clock and model.

The model's KV is a function of the tokens, and each token is a function of the KV bytes in the pool: a stale, foreign or missing
block changes the tokens. Every message may be dropped, delayed, repeated; instances die and come back under new ids.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from fastdeploy_pd.clock import VirtualClock
from fastdeploy_pd.cluster.messages import Command, Message, Peer
from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.core.multiplexing import Multiplexing
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.prefix_index import HeldBlocks
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.engine.context import EngineContext, EngineOptions, NoObserver
from fastdeploy_pd.engine.frontend import Delivered, Failed, FrontEnd, FrontEndOptions, Instance
from fastdeploy_pd.engine.loop import Engine
from fastdeploy_pd.engine.outbox import Action, Connect
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.request import Request, SamplingParams, Slo, TokenLogprobs
from fastdeploy_pd.transfer.host_tier import HostTier
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.loopback import LoopbackNetwork, LoopbackTransfer

OnLayer = Callable[[int], None] | None

BLOCK_SIZE = 4
VOCAB = 997
ENDING = tuple(range(0, VOCAB, 20))  # end-of-sequence tokens: nobody knows beforehand when these come
STEP_S = 0.02
PUBLISH_S = 0.2
BAD_TOKEN = VOCAB  # the model computes nonsense from it
TOKEN_BYTES = 16  # K and V of one token in one layer
NUM_LAYERS = 2


def kv_of(token_id: int, position: int, layer: int) -> bytes:
    """The KV bytes the model writes for a token."""
    return blake2b(f"{token_id}:{position}:{layer}".encode(), digest_size=TOKEN_BYTES).digest()


def token_after(kv: Iterable[bytes]) -> int:
    """The token the model samples after these KV bytes."""
    digest = blake2b(b"".join(kv), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected_tokens(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What any correct cluster must answer."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens and not (tokens[len(prompt) :] and tokens[-1] in ENDING):
        kv = [kv_of(t, p, layer) for layer in range(NUM_LAYERS) for p, t in enumerate(tokens)]
        tokens.append(token_after(kv))
    return tokens[len(prompt) :]


@dataclass(slots=True)
class SimulatedOutput:
    """See engine.context.StepOutput."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    error: FastDeployPDError | None = None


def prompt_logprobs_of(sequence: ScheduledSequence) -> tuple[TokenLogprobs | None, ...]:
    """What a step says of the prompt's tokens that follow those it computes, where asked for; of the first nothing can be said."""
    request = sequence.request
    if request.sampling.prompt_logprobs is None:
        return ()
    scored = request.prompt_token_ids[sequence.start + 1 : sequence.stop + 1]
    return (*((None,) if sequence.start == 0 else ()), *(TokenLogprobs(t, -1.0) for t in scored))


@dataclass(slots=True)
class SimulatedSequence:
    """What a device has been given of a ScheduledSequence: copies, and where its pending token comes from."""

    key: int  #: names the request
    start: int
    token_ids: list[int]
    has_pending: bool
    needs_sample: bool
    block_table: list[int]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]


class SimulatedStep:
    """See engine.context.Step. The device computes it a layer at a time, when `SimulatedRunner.advance` says so."""

    def __init__(self, runner: SimulatedRunner, sequences: list[SimulatedSequence], on_layer: OnLayer) -> None:
        self.runner = runner
        self.sequences = sequences
        self.on_layer = on_layer
        self.num_computed = self.num_handed = 0  # layers
        self.sampled: dict[int, int | None] = {}
        self.results: list[SimulatedOutput] = []

    def poll(self) -> bool:
        """Hand over what is computed: one layer, or several at once."""
        self.runner.advance()
        if self.num_handed < self.num_computed:
            self.num_handed = self.num_computed
            if self.on_layer is not None:
                self.on_layer(self.num_handed - 1)
        return self.num_handed == NUM_LAYERS

    def outputs(self) -> list[SimulatedOutput]:
        """See engine.context.Step."""
        assert self.num_computed == NUM_LAYERS
        return self.results

    def compute_layer(self, before: SimulatedStep | None) -> None:
        """Write one layer; after the last one, sample."""
        for sequence in self.sequences:
            if sequence.has_pending:
                assert before is not None
                token_id = before.sampled[sequence.key]
                sequence.token_ids[-1] = BAD_TOKEN if token_id is None else token_id
                sequence.has_pending = False
            for position, token_id in enumerate(sequence.token_ids, sequence.start):
                self._slot(sequence, self.num_computed, position)[:] = kv_of(token_id, position, self.num_computed)
        self.num_computed += 1
        if self.num_computed == NUM_LAYERS:
            self.results = [self._output(s) for s in self.sequences]

    def _output(self, sequence: SimulatedSequence) -> SimulatedOutput:
        self.sampled[sequence.key] = None
        if BAD_TOKEN in sequence.token_ids:
            return SimulatedOutput(None, error=FastDeployPDError("the logits are not numbers", code="bad_logits"))
        if sequence.needs_sample:
            stop = sequence.start + len(sequence.token_ids)
            kv = (bytes(self._slot(sequence, layer, p)) for layer in range(NUM_LAYERS) for p in range(stop))
            self.sampled[sequence.key] = token_after(kv)
        return SimulatedOutput(self.sampled[sequence.key], prompt_logprobs=sequence.prompt_logprobs)

    def _slot(self, sequence: SimulatedSequence, layer: int, position: int) -> memoryview:
        block = self.runner.pool.block(layer, sequence.block_table[position // BLOCK_SIZE])
        offset = position % BLOCK_SIZE * TOKEN_BYTES
        return block[offset : offset + TOKEN_BYTES]


class SimulatedRunner:
    """Writes kv_of into the pool and samples token_after what it finds there: some layers at each poll, or everything at launch."""

    def __init__(self, pool: KVPool, rng: random.Random | None = None, depth: int = 1) -> None:
        """
        Args:
            rng: says how many layers are computed between two looks; None: all at launch.
        """
        self.pool = pool
        self.rng = rng
        self.depth = depth
        self.can_advance, self.is_nearly_done, self.is_queued = False, True, True
        self.most_in_flight = 0
        self._num_stalled = 0  # looks at which nothing will have happened
        self._queue: list[SimulatedStep] = []
        self._newest: SimulatedStep | None = None  # of those that were computed

    def prepare_more(self) -> bool:
        return False

    def samples_on_device(self, request: Request) -> bool:
        """Some do, some don't."""
        return request.sampling.logprobs is None

    def launch(self, batch: Batch, on_layer: OnLayer = None) -> SimulatedStep:
        """See engine.context.Runner."""
        sequences = [
            SimulatedSequence(
                id(s.request),
                s.start,
                s.token_ids,
                s.num_pending == 1,
                s.needs_sample,
                list(s.request.local.block_table),
                prompt_logprobs_of(s),
            )
            for s in batch.sequences
        ]
        assert all(self.samples_on_device(s.request) for s in batch.sequences if s.num_pending)
        step = SimulatedStep(self, sequences, on_layer)
        self._queue.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self._queue))
        assert len(self._queue) <= self.depth
        if self.rng is None:
            self.advance()
        return step

    def blocks_in_use(self) -> list[int]:
        """Returns: blocks that steps in flight write into."""
        return [
            block_id
            for step in self._queue
            for s in step.sequences
            for block_id in s.block_table[s.start // BLOCK_SIZE : -(-(s.start + len(s.token_ids)) // BLOCK_SIZE)]
        ]

    def advance(self) -> None:
        """Time has passed on the device: some layers were computed, in order."""
        num_layers = NUM_LAYERS
        if self.rng is not None:
            if self._num_stalled == 0 and self.rng.random() < 0.02:
                self._num_stalled = self.rng.randint(5, 50)
            self._num_stalled = max(0, self._num_stalled - 1)
            num_layers = self.rng.randint(0, 3) if self._num_stalled == 0 else 0
        for _ in range(num_layers):
            if not self._queue:
                return
            self._queue[0].compute_layer(self._newest)
            if self._queue[0].num_computed == NUM_LAYERS:
                self._newest = self._queue.pop(0)


@dataclass(frozen=True, slots=True)
class Faults:
    """What may go wrong, as probabilities a message and mean seconds between events."""

    drop: float = 0.0
    repeat: float = 0.0
    late: float = 0.0  #: share of messages that take up to 3 s
    kill_every_s: float = 0.0  #: 0 never
    flip_every_s: float = 0.0  #: an instance's role changes; 0 never
    drain_every_s: float = 0.0  #: an instance drains and ends, a new one of its role starts; 0 never
    corrupt: float = 0.0  #: share of blocks written with a wrong byte
    until_s: float = 60.0  #: faults stop; then everything must finish


@dataclass(slots=True)
class Node:
    """One engine process."""

    peer: Peer
    engine: Engine
    pool: KVPool
    runner: SimulatedRunner
    is_up: bool = True

    @property
    def instance(self) -> Instance:
        """What its member record says now."""
        role = self.engine.role
        can = role.can_prefill, role.can_decode
        return Instance(self.peer, *can, is_draining=self.engine.is_draining, block_size=BLOCK_SIZE)

    def check_fences(self) -> None:
        """Whatever has just happened: nobody else may be given a block that a step in flight writes into."""
        pool = self.engine.context.scheduler.pool
        assert pool.num_free_among(self.runner.blocks_in_use()) == 0, "a block was released under a step in flight"


@dataclass(slots=True)
class Client:
    """What one client has received."""

    prompt: list[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    num_terminal: int = 0
    error: FastDeployPDError | None = None
    was_aborted: bool = False


class FetchCounts(NoObserver):
    """What became of the fetches of a cluster."""

    def __init__(self) -> None:
        self.num_fetched = 0
        self.failures: Counter[str] = Counter()

    def fetched(self, num_tokens: int, num_bytes: int, seconds: float) -> None:
        """See HandOverObserver."""
        assert num_tokens % BLOCK_SIZE == 0 and num_bytes == num_tokens * TOKEN_BYTES * NUM_LAYERS and seconds > 0
        self.num_fetched += 1

    def fetch_failed(self, reason: str) -> None:
        """See HandOverObserver."""
        self.failures[reason] += 1


class SimulatedCluster:
    """Runs front ends and engines until everything has ended."""

    def __init__(
        self,
        seed: int,
        roles: Sequence[Role],
        faults: Faults,
        num_blocks: int = 24,
        num_front_ends: int = 2,
        max_lost_instances: int = 10**6,
        depth: int = 0,
        options: EngineOptions | None = None,
        predictor: Predictor | None = None,
        num_host_blocks: int = 0,
        fairness: str = "none",
    ) -> None:
        """
        Args:
            fairness: of the schedulers.
            predictor: what engines know of their steps at first; with one, prompts and placement go by SLOs.
            depth: of the runners; 0: one step at a time, which is computed when it is launched.
            options: of the engines; None: the usual ones, and front ends know nothing of prefix caches.
            num_host_blocks: that have room behind each pool.
        """
        self.predictor = predictor
        self.num_host_blocks, self.fairness = num_host_blocks, fairness
        self.options, self.fetches = options, FetchCounts()
        self.rng = random.Random(seed)
        self.faults = faults
        self.num_blocks, self.depth = num_blocks, depth
        self.clock = VirtualClock()
        self.network = LoopbackNetwork(seed=seed, corrupt=faults.corrupt)
        self.layout = KVLayout(NUM_LAYERS, num_blocks, 1, BLOCK_SIZE, TOKEN_BYTES // 8, "float32")
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = 0
        self.num_kills = self.num_flips = self.num_drains = 0
        self.nodes: dict[str, Node] = {}
        self.dead: list[Node] = []
        self.clients: dict[str, Client] = {}
        self.front_ends = {
            f"front-{i}": FrontEnd(
                f"front-{i}",
                random.Random(f"{seed}-{i}"),
                FrontEndOptions(placement_timeout_s=600, max_lost_instances=max_lost_instances),
                Multiplexing() if predictor else None,
            )
            for i in range(num_front_ends)
        }
        for role in roles:
            self.start(role)
        for name in self.front_ends:
            self.at(self.rng.uniform(0, STEP_S), lambda name=name: self.run_front_end(name))
        for every_s, act in (
            (faults.kill_every_s, self.kill_one),
            (faults.flip_every_s, self.flip_one),
            (faults.drain_every_s, self.drain_one),
        ):
            if every_s:
                self.at(self.rng.expovariate(1 / every_s), lambda every_s=every_s, act=act: self.again(every_s, act))

    # time

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something later."""
        self.num_events += 1
        heapq.heappush(self.events, (self.clock.now_s() + delay_s, self.num_events, action))

    def run(self, limit_s: float) -> None:
        """Run until every client has its terminal answer and the engines are idle, or the limit is reached."""
        while self.events and self.clock.now_s() < limit_s:
            when_s, _, action = heapq.heappop(self.events)
            self.clock.advance_to(when_s)
            self.network.run_until(when_s)
            action()
            if self.clock.now_s() > self.faults.until_s and all(c.num_terminal for c in self.clients.values()):
                if self.is_quiet():
                    return

    def is_quiet(self) -> bool:
        """Whether no engine holds a block."""
        return all(n.engine.context.scheduler.pool.counts().held == 0 for n in self.nodes.values())

    # nodes

    def start(self, role: Role) -> None:
        """Start an instance under a new id."""
        instance_id = f"{role.value}-{self.num_events}-{len(self.nodes) + len(self.dead)}"
        pool = KVPool(self.layout)
        policy = "slack" if self.predictor else "fcfs"
        options = SchedulerOptions(4, 16, 64, prefill_policy=policy, guards_tpot=True, fairness=self.fairness)
        counter = iter(range(10**9))
        runner = SimulatedRunner(pool, self.rng if self.depth else None, max(1, self.depth))
        context = EngineContext(
            instance_id,
            Scheduler(BlockPool(self.num_blocks, BLOCK_SIZE), options, runner.samples_on_device),
            {"loopback": LoopbackTransfer(instance_id, pool, self.layout, self.network)},
            self.options or EngineOptions(),
            observer=self.fetches,
            num_layers=NUM_LAYERS,
            new_id=lambda: f"{instance_id}:{next(counter)}",
            new_nonce=lambda: self.rng.getrandbits(63),
        )
        if self.num_host_blocks:
            num_bytes = self.num_host_blocks * NUM_LAYERS * self.layout.block_bytes
            context.scheduler.pool.lower = HostTier(pool, num_bytes, self.rng.getrandbits(63))
        engine = Engine(role, context, runner, self.clock)
        engine.start_from(self.predictor)
        self.nodes[instance_id] = Node(Peer(instance_id, f"sim://{instance_id}"), engine, pool, runner)
        self.at(self.rng.uniform(0, STEP_S), lambda: self.run_engine(instance_id))
        self.publish()
        if self.options is not None:
            context.scheduler.pool.listener = held = HeldBlocks()
            self.at(PUBLISH_S, lambda: self.publish_prefixes(instance_id, held, 1))

    def publish_prefixes(self, instance_id: str, held: HeldBlocks, sequence: int) -> None:
        """Every front end hears what an instance's cache holds, or misses it and reads the snapshot later on."""
        if instance_id not in self.nodes:
            return
        came, went = held.take_changes()
        snapshot = held.snapshot()

        def tell(front_end: FrontEnd) -> None:
            if not front_end.prefixes.apply(instance_id, sequence, came, went):
                front_end.prefixes.reset(instance_id, sequence, snapshot)

        for front_end in self.front_ends.values():
            if self.rng.random() >= self.faults.drop:
                self.at(self.rng.uniform(0, 2 * PUBLISH_S), lambda f=front_end: tell(f))
        self.at(PUBLISH_S, lambda: self.publish_prefixes(instance_id, held, sequence + 1))

    def publish(self) -> None:
        """Every front end sees the new members a little later."""
        for front_end in self.front_ends.values():
            self.at(self.rng.uniform(0, 0.2), lambda f=front_end: self.read_members(f))

    def read_members(self, front_end: FrontEnd) -> None:
        """The snapshot may be older than what a beat has told meanwhile."""
        members = [n.instance for n in self.nodes.values()]
        self.at(STEP_S, lambda: front_end.set_members(members, self.clock.now_s()))

    def again(self, every_s: float, act: Callable[[str], None]) -> None:
        """Do something to a random instance every so often, until faults stop."""
        if self.clock.now_s() > self.faults.until_s:
            return
        self.at(self.rng.expovariate(1 / every_s), lambda: self.again(every_s, act))
        if self.nodes:
            act(self.rng.choice(sorted(self.nodes)))

    def others(self, instance_id: str) -> list[Role]:
        """Roles of the other instances that don't drain."""
        return [n.engine.role for i, n in self.nodes.items() if i != instance_id and not n.engine.is_draining]

    def flip_one(self, instance_id: str) -> None:
        """Give an instance another role, unless nobody else could decode then."""
        role = self.rng.choice(list(Role))
        if role.can_decode or any(r.can_decode for r in self.others(instance_id)):
            engine = self.nodes[instance_id].engine
            self.num_flips += role is not engine.role
            engine.receive("an operator", Command("c", role.value))
            self.publish()

    def drain_one(self, instance_id: str) -> None:
        """Drain an instance, unless nobody else could decode then."""
        if any(r.can_decode for r in self.others(instance_id)):
            self.num_drains += 1
            self.nodes[instance_id].engine.receive("an operator", Command("c", None, 1e6))
            self.publish()

    def kill_one(self, instance_id: str) -> None:
        """Kill an instance; a new one of its role starts soon after."""
        node = self.nodes.pop(instance_id)
        node.is_up = False
        node.engine.context.transfers["loopback"].close()
        self.dead.append(node)
        self.num_kills += 1
        for other in (*self.front_ends, *self.nodes):
            self.at(self.rng.uniform(0, 0.1), lambda o=other: self.tell_lost(o, instance_id))
        self.publish()
        self.at(self.rng.uniform(0.5, 3), lambda: self.start(node.engine.role))

    def tell_lost(self, observer_id: str, instance_id: str) -> None:
        """The observer's link to a dead instance ends."""
        if observer_id in self.front_ends:
            self.front_ends[observer_id].peer_lost(instance_id, self.clock.now_s())
        elif observer_id in self.nodes:
            self.nodes[observer_id].engine.peer_lost(instance_id)
            self.nodes[observer_id].check_fences()

    def run_engine(self, instance_id: str) -> None:
        """One step of one engine."""
        node = self.nodes.get(instance_id)
        if node is None:
            return
        node.engine.step()
        node.check_fences()
        self.carry(instance_id, node.engine.take_actions())
        if node.engine.is_drained:
            assert node.engine.context.scheduler.pool.counts().held == 0, "a drained instance holds blocks"
            self.kill_one(instance_id)
            self.num_kills -= 1
            return
        self.at(STEP_S * self.rng.uniform(0.5, 2), lambda: self.run_engine(instance_id))

    def run_front_end(self, name: str) -> None:
        """One turn of one front end."""
        front_end = self.front_ends[name]
        front_end.tick(self.clock.now_s())
        self.carry(name, front_end.outbox.take())
        for event in front_end.take_events():
            self.on_event(event)
        self.at(STEP_S, lambda: self.run_front_end(name))

    def on_event(self, event: Delivered | Failed) -> None:
        """What a client sees."""
        client = self.clients[event.request_id]
        if client.was_aborted:
            return  # made before the client left, picked up after
        assert client.num_terminal == 0, f"{event.request_id} heard something after its terminal answer"
        if isinstance(event, Failed):
            client.error = event.error
            client.num_terminal += 1
            return
        assert event.chunk.index == len(client.tokens), (
            f"{event.request_id}: index {event.chunk.index}, have {len(client.tokens)}"
        )
        client.tokens.extend(event.chunk.token_ids)
        client.num_terminal += event.chunk.finish_reason is not None

    # messages

    def carry(self, sender_id: str, actions: list[Action]) -> None:
        """Send messages through the faulty network."""
        for action in actions:
            if isinstance(action, Connect):
                continue
            faulty = self.clock.now_s() < self.faults.until_s
            if faulty and self.rng.random() < self.faults.drop:
                continue
            for _ in range(2 if faulty and self.rng.random() < self.faults.repeat else 1):
                late = faulty and self.rng.random() < self.faults.late
                delay_s = self.rng.uniform(0, 3) if late else self.rng.uniform(0.0005, 0.01)
                self.at(delay_s, lambda a=action: self.arrive(sender_id, a.peer_id, a.message))

    def arrive(self, sender_id: str, peer_id: str, message: Message) -> None:
        """A message reaches its receiver, if that still lives."""
        if peer_id in self.front_ends:
            self.front_ends[peer_id].receive(sender_id, message, self.clock.now_s())
        elif peer_id in self.nodes:
            self.nodes[peer_id].engine.receive(sender_id, message)
            self.nodes[peer_id].check_fences()

    # clients

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        delay_s: float,
        salt: str = "",
        on_host: bool = False,
        tenant: str = "",
    ) -> None:
        """A client asks; its tokens are sampled on the host or on the device."""
        self.clients[request_id] = Client(prompt, max_tokens)
        front_end = self.rng.choice(sorted(self.front_ends))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=0 if on_host else None)
        request = Request(request_id, list(prompt), sampling, ENDING, cache_salt=salt, tenant=tenant)
        if self.predictor is not None:
            request.slo = Slo(self.rng.uniform(0.01, 0.3), self.rng.uniform(0.5, 2) * STEP_S)
            request.priority = self.rng.randrange(2)
        self.at(delay_s, lambda: self.front_ends[front_end].submit(request, self.clock.now_s()))

    def abort(self, request_id: str, delay_s: float) -> None:
        """A client goes away."""

        def go() -> None:
            client = self.clients[request_id]
            if client.num_terminal == 0:
                client.was_aborted, client.num_terminal = True, 1
                for front_end in self.front_ends.values():
                    front_end.abort(request_id, self.clock.now_s())

        self.at(delay_s, go)
