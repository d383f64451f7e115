"""An instance's configuration: small frozen classes, one a concern; flags and environment are read here, once, and checked.

Flags have FastDeploy's names. A bad value is refused with its flag, the value and what is allowed; a flag whose feature this version
does not have is refused too, with what to use instead: nothing is swallowed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.interfaces import address_of

ROLES = ("mixed", "prefill", "decode")
DEMO_MODEL = Path(__file__).parent / "demo_model"
MIN_SECRET_BYTES = 16
MAX_RANKS = 64
NEAR = 0.72  # difflib's ratio above which a flag may be meant by another word


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
            directory = Path(args.model)
            values["model"] = str(directory / "config.json")
            values["skip_tokenizer_init"] = args.skip_tokenizer_init or not (directory / "tokenizer.json").exists()
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


def with_hyphens(argument: str) -> str:
    """FastDeploy's users write both --max_model_len and --max-model-len."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown and unknown[1].startswith("-"):
            names = [name.removeprefix("--") for name in self._option_string_actions]  # the hyphens make any two alike
            near = difflib.get_close_matches(unknown[1].removeprefix("--"), names, 1, NEAR)
            message = f"there is no flag {unknown[1]}" + (f"; did you mean --{near[0]}?" if near else "")
        elif unknown:
            message = f"{unknown[1]!r} belongs to no flag; a model is given as --model {unknown[1]}"
        raise ConfigError(re.sub(r"^argument (--[\w-]+): ", r"\1: ", message))


def _number(kind: Callable[[str], Any], minimum: float, maximum: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be {what}")
        return value

    return parse


def _integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], Any]:
    return _number(int, minimum, maximum, f"an integer from {minimum} to {maximum}")


_PORT = _integer(1, 65535)


def _ports(text: str) -> tuple[int, ...]:
    return tuple(_PORT(part.strip()) for part in text.split(","))


def _block_size(text: str) -> int:
    value = int(_integer(1, 1024)(text))
    if value & (value - 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a power of two up to 1024")
    return value


def _topic(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be 1 to 64 of A-Z a-z 0-9 . _ -")
    return text


def _protocols(text: str) -> tuple[str, ...]:
    names = tuple(n.strip() for n in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be names separated by commas, each once, e.g. shm,tcp"
        )
    return names


def _directory(text: str) -> str:
    if text == "demo":
        return str(DEMO_MODEL)
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a directory; give a Hugging Face checkpoint directory, or `demo` for the model that comes with the package"
        )
    return text


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


class _Help(argparse.HelpFormatter):
    """Shows a flag's default where its text does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "default" in text or text == "":
            return action.help
        value = ",".join(action.default) if isinstance(action.default, tuple) else action.default
        return f"{text} (default: {'demo' if value == str(DEMO_MODEL) else value})".replace("%", "%%")


def make_parser(program: str = "api_server") -> argparse.ArgumentParser:
    """Returns: the parser of an instance's flags; docs/configuration.md is held against it by a test."""
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        description="One instance of a fastdeploy-pd cluster.",
        formatter_class=_Help,
    )
    _add_model_flags(parser.add_argument)
    _add_cache_flags(parser.add_argument)
    _add_cluster_flags(parser.add_argument)
    _add_server_flags(parser.add_argument)
    _add_slo_flags(parser.add_argument)
    return parser


def _add_model_flags(add: Callable[..., Any]) -> None:
    add("--model", type=_directory, default=str(DEMO_MODEL), help="checkpoint directory, or `demo`")
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
    add("--max-model-len", type=_integer(2), help="most tokens of a sequence (default: what the model allows)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="compute and KV type; all but float32 need --ops torch (default: float32, on a GPU bfloat16)",
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
        type=_integer(1, MAX_RANKS),
        default=1,
        help="ranks that compute the model together, a process each; must divide the model's attention heads and MLP",
    )


