"""Front ends and engines as they are, joined by a virtual clock, a network without faults and devices that only take their time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.trace import TraceRequest, arrivals
from fastdeploy_pd.clock import VirtualClock
from fastdeploy_pd.cluster.messages import Message, Peer
from fastdeploy_pd.config import lone_prompt_tokens
from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.core.multiplexing import PLACEMENTS
from fastdeploy_pd.core.placement import NO_SLO
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.prefix_index import HeldBlocks
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.engine.frontend import Delivered, FrontEnd, Instance
from fastdeploy_pd.engine.loop import Engine
from fastdeploy_pd.engine.outbox import Action, Send
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.model.runner import StepOutput
from fastdeploy_pd.request import Request, SamplingParams, Slo
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.loopback import LoopbackNetwork, LoopbackTransfer

LAYOUTS = {"2mixed": (Role.MIXED, Role.MIXED), "1p1d": (Role.PREFILL, Role.DECODE)}

# Llama-3-8B on an H200, from the runs in docs/benchmarks.md
PREFILL, DECODE = (6.7e-10, 2.1e-5, 0.004), (3.1e-8, 1.2e-5, 0.0042)
LATER_PART = 1.1  # so much longer the attention of a prompt's later parts takes
LAUNCH_S, DECODE_LAUNCH_S = 0.012, 0.0015  # that an engine takes to launch a step with prompts, and a graph
FIRST_KERNEL_S = 0.002  # until the device has something to do
QUEUED_S = 0.01  # until a step with prompts has been queued wholly
LEAD = 4 / 32  # of such a step: its last layers, during which the next one is launched

NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS, MAX_MODEL_LEN = 14_000, 64, 256, 8192
TURN_S, TICK_S, PUBLISH_S, MESSAGE_S, HAND_OVER_S = 0.0005, 0.02, 0.2, 0.001, 0.004


def prefill_s(num_tokens: int) -> float:
    """Returns: seconds that a prompt takes alone."""
    return Predictor(PREFILL, DECODE).prefill_s(num_tokens)


@dataclass(frozen=True, slots=True)
class Setting:
    """Two instances, and by what they are used."""

    layout: str
    placement: str = "slo"
    max_num_batched_tokens: int = 2048
    given_lone_tokens: int | None = None  #: --max-lone-prompt-tokens; None: as an instance on a GPU has it
    slo_ttft_x: float = 5.0
    slo_tpot_s: float = 0.1

    @property
    def max_lone_prompt_tokens(self) -> int:
        """Returns: most tokens of a step for a prompt that is alone."""
        lone = self.given_lone_tokens or lone_prompt_tokens(self.max_num_batched_tokens)
        return max(lone, self.max_num_batched_tokens)


@dataclass(slots=True)
class Answer:
    """When a request was sent, and when its tokens came."""

    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0


@dataclass(slots=True)
class VirtualStep:
    """See engine.context.Step."""

    clock: VirtualClock
    end_s: float
    results: list[StepOutput]
    on_layer: Callable[[int], None] | None

    def poll(self) -> bool:
        """Hand over the only layer when the step has ended."""
        if self.clock.now_s() < self.end_s:
            return False
        if self.on_layer is not None:
            on_layer, self.on_layer = self.on_layer, None
            on_layer(0)
        return True

    def outputs(self) -> list[StepOutput]:
        """See engine.context.Step."""
        return self.results


class VirtualDevice:
    """See engine.context.Runner: two steps deep, as a GPU is."""

    depth, can_advance = 2, False

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.launching_until_s = 0.0
        self._free_s = self._lead_s = self._queued_s = 0.0

    @property
    def is_queued(self) -> bool:
        """See Runner."""
        return self.clock.now_s() >= self._queued_s

    @property
    def is_nearly_done(self) -> bool:
        """See Runner."""
        return self.is_queued and self.clock.now_s() >= self._free_s - self._lead_s

    def prepare_more(self) -> bool:
        """See Runner."""
        return False

    def samples_on_device(self, request: Request) -> bool:
        """See Runner."""
        return True

    def launch(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> VirtualStep:
        """See Runner."""
        now_s = self.clock.now_s()
        prompts = [(s.start, s.stop) for s in batch.sequences if s.num_tokens > 1]
        launch_s = LAUNCH_S if prompts else DECODE_LAUNCH_S
        self.launching_until_s = now_s + launch_s
        seconds = step_s(prompts, [s.stop for s in batch.sequences if s.num_tokens == 1])
        self._free_s = max(self._free_s, now_s + min(launch_s, FIRST_KERNEL_S)) + seconds
        self._lead_s = seconds * LEAD if prompts else float("inf")
        self._queued_s = now_s + QUEUED_S if prompts else now_s
        outputs = [StepOutput(5 if s.needs_sample else None) for s in batch.sequences]
        return VirtualStep(self.clock, self._free_s, outputs, on_layer)


def step_s(prompts: Sequence[tuple[int, int]], streams: Sequence[int]) -> float:
    """Returns: seconds of a step that computes parts of prompts, (start, stop), and a token for each stream of so many."""
    a, b, c = PREFILL
    d, e, f = DECODE
    attention = sum((stop * stop - start * start) * (LATER_PART if start else 1) for start, stop in prompts)
    seconds = a * attention + b * sum(stop - start for start, stop in prompts) + (c if prompts else 0.0)
    own_s = f if streams and not prompts else 0.0  # the weights are read once
    return seconds + d * sum(streams) + e * len(streams) + own_s


@dataclass(slots=True)
class Node:
    """An instance's engine."""

    name: str
    engine: Engine
    device: VirtualDevice
    held: HeldBlocks
    inbox: list[tuple[str, Message]] = field(default_factory=list)
    num_published: int = 0


