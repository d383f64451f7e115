"""An instance's configuration: small frozen classes, one a concern; flags and environment are read here, once, and checked.

Flags have FastDeploy's names. A bad value is refused with its flag, the value and what is allowed; a flag whose feature this version
does not have is refused too, with what to use instead: nothing is swallowed.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.flags import (
    DEMO_MODEL,
    PORT,
    Help,
    Parser,
    api_key,
    block_size,
    directory,
    integer,
    number,
    ports,
    protocols,
    topic,
    with_hyphens,
)
from fastdeploy_pd.interfaces import address_of

ROLES = ("mixed", "prefill", "decode")
MIN_SECRET_BYTES = 16
MAX_RANKS = 64
FP8_NAMES = ("fp8", "fp8_e4m3")  # as vLLM calls it
FP8 = "float8_e4m3"
LONE_PROMPT_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it is computed."""

    model: str  #: checkpoint directory; with load_format "dummy" the path of its config.json, which stands for random weights
    served_model_name: tuple[str, ...]
    max_model_len: int | None
    dtype: str
    device: str
    ops: str
    tensor_parallel_size: int  #: ranks, each a process
    load_format: str
    skip_tokenizer_init: bool


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The KV pool and how its blocks travel."""

    block_size: int
    kv_cache_dtype: str  #: as a KVLayout names it
    num_gpu_blocks_override: int | None
    gpu_memory_utilization: float | None
    enable_prefix_caching: bool
    cache_transfer_protocol: tuple[str, ...]
    cache_queue_port: int | None
    rdma_comm_ports: tuple[int, ...]
    swap_space: float  #: GiB
    min_fetch_tokens: int
    local_prefill_tokens: int


@dataclass(frozen=True, slots=True)
class SchedulingOptions:
    """The limits of a step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_lone_prompt_tokens: int
    enable_chunked_prefill: bool
    prefill_policy: str
    fairness: str
    placement: str
    profile_path: str | None
    profile_directory: str  #: of profiles of all models, for this user of this machine


@dataclass(frozen=True, slots=True)
class SloOptions:
    """What is expected for requests that say nothing themselves."""

    slo_ttft_x: float | None
    slo_ttft_ms: float | None
    slo_tpot_ms: float | None


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Role, coordinator and links."""

    splitwise_role: str
    elastic: str
    elastic_cooldown: float
    scheduler_name: str
    scheduler_host: str
    scheduler_port: int
    scheduler_db: int
    scheduler_username: str | None
    scheduler_password: str | None = field(repr=False)
    scheduler_topic: str
    scheduler_ttl: float
    peer_timeout: float
    scheduler_tls: bool
    scheduler_tls_ca_file: str | None
    scheduler_tls_cert_file: str | None
    scheduler_tls_key_file: str | None
    pd_comm_port: int | None
    engine_worker_queue_port: int | None
    advertise_host: str
    secret: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The HTTP side."""

    host: str
    port: int | None
    metrics_port: int | None
    api_keys: tuple[str, ...] = field(repr=False)
    workers: int
    log_dir: str | None
    ready_file: str | None


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """All of one instance's options."""

    model: ModelOptions
    cache: CacheOptions
    scheduling: SchedulingOptions
    cluster: ClusterOptions
    server: ServerOptions
    slo: SloOptions

    @classmethod
    def from_args(cls, argv: Sequence[str], env: Mapping[str, str], program: str = "api_server") -> InstanceConfig:
        """Read flags and environment (FD_LOG_DIR, FD_CLUSTER_SECRET, FD_SCHEDULER_PASSWORD, KVCACHE_SOCKET_IFNAME, XDG_CACHE_HOME).

        Args:
            program: what `--help` calls it.

        Raises: ConfigError: something is wrong; names it.
        """
        args = make_parser(program).parse_args([with_hyphens(a) for a in argv])
        for name, check in UNSUPPORTED.items():
            value = getattr(args, name)
            if value is not None:
                check(value)
        _check_ports(args)
        _choose_by_device(args)
        args.scheduler_password = args.scheduler_password or env.get("FD_SCHEDULER_PASSWORD") or None
        args.advertise_host = args.advertise_host or _own_address(env)
        if args.advertise_host in ("0.0.0.0", "::", "*"):
            raise ConfigError(
                f"--advertise-host is {args.advertise_host!r}, where nobody can be reached; it must be one of this machine's addresses"
            )
        args.profile_directory = str(_cache_home(env) / "fastdeploy_pd" / "profiles")
        secret = read_secret(args.cluster_secret_file, env)
        if secret is None and args.scheduler_name != "local" and not is_loopback(args.advertise_host):
            raise ConfigError(
                f"--advertise-host is {args.advertise_host!r}, which other machines can reach; that needs a cluster secret: "
                "give --cluster-secret-file FILE or set FD_CLUSTER_SECRET to the same value on every instance"
            )
        if args.scheduler_name == "local" and args.splitwise_role != "mixed":
            raise ConfigError(
                f"--splitwise-role {args.splitwise_role} needs --scheduler-name splitwise: with `local` an instance is alone, so it must be mixed"
            )
        if args.scheduler_name == "local" and args.elastic != "off":
            raise ConfigError(
                f"--elastic {args.elastic} needs --scheduler-name splitwise: with `local` an instance is alone, so it must be mixed"
            )
        if args.swap_space and (args.tensor_parallel_size > 1 or not args.enable_prefix_caching):
            raise ConfigError(
                f"--swap-space is {args.swap_space:g} GiB; with several ranks or --no-enable-prefix-caching it must be 0"
            )
        return cls(
            *(
                _pick(kind, args, env, secret)
                for kind in (ModelOptions, CacheOptions, SchedulingOptions, ClusterOptions, ServerOptions, SloOptions)
            )
        )


