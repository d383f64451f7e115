"""Rank 0's hold on the other ranks of its instance: it starts them, tells them each step, and has them move their parts of blocks.

A worker that ends, or does not answer, ends the instance at once, as a kill would: part of a model serves nobody. The others see links
end and leases lapse; the API process starts the engine again. Workers end with the engine (engine/lifetime.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.engine.channel import TIMEOUT_S, Answer, Attach, Call, Channel, Happened, Refusal, Setup
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.ops.environment import no_gpu
from fastdeploy_pd.transfer.base import TransferEvent
from rdma_comm.cuda.driver import CudaError, CudaUnavailable, num_gpus

log = logging.getLogger("fastdeploy_pd.engine")

START_TIMEOUT_S = 600.0  # for a worker to load its part of a model
ENDING_S = 1.0  # between the end of a process's connections and its own
LOST_STATUS = 3  # of an engine whose worker was lost
_TOLD = msgspec.msgpack.Decoder(Answer | Happened | Refusal)
OnLayer = Callable[[int], None]


def end_instance(reason: str) -> NoReturn:
    """End this process now, whatever its threads wait for."""
    log.critical("%s: the instance ends", reason)
    logging.shutdown()
    os._exit(LOST_STATUS)


class Worker:
    """One other rank's process."""

    def __init__(self, setup: Setup, env: dict[str, str]) -> None:
        self.rank = setup.rank
        (own_steps, steps), (own_orders, orders) = socket.socketpair(), socket.socketpair()
        command = [sys.executable, "-m", "fastdeploy_pd.engine.worker"]
        command += [str(steps.fileno()), str(orders.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, pass_fds=(steps.fileno(), orders.fileno())
        )
        steps.close()
        orders.close()
        self._steps, self._orders = Channel(own_steps), Channel(own_orders)
        self._orders.send(msgspec.msgpack.encode(setup))
        self._num_unanswered = 0
        self._answer: Any = None
        self._events: dict[str, list[TransferEvent]] = {}

    # the start

    def first_answer(self) -> Any:
        """Returns: what the worker says next. Raises: ConfigError: it cannot start; says why."""
        try:
            data = self._orders.receive(START_TIMEOUT_S)
            if data is None:
                raise ConfigError(f"rank {self.rank} was not ready within {START_TIMEOUT_S:g} s; its log says more")
            told = _TOLD.decode(data)
        except (EOFError, OSError) as error:
            status = self._process.wait(TIMEOUT_S)
            raise ConfigError(
                f"rank {self.rank} ended with status {status} before it was ready; its log says why"
            ) from error
        if isinstance(told, Refusal):
            raise ConfigError(f"rank {self.rank}: {told.message}")
        assert isinstance(told, Answer)
        return told.value

    def attach(self, message: Attach) -> None:
        """Tell what was agreed on. Raises: ConfigError: the worker is gone."""
        try:
            self._orders.send(msgspec.msgpack.encode(message))
        except OSError as error:
            raise ConfigError(f"rank {self.rank} ended before it was ready; its log says why") from error

    def watch(self) -> None:
        """From now on the instance ends with this worker."""

        def wait() -> None:
            status = self._process.wait()
            if status:  # 0: it has seen us leave
                self._lost()

        threading.Thread(target=wait, name=f"rank-{self.rank}", daemon=True).start()

    # serving

    def announce(self, data: bytes) -> None:
        """Send a step."""
        self._send(self._steps, data)

    def call(self, call: Call) -> None:
        """Have a method called; `settle` waits for the answer where one was asked for."""
        self._listen()  # a worker whose events nobody takes would take no calls
        self._num_unanswered += call.is_asked
        self._send(self._orders, msgspec.msgpack.encode(call))

    def settle(self) -> Any:
        """Returns: the last answer, when all have come."""
        while self._num_unanswered:
            self._hear(TIMEOUT_S)
        return self._answer

    def events(self, backend: str) -> list[TransferEvent]:
        """Returns: what has happened at an end since the last call."""
        self._listen()
        return self._events.pop(backend, [])

    def _listen(self) -> None:
        while self._hear(0.0):
            pass

    def _send(self, channel: Channel, data: bytes) -> None:
        try:
            channel.send(data)
        except OSError as error:
            self._lost(f"takes no messages ({error})")

    def _lost(self, why: str = "") -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):  # whoever notices first: the same is said
            why = f"ended with status {self._process.wait(ENDING_S)}"
        end_instance(f"rank {self.rank} (process {self._process.pid}) {why}")

    def _hear(self, timeout_s: float) -> bool:
        """Returns: whether there was a message."""
        try:
            data = self._orders.receive(timeout_s)
        except (EOFError, OSError) as error:
            self._lost(f"is gone ({error})")
        if data is None:
            if timeout_s:
                self._lost(f"has not answered for {timeout_s:g} s")
            return False
        told = _TOLD.decode(data)
        if isinstance(told, Happened):
            self._events.setdefault(told.backend, []).append(told.event())
        elif isinstance(told, Answer):
            self._num_unanswered -= 1
            self._answer = told.value
        return True


