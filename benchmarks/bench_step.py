"""What a step costs the engine's CPU beside the model: scheduling, handling the outputs, and the messages to front ends as bytes.

    python -m benchmarks.bench_step --json out.json

All sequences decode, one token each a step, under a runner that computes nothing; 1,000 tokens of prompt, blocks of 64. With depth 2
each step is scheduled while the one before it is in flight. Times are the thread's CPU time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.codec import encode
from fastdeploy_pd.cluster.messages import Reserve
from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.engine.loop import Engine
from fastdeploy_pd.engine.outbox import Send
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.model.runner import FinishedStep, StepOutput
from fastdeploy_pd.request import Request, SamplingParams

PROMPT_TOKENS = 1000
STEPS = 1000
FREEZE_STEPS = 10  # engine/process.py does so every 0.1 s


@dataclass(slots=True)
class LaterStep(FinishedStep):
    """Ends when it is asked again."""

    is_over: bool = False

    def poll(self) -> bool:
        """Whether this is not the first time."""
        was_over, self.is_over = self.is_over, True
        return was_over


class NoModel:
    """A runner that samples token 5 everywhere; counts its own time."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.own_s = 0.0

    def samples_on_device(self, request: Request) -> bool:
        """All do."""
        return True

    def launch(self, batch: Batch, on_layer: object = None) -> FinishedStep:
        """See engine.context.Runner."""
        start_s = time.thread_time()
        results = [StepOutput(5 if s.needs_sample else None) for s in batch.sequences]
        self.own_s += time.thread_time() - start_s
        return FinishedStep(results) if self.depth == 1 else LaterStep(results)


def measure(num_sequences: int, depth: int) -> dict[str, float]:
    """Returns: milliseconds a step."""
    runner, numbers = NoModel(depth), count()
    options = SchedulerOptions(num_sequences, 8 * PROMPT_TOKENS, 32 * PROMPT_TOKENS)
    scheduler = Scheduler(BlockPool(200 * num_sequences, 64), options, runner.samples_on_device)
    context = EngineContext("i", scheduler, {}, new_id=lambda: str(next(numbers)), new_nonce=lambda: next(numbers))
    engine = Engine(Role.MIXED, context, runner, WallClock())
    for number in range(num_sequences):
        sampling = SamplingParams(max_tokens=30 * PROMPT_TOKENS)
        request = Request(f"request-{number:032}", [7 + number] * PROMPT_TOKENS, sampling, front_end_id="front")
        engine.receive("front", Reserve(request.to_wire(), None))
    while any(r.local.num_computed_tokens < PROMPT_TOKENS + 5 for r in scheduler.running) or scheduler.waiting:
        engine.step()
        engine.take_actions()
    steps_s, runner.own_s = [], 0.0
    while len(steps_s) < STEPS:
        if len(steps_s) % FREEZE_STEPS == 0:
            gc.collect(1)
            gc.freeze()
        before_s, start_s = runner.own_s, time.thread_time()
        report = engine.step()
        sends = [a.message for a in engine.take_actions() if isinstance(a, Send)]
        for message in sends:
            encode(message)
        if report.num_tokens:
            steps_s.append(time.thread_time() - start_s - (runner.own_s - before_s))
    cuts_s = statistics.quantiles(steps_s, n=100)
    return {
        "sequences": num_sequences,
        "depth": depth,
        "p50_ms": round(1e3 * cuts_s[49], 3),
        "p99_ms": round(1e3 * cuts_s[98], 3),
        "max_ms": round(1e3 * max(steps_s), 2),
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--num-sequences", nargs="+", type=int, default=[64, 256])
    arguments = parser.parse_args()
    rows = [measure(number, depth) for number in arguments.num_sequences for depth in (1, 2)]
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