def _pick(kind: type, args: argparse.Namespace, env: Mapping[str, str], secret: bytes | None) -> Any:
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(kind) if hasattr(args, f.name)}
    if kind is ModelOptions:
        values["served_model_name"] = tuple(
            args.served_model_name or [Path(args.model).name.replace("demo_model", "demo")]
        )
        if args.load_format == "dummy":
            folder = Path(args.model)
            values["model"] = str(folder / "config.json")
            values["skip_tokenizer_init"] = args.skip_tokenizer_init or not (folder / "tokenizer.json").exists()
    elif kind is ClusterOptions:
        values["secret"] = secret
    elif kind is ServerOptions:
        values |= {"api_keys": tuple(args.api_key or ()), "log_dir": env.get("FD_LOG_DIR")}
    return kind(**values)


def read_secret(path: str | None, env: Mapping[str, str]) -> bytes | None:
    """Returns: the cluster secret from the file or FD_CLUSTER_SECRET; None if neither is given.

    Raises: ConfigError: it cannot be read, others can read the file, or it is too short.
    """
    if path is None:
        secret, source = env.get("FD_CLUSTER_SECRET", "").encode(), "FD_CLUSTER_SECRET"
        if not secret:
            return None
    else:
        source = f"--cluster-secret-file {path}"
        try:
            if Path(path).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                raise ConfigError(f"{source} can be read by other users; run: chmod 600 {path}")
            secret = Path(path).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"{source} cannot be read: {error.strerror}") from error
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{source} holds {len(secret)} bytes; the cluster secret must have at least {MIN_SECRET_BYTES}"
        )
    return secret


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _later(flag: str, instead: str, allowed: Any = None) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if value != allowed:
            raise ConfigError(f"{flag} {value} is not part of this version: {instead}")

    return check


#: flags of FastDeploy that are known and refused, unless they ask for what is the case anyway
UNSUPPORTED: dict[str, Callable[[Any], None]] = {
    "data_parallel_size": _later("--data-parallel-size", "start more instances instead; only 1 is allowed", 1),
    "speculative_config": _later("--speculative-config", "speculative decoding is not implemented"),
}


def make_parser(program: str = "api_server") -> argparse.ArgumentParser:
    """Returns: the parser of an instance's flags; docs/configuration.md is held against it by a test."""
    parser = Parser(
        prog=program,
        description="One instance of a fastdeploy-pd cluster.",
        formatter_class=Help,
    )
    _add_model_flags(parser.add_argument)
    _add_cache_flags(parser.add_argument)
    _add_step_flags(parser.add_argument)
    _add_cluster_flags(parser.add_argument)
    _add_server_flags(parser.add_argument)
    _add_slo_flags(parser.add_argument)
    return parser


