"""Instances of a simulated cluster that die, and what becomes of their requests: what front ends and engines make of it (docs/life_of_a_request.md).

Who dies loses its blocks, its prefix cache, its step and what it has not sent. The requests that it generated for, or computed the prompt
of, are placed again DETECTION_S later, attempt + 1, with the tokens that their clients have as part of what is computed; where another
instance held blocks for them these are free. Bytes that have left a prefill instance arrive. One that decode has not ordered yet is
placed again when it would have been. While nobody can decode requests wait, PLACEMENT_TIMEOUT_S at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Phase, Request
from fastdeploy_pd.sim.cluster import Cluster, Record, Served
from fastdeploy_pd.sim.instance import Instance

DETECTION_S = 0.002  #: from a death to when its requests are placed again: the link's end comes so soon after a kill
PLACEMENT_TIMEOUT_S = 30.0  #: as engine.frontend.FrontEndOptions has it
MAX_LOST_INSTANCES = 6  #: likewise: a request that has seen so many die fails


@dataclass(frozen=True, slots=True, order=True)
class Failure:
    """An instance dies."""

    at_s: float
    index: int  #: of the instance, in the layout
    down_s: float | None = None  #: until it is back, empty; None: it never is


def parse(texts: Iterable[str], num_instances: int) -> list[Failure]:
    """Returns: what --fail says, by time. Raises: ConfigError: one is no failure, or of an instance that is not there."""
    found = []
    for text in (t for several in texts for t in several.split(",")):
        match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+)(?::(\d+(?:\.\d+)?))?", text)
        if not match:
            raise ConfigError(
                f"--fail {text}: it must be TIME:INSTANCE or TIME:INSTANCE:SECONDS, as in 60:2 or 60:2:30"
            )
        failure = Failure(float(match[1]), int(match[2]), float(match[3]) if match[3] else None)
        if failure.index >= num_instances:
            raise ConfigError(f"--fail {text}: the instance is {match[2]}; it must be from 0 to {num_instances - 1}")
        if failure.down_s == 0:
            raise ConfigError(f"--fail {text}: SECONDS is {match[3]}; it must be above 0")
        found.append(failure)
    check(found)
    return sorted(found, key=lambda f: (f.at_s, f.index))


def check(failures: Iterable[Failure]) -> None:
    """Raises: ConfigError: an instance dies that is down."""
    last: dict[int, Failure] = {}
    for f in sorted(failures, key=lambda f: (f.at_s, f.index)):
        before = last.get(f.index)
        if before is not None and (before.down_s is None or f.at_s < before.at_s + before.down_s):
            until = "for good" if before.down_s is None else f"until {before.at_s + before.down_s:g}"
            raise ConfigError(
                f"--fail {f.at_s:g}:{f.index}: instance {f.index} is down from {before.at_s:g} {until}; it must be up"
            )
        last[f.index] = f


class Failures:
    """Lets instances of a cluster die and come back while it runs."""

    def __init__(self, cluster: Cluster, failures: Sequence[Failure]) -> None:
        """
        Args:
            cluster: one that places requests when they arrive, before its `run`.
            failures: as `check` wants them.
        """
        self._cluster = cluster
        self._failures = failures
        self._num_moved = [0] * len(failures)
        self._unplaced: dict[Request, Record] = {}  # nobody decodes
        self._timed: set[Request] = set()  # that wait, or have waited, for an instance
        cluster.on_unplaced, cluster.on_lost = self._wait, self._give_back
        for number, failure in enumerate(failures):
            instance = cluster.instances[failure.index]
            cluster.at(failure.at_s, partial(self._die, number, instance))
            if failure.down_s is not None:
                cluster.at(failure.at_s + failure.down_s, partial(self._return, instance))

    def rows(self) -> list[dict[str, Any]]:
        """Returns: what the report says of each failure: instance, at, until (None: it never came back), requests moved."""
        ids = [self._cluster.instances[f.index].instance_id for f in self._failures]
        return [
            {"instance": i, "at": f.at_s, "until": None if f.down_s is None else f.at_s + f.down_s, "moved": num}
            for i, f, num in zip(ids, self._failures, self._num_moved, strict=True)
        ]

    def _die(self, number: int, dead: Instance, now_s: float) -> None:
        cluster, moved, touched = self._cluster, [], set()
        dead.catch_up(now_s)
        for served in cluster.served():
            prefill, order = served.prefill, served.order
            if served.decode is dead:
                moved.append(served)
                if prefill is not None:
                    touched.add(prefill)
            elif prefill is dead and order is None:
                served.lost_by = number
            elif prefill is dead and order is not None and order.phase is not Phase.FINISHED:
                if served.sent_s <= now_s:
                    served.pinned = []
                else:
                    moved.append(served)
                    touched.add(served.decode)
        others = sorted(touched - {dead}, key=lambda i: i.index)
        for instance in others:
            cluster.interrupt(instance, now_s)
        for served in moved:
            self._withdraw(served, dead, now_s)
            self._move(number, served, now_s)
        cluster.remove(dead)
        dead.lose(now_s)
        for instance in others:
            cluster.go_on(instance, now_s)

    def _return(self, instance: Instance, now_s: float) -> None:
        self._cluster.add(instance)
        waiting, self._unplaced = self._unplaced, {}
        for request, record in waiting.items():
            self._cluster.place(record, request, now_s)

    def _withdraw(self, served: Served, dead: Instance, now_s: float) -> None:
        """Let the instances that live forget a request's prompt."""
        cluster, order, prefill = self._cluster, served.order, served.prefill
        if prefill is None or order is None or order.phase is Phase.FINISHED:
            return
        if order.phase is Phase.TRANSFERRING:
            cluster.take_off_link(served)
            if prefill is not dead:
                prefill.scheduler.pool.release(served.pinned)
        elif prefill is not dead:
            prefill.drop(order)
        if served.decode is not dead:
            cluster.end_order(served)

    def _give_back(self, served: Served, now_s: float) -> None:
        """Decode has room for a prompt, whose prefill instance has died meanwhile."""
        assert served.lost_by is not None
        served.decode.scheduler.release_blocks(served.request)
        self._move(served.lost_by, served, now_s)

    def _move(self, number: int, served: Served, now_s: float) -> None:
        """Let a request go on elsewhere, with what its client has."""
        request, order, record = served.request, served.order, served.record
        self._cluster.forget(served)
        self._num_moved[number] += 1
        record.num_lost += 1
        record.num_preemptions += request.local.num_preemptions
        latest = order if order is not None and order.phase is not Phase.FINISHED else request
        again = Request(
            request.request_id,
            request.prompt_token_ids,
            request.sampling,
            attempt=request.attempt + 1,
            output_token_ids=list(latest.output_token_ids),
            slo=request.slo,
            arrival_s=request.arrival_s,
        )
        again.local.block_hashes = request.local.block_hashes
        if self._cluster.is_complete(again):  # the prompt's token was all, and its blocks are needed no more
            record.end_s = record.first_token_s
        elif record.num_lost >= MAX_LOST_INSTANCES:
            self._fail(record, now_s)
        else:
            self._cluster.at(now_s + DETECTION_S, partial(self._cluster.place, record, again))

    def _wait(self, record: Record, request: Request, now_s: float) -> None:
        self._unplaced[request] = record
        if request not in self._timed:
            self._timed.add(request)
            self._cluster.at(now_s + PLACEMENT_TIMEOUT_S, partial(self._give_up, request))

    def _give_up(self, request: Request, now_s: float) -> None:
        record = self._unplaced.pop(request, None)
        if record is not None:
            self._fail(record, now_s)

    def _fail(self, record: Record, now_s: float) -> None:
        record.is_failed, record.end_s = True, now_s


def table(found: dict[str, Any]) -> str:
    """Returns: the report's failures for a person."""
    lines = ["failure        at s     until s  requests moved"]
    for f in found["failures"]:
        until = "-" if f["until"] is None else f"{f['until']:.2f}"
        lines.append(f"{f['instance']:9}{f['at']:>10.2f}{until:>12}{f['moved']:>16}")
    return "\n".join([*lines, f"failed for good: {found['failed']}"])
