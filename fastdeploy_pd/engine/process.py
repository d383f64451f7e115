"""The engine's process: owns sockets, signals and the lease; feeds the `Engine` machine and sends what it wants sent.

Started by the API server as `python -m fastdeploy_pd.engine.process FLAGS` with the instance's own flags and, in the environment,
the instance's run directory (FD_RUN_DIR), its HTTP address (FD_HTTP_ADDRESS) and who started it (FD_PARENT_PID). When it is ready it
writes `engine.json` there, and `engine.draining` when it has begun to drain: no other one is started in its place.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from fastdeploy_pd.cluster.links import Links, PeerLost, PeerUp
from fastdeploy_pd.cluster.messages import Command, Peer
from fastdeploy_pd.cluster.registry import LEASE_S, HeartbeatThread, MemberRecord, RedisRegistry
from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.core.elastic import ElasticOptions
from fastdeploy_pd.engine.build import BuiltEngine, build_engine, redis_options
from fastdeploy_pd.engine.elastic import ElasticThread
from fastdeploy_pd.engine.interpreter import keep, share_lock, uncollected
from fastdeploy_pd.engine.lifetime import PARENT_PID, die_with_parent
from fastdeploy_pd.engine.outbox import Connect
from fastdeploy_pd.engine.process_log import configure_process_log
from fastdeploy_pd.engine.profile import load_predictor
from fastdeploy_pd.engine.publish import start_publisher
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.observe.metrics import EngineMetrics, enable_multiprocess

log = logging.getLogger("fastdeploy_pd.engine")

IDLE_WAIT_S = 0.02  #: nothing to compute and nothing on the wire
ACTIVE_WAIT_S = 0.0002  #: a step in flight or a transfer may end at any moment
RECORD_S = 0.1
HUNG_STEP_S = 20.0  #: a step that takes longer stops the lease
DRAIN_S = 30.0  #: how long SIGTERM waits for requests to end


class EngineShell:
    """Runs one engine until it is told to stop."""

    def __init__(self, config: InstanceConfig, built: BuiltEngine, links: Links, metrics: EngineMetrics) -> None:
        self.config = config
        self.built = built
        self.engine = built.engine
        self.links = links
        self.metrics = metrics
        self.on_change: Callable[[], None] = lambda: None  #: called when role or draining has changed
        self._clock = built.engine.clock
        self._last_counter, self._last_turn_s = -1, self._clock.now_s()
        self._record: MemberRecord | None = None
        self._told = (built.engine.role, False)
        self._commands: SimpleQueue[tuple[Peer, Command]] = SimpleQueue()
        self._record_s = 0.0
        self._is_preparing = False

    def request_stop(self, is_gentle: bool) -> None:
        """Stop: at once, or when what is being served has ended (at most DRAIN_S later).

        Called between any two instructions of the loop, by a signal: it takes no lock, such as that of the metrics.
        """
        self.engine.drain(DRAIN_S if is_gentle else 0.0)
        self._refresh_record()

    def tell(self, peer: Peer, command: Command) -> None:
        """Have the loop send a command, or obey it. From any thread."""
        self._commands.put((peer, command))

    def record(self) -> MemberRecord | None:
        """The member record as of the last turn, for the heartbeat thread; None when loop or device stand still: no lease for the hung."""
        if self._clock.now_s() - self._last_turn_s > HUNG_STEP_S:
            return None
        return self._record

    def run(self) -> None:
        """Turn until stopped."""
        self._refresh_record()
        self._observe_state()
        while not self._is_over():
            self._turn()

    def _is_over(self) -> bool:
        return self.engine.is_drained or self._clock.now_s() >= self.engine.stop_at_s

    def _turn(self) -> None:
        engine = self.engine
        for sender_id, item in self.links.receive(self._wait_s()):
            if isinstance(item, PeerLost):
                if not item.why_refused:  # else `Links` has said so, once: it is called again and again
                    log.info("link to %s ended", sender_id)
                engine.peer_lost(sender_id)
            elif not isinstance(item, PeerUp):
                engine.receive(sender_id, item)
        while not self._commands.empty():
            peer, command = self._commands.get_nowait()
            if peer.instance_id == self.built.instance_id:
                engine.receive(peer.instance_id, command)
            else:
                engine.context.outbox.connect(peer)
                engine.context.outbox.send(peer.instance_id, command)
        report = engine.step()
        for action in engine.take_actions():
            if isinstance(action, Connect):
                self.links.connect(action.peer.instance_id, action.peer.address)
            else:
                self.links.send(action.peer_id, action.message)
        now_s = self._clock.now_s()
        if engine.counter != self._last_counter:
            self._last_counter, self._last_turn_s = engine.counter, now_s
        if (engine.role, engine.is_draining) != self._told:
            self._told = (engine.role, engine.is_draining)
            log.info("%s is %s%s now", self.built.instance_id, engine.role, ", draining," if engine.is_draining else "")
            self._refresh_record()
            self.on_change()
        if now_s - self._record_s > RECORD_S:
            self._refresh_record()
            self._observe_state()
            keep()
        if report.num_tokens:
            self.metrics.observe_step(report.num_tokens, report.step_s, self.engine.context.scheduler)
        if report.observation is not None:
            self.metrics.observe_prediction(report.observation.kind, report.observation.relative_error)
        self._is_preparing = engine.prepare()

    def _wait_s(self) -> float:
        engine = self.engine
        if self._is_preparing or (engine.has_work and engine.has_moved):
            return 0.0
        return IDLE_WAIT_S if engine.is_idle else ACTIVE_WAIT_S

    def _refresh_record(self) -> None:
        self._record_s = self._clock.now_s()
        self._record = self.built.member_record(
            self.config, os.environ.get("FD_HTTP_ADDRESS", ""), self.links.addresses[0]
        )

    def _observe_state(self) -> None:
        scheduler = self.engine.context.scheduler
        num_waiting = len(scheduler.waiting) + len(self.engine.decode.queued)
        self.metrics.observe_state(len(scheduler.running), num_waiting, scheduler.pool.counts())


def bind_endpoints(config: InstanceConfig, run_dir: Path) -> list[str]:
    """Returns: the endpoints of the links socket: TCP first (it is announced), unless the instance serves nobody else."""
    if config.cluster.scheduler_name == "local":
        port = config.cluster.engine_worker_queue_port
        return [f"tcp://127.0.0.1:{port}"] if port else [f"ipc://{run_dir}/engine.sock"]
    return [f"tcp://{config.cluster.advertise_host}:{config.cluster.pd_comm_port or '*'}"]


def announce(run_dir: Path, built: BuiltEngine, links: Links) -> None:
    """Tell the API processes, which wait for this file."""
    facts = {
        "instance_id": built.instance_id,
        "links_address": links.addresses[0],
        "max_model_len": built.max_model_len,
        "fingerprint": built.fingerprint,
        "num_blocks": built.layout.num_blocks,
        "pid": os.getpid(),
    }
    part = run_dir / "engine.json.part"
    part.write_text(json.dumps(facts))
    part.replace(run_dir / "engine.json")


def serve(config: InstanceConfig, run_dir: Path) -> None:
    """Build the engine, announce it, run it, leave."""
    share_lock()
    secret = config.cluster.secret
    metrics = EngineMetrics(config.model.served_model_name[0], config.cluster.splitwise_role)
    with uncollected():
        built = build_engine(config, metrics, secret)
    built.engine.start_from(load_predictor(config, built.fingerprint))
    links = Links(built.instance_id, bind_endpoints(config, run_dir), secret=secret)
    shell = EngineShell(config, built, links, metrics)
    signal.signal(signal.SIGTERM, lambda *_: shell.request_stop(is_gentle=True))
    signal.signal(signal.SIGINT, lambda *_: shell.request_stop(is_gentle=False))
    heartbeat = elastic = None
    if config.cluster.elastic != "off":
        options = ElasticOptions(config.cluster.elastic_cooldown)
        registry = RedisRegistry(redis_options(config.cluster))
        elastic = ElasticThread(registry, shell.record, shell.tell, options, built.engine.clock)
        elastic.start()
    if config.cluster.scheduler_name != "local":
        shell._refresh_record()
        heartbeat = HeartbeatThread(
            RedisRegistry(redis_options(config.cluster), max(LEASE_S, config.cluster.peer_timeout / 5)), shell.record
        )
        heartbeat.start()

    def on_change() -> None:
        if built.engine.is_draining:
            (run_dir / "engine.draining").touch()
        if heartbeat is not None:
            heartbeat.wake()

    shell.on_change = on_change
    announce(run_dir, built, links)
    publisher = start_publisher(config, built)
    log.info("%s serves %s with %d KV blocks", built.instance_id, config.model.model, built.layout.num_blocks)
    try:
        shell.run()
    finally:
        (run_dir / "engine.json").unlink(missing_ok=True)
        for thread in (elastic, heartbeat, publisher):
            if thread is not None:
                thread.stop()
        links.close()
        for transfer in built.engine.context.transfers.values():
            transfer.close()


def main() -> int:
    """Returns: the process's exit status."""
    die_with_parent(int(os.environ[PARENT_PID]))
    # A terminal's is for the whole group: until this process serves, the API process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_dir = Path(os.environ["FD_RUN_DIR"])
    enable_multiprocess(run_dir / "metrics")
    try:
        config = InstanceConfig.from_args(sys.argv[1:], dict(os.environ))
        configure_process_log(config.server.log_dir, "engine")
        serve(config, run_dir)
        if config.model.tensor_parallel_size > 1:
            logging.shutdown()
            os._exit(0)  # at the interpreter's end NCCL would wait a minute for ranks that wait for this one
    except FastDeployPDError as error:
        (run_dir / "engine.error").write_text(error.message)  # the API process says it
        return 2
    except Exception:
        log.exception("the engine ends by a defect, of its own or of a policy or transfer that was added to it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
