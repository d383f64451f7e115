"""`fastdeploy-pd profile`: times steps of the real runner, fits the predictor to them and stores both.

Steps are timed as an engine's are: as many in flight as the runner takes, from one's end to the next one's. A prompt longer than
--max-num-batched-tokens is computed in one step only if nothing is beside it, so its later parts are timed as steps behind a prefix of
the same length.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.predictor import fit
from fastdeploy_pd.engine.build import BuiltEngine, build_engine
from fastdeploy_pd.engine.context import NoObserver, Step
from fastdeploy_pd.engine.profile import VERSION, Profile, check_target, conditions_of, profile_path
from fastdeploy_pd.errors import ConfigError, FastDeployPDError
from fastdeploy_pd.model.checkpoint import ModelConfig
from fastdeploy_pd.request import Request

SHORTEST = 16  # tokens
MAX_POINT_S = 2.0  # repeats end after so long
BAR_WIDTH = 30
Part = tuple[int, int]  # (tokens, tokens computed before) of a prompt
Group = tuple[int, int]  # (sequences, tokens of each)
Item = TypeVar("Item")


def geometric(first: int, last: int, count: int) -> list[int]:
    """Returns: up to `count` integers from first to last in equal ratios; none if there are none."""
    if not 0 < first <= last:
        return []
    return sorted({round(first * (last / first) ** (i / (count - 1))) for i in range(count)})


def prefill_parts(longest: int, budget: int) -> list[Part]:
    """Returns: what to time of prompts of up to `longest` tokens, `budget` at most in a step: whole ones, then later parts."""
    step = min(longest, budget)
    parts = [(n, 0) for n in geometric(min(SHORTEST, step), step, 9)]
    for chunk in geometric(max(1, step // 8), step, 2):
        parts += [(m + chunk, m) for m in geometric(min(4 * SHORTEST, step), longest - chunk, 4)]
    return parts


def decode_groups(longest: int, most: int, num_blocks: int, block_size: int) -> list[Group]:
    """Returns: what to time of steps with up to `most` sequences of up to `longest` tokens, in so many blocks."""
    groups = []
    for size in geometric(1, most, 5):
        room = num_blocks // size * block_size
        groups += [(size, n) for n in geometric(min(SHORTEST, longest, room), min(longest, room), 4)]
    return groups


class Profiler:
    """Times steps of a built engine's runner in its pool, which nothing else uses meanwhile."""

    def __init__(self, built: BuiltEngine, vocab_size: int, repeats: int) -> None:
        self._runner, self._pool = built.engine.runner, built.engine.context.scheduler.pool
        self._blocks = self._pool.allocate(self._pool.num_free)
        self._vocab_size, self._repeats = vocab_size, repeats
        self._clock, self._rng = WallClock(), random.Random(0)

    @property
    def num_tokens(self) -> int:
        """Tokens that the pool holds."""
        return len(self._blocks) * self._pool.block_size

    def prefill_s(self, part: Part) -> float:
        """Returns: median seconds of a step with a part of a prompt; the KV before it is whatever the pool holds."""
        return self._median_s(lambda: [self._sequence(*part, self._blocks)])

    def decode_s(self, group: Group) -> float:
        """Returns: median seconds of a step that computes one token for each of some sequences."""
        size, length = group
        num = self._pool.num_blocks_for(length)
        return self._median_s(
            lambda: [self._sequence(length, length - 1, self._blocks[i * num : (i + 1) * num]) for i in range(size)]
        )

    def _sequence(self, stop: int, start: int, blocks: list[int]) -> ScheduledSequence:
        request = Request("profile", [self._rng.randrange(self._vocab_size) for _ in range(stop)])
        request.local.block_table = blocks[: self._pool.num_blocks_for(stop)]
        request.local.samples_on_device = self._runner.samples_on_device(request)
        return ScheduledSequence(request, start, stop)

    def _median_s(self, make: Callable[[], list[ScheduledSequence]]) -> float:
        """Times `repeats` steps after one that is not counted; fewer if they take long."""
        batch = Batch(make(), self._pool.block_size)
        steps: deque[Step] = deque()
        begun_s = end_s = self._clock.now_s()
        seconds: list[float] = []
        while len(seconds) < 1 + self._repeats and (len(seconds) < 2 or end_s - begun_s < MAX_POINT_S):
            while len(steps) < self._runner.depth:
                steps.append(self._runner.launch(batch))
            steps.popleft().outputs()
            last_s, end_s = end_s, self._clock.now_s()
            seconds.append(end_s - last_s)
        for step in steps:
            step.outputs()
        return statistics.median(seconds[1:])


