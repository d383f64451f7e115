"""`fastdeploy-pd role` and `fastdeploy-pd drain`: the admin endpoints of a running instance, from a shell."""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastdeploy_pd.cluster.messages import MAX_DRAIN_S
from fastdeploy_pd.config import ROLES
from fastdeploy_pd.errors import ConfigError, CoordinatorLost, FastDeployPDError, LinkLost, NoCapacity
from fastdeploy_pd.flags import number

if TYPE_CHECKING:
    from fastdeploy_pd.cluster.registry import MemberRecord

POLL_S = 0.2
TIMEOUT_S = 30.0
ADDRESS = re.compile(r"([^/\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):\d+")
URL = re.compile(r"https?://([^/\s:\[\]]+|\[[0-9A-Fa-f:.]+\])(:\d+)?(/\S*)?")


def add_commands(commands: Any) -> None:
    """Add both to the parsers of the `fastdeploy-pd` command."""
    role = commands.add_parser(
        "role",
        help="show or flip the role of a running instance",
        description="Flips an instance between prefill, decode and mixed without dropping a request. See docs/elastic_roles.md.",
    )
    _add_instance(role)
    role.add_argument("role", nargs="?", choices=ROLES, help="the role to flip to (default: only show the present one)")
    role.add_argument("--force", action="store_true", help="also if nobody is left to do what the instance does now")
    drain = commands.add_parser(
        "drain",
        help="have an instance leave its topic, finish what it serves and end",
        description="Shows what is left until the instance is gone. See docs/elastic_roles.md.",
    )
    _add_instance(drain)
    drain.add_argument(
        "--timeout-s",
        type=number(float, 0, MAX_DRAIN_S, f"seconds from 0 to {MAX_DRAIN_S:g}"),
        help="seconds after which it ends all the same (default 30)",
    )


def _add_instance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("instance", metavar="INSTANCE", help="its id (or how it begins), URL or host:port")
    parser.add_argument(
        "--redis-url",
        default="redis://127.0.0.1:6379",
        help="the cluster's Redis, where ids are looked up (default %(default)s)",
    )
    parser.add_argument("--scheduler-topic", default="default", help="the cluster's topic (default %(default)s)")
    parser.add_argument("--api-key", help="the instance's key, if it has one (or FD_API_KEY, which `ps` does not show)")


def run(args: argparse.Namespace) -> int:
    """Returns: exit status 0. Raises: ConfigError: there is no such instance. FastDeployPDError: what it answers, or that it cannot be reached."""
    if args.command == "role" and args.force and not args.role:
        raise ConfigError("--force is given without a role to flip to")
    url = find_url(args.instance, args.redis_url, args.scheduler_topic)
    key = args.api_key or os.environ.get("FD_API_KEY", "")
    if args.command == "drain":
        return _drain(url, key, args.timeout_s)
    body = {"role": args.role, "force": args.force} if args.role else None
    answer = call(url + "/v1/admin/role", key, body)
    _say(f"{answer['instance_id']} at {url} is {answer['role']}; left of its old role: {_list(answer['left'])}")
    return 0


def find_url(instance: str, redis_url: str, topic: str) -> str:
    """Returns: the base URL of an instance. Raises: ConfigError: none or several fit; CoordinatorLost."""
    if "://" in instance:
        if not URL.fullmatch(instance):
            raise ConfigError(f"INSTANCE is {instance!r}; a URL must be http:// or https://, a host and perhaps a port")
        return instance.rstrip("/").removesuffix("/v1")
    if not instance:
        raise ConfigError("INSTANCE is ''; it must be an instance's id (or how it begins), URL or host:port")
    if ADDRESS.fullmatch(instance):
        return f"http://{instance}"
    members = _members(instance, redis_url, topic)
    found = [m for m in members if m.instance_id == instance] or [
        m for m in members if m.instance_id.startswith(instance)
    ]
    if len(found) == 1:
        return found[0].http_address
    ids = ", ".join(m.instance_id for m in found or members) or "nobody"
    what = "fits several members" if found else "is neither a member"
    rest = "" if found else ", nor a URL, nor host:port"
    raise ConfigError(f"INSTANCE is {instance!r}, which {what} of topic {topic!r}{rest}; there are: {ids}")


def _members(instance: str, redis_url: str, topic: str) -> Sequence[MemberRecord]:
    """Returns: who is in the topic. Raises: ConfigError; CoordinatorLost: Redis cannot be asked for this id; says what else helps."""
    from fastdeploy_pd.cluster.redis_connection import RedisOptions
    from fastdeploy_pd.cluster.registry import RedisRegistry

    options = RedisOptions.from_url(redis_url, topic)
    password = options.password or os.environ.get("FD_SCHEDULER_PASSWORD") or None
    registry = RedisRegistry(dataclasses.replace(options, password=password))
    try:
        return registry.members()
    except CoordinatorLost as error:
        raise CoordinatorLost(
            f"INSTANCE is {instance!r}, taken for an id because it is no host:port, and ids are looked up in Redis. {error.message.rstrip('.')}. "
            "Give the instance's host:port, or the cluster's --redis-url and --scheduler-topic (`fastdeploy-pd up` prints all three)"
        ) from error
    finally:
        registry.close()


def call(url: str, key: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns: the answer to a GET, or to a POST if there is a body, what is left under "left".

    Raises: ConfigError: no key can look like this. LinkLost: nobody answers. NoCapacity: it takes the instance too long, or it is about to end.
        FastDeployPDError: what the instance says.
    """
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("--api-key (or FD_API_KEY) has characters that no key has; it must be printable ASCII")
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT_S) as answer:
            found = json.loads(answer.read())
            left = found["left_of_old_role"] if "left_of_old_role" in found else found["left"]
            return {**found, "left": {str(k): int(v) for k, v in left.items()}, "instance_id": found["instance_id"]}
    except urllib.error.HTTPError as error:
        try:
            text = json.loads(error.read())["error"]["message"]
        except (ValueError, KeyError, TypeError, AttributeError):
            text = error.reason
        text += " (here: --api-key KEY, or FD_API_KEY)" if error.code == 401 else ""
        kind = NoCapacity if error.code == 503 else FastDeployPDError
        raise kind(f"{url} answers {error.code}: {text}") from error
    except TimeoutError as error:
        raise NoCapacity(f"{url} has not answered for {TIMEOUT_S:g} s") from error
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = (isinstance(cause, OSError) and cause.strerror) or cause
        raise LinkLost(f"{url} cannot be reached: {reason}; is an instance at this address?") from error
    except (ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException) as error:
        raise FastDeployPDError(f"{url} does not answer as an instance does: {error!r}") from error


def _drain(url: str, key: str, timeout_s: float | None) -> int:
    """Ask, and show what is left until the instance is gone."""
    address, last = url + "/v1/admin/drain", ""
    answer = call(address, key, {} if timeout_s is None else {"timeout_s": timeout_s})
    own_id = answer["instance_id"]
    while answer["instance_id"] == own_id and answer.get("is_draining"):  # else another was started in its place
        text = f"{own_id} drains; left: {_list(answer['left'])}"
        if text != last:
            _say(text)
        last = text
        threading.Event().wait(POLL_S)
        try:
            answer = call(address, key)
        except NoCapacity:
            continue  # its engine is in a long step, or has ended already
        except FastDeployPDError:
            break
    _say(f"{own_id} has left")
    return 0


def _list(left: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in left.items())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
