"""Builds one instance's engine from its configuration: model, KV pool, transfers, scheduler, member record."""

from __future__ import annotations

import logging
import os
import secrets
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastdeploy_pd import machine
from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.messages import PROTOCOL_VERSION
from fastdeploy_pd.cluster.redis_connection import RedisOptions
from fastdeploy_pd.cluster.registry import MemberLoad, MemberRecord
from fastdeploy_pd.config import ClusterOptions, InstanceConfig
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import KVLayout, shard, whole
from fastdeploy_pd.core.order import prefill_left_s
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions, is_prompt
from fastdeploy_pd.engine import policies
from fastdeploy_pd.engine.context import EngineContext, EngineOptions, HandOverObserver
from fastdeploy_pd.engine.crew import Crew, RemoteEnd
from fastdeploy_pd.engine.loop import Engine
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import ConfigError, TransferUnavailable
from fastdeploy_pd.model.checkpoint import ModelConfig, fingerprint
from fastdeploy_pd.model.parallel import Rank
from fastdeploy_pd.model.runner import ModelRunner
from fastdeploy_pd.model.select import make_runner
from fastdeploy_pd.transfer.base import Transfer
from fastdeploy_pd.transfer.device_pool import DevicePool
from fastdeploy_pd.transfer.host_tier import HostTier
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.ranks import RankedTransfer
from fastdeploy_pd.transfer.select import build as build_transfer
from fastdeploy_pd.transfer.select import find as find_transfer
from rdma_comm.cuda.driver import Gpu
from rdma_comm.errors import RdmaError

log = logging.getLogger("fastdeploy_pd.engine")

#: of the memory that is free at start, how much the KV pool may take when --gpu-memory-utilization is not given
DEFAULT_MEMORY_FRACTION = 0.25
DEFAULT_GPU_FRACTION = 0.9
FRONT_END_SHARE = 0.7  #: of --peer-timeout: a front end that is silent for so long has gone
USUAL_TOKENS_PER_S = 2000.0  #: of prompts, until steps were measured
Pool = KVPool | DevicePool
#: full-length sequences a pool is made for, above max_num_seqs, when memory allows: prefixes stay cached
SPARE_SEQUENCES = 8


@dataclass(slots=True)
class BuiltEngine:
    """An engine and what its shell needs to run and announce it."""

    engine: Engine
    instance_id: str
    pool: Pool
    fingerprint: str
    layout: KVLayout
    max_model_len: int

    def member_record(self, config: InstanceConfig, http_address: str, links_address: str) -> MemberRecord:
        """Returns: how the instance is announced, with its present load."""
        engine = self.engine
        pool = engine.context.scheduler.pool
        return MemberRecord(
            instance_id=self.instance_id,
            role=engine.role.value,
            http_address=http_address,
            links_address=links_address,
            transfers={name: dict(t.descriptor()) for name, t in engine.context.transfers.items()},
            model_name=config.model.served_model_name[0],
            fingerprint=self.fingerprint,
            kv_layout=self.layout.to_wire(),
            protocol_version=PROTOCOL_VERSION,
            max_model_len=self.max_model_len,
            outstanding_tokens=engine.outstanding_tokens(),
            num_requests=len(engine.context.scheduler.running) + len(engine.context.scheduler.waiting),
            free_blocks=pool.num_free,
            is_draining=engine.is_draining,
            load=self.load(config.cluster.elastic != "off"),
        )

    def load(self, is_elastic: bool) -> MemberLoad:
        """Returns: what --elastic auto looks at, as it is now."""
        engine, scheduler = self.engine, self.engine.context.scheduler
        requests = (*scheduler.waiting, *scheduler.running)
        prompts = [r for r in requests if is_prompt(r)]
        predictor = scheduler.predictor
        num_left = sum(r.num_tokens - r.local.num_computed_tokens for r in prompts)
        counts = scheduler.pool.counts()
        return MemberLoad(
            prefill_s=sum(prefill_left_s(r, predictor) for r in prompts)
            if predictor
            else num_left / USUAL_TOKENS_PER_S,
            num_decodes=len(requests) - len(prompts),
            num_seats=scheduler.options.max_num_seqs,
            num_queued=len(engine.decode.queued),
            kv_usage=counts.held / (counts.held + counts.free),
            flip_age_s=engine.clock.now_s() - engine.flipped_s if engine.flipped_s is not None else None,
            is_elastic=is_elastic,
        )


