"""`fastdeploy-pd up`: Redis, a prefill and a decode instance, a first streamed answer, and the command for the next one."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import urllib.request
from contextlib import ExitStack

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.redis_connection import RedisConnection, RedisOptions
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster, LocalInstance

MAX_RESTARTS = 20  # of all instances together


def say(text: str, end: str = "\n") -> None:
    """Print at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


class Waiting:
    """Shows what is waited for: one line that is rewritten on a terminal, a new line whenever it changes elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._last = ""

    def __call__(self, names: list[str], elapsed_s: float) -> None:
        """Show it."""
        text = "waiting for " + ", ".join(names)
        if self._is_terminal:
            say(f"\r\033[K  {text} ({elapsed_s:.0f} s)", end="")
        elif text != self._last:
            say(f"  {text}")
        self._last = text

    def done(self) -> None:
        """End the line."""
        if self._is_terminal and self._last:
            say("\r\033[K", end="")


def ask(instance: LocalInstance, model: str, prompt: str) -> dict[str, object]:
    """Send a chat request, print the answer as it comes.

    Returns: the report that comes with the last event: prefill, decode, ttft_s, tpot_s, kv_bytes.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 200,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_timings": True,
    }
    request = urllib.request.Request(
        instance.http_url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    report: dict[str, object] = {}
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            report = event.get("fastdeploy_pd", report)
            for choice in event["choices"]:
                say(choice["delta"].get("content", ""), end="")
    say("")
    return report


def show_report(report: dict[str, object]) -> None:
    """Print the figures of an answer."""
    ttft_s, tpot_s, num_bytes = report.get("ttft_s"), report.get("tpot_s"), int(str(report.get("kv_bytes", 0)))
    ttft = f"{float(str(ttft_s)) * 1000:.0f} ms" if ttft_s is not None else "-"
    tpot = f"{float(str(tpot_s)) * 1000:.1f} ms" if tpot_s is not None else "-"
    say(
        f"\n  TTFT {ttft}   TPOT {tpot}   prefill by {report.get('prefill')}   decode by {report.get('decode')}   KV moved: {num_bytes:,} bytes"
    )


def run(args: argparse.Namespace) -> int:
    """Returns: exit status: 0, also when Ctrl-C ends a running cluster. Raises: KeyboardInterrupt: it came before that."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    clock = WallClock()
    start_s = clock.now_s()
    with ExitStack() as stack:
        url = args.redis_url
        if url is None:
            say("starting a Redis server of its own")
            url = stack.enter_context(EmbeddedRedis()).url
        else:
            check_redis(url)
        roles = ["prefill"] * args.prefill + ["decode"] * args.decode + ["mixed"] * args.mixed
        say(f"starting {', '.join(roles)}")
        flags = ["--model", args.model, *(["--ops", args.ops] if args.ops else []), *args.flags]
        cluster = stack.enter_context(LocalCluster(url, flags=flags))
        stack.callback(_ignore_signals)  # what was started is ended, however impatient one is
        instances = [
            cluster.launch(r, ["--port", str(args.port)] if i == 0 and args.port else []) for i, r in enumerate(roles)
        ]
        waiting = Waiting()
        cluster.wait_ready(instances, waiting)
        waiting.done()
        say(
            f"ready after {clock.now_s() - start_s:.1f} s: "
            + ", ".join(f"{i.role} {i.http_url}" for i in instances)
            + "\n"
        )
        name = _model_name(instances[0])
        say(f"  you: {args.prompt}\n  {name}: ", end="")
        show_report(ask(instances[0], name, args.prompt))
        if args.once:
            return 0
        show_next(instances[0], name)
        try:
            return tend(cluster, instances, args.port)
        except KeyboardInterrupt:
            say("\nstopping")
    return 0


def show_next(instance: LocalInstance, name: str) -> None:
    """Print how to go on."""
    body = json.dumps(
        {"model": name, "messages": [{"role": "user", "content": "Tell me a story about a fox"}], "stream": True}
    )
    say("\nAsk for more (any instance answers; Ctrl-C ends everything):\n")
    say(f"  curl -N {instance.http_url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n")
    say(f"or from Python: openai.OpenAI(base_url='{instance.http_url}/v1', api_key='none')\n")


def tend(cluster: LocalCluster, instances: list[LocalInstance], first_port: int | None) -> int:
    """Start whatever dies again: the others go on meanwhile.

    Returns: 1 when instances keep dying; 0 when all were told to end (SIGTERM, `fastdeploy-pd drain`).
    """
    num_restarts, awaited, left = 0, set[str](), set[str]()
    while len(left) < len(instances):
        for index, instance in enumerate(instances):
            if instance.name in awaited and instance.is_ready:
                awaited.discard(instance.name)
                say(f"{instance.name} is ready at {instance.http_url}")
            status = instance.process.poll()
            if status is None or instance.name in left:
                continue
            if status == 0:
                left.add(instance.name)
                say(f"{instance.name} was told to end, and has left")
                continue
            say(
                f"{instance.name} ended with status {status}; the others go on. Its last words:\n{instance.last_lines()}"
            )
            num_restarts += 1
            if num_restarts > MAX_RESTARTS:
                say(f"instances have ended {num_restarts} times; giving up")
                return 1
            instances[index] = cluster.launch(
                instance.role, ["--port", str(first_port)] if index == 0 and first_port else []
            )
            awaited.add(instances[index].name)
            say(f"starting {instances[index].name} in its place")
        threading.Event().wait(0.5)
    return 0


def check_redis(url: str) -> None:
    """Raises: CoordinatorLost, ConfigError: the server cannot be used."""
    connection = RedisConnection(RedisOptions.from_url(url))
    try:
        connection.check_version()
    finally:
        connection.close()


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _model_name(instance: LocalInstance) -> str:
    with urllib.request.urlopen(instance.http_url + "/v1/models", timeout=10) as answer:
        return str(json.loads(answer.read())["data"][0]["id"])
