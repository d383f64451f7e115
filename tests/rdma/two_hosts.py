"""Runs in both of two machines: prefill and Redis on the first, decode and the client on the second, KV blocks by RDMA alone.

The cases (prompts and their expected tokens) come as a file named by RDMA_CASES. While requests run, the second machine's NIC is
set down and up again, and later the prefill instance is killed and started anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redis

from fastdeploy_pd.launch.embedded_redis import find_server

PASSWORD, TOPIC, WAIT_S = "between two machines", "demo", 500.0
SELF, PEER, INDEX = os.environ["SELF_IP"], os.environ["PEER_IP"], int(os.environ["HOST_INDEX"])
REDIS = SELF if INDEX == 0 else PEER
DIRECTORY = Path(tempfile.mkdtemp())
NIC_DOWN_S = 3.0
NUM_TRIES = 6


def say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%X')} {text}\n")
    sys.stdout.flush()


def start(role: str) -> tuple[subprocess.Popen[bytes], Path]:
    ready = DIRECTORY / f"{role}-{time.monotonic_ns()}.json"
    flags = (
        f"--model demo --ops reference --splitwise-role {role} --scheduler-name splitwise --scheduler-host {REDIS} --scheduler-port 6379 "
        f"--scheduler-topic {TOPIC} --advertise-host {SELF} --host {SELF} --port 8000 --cache-transfer-protocol rdma --rdma-comm-ports 2336 "
        f"--num-gpu-blocks-override 64 --max-model-len 1024 --max-num-batched-tokens 128 --peer-timeout 100 --ready-file {ready}"
    )
    env = {**os.environ, "FD_CLUSTER_SECRET": "a secret of thirty-two characters!!", "FD_SCHEDULER_PASSWORD": PASSWORD}
    env["PYTHONPATH"] = ":".join(sys.path)
    code = "from fastdeploy_pd.entrypoints.openai.api_server import main; import sys; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *flags.split()], env=env), ready


def wait_for(what: str, condition: Any) -> None:
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        try:
            if condition():
                return
        except (redis.RedisError, OSError):
            pass  # not there yet
        time.sleep(0.3)
    raise SystemExit(f"waited {WAIT_S:g} s for {what}")


def first_host(store: redis.Redis) -> None:
    say("starting Redis and prefill")
    server = subprocess.Popen(
        [find_server(), "--bind", "0.0.0.0", "--port", "6379", "--requirepass", PASSWORD, "--save", ""],
        stdout=subprocess.DEVNULL,
    )
    prefill, _ = start("prefill")
    try:
        wait_for("the second host to ask for a kill", lambda: store.get("kill"))
        engines = subprocess.run(
            ["pgrep", "-P", str(prefill.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        for pid in (prefill.pid, *map(int, engines)):
            os.kill(pid, 9)
        say("killed prefill")
        prefill.wait()
        prefill, _ = start("prefill")
        wait_for("the second host to end", lambda: store.get("done"))
    finally:
        prefill.kill()
        server.kill()


def ask(case: dict[str, Any], salt: str) -> list[int]:
    body = {
        "model": "demo",
        "cache_salt": salt,
        "prompt": case["prompt"],
        "max_tokens": len(case["tokens"]),
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    call = urllib.request.Request(
        f"http://{SELF}:8000/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=WAIT_S) as answer:
        tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return tokens


def check(cases: list[dict[str, Any]], name: str, meanwhile: Any = None) -> None:
    began_s = time.monotonic()
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = [pool.submit(ask, case, name) for case in cases]
        if meanwhile:
            time.sleep(1.5)
            meanwhile()
        for case, answer in zip(cases, answers, strict=True):
            if answer.result() != case["tokens"]:
                raise SystemExit(f"{name}: {len(case['prompt'])} tokens: {answer.result()} is not {case['tokens']}")
    say(f"{name}: {len(cases)} answers equal, {time.monotonic() - began_s:.1f} s")


def moved_by_rdma() -> bool:
    """Returns: whether decode has received bytes by RDMA; prints what it counted."""
    with urllib.request.urlopen(f"http://{SELF}:8000/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    counted = [x for x in lines if x.startswith(("fastdeploy_pd:handover_", "fastdeploy_pd:requests_retried_total"))]
    say(" ".join(x for x in counted if "stage_seconds" not in x))
    return any('handover_bytes_total{backend="rdma"}' in x and float(x.split()[-1]) > 0 for x in counted)


def set_nic_down_and_up() -> None:
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    time.sleep(NIC_DOWN_S)
    subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)


def second_host(store: redis.Redis) -> None:
    cases = json.loads(Path(os.environ["RDMA_CASES"]).read_text())
    wait_for("Redis", store.ping)
    decode, ready = start("decode")
    try:
        wait_for("decode", ready.exists)
        check(cases[:1], "first")
        check(cases, "together")
        # An emulated machine that is kept waiting loses peers for a while, and decode computes the prompts itself.
        for number in range(NUM_TRIES):
            if moved_by_rdma():
                break
            time.sleep(5)
            check(cases, f"together, try {number + 2}")
        else:
            raise SystemExit("no bytes came by RDMA")
        check(cases, "NIC down and up", set_nic_down_and_up)
        check(cases, "prefill killed", lambda: store.set("kill", 1))
    finally:
        store.set("done", 1)
        decode.kill()


if __name__ == "__main__":
    (first_host if INDEX == 0 else second_host)(redis.Redis(REDIS, 6379, password=PASSWORD, socket_timeout=20))
    say("ended well")