def _add_model_flags(add: Callable[..., Any]) -> None:
    add("--model", type=directory, default=str(DEMO_MODEL), help="checkpoint directory, or `demo`")
    add(
        "--served-model-name",
        action="append",
        help="name in the API; may be given several times (default: the directory's name)",
    )
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="auto: safetensors; dummy: random weights, of a directory that needs only config.json, to measure speed",
    )
    add(
        "--skip-tokenizer-init",
        action="store_true",
        help="serve without tokenizer.json: /v1/completions takes and gives token ids, text and chat are refused "
        "(implied by --load-format dummy where there is no tokenizer.json)",
    )
    add("--max-model-len", type=integer(2), help="most tokens of a sequence (default: what the model allows)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="what is computed in; all but float32 need --ops torch (default: float32, on a GPU bfloat16)",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the model runs; cuda: the first GPU that CUDA_VISIBLE_DEVICES leaves, with --ops torch",
    )
    add(
        "--ops",
        choices=("paddle", "torch", "reference"),
        help="which framework computes (default: paddle; on a GPU, or on several ranks, torch)",
    )
    add(
        "--tensor-parallel-size",
        type=integer(1, MAX_RANKS),
        default=1,
        help="ranks that compute the model together, a process each; must divide the model's attention heads and MLP",
    )


def _add_cache_flags(add: Callable[..., Any]) -> None:
    add("--block-size", type=block_size, default=64, help="tokens a KV block, a power of two")
    add(
        "--kv-cache-dtype",
        choices=("auto", *FP8_NAMES),
        default="auto",
        help="auto: as --dtype; fp8: half a bfloat16's memory and transfers, three bits of mantissa (e4m3), values beyond 448 cut off, "
        "with --ops torch",
    )
    add("--num-gpu-blocks-override", type=integer(1), help="KV blocks of the pool (default: from free memory)")
    add(
        "--gpu-memory-utilization",
        type=number(float, 0.01, 0.95, "a number from 0.01 to 0.95"),
        help="share of the device's free memory for KV blocks, weights loaded (default: 0.9 of a GPU's; of RAM 0.25 and no more than needed)",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep KV blocks of earlier prompts",
    )
    add(
        "--cache-transfer-protocol",
        type=protocols,
        help="transfer backends in order of preference: ipc, shm, rdma, nccl, mooncake, tcp, or one of another package (default: shm,tcp; "
        "on a GPU ipc,rdma,nccl)",
    )
    add(
        "--cache-queue-port",
        type=PORT,
        help="TCP port for KV blocks, of the first of tcp, nccl and mooncake; rank 1 takes the next one, and so on (default: free ones)",
    )
    add(
        "--rdma-comm-ports",
        type=ports,
        default=(),
        help="TCP ports at which peers set up RDMA, one a tensor-parallel rank (default: a free one)",
    )
    gib = number(float, 0, 65536, "a number of GiB from 0 to 65536")
    add("--swap-space", type=gib, default=0.0, help="GiB for evicted KV blocks")
    add("--min-fetch-tokens", type=integer(0), default=256, help="shortest prefix fetched from a peer's cache; 0: none")
    add("--local-prefill-tokens", type=integer(0), default=64, help="most that decode computes after a cached prefix")


def _add_step_flags(add: Callable[..., Any]) -> None:
    add("--max-num-seqs", type=integer(1, 512), default=8, help="most sequences in a step")
    add(
        "--max-num-batched-tokens",
        type=integer(1),
        default=2048,
        help="most tokens of prompts in a step; each running stream adds one",
    )
    add(
        "--max-lone-prompt-tokens",
        type=integer(1),
        help="the same of a prompt while there is nothing else to compute (default: as --max-num-batched-tokens; "
        f"on a GPU four times that, up to {LONE_PROMPT_TOKENS} or that, if it is more)",
    )
    add(
        "--enable-chunked-prefill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute long prompts in several steps",
    )
    add(
        "--profile-path",
        help="file with measured step times, which `fastdeploy-pd profile` writes and an instance starts from "
        "(default: one a model and device, in $XDG_CACHE_HOME/fastdeploy_pd/profiles)",
    )


