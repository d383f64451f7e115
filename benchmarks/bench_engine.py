"""The engine alone, in this process: prefill and decode on the cases of engine_cases.py, without HTTP, sockets or Redis.

    python -m benchmarks.bench_engine --model DIR --device cuda --json ours.json
    python -m benchmarks.bench_engine --model DIR --device cpu --dtype float32 --max-model-len 512 --scale 0.05 --cases b1,b8

Requests come as Reserve messages and answers leave as Tokens, as with a front end. benchmarks/peers/vllm_engine.py times vLLM on the
same cases; `python -m benchmarks.engine_cases ours.json vllm.json` compares.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.checks import ended
from benchmarks.engine_cases import MAX_NUM_SEQS, complete, parser, run, since_start_s
from fastdeploy_pd import __version__
from fastdeploy_pd.cluster.messages import Beat, Refused, Reserve, Tokens
from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.engine.build import build_engine
from fastdeploy_pd.engine.context import NoObserver
from fastdeploy_pd.engine.interpreter import keep, uncollected
from fastdeploy_pd.engine.loop import Engine
from fastdeploy_pd.engine.outbox import Send
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.request import FinishReason, Request, SamplingParams

FRONT_END = "bench"
BEAT_S = 0.1


class Client:
    """The front end of one engine in the same thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._num_requests = self._num_beats = 0
        self._next_beat_s = 0.0

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[int]:
        """Returns: how many tokens each prompt was answered with. Raises: FastDeployPDError: one was refused or failed; says why."""
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        counts: dict[str, int] = {}
        for prompt in prompts:
            self._num_requests += 1
            request = Request(f"r{self._num_requests}", prompt, sampling, front_end_id=FRONT_END)
            counts[request.request_id] = 0
            self.engine.receive(FRONT_END, Reserve(request.to_wire(), None))
        num_open = len(prompts)
        while num_open:
            self._beat()
            self.engine.step()
            for action in self.engine.take_actions():
                if isinstance(action, Send) and isinstance(action.message, Tokens | Refused):
                    num_open -= self._take(action.message, counts)
        return list(counts.values())

    def _take(self, message: Tokens | Refused, counts: dict[str, int]) -> int:
        """Count tokens. Returns: how many answers have ended."""
        if isinstance(message, Refused):
            raise FastDeployPDError(f"{message.request_id} was refused: {message.reason}")
        num_ended = 0
        for chunk in message.chunks:
            if chunk.finish_reason is FinishReason.ERROR:
                raise FastDeployPDError(f"{chunk.request_id} failed: {chunk.error}")
            counts[chunk.request_id] += len(chunk.token_ids)
            num_ended += chunk.finish_reason is not None
        return num_ended

    def _beat(self) -> None:
        """A front end that says nothing for long is taken for lost, and an instance's process has Python keep what there is."""
        if time.perf_counter() >= self._next_beat_s:
            self._next_beat_s = time.perf_counter() + BEAT_S
            self._num_beats += 1
            keep()
            self.engine.receive(FRONT_END, Beat(self._num_beats))


def flags_of(args: argparse.Namespace) -> list[str]:
    """Returns: the instance's flags."""
    flags = ["--model", str(args.model), "--load-format", args.load_format, "--device", args.device]
    flags += ["--dtype", args.dtype, "--max-model-len", str(args.max_model_len), "--max-num-seqs", str(MAX_NUM_SEQS)]
    flags += ["--no-enable-prefix-caching", "--scheduler-name", "local"]
    flags += ["--ops", args.ops] if args.ops else []
    flags += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)] if args.max_num_batched_tokens else []
    return flags + args.flags


def device_facts(device: str) -> dict[str, Any]:
    """Returns: what computed."""
    if device == "cpu":
        return {"device": platform.processor() or platform.machine()}
    import torch

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns: 0. Raises: FastDeployPDError: something is wrong; says what."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    arguments.add_argument("--ops", help="as of an instance")
    arguments.add_argument("flags", nargs="*", help="behind `--`: further flags of an instance")
    args = arguments.parse_args(argv)
    complete(args, args.device)
    flags = flags_of(args)
    with uncollected():  # as in an instance's process
        built = build_engine(InstanceConfig.from_args(flags, {}), NoObserver(), None)
    facts = {"engine": "fastdeploy-pd", "version": __version__, "ready_s": since_start_s(), "flags": flags}
    while built.engine.prepare():
        pass  # as an instance does while nothing comes
    results = run(args, {**facts, **device_facts(args.device)}, Client(built.engine).generate)
    sys.stdout.write(f"ready after {results['ready_s']:.1f} s; GPU memory {results['gpu_memory_mib']} MiB\n")
    sys.stdout.flush()
    if built.engine.runner.rank.count > 1:
        os._exit(0)  # at the interpreter's end NCCL would wait for other ranks that wait for this one
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