class Crew:
    """Ranks 1 and up."""

    def __init__(self, config: InstanceConfig) -> None:
        """Start them; they load the model while this process does."""
        count = config.model.tensor_parallel_size
        self._directory = tempfile.TemporaryDirectory(prefix="fastdeploy-pd-ranks-", dir=os.environ.get("FD_RUN_DIR"))
        self.group = Path(self._directory.name) / "group"
        self.workers = [
            Worker(Setup(rank, count, config, str(self.group)), _environment(config, rank)) for rank in range(1, count)
        ]
        self._step = 0
        self.handing_over = 0  #: the step whose layers are being handed over

    def num_blocks(self) -> list[int]:
        """Returns: how many blocks each has room for. Raises: ConfigError: one cannot start; says why."""
        return [worker.first_answer() for worker in self.workers]

    def attach(self, num_blocks: int, fingerprint: str) -> None:
        """Tell them how many blocks all take. When it returns they have their pools and wait for rank 0 to join the group.

        Raises: as num_blocks.
        """
        for worker in self.workers:
            worker.attach(Attach(num_blocks, fingerprint))
        for worker in self.workers:
            worker.first_answer()

    def descriptors(self) -> list[dict[str, dict[str, Any] | str]]:
        """Returns: each rank's ends by backend; of one that cannot be used, the reason. Raises: as num_blocks."""
        found = [worker.first_answer() for worker in self.workers]
        self._directory.cleanup()  # they have found each other
        for worker in self.workers:
            worker.watch()
        return found

    def announce(self, data: bytes, on_layer: OnLayer | None) -> OnLayer | None:
        """Have the others compute a step (model/parallel.py).

        Returns: what to call instead of on_layer: writes of layers that are ordered in it wait for each rank's own.
        """
        self._step += 1
        step = self._step
        for worker in self.workers:
            worker.announce(data)
        if on_layer is None:
            return None

        def at_step(layer: int) -> None:
            self.handing_over = step
            on_layer(layer)

        return at_step

    def settle(self) -> None:
        """Return when all ranks have done what they were asked to."""
        for worker in self.workers:
            worker.settle()


class RemoteEnd:
    """Another rank's end of a backend; see transfer/base.py. What is asked for is done when `Crew.settle` returns."""

    def __init__(self, name: str, descriptor: dict[str, Any], crew: Crew, worker: Worker) -> None:
        self.name = name
        self._descriptor, self._crew, self._worker = descriptor, crew, worker
        self._reached: dict[str, str] = {}  # by descriptor: it stays as it is

    def descriptor(self) -> dict[str, Any]:
        """See base."""
        return self._descriptor

    def reaches(self, peer: dict[str, Any]) -> str:
        """See base."""
        key = str(peer)
        if key not in self._reached:
            if len(self._reached) >= 1024:
                self._reached.clear()
            self._worker.settle()
            self._call("reaches", peer, is_asked=True)
            self._reached[key] = self._worker.settle()
        return self._reached[key]

    def open_epoch(self, epoch: str, block_ids: Sequence[int], nonce: int, parts: int = 1) -> None:
        """See base."""
        self._call("open_epoch", epoch, block_ids, nonce, parts, is_asked=True)

    def revoke(self, epoch: str) -> None:
        """See base."""
        self._call("revoke", epoch, is_asked=True)

    def start(
        self, epoch: str, nonce: int, peer: dict[str, Any], remote_block_ids: Sequence[int], parts: int = 1
    ) -> None:
        """See base."""
        self._call("start", epoch, nonce, peer, remote_block_ids, parts)

    def write(
        self, epoch: str, layers: Sequence[int], local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """See base. To be called while this rank hands over the layers: the other waits for its own."""
        arguments = [epoch, list(layers), local_block_ids, remote_block_ids]
        self._worker.call(Call(self.name, "write", arguments, self._crew.handing_over, layers[-1]))

    def finish(self, epoch: str) -> None:
        """See base."""
        self._call("finish", epoch)

    def cancel(self, epoch: str) -> None:
        """See base."""
        self._call("cancel", epoch)

    def poll(self) -> list[TransferEvent]:
        """See base."""
        return self._worker.events(self.name)

    def close(self) -> None:
        """See base."""
        self._call("close")

    def _call(self, method: str, *arguments: Any, is_asked: bool = False) -> None:
        self._worker.call(Call(self.name, method, list(arguments), is_asked=is_asked))


def visible_gpus(device: str) -> list[str]:
    """Returns: what CUDA_VISIBLE_DEVICES calls the GPUs that this process sees. Raises: ConfigError: there is none; says why."""
    try:
        count = num_gpus()
    except (CudaUnavailable, CudaError) as error:
        raise no_gpu(device, error) from error
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def _environment(config: InstanceConfig, rank: int) -> dict[str, str]:
    """A worker's: rank 0 computes on the first GPU that it sees, and each rank sees its own first."""
    env = dict(os.environ)
    if config.model.device != "cpu":
        names = visible_gpus(config.model.device)
        if len(names) < config.model.tensor_parallel_size:
            raise ConfigError(
                f"--tensor-parallel-size is {config.model.tensor_parallel_size}; GPUs that this process sees: {len(names)} "
                f"({','.join(names)}); see CUDA_VISIBLE_DEVICES"
            )
        env["CUDA_VISIBLE_DEVICES"] = ",".join([*names[rank:], *names[:rank]])
    return env