def _add_cluster_flags(add: Callable[..., Any]) -> None:
    add("--splitwise-role", choices=ROLES, default="mixed", help="what the instance is for")
    add(
        "--elastic",
        choices=("off", "auto"),
        default="off",
        help="auto: the topic's leader flips this instance between prefill and decode when one side is under pressure",
    )
    add(
        "--elastic-cooldown",
        type=number(float, 1, 86400, "seconds from 1 to 86400"),
        default=30.0,
        help="with --elastic auto: least seconds between two flips in the topic",
    )
    add(
        "--scheduler-name",
        choices=("splitwise", "local"),
        default="local",
        help="splitwise: a cluster through Redis; local: one instance alone",
    )
    add("--scheduler-host", default="127.0.0.1", help="Redis host")
    add("--scheduler-port", type=PORT, default=6379, help="Redis port")
    add("--scheduler-db", type=integer(0, 1023), default=0, help="Redis database number")
    add("--scheduler-username", help="Redis ACL user")
    add("--scheduler-password", help="Redis password (or FD_SCHEDULER_PASSWORD, which `ps` does not show)")
    add("--scheduler-topic", type=topic, default="default", help="name of the cluster in Redis")
    add(
        "--scheduler-ttl",
        type=number(float, 1, 86400, "seconds from 1 to 86400"),
        default=900.0,
        help="seconds after which a request fails and results expire",
    )
    add(
        "--peer-timeout",
        type=number(float, 1, 3600, "seconds from 1 to 3600"),
        default=10.0,
        help="seconds an instance's step counter may stand still before it counts as lost, a front end 0.7 of it; a closed connection counts at once",
    )
    add("--scheduler-tls", action="store_true", help="connect to Redis with TLS")
    add("--scheduler-tls-ca-file", help="certificates that sign Redis' certificate")
    add("--scheduler-tls-cert-file", help="our certificate for Redis")
    add("--scheduler-tls-key-file", help="our certificate's key")
    add("--pd-comm-port", type=PORT, help="port for links between instances (default: a free one)")
    add(
        "--engine-worker-queue-port",
        type=PORT,
        help="with --scheduler-name local: loopback port between API and engine (default: a Unix socket)",
    )
    add(
        "--advertise-host",
        help="address at which other instances reach this one (default: that of KVCACHE_SOCKET_IFNAME's interface, or 127.0.0.1)",
    )
    add("--cluster-secret-file", help="file with the cluster secret (or FD_CLUSTER_SECRET)")


def _add_server_flags(add: Callable[..., Any]) -> None:
    add("--host", default="127.0.0.1", help="address of the HTTP port")
    add("--port", type=PORT, help="HTTP port (default: a free one)")
    add("--metrics-port", type=PORT, help="a second port for /metrics alone")
    add("--api-key", type=api_key, action="append", help="key that clients must send; may be given several times")
    add("--workers", type=integer(1, 64), default=1, help="API processes")
    add("--ready-file", help="file to write addresses to when the instance is ready")
    add("--data-parallel-size", type=integer(1), help="only 1 in this version")
    add("--speculative-config", help="not part of this version: refused")


def _add_slo_flags(add: Callable[..., Any]) -> None:
    add(
        "--prefill-policy",
        default="slack",
        help="order of prompts: fcfs, sjf, ljf, edf, slack, or an entry point's name",
    )
    add("--fairness", choices=("none", "vtc"), default="none", help="vtc: tenants with the least service come first")
    add(
        "--placement",
        default="fewest-tokens",
        help="choice of instances: fewest-tokens, round-robin, slo, or an entry point's name",
    )
    add(
        "--slo-ttft-x",
        type=number(float, 0.1, 1e6, "a number from 0.1 to 1e6"),
        help="time to the first token that requests expect which say nothing of it, as a multiple of the prompt's predicted prefill on "
        "an idle instance; has no effect until an instance knows what its steps take: then it goes before --slo-ttft-ms (default: none)",
    )
    milliseconds = number(float, 0.001, 999_999_999.999, "milliseconds from 0.001 to below 1e9")
    add(
        "--slo-ttft-ms",
        type=milliseconds,
        help="milliseconds to the first token that requests expect which say nothing of it (default: none)",
    )
    add("--slo-tpot-ms", type=milliseconds, help="the same for each token after the first (default: none)")


