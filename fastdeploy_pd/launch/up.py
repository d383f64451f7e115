"""`fastdeploy-pd up`: Redis, a prefill and a decode instance, a first streamed answer, and the command for the next one."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.redis_connection import RedisConnection, RedisOptions
from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.errors import ConfigError, FastDeployPDError
from fastdeploy_pd.flags import with_hyphens
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster, LocalInstance

MAX_RESTARTS = 20  # of all instances together
INSTANCE_BYTES = 3 << 28  # two processes and a framework: 0.7 GiB with paddle, 0.4 with torch; weights come on top
INSTANCES_A_CORE = 4  # more only wait for each other
REDIS_FLAGS = "--redis-url of `up`, as in: fastdeploy-pd up --redis-url redis://10.0.0.1:6379"
#: an instance's flags that `up` gives itself, and what to do instead
OWN_FLAGS = {
    "--splitwise-role": "--prefill, --decode and --mixed of `up`, as in: fastdeploy-pd up --prefill 1 --decode 2",
    "--port": "--port of `up`, before the `--`: the first instance's, as in: fastdeploy-pd up --port 8000",
    "--scheduler-topic": "--scheduler-topic of `up`, before the `--`",
    "--ready-file": "the addresses that `up` prints",
    **dict.fromkeys(
        (
            *("--scheduler-name", "--scheduler-host", "--scheduler-port", "--scheduler-db", "--scheduler-username"),
            *("--scheduler-tls", "--scheduler-tls-ca-file", "--scheduler-tls-cert-file", "--scheduler-tls-key-file"),
        ),
        REDIS_FLAGS,
    ),
    "--scheduler-password": "FD_SCHEDULER_PASSWORD, or " + REDIS_FLAGS,
}
#: and those that only one instance of a machine can have
PORT_FLAGS = ("--metrics-port", "--pd-comm-port", "--cache-queue-port", "--rdma-comm-ports")


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


def check_flags(flags: Sequence[str], num_instances: int) -> None:
    """Raises: ConfigError: a flag for every instance is one that `up` gives them itself; says which flag of `up` does it."""
    for name in (with_hyphens(word).partition("=")[0] for word in flags):
        if name in OWN_FLAGS:
            raise ConfigError(f"{name} stands behind `--`, but `up` sets it for its instances; use {OWN_FLAGS[name]}")
        if name in PORT_FLAGS and num_instances > 1:
            raise ConfigError(
                f"{name} stands behind `--`, so that {num_instances} instances would ask for the same port; "
                "leave it out: they choose free ones"
            )


def check_instances(flags: Sequence[str], topic: str, roles: Sequence[str]) -> InstanceConfig:
    """Returns: the configuration that these flags make. Raises: ConfigError: an instance of one of the roles would refuse them."""
    from fastdeploy_pd.engine.build import check  # late: it loads what an engine needs
    from fastdeploy_pd.entrypoints.openai.api_server import check_ports

    own = ["--scheduler-name", "splitwise", "--scheduler-topic", topic]
    for role in dict.fromkeys(roles):
        config = InstanceConfig.from_args([*flags, *own, "--splitwise-role", role], os.environ)
        check(config)
        check_ports(config)
    return config


def check_room(num_instances: int, config: InstanceConfig) -> None:
    """Raises: ConfigError: this machine has not enough memory or cores for so many; says for how many."""
    from fastdeploy_pd.engine.build import free_memory_bytes  # late: it loads what an engine needs

    model = Path(config.model.model)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors")) if config.model.device == "cpu" else 0
    free, num_cores = free_memory_bytes(), len(os.sched_getaffinity(0))
    by_memory = free // (INSTANCE_BYTES + weights)
    most = min(by_memory, num_cores * INSTANCES_A_CORE)
    if num_instances > max(most, 1):
        raise ConfigError(
            f"--prefill, --decode and --mixed ask for {num_instances} instances; this machine has room for {max(most, 1)}: "
            f"{num_cores} cores are enough for {num_cores * INSTANCES_A_CORE}, {free / 2**30:.1f} GiB of free memory for {by_memory} "
            f"({(INSTANCE_BYTES + weights) / 2**30:.2f} GiB each, KV blocks not counted). --force starts them all the same"
        )


def question(model: str, prompt: str | None) -> tuple[str, dict[str, object]]:
    """Returns: path and body of a request that streams: a chat; without a prompt, token ids for a model that has no tokenizer."""
    if prompt is None:
        return "/v1/completions", {"model": model, "prompt": [1] * 16, "max_tokens": 16, "stream": True}
    return "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}


def ask(instance: LocalInstance, model: str, prompt: str | None, key: str) -> dict[str, object]:
    """Send a request, print the answer as it comes.

    Args:
        prompt: see `question`; key: an API key; "" if the instance asks for none.
    Returns: the report that comes with the last event: prefill, decode, ttft_s, tpot_s, kv_bytes.
    Raises: FastDeployPDError: it is not answered; says why.
    """
    path, body = question(model, prompt)
    body = {"max_tokens": 200, **body, "temperature": 0, "return_timings": True}
    body["stream_options"] = {"include_usage": True}
    url = instance.http_url + path
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        report = _print_stream(urllib.request.Request(url, json.dumps(body).encode(), headers))
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            pass
        raise FastDeployPDError(f"the first question is answered with HTTP {error.code} by {url}: {text}") from error
    except (OSError, http.client.HTTPException) as error:
        raise FastDeployPDError(
            f"the first question is not answered by {url}: {getattr(error, 'reason', error)}"
        ) from error
    say("")
    return report


def _print_stream(request: urllib.request.Request) -> dict[str, object]:
    """Returns: the report. Raises: FastDeployPDError: the stream ends in an error; OSError."""
    report: dict[str, object] = {}
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise FastDeployPDError(f"the first answer broke off: {event['error'].get('message')}")
            report = event.get("fastdeploy_pd", report)
            for choice in event["choices"]:
                say(choice["delta"].get("content", "") if "delta" in choice else choice["text"], end="")
            if event.get("usage") and event["object"] == "text_completion":
                say(f"{event['usage']['completion_tokens']} tokens", end="")
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
    """Returns: exit status: 0, also when Ctrl-C ends a running cluster.

    Raises: KeyboardInterrupt: it came before that. ConfigError: a flag is wrong, or an instance refused or died. FastDeployPDError: no first answer.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    roles = ["prefill"] * args.prefill + ["decode"] * args.decode + ["mixed"] * args.mixed
    check_flags(args.flags, len(roles))
    flags = ["--model", args.model, *(["--ops", args.ops] if args.ops else []), *args.flags]
    config = check_instances(flags, args.scheduler_topic, roles)
    if not args.force:
        check_room(len(roles), config)
    with ExitStack() as stack:
        url = args.redis_url
        if url is None:
            say("starting a Redis server of its own")
            url = stack.enter_context(EmbeddedRedis()).url
        else:
            check_redis(url)
        cluster = stack.enter_context(LocalCluster(url, args.scheduler_topic, flags))
        stack.callback(_ignore_signals)  # what was started is ended, however impatient one is
        say(f"starting {', '.join(roles)}; logs: {cluster.log_dir}/INSTANCE/")
        try:
            return serve(args, cluster, roles, config, url)
        except FastDeployPDError as error:
            cluster.keeps_logs = True
            raise type(error)(f"{error.message}\nthe logs are kept in {cluster.log_dir}") from error


