"""Prometheus metrics of an instance: one engine process and its API processes, shown together by any of them.

Names are vLLM's where they mean the same, with the prefix `fastdeploy_pd:`. The processes share memory-mapped files in a directory of
their own (prometheus_client's multiprocess mode), which must be named before anything is measured: `enable_multiprocess`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", "")

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    values,
)

from fastdeploy_pd.core.blocks import BlockCounts
from fastdeploy_pd.core.scheduler import Scheduler

log = logging.getLogger("fastdeploy_pd.engine")

PREFIX = "fastdeploy_pd:"
MAX_LOGGED = 1024  # pairs whose slower way was logged
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
STAGE_BUCKETS_S = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.0125,
    0.015,
    0.02,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    10,
)
ERROR_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def enable_multiprocess(directory: Path) -> None:
    """Keep this process's measurements in files of this directory; call it before any metric is made."""
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]


def render() -> tuple[bytes, str]:
    """Returns: (body, content type) of /metrics: all processes of the instance together."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=os.environ["PROMETHEUS_MULTIPROC_DIR"])  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _name(name: str) -> str:
    return PREFIX + name


class EngineMetrics:
    """What the engine process measures."""

    def __init__(self, model_name: str, role: str) -> None:
        registry = CollectorRegistry()
        labels, given = ["model_name", "role"], (model_name, role)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(_name(name), text, labels, registry=registry, multiprocess_mode="mostrecent").labels(*given)

        def counter(name: str, text: str) -> Counter:
            return Counter(_name(name), text, labels, registry=registry).labels(*given)

        self._running = gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = gauge("num_requests_waiting", "Requests waiting to be scheduled.")
        self._usage = gauge("kv_cache_usage_perc", "Share of KV blocks that are held, 0 to 1.")
        self._free = gauge("kv_blocks_free", "KV blocks nobody holds.")
        self._cached = gauge("kv_blocks_cached", "KV blocks that can be found by their content.")
        self._preemptions = counter("num_preemptions", "Requests that gave their blocks up to be computed again.")
        self._queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self._swapped = counter("prefix_cache_swap_hits", "Of them, brought back from host memory (--swap-space).")
        self._computed = counter("computed_tokens", "Tokens computed, of prompts and of outputs.")
        self._step_tokens = Histogram(
            _name("iteration_tokens_total"), "Tokens of a step.", labels, registry=registry, buckets=STEP_BUCKETS
        ).labels(*given)
        self._step_s = Histogram(
            _name("step_seconds"), "Duration of a step.", labels, registry=registry, buckets=STAGE_BUCKETS_S
        ).labels(*given)
        errors = Histogram(
            _name("predictor_relative_error"),
            "Difference between a step's duration and its prediction, in durations.",
            [*labels, "kind"],
            registry=registry,
            buckets=ERROR_BUCKETS,
        )
        self._errors = {kind: errors.labels(*given, kind) for kind in ("prefill", "decode")}
        self._stage = Histogram(
            _name("handover_stage_seconds"),
            "Duration of a hand-over's stages.",
            ["stage"],
            registry=registry,
            buckets=STAGE_BUCKETS_S,
        )
        self._bytes = Counter(
            _name("handover_bytes"), "KV bytes received and verified.", ["backend"], registry=registry
        )
        self._failures = Counter(_name("handover_failures"), "Hand-overs given up.", ["reason"], registry=registry)
        self._fallbacks = Counter(
            _name("handover_fallbacks"),
            "Hand-overs on another backend than the first of --cache-transfer-protocol.",
            ["backend"],
            registry=registry,
        )
        self._fetched_tokens = counter("prefix_fetched_tokens", "Tokens fetched from a peer's prefix cache.")
        self._fetched_bytes = counter("prefix_fetched_bytes", "KV bytes of them, verified.")
        self._fetch_failures = Counter(
            _name("prefix_fetch_failures"), "Fetches given up.", ["reason"], registry=registry
        )
        self._policy_failures = counter("prefill_policy_failures", "Steps that a user's policy did not order.")
        self._fallen: set[tuple[str, str]] = set()  # (peer, backend) that the log has
        self._last = {"preemptions": 0, "queries": 0, "hits": 0, "swap_hits": 0}

    def observe_state(self, num_running: int, num_waiting: int, blocks: BlockCounts) -> None:
        """Record how things stand now."""
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._usage.set(blocks.held / (blocks.held + blocks.free))
        self._free.set(blocks.free)
        self._cached.set(blocks.cached)

    def observe_step(self, num_tokens: int, step_s: float, scheduler: Scheduler) -> None:
        """Record a step."""
        self._computed.inc(num_tokens)
        self._step_tokens.observe(num_tokens)
        self._step_s.observe(step_s)
        for name, counter, value in (
            ("preemptions", self._preemptions, scheduler.num_preemptions),
            ("queries", self._queries, scheduler.num_prefix_queries),
            ("hits", self._hits, scheduler.num_prefix_hits),
            ("swap_hits", self._swapped, scheduler.num_swap_hits),
        ):
            if value != self._last[name]:
                counter.inc(value - self._last[name])
                self._last[name] = value

    def observe_prediction(self, kind: str, relative_error: float) -> None:
        """Record how far a step's prediction was off; `kind` is what most of the step was."""
        self._errors[kind].observe(relative_error)

    def handover(self, stages: Mapping[str, float], num_bytes: int, backend: str) -> None:
        """Record a verified hand-over."""
        for stage, seconds in stages.items():
            self._stage.labels(stage).observe(max(0.0, seconds))
        self._bytes.labels(backend).inc(num_bytes)

    def handover_failed(self, reason: str) -> None:
        """Record a hand-over that was given up."""
        self._failures.labels(reason).inc()

    def fetched(self, num_tokens: int, num_bytes: int, seconds: float) -> None:
        """Record a verified fetch from a peer's prefix cache."""
        self._fetched_tokens.inc(num_tokens)
        self._fetched_bytes.inc(num_bytes)
        self._stage.labels("fetch").observe(seconds)

    def fetch_failed(self, reason: str) -> None:
        """Record a fetch that was given up."""
        self._fetch_failures.labels(reason).inc()

    def fell_back(self, peer_id: str, backend: str, passed_over: Sequence[str]) -> None:
        """Record a hand-over that takes a slower way; log it once a pair."""
        self._fallbacks.labels(backend).inc()
        if (peer_id, backend) not in self._fallen and len(self._fallen) < MAX_LOGGED:
            self._fallen.add((peer_id, backend))
            log.warning(
                "hand-overs to %s go by %s, not by what is preferred (%s)", peer_id, backend, "; ".join(passed_over)
            )

    def no_backend(self, peer_id: str, reason: str) -> None:
        """Log once a pair that it cannot hand over at all."""
        if (peer_id, "") not in self._fallen and len(self._fallen) < MAX_LOGGED:
            self._fallen.add((peer_id, ""))
            log.warning("no KV cache can be handed to %s, so its prompts are computed without us: %s", peer_id, reason)

    def policy_failed(self) -> None:
        """Record a step that a user's prefill policy failed to order."""
        self._policy_failures.inc()