def free_memory_bytes() -> int:
    """Returns: memory the machine could give us now, in bytes. Raises: ConfigError: it does not say."""
    free = machine.free_memory_bytes()
    if free is None:
        raise ConfigError("/proc/meminfo has no MemAvailable line; give --num-gpu-blocks-override")
    return free


def num_pool_blocks(config: InstanceConfig, layout: KVLayout, max_model_len: int, gpu: Gpu | None = None) -> int:
    """How many blocks the pool gets.

    Args:
        layout: with any num_blocks; the rest is used.
        max_model_len: tokens one sequence may have; the pool holds at least one such sequence.
        gpu: whose memory it takes; None: the machine's, which all ranks share.
    Raises: ConfigError: the memory, or the override, does not suffice for one sequence; says the numbers.
    """
    per_sequence = -(-max_model_len // layout.block_size)
    block_bytes = layout.num_layers * layout.block_bytes
    if config.cache.num_gpu_blocks_override is not None:
        num_blocks, why = config.cache.num_gpu_blocks_override, "--num-gpu-blocks-override"
        wanted = num_blocks * block_bytes * config.model.tensor_parallel_size
        if gpu is None and wanted > (free := free_memory_bytes()):
            raise ConfigError(
                f"{why} is {num_blocks}; so many KV blocks of {block_bytes} bytes take {wanted / 2**30:.2f} GiB; "
                f"only {free / 2**30:.2f} GiB are free"
            )
    else:
        fraction = config.cache.gpu_memory_utilization
        usual = DEFAULT_MEMORY_FRACTION if gpu is None else DEFAULT_GPU_FRACTION
        free = free_memory_bytes() // config.model.tensor_parallel_size if gpu is None else gpu.memory()[0]
        budget = int(free * (usual if fraction is None else fraction))
        num_blocks, why = budget // block_bytes, f"{budget / 2**20:.0f} MiB of {free / 2**20:.0f} MiB free memory"
        if fraction is None and gpu is None:
            num_blocks = min(num_blocks, (config.scheduling.max_num_seqs + SPARE_SEQUENCES) * per_sequence)
    if num_blocks < per_sequence:
        raise ConfigError(
            f"{why} gives {num_blocks} KV blocks of {block_bytes} bytes; one sequence of --max-model-len {max_model_len} "
            f"needs {per_sequence}. Allow more, or lower --max-model-len."
        )
    return num_blocks


def resolve_max_model_len(config: InstanceConfig, model: ModelConfig) -> int:
    """Returns: --max-model-len, or what the model was made for. Raises: ConfigError: more than that is asked for, or than a step may have."""
    wanted = config.model.max_model_len
    if wanted is not None and wanted > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len is {wanted}; this model's config.json allows max_position_embeddings = {model.max_position_embeddings}"
        )
    max_model_len = wanted if wanted is not None else model.max_position_embeddings
    if not config.scheduling.enable_chunked_prefill and config.scheduling.max_num_batched_tokens < max_model_len:
        raise ConfigError(
            f"--max-num-batched-tokens is {config.scheduling.max_num_batched_tokens}; without chunked prefill it must be at least "
            f"--max-model-len ({max_model_len})"
        )
    return max_model_len


def check(config: InstanceConfig) -> None:
    """What an instance in a topic would refuse, as far as that can be told before anything is started or loaded.

    Raises: ConfigError, ModelLoadError: what is wrong, with flag or file and field.
    """
    model = ModelConfig.from_directory(Path(config.model.model))
    Rank(0, config.model.tensor_parallel_size).check(model, config.model.ops)
    resolve_max_model_len(config, model)
    policies.check(config.scheduling.prefill_policy, config.scheduling.placement)
    for name in config.cache.cache_transfer_protocol:
        find_transfer(name)


def load_model(config: InstanceConfig, rank: Rank) -> tuple[ModelRunner, int]:
    """Returns: a rank's part of the model, and the most tokens of a sequence.

    Raises: ConfigError, ModelLoadError: what is wrong, with flag or file and field.
    """
    directory = Path(config.model.model)
    max_model_len = resolve_max_model_len(config, ModelConfig.from_directory(directory))
    options = config.model
    runner = make_runner(
        directory, options.ops, options.dtype, device=options.device, rank=rank, kv_dtype=config.cache.kv_cache_dtype
    )
    return runner, max_model_len


