"""Two GPUs used in six ways: ours and vLLM's, with prefill and decode together on each or on one each. Started and ended here."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers import vllm_server
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster

MAX_NUM_SEQS = 256
TTFT_FACTOR, TPOT_MS = 5.0, 100.0  # the SLO: a multiple of the unloaded TTFT, and a limit
TTFT_AIM = 0.95  # of it, for our instances: they count in their own time for a prompt, and the client is farther away
BY_SLO = ("--placement", "slo", "--slo-ttft-x", f"{TTFT_AIM * TTFT_FACTOR:g}", "--slo-tpot-ms", f"{TPOT_MS:g}")
MODEL_NAME, TOPIC = "bench", "bench-pd"


@dataclass(frozen=True, slots=True)
class Running:
    """A layout that answers."""

    urls: list[str]  #: requests go to them in turn
    metrics_urls: list[str] = field(default_factory=list)  #: ours, of all instances


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to use the GPUs."""

    title: str
    start: Callable[[argparse.Namespace], AbstractContextManager[Running]]
    missing: Callable[[argparse.Namespace], str] = lambda _: ""  #: why it cannot be run here; "": it can


def common_flags(args: argparse.Namespace) -> list[str]:
    """Returns: what our instances and vLLM's servers spell alike."""
    flags = ["--load-format", args.load_format, "--served-model-name", MODEL_NAME]
    flags += ["--max-model-len", str(args.max_model_len), "--max-num-seqs", str(MAX_NUM_SEQS)]
    flags += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)] if args.max_num_batched_tokens else []
    flags += ["--dtype", args.dtype] if args.dtype else []
    return flags + ([] if (Path(args.model) / "tokenizer.json").exists() else ["--skip-tokenizer-init"])


def instance_flags(args: argparse.Namespace, more: Sequence[str] = ()) -> list[str]:
    """Returns: the flags that each of our instances gets, its role's and its topic's aside."""
    return ["--model", str(args.model), "--device", args.device, *common_flags(args), *more, *args.flags]


def _ours(*roles: str, more: Sequence[str] = ()) -> Callable[[argparse.Namespace], AbstractContextManager[Running]]:
    @contextmanager
    def start(args: argparse.Namespace) -> Iterator[Running]:
        with EmbeddedRedis() as redis, LocalCluster(redis.url, TOPIC, instance_flags(args, more)) as cluster:
            instances = [cluster.launch(role, [], _own_gpu(args, place)) for place, role in enumerate(roles)]
            cluster.wait_ready(instances)
            urls = [instance.http_url for instance in instances]
            yield Running(urls, urls)

    return start


def _own_gpu(args: argparse.Namespace, place: int) -> dict[str, str]:
    """The first GPU that an instance sees is its own; CUDA IPC needs the others in view."""
    gpus: Sequence[str] = args.gpus
    return {"CUDA_VISIBLE_DEVICES": ",".join((*gpus[place:], *gpus[:place]))} if args.device != "cpu" else {}


def _vllm(is_pair: bool) -> Callable[[argparse.Namespace], AbstractContextManager[Running]]:
    @contextmanager
    def start(args: argparse.Namespace) -> Iterator[Running]:
        flags = [*common_flags(args), "--gpu-memory-utilization", str(args.vllm_memory_utilization)]
        servers = vllm_server.pair if is_pair else vllm_server.replicas
        with servers(args.vllm_python, Path(args.model), flags, args.gpus) as urls:
            yield Running(urls)

    return start


def _missing_for(*modules: str) -> Callable[[argparse.Namespace], str]:
    def missing(args: argparse.Namespace) -> str:
        if args.device == "cpu":
            return "vLLM is measured on GPUs alone: --device cuda"
        find = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
        try:
            found = subprocess.run(
                [args.vllm_python, "-c", find, *modules], capture_output=True, text=True, check=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError) as error:
            return f"--vllm-python {args.vllm_python} does not run: {error}"
        names = found.stdout.split()
        return (
            f"{' and '.join(names)} not installed: {args.vllm_python} -m pip install {' '.join(names)}" if names else ""
        )

    return missing


LAYOUTS = {
    "ours-1p1d": Layout("ours, 1 prefill + 1 decode", _ours("prefill", "decode")),
    "ours-1p1d-slo": Layout("ours, 1 prefill + 1 decode, --placement slo", _ours("prefill", "decode", more=BY_SLO)),
    "ours-2mixed": Layout("ours, 2 mixed", _ours("mixed", "mixed")),
    "ours-2mixed-slo": Layout("ours, 2 mixed, --placement slo", _ours("mixed", "mixed", more=BY_SLO)),
    "vllm-2": Layout("vLLM, 2 replicas", _vllm(False), _missing_for("vllm")),
    "vllm-1p1d": Layout("vLLM, 1 prefill + 1 decode (NIXL)", _vllm(True), _missing_for("vllm", "nixl")),
}