def lone_prompt_tokens(max_num_batched_tokens: int) -> int:
    """Returns: --max-lone-prompt-tokens of an instance on a GPU that was not given it; who allows a step few tokens may lack memory."""
    return max(max_num_batched_tokens, min(4 * max_num_batched_tokens, LONE_PROMPT_TOKENS))


def _choose_by_device(args: argparse.Namespace) -> None:
    is_gpu = args.device != "cpu"
    args.ops = args.ops or ("torch" if is_gpu or args.tensor_parallel_size > 1 else "paddle")
    args.dtype = args.dtype or ("bfloat16" if is_gpu else "float32")
    args.cache_transfer_protocol = args.cache_transfer_protocol or (
        ("ipc", "rdma", "nccl") if is_gpu else ("shm", "tcp")
    )
    least = args.max_num_batched_tokens
    if args.max_lone_prompt_tokens is None:
        args.max_lone_prompt_tokens = lone_prompt_tokens(least) if is_gpu else least
    if args.max_lone_prompt_tokens < least:
        raise ConfigError(
            f"--max-lone-prompt-tokens is {args.max_lone_prompt_tokens}; it must be at least --max-num-batched-tokens ({least})"
        )
    is_fp8 = args.kv_cache_dtype in FP8_NAMES
    if is_fp8 and args.ops != "torch":
        raise ConfigError(
            f"--kv-cache-dtype is {args.kv_cache_dtype!r}; with --ops {args.ops} it must be auto (fp8 needs --ops torch)"
        )
    args.kv_cache_dtype = FP8 if is_fp8 else args.dtype
    if is_gpu and args.ops == "reference":
        raise ConfigError(f"--ops is {args.ops!r}; with --device {args.device} it must be torch")


def _own_address(env: Mapping[str, str]) -> str:
    interface = env.get("KVCACHE_SOCKET_IFNAME", "")
    address = address_of(interface) if interface else "127.0.0.1"
    if not address:
        names = ", ".join(name for _, name in socket.if_nameindex() if address_of(name))
        raise ConfigError(
            f"KVCACHE_SOCKET_IFNAME is {interface!r}, which is no network interface with an IPv4 address; there are: {names}"
        )
    return address


def _cache_home(env: Mapping[str, str]) -> Path:
    """Source: XDG Base Directory Specification; a path that is not absolute does not count."""
    given = env.get("XDG_CACHE_HOME", "")
    return Path(given) if given.startswith("/") else Path(os.path.expanduser("~")) / ".cache"


def _check_ports(args: argparse.Namespace) -> None:
    """Raises: ConfigError: two flags ask for the same port, or one has no meaning here."""
    names = ("port", "metrics_port", "pd_comm_port", "cache_queue_port", "engine_worker_queue_port")
    flags = [("--" + name.replace("_", "-"), getattr(args, name)) for name in names]
    num_ranks = args.tensor_parallel_size
    if args.rdma_comm_ports and len(args.rdma_comm_ports) != num_ranks:
        raise ConfigError(
            f"--rdma-comm-ports names {len(args.rdma_comm_ports)} ports; there must be one a tensor-parallel rank, "
            f"so {num_ranks}"
        )
    seen: dict[int, str] = {}
    if args.cache_queue_port:
        last = args.cache_queue_port + num_ranks - 1
        if last > 65535:
            raise ConfigError(
                f"--cache-queue-port is {args.cache_queue_port}; with {num_ranks} ranks, a port each, it must be at most {65536 - num_ranks}"
            )
        flags += [("--cache-queue-port", port) for port in range(args.cache_queue_port + 1, last + 1)]
    for flag, port in (*flags, *(("--rdma-comm-ports", port) for port in args.rdma_comm_ports)):
        if port is None:
            continue
        if port in seen:
            raise ConfigError(f"{seen[port]} and {flag} are both {port}; each needs a port of its own")
        seen[port] = flag
    if args.scheduler_name == "local" and (args.pd_comm_port or args.cache_queue_port or args.rdma_comm_ports):
        raise ConfigError(
            "--pd-comm-port, --cache-queue-port and --rdma-comm-ports have no use with --scheduler-name local: there is nobody to talk to"
        )
    if args.scheduler_name != "local" and args.engine_worker_queue_port:
        raise ConfigError(
            "--engine-worker-queue-port has no use with --scheduler-name splitwise: the engine listens on --pd-comm-port"
        )