def build_engine(config: InstanceConfig, observer: HandOverObserver, secret: bytes | None) -> BuiltEngine:
    """Load the model, put an engine together and warm it up; its other ranks are processes of their own.

    Raises: ConfigError, ModelLoadError: what is wrong, with flag or file and field.
    """
    rank = Rank(0, config.model.tensor_parallel_size)
    rank.check(ModelConfig.from_directory(Path(config.model.model)), config.model.ops)
    crew = Crew(config) if rank.count > 1 else None
    runner, max_model_len = load_model(config, rank)
    layout = pool_layout(config, runner.config, max_model_len, rank)
    if crew is not None:
        layout = replace(layout, num_blocks=min(layout.num_blocks, *crew.num_blocks()))
    pool = attach_pool(config, runner, layout, max_model_len)
    model_fingerprint = fingerprint(Path(config.model.model))
    backends = build_backends(config, pool, layout, model_fingerprint, secret)
    if crew is not None:
        crew.attach(layout.num_blocks, model_fingerprint)
        runner.join(crew.group)
        runner.announce = crew.announce
    instance_id = f"{config.cluster.splitwise_role}-{uuid.uuid4().hex[:12]}"
    scheduler = Scheduler(
        BlockPool(layout.num_blocks, layout.block_size),
        SchedulerOptions(
            config.scheduling.max_num_seqs,
            config.scheduling.max_num_batched_tokens,
            max_model_len,
            config.scheduling.enable_chunked_prefill,
            config.cache.enable_prefix_caching,
            config.scheduling.prefill_policy,
            guards_tpot=True,
            fairness=config.scheduling.fairness,
            max_lone_prompt_tokens=config.scheduling.max_lone_prompt_tokens,
        ),
        runner.samples_on_device,
        partial(policies.prefill_policy, on_failure=observer.policy_failed),
    )
    if config.cache.swap_space:
        scheduler.pool.lower = host_tier(config, pool)
    context = EngineContext(
        instance_id,
        scheduler,
        join_ends(backends, layout, crew),
        EngineOptions(
            peer_timeout_s=config.cluster.peer_timeout,
            front_end_timeout_s=FRONT_END_SHARE * config.cluster.peer_timeout,
            min_fetch_tokens=config.cache.min_fetch_tokens,
            local_prefill_tokens=config.cache.local_prefill_tokens,
        ),
        observer=observer,
        new_id=lambda: uuid.uuid4().hex,
        new_nonce=lambda: secrets.randbits(63),
        num_layers=layout.num_layers,
    )
    engine = Engine(Role(config.cluster.splitwise_role), context, runner, WallClock())
    most = config.scheduling.max_num_batched_tokens, config.scheduling.max_lone_prompt_tokens
    most_alone = runner.warm_up(scheduler.pool, engine.role.can_decode, *most)
    scheduler.options = replace(scheduler.options, max_lone_prompt_tokens=most_alone)
    return BuiltEngine(engine, instance_id, pool, model_fingerprint, whole(layout), max_model_len)


def host_tier(config: InstanceConfig, pool: Pool) -> HostTier:
    """Returns: the host memory of --swap-space. Raises: ConfigError: it cannot be had, or holds no block; says the numbers."""
    num_bytes, free = int(config.cache.swap_space * 2**30), free_memory_bytes()
    given = f"--swap-space is {config.cache.swap_space:g} GiB"
    if num_bytes > free:
        raise ConfigError(f"{given}; only {free / 2**30:.2f} GiB are free")
    try:
        return HostTier(pool, num_bytes, secrets.randbits(63))
    except (ValueError, OSError, RdmaError) as error:
        raise ConfigError(f"{given}, of no use here: {error}") from error


def pool_layout(config: InstanceConfig, model: ModelConfig, max_model_len: int, rank: Rank) -> KVLayout:
    """Returns: of a rank's KV pool, in what memory is free now. Raises: ConfigError: that is too little; says the numbers."""
    layout = ModelRunner.kv_layout(model, 1, config.cache.block_size, config.cache.kv_cache_dtype)
    if rank.count > 1:
        layout = shard(layout, rank.index, rank.count)
    try:
        gpu = None if config.model.device == "cpu" else Gpu()
        return replace(layout, num_blocks=num_pool_blocks(config, layout, max_model_len, gpu))
    except RdmaError as error:
        raise ConfigError(f"--device is {config.model.device!r}: no KV pool on it: {error}") from error