def serve(
    args: argparse.Namespace, cluster: LocalCluster, roles: Sequence[str], config: InstanceConfig, url: str
) -> int:
    """Start the instances, ask the first question, stay. Returns and raises as `run`."""
    clock = WallClock()
    start_s = clock.now_s()
    instances = [
        cluster.launch(r, ["--port", str(args.port)] if i == 0 and args.port else []) for i, r in enumerate(roles)
    ]
    waiting = Waiting()
    cluster.wait_ready(instances, waiting)
    waiting.done()
    say(
        f"ready after {clock.now_s() - start_s:.1f} s: " + ", ".join(f"{i.role} {i.http_url}" for i in instances) + "\n"
    )
    name, keys = config.model.served_model_name[0], config.server.api_keys
    prompt = None if config.model.skip_tokenizer_init else args.prompt
    say(f"  you: {'token ids, as there is no tokenizer' if prompt is None else prompt}\n  {name}: ", end="")
    show_report(ask(instances[0], name, prompt, keys[0] if keys else ""))
    if args.once:
        return 0
    show_next(instances[0], question(name, None if prompt is None else "Tell me a story about a fox"), bool(keys))
    say(
        f"Its role (or drain): fastdeploy-pd role {instances[0].instance_id} --redis-url {without_password(url)} "
        f"--scheduler-topic {args.scheduler_topic}\n"
    )
    status = 0
    try:
        status = tend(cluster, instances, args.port)
    except KeyboardInterrupt:
        say("\nstopping")
    if cluster.keeps_logs:
        say(f"the logs are kept in {cluster.log_dir}")
    return status


def without_password(url: str) -> str:
    """Returns: a Redis URL that may be shown; the commands take the password from FD_SCHEDULER_PASSWORD."""
    parts = urlsplit(url)
    login, _, place = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    query = "&".join(part for part in parts.query.split("&") if not part.startswith("password="))
    return parts._replace(netloc=f"{user}@{place}" if user else place, query=query).geturl().removesuffix("/0")


def show_next(instance: LocalInstance, example: tuple[str, dict[str, object]], needs_key: bool) -> None:
    """Print how to go on."""
    path, body = example[0], json.dumps(example[1])
    say("\nAsk for more (any instance answers; Ctrl-C ends everything):\n")
    key = "-H 'authorization: Bearer KEY' " if needs_key else ""
    say(f"  curl -N {instance.http_url}{path} -H 'content-type: application/json' {key}-d '{body}'\n")
    say(f"or from Python: openai.OpenAI(base_url='{instance.http_url}/v1', api_key='{'KEY' if key else 'none'}')\n")


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
            cluster.keeps_logs = True
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
