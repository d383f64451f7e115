"""Redis: can it be reached, is it the right kind, how fast is it, and what time does it think it is."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.redis_connection import MIN_VERSION, RedisConnection, RedisOptions
from fastdeploy_pd.doctor.finding import Finding
from fastdeploy_pd.errors import ConfigError, CoordinatorLost

NUM_PINGS = 50
SLOW_PING_S = 0.010  # a heartbeat is due every half second, a lease lasts two
MAX_CLOCK_OFFSET_S = 1.0  # instances compare no clocks; people who read two logs do
CLOCK_REMEDY = "timedatectl set-ntp true (or: chronyc makestep)"


def check_redis(options: RedisOptions, is_asked_for: bool) -> Iterator[Finding]:
    """
    Args:
        is_asked_for: a server that does not answer is a failure, and not just absent.
    """
    connection, where = RedisConnection(options), options.unix_socket or f"{options.host}:{options.port}"
    try:
        info = dict(connection.run(lambda c: c.info("everything")))
        yield _version(info, where)
        yield _policy(str(info.get("maxmemory_policy", "unknown")))
        yield _persistence(info, _save_points(connection))
        yield from _latency_and_clock(connection)
    except CoordinatorLost as error:
        state = "fail" if is_asked_for else "absent"
        remedy = (
            "redis-server --save '' --maxmemory-policy noeviction (or --redis-url; `fastdeploy-pd up` starts its own)"
        )
        yield Finding("redis", state, f"{where}: {error.message}", remedy)
    except ConfigError as error:
        remedy = "export FD_SCHEDULER_PASSWORD=..., or the ACL user of docs/redis_keys.md"
        yield Finding("redis", "fail", f"{where}: {error.message}", remedy)
    finally:
        connection.close()


def _version(info: dict[str, Any], where: str) -> Finding:
    text = str(info.get("redis_version", "0.0"))
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {text}"
    if tuple(int(part) for part in text.split(".")[:2]) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        return Finding("redis", "fail", f"{where}: {name}; at least {wanted} is needed", "apt-get install redis-server")
    if info.get("role", "master") != "master":
        remedy = "give --redis-url of the primary (redis-cli INFO replication)"
        return Finding("redis", "fail", f"{where}: {name}, a read-only replica", remedy)
    return Finding("redis", "ok", f"{where}: {name}")


def _policy(policy: str) -> Finding:
    if policy == "noeviction":
        return Finding("redis memory policy", "ok", policy)
    remedy = "redis-cli CONFIG SET maxmemory-policy noeviction"
    return Finding("redis memory policy", "fail", f"{policy}: it may drop members and requests", remedy)


def _save_points(connection: RedisConnection) -> str:
    """Returns: the setting `save`; "unknown" where this user may not ask."""
    try:
        return str(connection.run(lambda c: c.config_get("save")).get("save", "unknown"))
    except (ConfigError, CoordinatorLost):
        return "unknown"


def _persistence(info: dict[str, Any], save: str) -> Finding:
    name = "redis persistence"
    if info.get("rdb_last_bgsave_status", "ok") != "ok" and save:
        detail = "the last snapshot failed, so Redis may refuse to write"
        return Finding(
            name, "fail", detail, "redis-cli CONFIG SET save '' (nothing here needs it), or make room on its disk"
        )
    kept = [*(["append-only file"] if info.get("aof_enabled") else []), *([f"snapshots ({save})"] if save else [])]
    if not kept:
        return Finding(name, "ok", "off; members register again by themselves after a restart")
    return Finding(name, "ok", f"{', '.join(kept)}; not needed, and a snapshot makes Redis pause for its fork")


def _latency_and_clock(connection: RedisConnection) -> Iterator[Finding]:
    clock, times_s, offsets = WallClock(), [], []
    for _ in range(NUM_PINGS):
        began_s, unix_s = clock.now_s(), clock.unix_s()
        seconds, microseconds = connection.run(lambda c: c.time())
        took_s = clock.now_s() - began_s
        times_s.append(took_s)
        offsets.append((took_s, seconds + microseconds / 1e6 - unix_s - took_s / 2))
    p50_s = statistics.median(times_s)
    is_slow = p50_s > SLOW_PING_S
    remedy = "redis-cli --latency -h HOST; redis-cli SLOWLOG GET (put Redis next to the instances)"
    detail = f"P50 {p50_s * 1e3:.2f} ms, longest {max(times_s) * 1e3:.2f} ms of {NUM_PINGS} round trips"
    yield Finding("redis latency", "warn" if is_slow else "ok", detail, remedy if is_slow else "")
    yield clock_finding("clock", "Redis", *min(offsets)[::-1])


def clock_finding(name: str, whose: str, offset_s: float, round_trip_s: float) -> Finding:
    """Returns: how far another clock is ahead of ours, measured within that round trip."""
    known_to_s = round_trip_s / 2
    is_off = abs(offset_s) - known_to_s > MAX_CLOCK_OFFSET_S
    detail = f"{whose} is {abs(offset_s) * 1e3:.2f} ms {'ahead' if offset_s > 0 else 'behind'} (known to {known_to_s * 1e3:.2f} ms)"
    if is_off:
        return Finding(name, "warn", f"{detail}: the logs of two machines do not line up", CLOCK_REMEDY)
    return Finding(name, "ok", detail)