def attach_pool(config: InstanceConfig, runner: ModelRunner, layout: KVLayout, max_model_len: int) -> Pool:
    """Returns: the KV pool, on the device, that the runner works on from now on. Raises: ConfigError: it cannot be had."""
    try:
        pool = KVPool(layout) if config.model.device == "cpu" else DevicePool(layout, Gpu())
    except RdmaError as error:
        raise ConfigError(f"--device is {config.model.device!r}: no KV pool on it: {error}") from error
    memory = pool.array if isinstance(pool, KVPool) else pool
    runner.attach(memory, layout, config.scheduling.max_num_seqs, max_model_len)
    return pool


def join_ends(own: dict[str, Transfer | str], layout: KVLayout, crew: Crew | None) -> dict[str, Transfer | str]:
    """Returns: one transfer a backend out of all ranks' ends; where one rank cannot use it, the reason.

    Args:
        own: rank 0's.
        layout: of its pool.
    """
    if crew is None:
        return {name: b if isinstance(b, str) else RankedTransfer([b], [layout]) for name, b in own.items()}
    others = crew.descriptors()
    layouts = [shard(whole(layout), rank, len(others) + 1) for rank in range(len(others) + 1)]
    joined: dict[str, Transfer | str] = {}
    for name, backend in own.items():
        ends = [backend]
        for worker, said in zip(crew.workers, others, strict=True):
            end = said[name]
            ends.append(f"rank {worker.rank}: {end}" if isinstance(end, str) else RemoteEnd(name, end, crew, worker))
        reasons = [end for end in ends if isinstance(end, str)]
        joined[name] = reasons[0] if reasons else RankedTransfer(ends, layouts, crew.settle)  # type: ignore[arg-type]
    return joined


def build_backends(
    config: InstanceConfig, pool: Pool, layout: KVLayout, model_fingerprint: str, secret: bytes | None, rank: int = 0
) -> dict[str, Transfer | str]:
    """Returns: a rank's ends of the backends of --cache-transfer-protocol by name, in its order; of one that cannot be used here, the reason.

    None where there is nobody to exchange with. Raises: ConfigError: not one can be used here; says why of each.
    """
    if config.cluster.scheduler_name == "local":
        return {}
    cache = config.cache
    ports = {"rdma": cache.rdma_comm_ports[rank] if cache.rdma_comm_ports else 0}
    for name in cache.cache_transfer_protocol:
        if name in ("tcp", "nccl", "mooncake"):
            ports[name] = cache.cache_queue_port + rank if cache.cache_queue_port else 0
            break
    else:
        if cache.cache_queue_port:
            log.warning(
                "--cache-queue-port %d is not used: of --cache-transfer-protocol none takes it", cache.cache_queue_port
            )
    if cache.rdma_comm_ports and "rdma" not in cache.cache_transfer_protocol:
        log.warning("--rdma-comm-ports is not used: --cache-transfer-protocol does not name rdma")
    if os.environ.get("KVCACHE_RDMA_NICS") and set(cache.cache_transfer_protocol) <= {"ipc", "nccl", "shm", "tcp"}:
        log.warning("KVCACHE_RDMA_NICS is not used: --cache-transfer-protocol does not name rdma")
    backends: dict[str, Transfer | str] = {}
    for name in config.cache.cache_transfer_protocol:
        try:
            backends[name] = build_transfer(
                name,
                pool=pool,
                layout=layout,
                fingerprint=model_fingerprint,
                host=config.cluster.advertise_host,
                port=ports.get(name, 0),
                secret=secret,
            )
        except TransferUnavailable as error:
            backends[name] = f"not usable on this machine: {error.message}"
            log.warning("--cache-transfer-protocol: %s cannot be used here: %s", name, error.message)
    if all(isinstance(backend, str) for backend in backends.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in backends.items())
        raise ConfigError(f"--cache-transfer-protocol leaves nothing that works here: {reasons}")
    return backends


def redis_options(cluster: ClusterOptions) -> RedisOptions:
    """Returns: where the coordinator is."""
    return RedisOptions(
        host=cluster.scheduler_host,
        port=cluster.scheduler_port,
        db=cluster.scheduler_db,
        username=cluster.scheduler_username,
        password=cluster.scheduler_password,
        tls=cluster.scheduler_tls,
        tls_ca_file=cluster.scheduler_tls_ca_file,
        tls_cert_file=cluster.scheduler_tls_cert_file,
        tls_key_file=cluster.scheduler_tls_key_file,
        topic=cluster.scheduler_topic,
        ttl_s=cluster.scheduler_ttl,
    )
