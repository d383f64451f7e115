"""vLLM's engine in this process, on the cases of engine_cases.py, with the same flags and the same JSON as bench_engine.

    python -m benchmarks.peers.vllm_engine --model DIR --json vllm.json

Prefix cache off, as for ours; everything else that speed depends on (CUDA graphs, compilation, attention backend, chunked prefill,
tokens a step) is vLLM's default, and compilation is over before the clock starts.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.checks import ended
from benchmarks.engine_cases import MAX_NUM_SEQS, complete, parser, run, since_start_s
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.flags import number

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class Vllm:
    """Its offline interface."""

    def __init__(self, vllm: Any, args: argparse.Namespace) -> None:
        limits = {"max_num_batched_tokens": args.max_num_batched_tokens} if args.max_num_batched_tokens else {}
        self._vllm = vllm
        self._llm = vllm.LLM(
            model=str(args.model),
            load_format=args.load_format,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            max_num_seqs=MAX_NUM_SEQS,
            gpu_memory_utilization=args.gpu_memory_utilization,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            seed=0,
            **limits,
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[int]:
        """Returns: how many tokens each prompt was answered with."""
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._llm.generate(inputs, params, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns: 0. Raises: ConfigError: something is wrong; says what."""
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--gpu-memory-utilization", type=number(float, 0.01, 1, "a number from 0.01 to 1"), default=0.85
    )
    args = arguments.parse_args(argv)
    complete(args)
    os.environ |= ENVIRONMENT
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(f"vLLM is not installed ({error}): {sys.executable} -m pip install vllm") from error
    engine = Vllm(vllm, args)
    engine.generate([[0]], 1)
    facts = {"engine": "vLLM", "version": vllm.__version__, "ready_s": since_start_s()}
    results = run(args, facts, engine.generate)
    sys.stdout.write(f"ready after {results['ready_s']:.1f} s; GPU memory {results['gpu_memory_mib']} MiB\n")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