def _add_cache_flags(add: Callable[..., Any]) -> None:
    add("--block-size", type=_block_size, default=64, help="tokens a KV block, a power of two")
    add("--num-gpu-blocks-override", type=_integer(1), help="KV blocks of the pool (default: from free memory)")
    add(
        "--gpu-memory-utilization",
        type=_number(float, 0.01, 0.95, "a number from 0.01 to 0.95"),
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
        type=_protocols,
        help="transfer backends in order of preference: ipc, shm, rdma, nccl, mooncake, tcp, or one of another package (default: shm,tcp; "
        "on a GPU ipc,rdma,nccl)",
    )
    add(
        "--cache-queue-port",
        type=_PORT,
        help="TCP port for KV blocks, of the first of tcp, nccl and mooncake; rank 1 takes the next one, and so on (default: free ones)",
    )
    add(
        "--rdma-comm-ports",
        type=_ports,
        default=(),
        help="TCP ports at which peers set up RDMA, one a tensor-parallel rank (default: a free one)",
    )
    gib = _number(float, 0, 65536, "a number of GiB from 0 to 65536")
    add("--swap-space", type=gib, default=0.0, help="GiB for evicted KV blocks")
    add(
        "--min-fetch-tokens", type=_integer(0), default=256, help="shortest prefix fetched from a peer's cache; 0: none"
    )
    add("--local-prefill-tokens", type=_integer(0), default=64, help="most that decode computes after a cached prefix")
    add("--max-num-seqs", type=_integer(1, 512), default=8, help="most sequences in a step")
    add("--max-num-batched-tokens", type=_integer(1), default=2048, help="most tokens in a step")
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
        type=_number(float, 1, 86400, "seconds from 1 to 86400"),
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
    add("--scheduler-port", type=_PORT, default=6379, help="Redis port")
    add("--scheduler-db", type=_integer(0, 1023), default=0, help="Redis database number")
    add("--scheduler-username", help="Redis ACL user")
    add("--scheduler-password", help="Redis password (or FD_SCHEDULER_PASSWORD, which `ps` does not show)")
    add("--scheduler-topic", type=_topic, default="default", help="name of the cluster in Redis")
    add(
        "--scheduler-ttl",
        type=_number(float, 1, 86400, "seconds from 1 to 86400"),
        default=900.0,
        help="seconds after which a request fails and results expire",
    )
    add(
        "--peer-timeout",
        type=_number(float, 1, 3600, "seconds from 1 to 3600"),
        default=10.0,
        help="seconds an instance's step counter may stand still before it counts as lost, a front end 0.7 of it; a closed connection counts at once",
    )
    add("--scheduler-tls", action="store_true", help="connect to Redis with TLS")
    add("--scheduler-tls-ca-file", help="certificates that sign Redis' certificate")
    add("--scheduler-tls-cert-file", help="our certificate for Redis")
    add("--scheduler-tls-key-file", help="our certificate's key")
    add("--pd-comm-port", type=_PORT, help="port for links between instances (default: a free one)")
    add(
        "--engine-worker-queue-port",
        type=_PORT,
        help="with --scheduler-name local: loopback port between API and engine (default: a Unix socket)",
    )
    add(
        "--advertise-host",
        help="address at which other instances reach this one (default: that of KVCACHE_SOCKET_IFNAME's interface, or 127.0.0.1)",
    )
    add("--cluster-secret-file", help="file with the cluster secret (or FD_CLUSTER_SECRET)")


def _add_server_flags(add: Callable[..., Any]) -> None:
    add("--host", default="127.0.0.1", help="address of the HTTP port")
    add("--port", type=_PORT, help="HTTP port (default: a free one)")
    add("--metrics-port", type=_PORT, help="a second port for /metrics alone")
    add("--api-key", action="append", help="key that clients must send; may be given several times")
    add("--workers", type=_integer(1, 64), default=1, help="API processes")
    add("--ready-file", help="file to write addresses to when the instance is ready")
    add("--data-parallel-size", type=_integer(1), help="only 1 in this version")
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
        type=_number(float, 0.1, 1e6, "a number from 0.1 to 1e6"),
        help="time to the first token that requests expect which say nothing of it, as a multiple of the prompt's predicted prefill on "
        "an idle instance; has no effect until an instance knows what its steps take: then it goes before --slo-ttft-ms (default: none)",
    )
    milliseconds = _number(float, 0.001, 999_999_999.999, "milliseconds from 0.001 to below 1e9")
    add(
        "--slo-ttft-ms",
        type=milliseconds,
        help="milliseconds to the first token that requests expect which say nothing of it (default: none)",
    )
    add("--slo-tpot-ms", type=milliseconds, help="the same for each token after the first (default: none)")


def _choose_by_device(args: argparse.Namespace) -> None:
    is_gpu = args.device != "cpu"
    args.ops = args.ops or ("torch" if is_gpu or args.tensor_parallel_size > 1 else "paddle")
    args.dtype = args.dtype or ("bfloat16" if is_gpu else "float32")
    args.cache_transfer_protocol = args.cache_transfer_protocol or (
        ("ipc", "rdma", "nccl") if is_gpu else ("shm", "tcp")
    )
    if is_gpu and args.ops != "torch":
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
