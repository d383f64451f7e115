"""The engine's process over real sockets, with a device that takes its time: it listens meanwhile, and costs nothing."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.links import Links
from fastdeploy_pd.cluster.messages import OrderEnded, OrderQuery, Reserve, Reserved, Tokens
from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.engine.build import BuiltEngine
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.engine.loop import Engine
from fastdeploy_pd.engine.process import IDLE_WAIT_S, EngineShell
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.model.runner import FinishedStep, StepOutput
from fastdeploy_pd.observe.metrics import EngineMetrics, render
from fastdeploy_pd.request import Request, SamplingParams
from fastdeploy_pd.transfer.layout import KVPool
from tests.engine.simulated_cluster import OnLayer

STEP_S = 0.4
LAYOUT = KVLayout(1, 16, 1, 4, 4, "float32")


@dataclass(slots=True)
class TimedStep(FinishedStep):
    """Ends at a point in time."""

    end_s: float = 0.0

    def poll(self) -> bool:
        return time.monotonic() >= self.end_s


class TimedRunner:
    """A device whose steps take STEP_S each, one after the other."""

    depth = 2
    can_advance, is_nearly_done, is_queued = False, True, True

    def __init__(self) -> None:
        self.free_s = 0.0
        self.launched_s: list[float] = []
        self.num_chores = 0

    def prepare_more(self) -> bool:
        self.num_chores -= 1
        return self.num_chores >= 0

    def samples_on_device(self, request: Request) -> bool:
        return True

    def launch(self, batch: Batch, on_layer: OnLayer = None) -> TimedStep:
        self.launched_s.append(time.monotonic())
        self.free_s = max(self.free_s, time.monotonic()) + STEP_S
        return TimedStep([StepOutput(5 if s.needs_sample else None) for s in batch.sequences], self.free_s)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineShell]:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    runner = TimedRunner()
    scheduler = Scheduler(BlockPool(LAYOUT.num_blocks, LAYOUT.block_size), SchedulerOptions(), runner.samples_on_device)
    ids = iter(range(10**9))
    context = EngineContext("one", scheduler, {}, new_id=lambda: str(next(ids)), new_nonce=lambda: next(ids))
    engine = Engine(Role.MIXED, context, runner, WallClock())
    built = BuiltEngine(engine, "one", KVPool(LAYOUT), "f", LAYOUT, 4096)
    links = Links("one", [f"ipc://{tmp_path}/engine.sock"])
    yield EngineShell(InstanceConfig.from_args([], {}), built, links, EngineMetrics("m", "mixed"))
    links.close()
    gc.unfreeze()  # the shell's doing


def test_messages_are_answered_while_a_step_is_in_flight(shell: EngineShell) -> None:
    front = Links("front")
    front.connect("one", shell.links.addresses[0])
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=4), front_end_id="front")
    front.send("one", Reserve(request.to_wire(), None))
    asked_s, waits_s, tokens = 0.0, [], []
    deadline_s = time.monotonic() + 20 * STEP_S
    while len(tokens) < 4 and time.monotonic() < deadline_s:
        shell._turn()
        for _, item in front.receive(0.0):
            if isinstance(item, Reserved | OrderEnded):
                if isinstance(item, OrderEnded):
                    waits_s.append(time.monotonic() - asked_s)
                asked_s = time.monotonic()
                front.send("one", OrderQuery("unknown"))
            elif isinstance(item, Tokens):
                tokens += [t for c in item.chunks for t in c.token_ids]
    front.close()
    assert tokens == [5] * 4
    assert np.median(waits_s) < STEP_S / 10, "an order waited for the end of a step"
    launched_s = shell.engine.runner.launched_s
    assert launched_s[1] - launched_s[0] < STEP_S / 2, "the second step was not launched under the first"
    assert len(launched_s) == 4


def test_an_engine_that_waits_does_not_spin(shell: EngineShell) -> None:
    engine = shell.engine
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=2), front_end_id="front")
    engine.receive("front", Reserve(request.to_wire(), None))
    num_turns, cpu_s, start_s = 0, time.process_time(), time.monotonic()
    while time.monotonic() < start_s + 1.5 * STEP_S:
        shell._turn()
        num_turns += 1
    assert engine.has_work
    assert time.process_time() - cpu_s < 0.5 * 1.5 * STEP_S
    assert num_turns > 50, "the step's end would be seen late"


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_idle_engine_prepares_for_later_steps_and_a_busy_one_does_not(
    shell: EngineShell, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = shell.engine, shell.engine.runner
    runner.num_chores = 60
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=2), front_end_id="front")
    engine.receive("front", Reserve(request.to_wire(), None))
    shell._turn()
    while engine.has_work:
        shell._turn()
    assert runner.num_chores == 59  # the turn that ended the last step
    name = {"prefill": "num_active", "decode": "num_ordered"}[side]
    with monkeypatch.context() as patch:  # a hand-over is under way
        patch.setattr(type(getattr(engine, side)), name, property(lambda _: 1))
        for _ in range(3):
            shell._turn()
    assert runner.num_chores == 59
    start_s = time.monotonic()
    while runner.num_chores > 0:
        shell._turn()
    assert time.monotonic() - start_s < 60 * IDLE_WAIT_S / 4, "it waited between them for messages"
    start_s = time.monotonic()
    for _ in range(4):
        shell._turn()
    assert time.monotonic() - start_s > 2 * IDLE_WAIT_S, "it goes round and round"


def test_an_answer_is_sent_before_the_next_chore(shell: EngineShell, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    send = shell.links.send
    monkeypatch.setattr(shell.links, "send", lambda *a: (order.append("send"), send(*a))[1])
    monkeypatch.setattr(shell.engine.runner, "prepare_more", lambda: order.append("chore"))
    shell.engine.context.outbox.send("front", OrderEnded("g", "done"))
    shell._turn()
    assert order == ["send", "chore"]


def test_a_signal_may_come_while_something_is_measured(shell: EngineShell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler runs between any two instructions of the loop: it must not wait for a lock that the loop holds."""
    monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue())
    shell.metrics = EngineMetrics("m", "mixed")
    write, has_come = MmapedDict.write_value, []

    def stopped(*arguments: Any) -> None:  # inside the lock of all measurements
        if not has_come:
            has_come.append(True)
            signal.setitimer(signal.ITIMER_REAL, 3)
            shell.request_stop(is_gentle=True)
        write(*arguments)

    def give_up(*_: Any) -> None:
        raise TimeoutError("the handler waits for what the loop holds")

    monkeypatch.setattr(MmapedDict, "write_value", stopped)
    before = signal.signal(signal.SIGALRM, give_up)
    try:
        shell.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    record = shell.record()
    assert has_come and record is not None and record.is_draining


def test_errors_of_predictions_are_shown(shell: EngineShell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue())
    shell.metrics = EngineMetrics("m", "mixed")
    shell.engine.start_from(Predictor((0, 0, STEP_S), (0, 0, STEP_S / 2)))
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=3), front_end_id="front")
    shell.engine.receive("front", Reserve(request.to_wire(), None))
    while shell.engine.has_work:
        shell._turn()
    name = "fastdeploy_pd:predictor_relative_error"
    lines = dict(line.rsplit(" ", 1) for line in render()[0].decode().splitlines() if line.startswith(name))
    found = {
        (kind, what): float(lines[f'{name}_{what}{{kind="{kind}",model_name="m",role="mixed"}}'])
        for kind in ("prefill", "decode")
        for what in ("count", "sum")
    }
    assert (found["prefill", "count"], found["decode", "count"]) == (1, 2)
    assert found["prefill", "sum"] < 0.2 < 0.7 < found["decode", "sum"] <= 1.0