def measure(config: InstanceConfig, repeats: int) -> Profile:
    """Build an instance's engine and time its steps. Raises: ConfigError: what is wrong, with its flag."""
    if config.scheduling.max_num_seqs < 2:
        raise ConfigError("--max-num-seqs is 1; a profile tells sequences from steps only if it is at least 2")
    # Alone and of both kinds: what it would exchange with whom has no part in a step's time.
    cluster = replace(config.cluster, scheduler_name="local", splitwise_role="mixed")
    built = build_engine(replace(config, cluster=cluster), NoObserver(), None)
    profiler = Profiler(built, ModelConfig.from_directory(Path(config.model.model)).vocab_size, repeats)
    longest = min(built.max_model_len, profiler.num_tokens)
    parts = prefill_parts(longest, config.scheduling.max_num_batched_tokens)
    block_size = built.layout.block_size
    groups = decode_groups(longest, config.scheduling.max_num_seqs, profiler.num_tokens // block_size, block_size)
    jobs = [(profiler.prefill_s, part) for part in parts] + [(profiler.decode_s, group) for group in groups]
    seconds = [time_s(what) for time_s, what in progress(jobs)]
    prefills = [(*part, s) for part, s in zip(parts, seconds, strict=False)]
    decodes = [(size, size * n, s) for (size, n), s in zip(groups, seconds[len(parts) :], strict=True)]
    whole = [(n, s) for n, before, s in prefills if not before]
    predictor = fit(whole, decodes, [p for p in prefills if p[1]])
    num_blocks, token_bytes = built.layout.num_blocks, built.layout.num_layers * built.layout.block_bytes // block_size
    conditions = conditions_of(config, built.fingerprint)
    return Profile(VERSION, conditions, predictor, prefills, decodes, num_blocks, block_size, token_bytes)


def progress(items: Sequence[Item]) -> Iterator[Item]:
    """Yield the items; a bar on a terminal's standard error shows how far it is."""
    stream = sys.stderr if sys.stderr.isatty() else None
    for number, item in enumerate(items):
        if stream is not None:
            filled = BAR_WIDTH * number // len(items)
            stream.write(f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {number} of {len(items)} kinds of steps")
            stream.flush()
        yield item
    if stream is not None:
        stream.write("\r\x1b[K")
        stream.flush()


def table(profile: Profile) -> str:
    """Returns: measured and predicted times, in lines."""
    predictor = profile.predictor
    rows = [
        (f"prefill of {n - m} tokens after {m}", s, predictor.prefill_s(n, m)) for n, m, s in profile.prefills
    ]  # fmt: skip
    rows += [(f"decode of {b} sequences, {kv} KV tokens", s, predictor.decode_s(b, kv)) for b, kv, s in profile.decodes]
    lines = [f"{'step':<44}{'measured ms':>12}{'predicted':>12}{'error':>8}"]
    lines += [f"{name:<44}{1e3 * s:>12.3f}{1e3 * p:>12.3f}{p / s - 1:>+8.0%}" for name, s, p in rows]
    for name, errors in (
        ("prefill", [abs(predictor.prefill_s(n, m) / s - 1) for n, m, s in profile.prefills]),
        ("decode", [abs(predictor.decode_s(b, kv) / s - 1) for b, kv, s in profile.decodes]),
    ):
        lines.append(f"{name}: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}")
    lines.append(
        f"pool: --num-blocks {profile.num_blocks} --block-size {profile.block_size} --kv-bytes-per-token {profile.kv_bytes_per_token}"
    )
    (a, b, c), (d, e, f) = predictor.prefill, predictor.decode
    lines.append(f"T(n) = {a:.3g} n^2 + {b:.3g} n + {c:.3g} s    D(B, K) = {d:.3g} K + {e:.3g} B + {f:.3g} s")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Returns: exit status."""
    parser = argparse.ArgumentParser(
        prog="fastdeploy-pd profile",
        allow_abbrev=False,
        description="Times steps of a model on this machine and stores them where an instance with the same flags finds them at its start.",
        epilog="All flags of `fastdeploy-pd serve` are understood; those of model, cache and steps count. See docs/scheduling.md.",
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind, whose median counts (default 3)")
    args, flags = parser.parse_known_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    try:
        config = InstanceConfig.from_args(flags, os.environ, "fastdeploy-pd profile")
        if config.scheduling.profile_path is not None:
            target = Path(config.scheduling.profile_path)
            check_target(target)  # measuring takes minutes
            if not os.path.isdir(target.absolute().parent):
                raise ConfigError(
                    f"--profile-path is '{target}'; its directory must be there: mkdir -p '{target.parent}'"
                )
        profile = measure(config, args.repeats)
        path = profile_path(config, profile.conditions)
        profile.save(path)
    except FastDeployPDError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 2
    sys.stdout.write(table(profile) + f"written to {path}\n")
    return 0
