"""The process of one rank other than 0: computes its part of every step, and moves its part of every block.

Started by rank 0 (crew.py) as `python -m fastdeploy_pd.engine.worker STEPS ORDERS PARENT`: descriptors of two sockets (channel.py) and
the parent's process id. One thread computes, another one serves the ends. It ends with rank 0, whatever ends that.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from fastdeploy_pd.engine.build import attach_pool, build_backends, load_model, pool_layout
from fastdeploy_pd.engine.channel import TIMEOUT_S, Answer, Attach, Call, Channel, Happened, Refusal, Setup
from fastdeploy_pd.engine.context import Step
from fastdeploy_pd.engine.interpreter import share_lock, uncollected
from fastdeploy_pd.engine.lifetime import die_with_parent
from fastdeploy_pd.engine.process_log import configure_process_log
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.model.parallel import Rank
from fastdeploy_pd.model.runner import ModelRunner
from fastdeploy_pd.transfer.base import EpochArrived, Transfer

log = logging.getLogger("fastdeploy_pd.engine")

IDLE_WAIT_S = 0.02  #: no epoch is open
ACTIVE_WAIT_S = 0.0005
FAULT_STATUS = 1
_SETUP, _ATTACH = msgspec.msgpack.Decoder(Setup), msgspec.msgpack.Decoder(Attach)
_CALL = msgspec.msgpack.Decoder(Call)


class Ends:
    """This rank's end of every backend, called by rank 0."""

    def __init__(self, transfers: dict[str, Transfer], orders: Channel) -> None:
        self._transfers, self._orders = transfers, orders
        self._lock = threading.Lock()  # a transfer is called by one thread at a time
        self._held: deque[Call] = deque()  # calls that wait for a layer, and what came after them
        # Step and layer that are in the pool; what is sent before the first step waits for nothing.
        self._reached = (0, sys.maxsize)
        self._steps: deque[Step] = deque()  # that may finish a layer at any moment
        self._active: set[tuple[str, str]] = set()  # (backend, epoch) that may have an event at any moment

    def on_layer(self, step: int, layer: int) -> None:
        """K and V of the step's layers up to this one are in the pool: write what waited for them."""
        with self._lock:
            self._reached = step, layer
            while self._held and (self._held[0].step, self._held[0].layer) <= self._reached:
                self._do(self._held.popleft())

    def watch(self, step: Step) -> None:
        """Ask a step after its layers until it is done."""
        if self._steps or not step.poll():
            self._steps.append(step)

    def serve(self) -> None:
        """Obey and report until rank 0 is gone. Raises: EOFError, ConnectionError: it is."""
        while True:
            data = self._orders.receive(ACTIVE_WAIT_S if self._active or self._steps else IDLE_WAIT_S)
            if data is not None:
                self._obey(_CALL.decode(data))
            while self._steps and self._steps[0].poll():
                self._steps.popleft()
            with self._lock:
                found = [(name, event) for name, transfer in self._transfers.items() for event in transfer.poll()]
                for name, event in found:
                    if not isinstance(event, EpochArrived):
                        self._active.discard((name, event.epoch))
            for name, event in found:
                self._orders.send(msgspec.msgpack.encode(Happened.of(name, event)))

    def _obey(self, call: Call) -> None:
        with self._lock:
            is_due = (call.step, call.layer) <= self._reached
            if call.is_asked or (is_due and not self._held):  # the receiving side waits for nothing of the sending one
                value = self._do(call)
            else:
                self._held.append(call)
        if call.is_asked:
            self._orders.send(msgspec.msgpack.encode(Answer(value)))

    def _do(self, call: Call) -> Any:
        if call.method in ("open_epoch", "start"):
            self._active.add((call.backend, call.arguments[0]))
        elif call.method == "revoke":
            self._active.discard((call.backend, call.arguments[0]))
        return getattr(self._transfers[call.backend], call.method)(*call.arguments)


def prepare(setup: Setup, orders: Channel) -> tuple[ModelRunner, Ends]:
    """Load this rank's part of the model and make its pool and its ends.

    Raises: FastDeployPDError: it cannot be; EOFError: rank 0 is gone.
    """
    rank, config = Rank(setup.rank, setup.num_ranks), setup.config
    runner, max_model_len = load_model(config, rank)
    layout = pool_layout(config, runner.config, max_model_len, rank)
    orders.send(msgspec.msgpack.encode(Answer(layout.num_blocks)))
    agreed = _ATTACH.decode(orders.receive(None) or b"")
    pool = attach_pool(config, runner, replace(layout, num_blocks=agreed.num_blocks), max_model_len)
    orders.send(msgspec.msgpack.encode(Answer()))
    runner.join(Path(setup.group))
    backends = build_backends(config, pool, pool.layout, agreed.fingerprint, config.cluster.secret, rank.index)
    transfers = {name: backend for name, backend in backends.items() if not isinstance(backend, str)}
    said = {name: b if isinstance(b, str) else b.descriptor() for name, b in backends.items()}
    orders.send(msgspec.msgpack.encode(Answer(said)))
    return runner, Ends(transfers, orders)


def follow(runner: ModelRunner, ends: Ends, steps: Channel) -> None:
    """Compute what rank 0 computes. Raises: EOFError, ConnectionError: it is gone."""
    number = 0
    while (data := steps.receive(None)) is not None:
        number += 1
        step = runner.follow(data, partial(ends.on_layer, number))
        if step is not None:
            ends.watch(step)


def serve_ends(ends: Ends) -> None:
    """A thread's whole life; the other one may wait in a sum, so the process ends from here."""
    try:
        ends.serve()
    except (EOFError, ConnectionError) as error:
        log.info("rank 0 is gone (%s)", error)
        os._exit(0)


def end_by_fault(found: threading.ExceptHookArgs) -> None:
    """A thread has failed: the process is of no use any more, and rank 0 sees its end."""
    log.critical("a thread failed", exc_info=found.exc_value)
    logging.shutdown()
    os._exit(FAULT_STATUS)


def main() -> int:
    """Returns: the process's exit status."""
    die_with_parent(int(sys.argv[3]))
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's are for the whole group: rank 0 decides
        signal.signal(number, signal.SIG_IGN)
    threading.excepthook = end_by_fault
    share_lock()  # between the ends' threads, the one that serves them and the one that computes
    steps, orders = (Channel(socket.socket(fileno=int(number))) for number in sys.argv[1:3])
    setup = _SETUP.decode(orders.receive(TIMEOUT_S) or b"")
    try:
        configure_process_log(setup.config.server.log_dir, f"rank-{setup.rank}")
        with uncollected():
            runner, ends = prepare(setup, orders)
        threading.Thread(target=serve_ends, args=(ends,), name="ends", daemon=True).start()
        follow(runner, ends, steps)
    except FastDeployPDError as error:
        with suppress(OSError):  # rank 0 may have refused the same, and left
            orders.send(msgspec.msgpack.encode(Refusal(error.message)))
        return 2
    except (EOFError, ConnectionError) as error:
        log.info("rank 0 is gone (%s)", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