class Traffic:
    """The trace against one setting: each instance has a front end, and requests go to them in turn."""

    def __init__(self, setting: Setting, requests: Sequence[TraceRequest], rate: float) -> None:
        self.setting, self.requests, self.rate = setting, requests, rate
        self.clock = VirtualClock()
        self.network = LoopbackNetwork(max_delay_s=HAND_OVER_S)
        roles = {f"{role.value}-{n}": role for n, role in enumerate(LAYOUTS[setting.layout])}
        self.nodes = {name: self._node(name, role) for name, role in roles.items()}
        members = [
            Instance(Peer(name, f"virtual://{name}"), role.can_prefill, role.can_decode, block_size=BLOCK_SIZE)
            for name, role in roles.items()
        ]
        self.front_ends = {
            f"front-{n}": FrontEnd(f"front-{n}", random.Random(n), policy=PLACEMENTS[setting.placement]())
            for n in range(len(members))
        }
        for front_end in self.front_ends.values():
            front_end.set_members(members, self.clock.now_s())
        self.answers: dict[str, Answer] = {}
        self._messages: list[tuple[float, int, str, str, Message]] = []
        self._numbers = itertools.count()

    def _node(self, name: str, role: Role) -> Node:
        setting, numbers = self.setting, itertools.count()
        device, held = VirtualDevice(self.clock), HeldBlocks()
        policy = "slack" if setting.placement == "slo" else "fcfs"
        options = SchedulerOptions(
            MAX_NUM_SEQS,
            setting.max_num_batched_tokens,
            MAX_MODEL_LEN,
            prefill_policy=policy,
            guards_tpot=True,
            max_lone_prompt_tokens=setting.max_lone_prompt_tokens,
        )
        pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        pool.listener = held
        layout = KVLayout(1, NUM_BLOCKS, 1, BLOCK_SIZE, 1, "float32")
        transfer = LoopbackTransfer(name, KVPool(layout), layout, self.network)
        context = EngineContext(
            name,
            Scheduler(pool, options, device.samples_on_device),
            {"loopback": transfer},
            new_id=lambda: f"{name}-{next(numbers)}",
            new_nonce=lambda: next(numbers),
        )
        engine = Engine(role, context, device, self.clock)
        engine.start_from(Predictor(PREFILL, DECODE))
        return Node(name, engine, device, held)

    def run(self) -> list[Answer]:
        """Returns: what became of each request, in their order. Raises: FastDeployPDError: one was not answered whole."""
        start_s = self.clock.now_s() + 1.0
        due_s = [start_s + arrival_s for arrival_s in arrivals(list(self.requests), self.rate)]
        num_sent, publish_s, tick_s = 0, 0.0, 0.0
        while num_sent < len(due_s) or any(f.requests for f in self.front_ends.values()):
            now_s = self.clock.now_s()
            self.network.run_until(now_s)
            while num_sent < len(due_s) and due_s[num_sent] <= now_s:
                self._submit(num_sent, now_s)
                num_sent += 1
            if now_s >= publish_s:
                publish_s = now_s + PUBLISH_S
                self._publish()
            if now_s >= tick_s:
                tick_s = now_s + TICK_S
                for front_end in self.front_ends.values():
                    front_end.tick(now_s)
                    self._flush(front_end)
            self._deliver(now_s)
            for node in self.nodes.values():
                self._turn(node, now_s)
            self.clock.advance_to(now_s + TURN_S)
        found = [self.answers[str(n)] for n in range(len(self.requests))]
        if any(a.num_tokens != r.num_output for a, r in zip(found, self.requests, strict=True)):
            raise FastDeployPDError("an answer is not whole")
        return found

    def _submit(self, number: int, now_s: float) -> None:
        asked, setting = self.requests[number], self.setting
        slo = Slo(setting.slo_ttft_x * prefill_s(asked.num_input), setting.slo_tpot_s)
        sampling = SamplingParams(max_tokens=asked.num_output, ignore_eos=True)
        front_end = self.front_ends[f"front-{number % len(self.front_ends)}"]
        self.answers[str(number)] = Answer(now_s)
        prompt = asked.prompt(100_000, f"rate {self.rate}")
        request = Request(str(number), prompt, sampling, slo=slo if setting.placement == "slo" else NO_SLO)
        front_end.submit(request, now_s)
        self._flush(front_end)

    def _publish(self) -> None:
        """Tell front ends what prefix caches hold, as through Redis."""
        for node in self.nodes.values():
            node.num_published += 1
            came, went = node.held.take_changes()
            for front_end in self.front_ends.values():
                if not front_end.prefixes.apply(node.name, node.num_published, came, went):
                    front_end.prefixes.reset(node.name, node.num_published, node.held.snapshot())

    def _flush(self, front_end: FrontEnd) -> None:
        now_s = self.clock.now_s()
        self._send(front_end.front_end_id, front_end.outbox.take(), now_s)
        for event in front_end.take_events():
            if not isinstance(event, Delivered):
                raise FastDeployPDError(f"request {event.request_id} failed: {event.error.message}")
            answer = self.answers[event.request_id]
            answer.first_s, answer.last_s = answer.first_s or now_s, now_s
            answer.num_tokens += len(event.chunk.token_ids)

    def _send(self, sender_id: str, actions: Sequence[Action], at_s: float) -> None:
        for action in actions:
            if isinstance(action, Send):
                number = next(self._numbers)
                message = (at_s + MESSAGE_S, number, action.peer_id, sender_id, action.message)
                heapq.heappush(self._messages, message)

    def _deliver(self, now_s: float) -> None:
        while self._messages and self._messages[0][0] <= now_s:
            _, _, receiver_id, sender_id, message = heapq.heappop(self._messages)
            front_end = self.front_ends.get(receiver_id)
            if front_end is None:
                self.nodes[receiver_id].inbox.append((sender_id, message))
            else:
                front_end.receive(sender_id, message, now_s)
                self._flush(front_end)

    def _turn(self, node: Node, now_s: float) -> None:
        """One turn of an engine's loop, unless it is still launching a step."""
        if now_s < node.device.launching_until_s:
            return
        inbox, node.inbox = node.inbox, []
        for sender_id, message in inbox:
            node.engine.receive(sender_id, message)
        node.engine.step()
        self._send(node.name, node.engine.take_actions(), max(now_s, node.device.launching_until_s))