class FrontEndMetrics:
    """What an API process measures."""

    def __init__(self, model_name: str) -> None:
        registry = CollectorRegistry()
        labels, given = ["model_name"], (model_name,)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(_name(name), text, labels, registry=registry, buckets=buckets).labels(*given)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", LATENCY_BUCKETS_S)
        self._tpot = histogram("time_per_output_token_seconds", "Mean time per token after the first.", TOKEN_BUCKETS_S)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", LATENCY_BUCKETS_S)
        self._prompt = Counter(
            _name("prompt_tokens"), "Prompt tokens of ended requests.", labels, registry=registry
        ).labels(*given)
        self._generated = Counter(
            _name("generation_tokens"), "Tokens sent to clients.", labels, registry=registry
        ).labels(*given)
        self._ended = Counter(
            _name("request_success"), "Ended requests.", ["model_name", "finished_reason"], registry=registry
        )
        self._retried = Counter(_name("requests_retried"), "Requests placed again.", ["reason"], registry=registry)
        self._model_name = model_name

    def ended(self, reason: str, num_prompt: int, num_output: int, ttft_s: float | None, e2e_s: float) -> None:
        """Record a request's end.

        Args:
            reason: finish reason, "abort" or "error".
            ttft_s: seconds to the first token; None if there was none.
        """
        self._ended.labels(self._model_name, reason).inc()
        self._prompt.inc(num_prompt)
        self._generated.inc(num_output)
        self._e2e.observe(e2e_s)
        if ttft_s is not None:
            self._ttft.observe(ttft_s)
            if num_output > 1:
                self._tpot.observe((e2e_s - ttft_s) / (num_output - 1))

    def retried(self, reason: str, count: int = 1) -> None:
        """Record that requests were placed again."""
        self._retried.labels(reason).inc(count)
