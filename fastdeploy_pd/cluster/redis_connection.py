"""The one place that makes Redis clients, runs our scripts and turns Redis' errors into ours.

redis-py repeats failed commands by default, which duplicates writes after a stall; we switch that off, give every write an id or a
script that makes it idempotent, and retry by ourselves where repeating is harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from fastdeploy_pd.cluster.keys import Keys
from fastdeploy_pd.errors import ConfigError, CoordinatorLost, ForeignData

COMMAND_TIMEOUT_S = 1.0
BLOCKING_TIMEOUT_S = 5.0  # a blocking read asks the server to answer well before
MIN_VERSION = (6, 2)
SCRIPTS = Path(__file__).parent / "scripts"

Result = TypeVar("Result")


MIN_TTL_S = 0.1


@dataclass(frozen=True, slots=True, repr=False)
class RedisOptions:
    """Where the coordinator is and how to log in. Has no repr: it holds a password."""

    host: str = "127.0.0.1"
    port: int = 6379
    db: int = 0
    username: str | None = None
    password: str | None = None
    unix_socket: str | None = None
    tls: bool = False
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    topic: str = "default"
    ttl_s: float = 900.0

    def __post_init__(self) -> None:
        if not self.ttl_s >= MIN_TTL_S:
            raise ConfigError(f"ttl_s (--scheduler-ttl) is {self.ttl_s:g}; it must be at least {MIN_TTL_S:g}")

    @classmethod
    def from_url(cls, url: str, topic: str = "default", **changes: Any) -> RedisOptions:
        """Read redis://, rediss:// or unix:// URLs.

        Raises: ConfigError: the URL is none of them. Its text is not repeated: it may hold a password.
        """
        try:
            parsed = dict(redis.connection.parse_url(url))  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ConfigError(
                "the Redis URL must begin with redis://, rediss:// or unix://, as in redis://127.0.0.1:6379; "
                "its port must be from 1 to 65535"
            ) from error
        names = {
            "path": "unix_socket",
            "ssl_ca_certs": "tls_ca_file",
            "ssl_certfile": "tls_cert_file",
            "ssl_keyfile": "tls_key_file",
        }
        is_tls = parsed.pop("connection_class", None) is redis.SSLConnection
        values = {names.get(k, k): v for k, v in parsed.items()}
        unknown = set(values) - set(cls.__slots__)
        if unknown:
            raise ConfigError(f"the Redis URL has unknown options: {', '.join(sorted(unknown))}")
        return cls(**{**values, "tls": is_tls, "topic": topic, **changes})

    def client(self, timeout_s: float = COMMAND_TIMEOUT_S) -> redis.Redis:
        """Returns: a client that never repeats a command by itself. It connects when first used."""
        common: dict[str, Any] = {
            "db": self.db,
            "username": self.username,
            "password": self.password,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": COMMAND_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        if self.unix_socket:
            return redis.Redis(unix_socket_path=self.unix_socket, **common)
        if self.tls:
            common |= {
                "ssl": True,
                "ssl_ca_certs": self.tls_ca_file,
                "ssl_certfile": self.tls_cert_file,
                "ssl_keyfile": self.tls_key_file,
            }
        return redis.Redis(host=self.host, port=self.port, **common)


#: errors that mean a consumer group has to be made, is there already, or was waited for when its stream went away
GROUP_ERRORS = ("NOGROUP", "BUSYGROUP", "UNBLOCKED")


@contextmanager
def coordinator_errors() -> Iterator[None]:
    """Raises, inside the block: CoordinatorLost for trouble with the server or its data, ConfigError for a refused login.

    redis.ResponseError: one of GROUP_ERRORS.
    """
    try:
        yield
    except redis.exceptions.NoPermissionError as error:
        raise ConfigError(
            f"Redis does not let this user do what an instance does ({str(error).rstrip('.')}); check --scheduler-topic and the "
            "user's rights to commands, keys and channels (docs/redis_keys.md)"
        ) from error
    except redis.AuthenticationError as error:
        raise ConfigError(
            f"Redis refuses us ({str(error).rstrip('.')}); check --scheduler-username and the password "
            "(FD_SCHEDULER_PASSWORD or --scheduler-password)"
        ) from error
    except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError, OSError) as error:
        raise CoordinatorLost(f"Redis cannot be reached: {error}") from error
    except redis.exceptions.ReadOnlyError as error:
        raise CoordinatorLost("Redis is a read-only replica now") from error
    except redis.exceptions.OutOfMemoryError as error:
        raise CoordinatorLost("Redis is out of memory") from error
    except redis.ResponseError as error:
        if any(word in str(error) for word in GROUP_ERRORS):
            raise
        if "WRONGTYPE" in str(error):
            raise ForeignData(f"Redis refuses a command: {error}; does something else use our keys?") from error
        raise CoordinatorLost(f"Redis refuses a command: {error}") from error


class Outage:
    """Says that Redis is away once, and once that it is back, however often it is tried meanwhile."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log, self._what = log, what
        self._message = ""

    def failed(self, message: str) -> None:
        """It did not answer, or refused us."""
        if message != self._message:
            self._log.warning("%s failed and is tried again until it succeeds: %s", self._what, message)
        self._message = message

    def over(self) -> None:
        """It has answered."""
        if self._message:
            self._log.info("%s succeeds again", self._what)
        self._message = ""


class RedisConnection:
    """A client, its topic's keys and its scripts."""

    def __init__(self, options: RedisOptions, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        self.options = options
        self.keys = Keys(options.topic)
        self.client = options.client(timeout_s)
        self._scripts: dict[str, Any] = {}

    def run(self, action: Callable[[redis.Redis], Result]) -> Result:
        """Returns: action(client). Raises: CoordinatorLost, ConfigError."""
        with coordinator_errors():
            return action(self.client)

    def script(self, name: str, keys: list[str], args: list[Any]) -> Any:
        """Run cluster/scripts/NAME.lua. Raises: CoordinatorLost, ConfigError."""
        if name not in self._scripts:
            self._scripts[name] = self.client.register_script((SCRIPTS / f"{name}.lua").read_text())
        with coordinator_errors():
            return self._scripts[name](keys=keys, args=args)

    def check_version(self) -> None:
        """Raises: ConfigError: the server is too old; CoordinatorLost."""
        text = str(self.run(lambda c: c.info("server"))["redis_version"])
        if tuple(int(p) for p in text.split(".")[:2]) < MIN_VERSION:
            raise ConfigError(f"Redis is version {text}; at least {MIN_VERSION[0]}.{MIN_VERSION[1]} is needed")

    def close(self) -> None:
        """Close the client's connections. Idempotent."""
        self.client.close()
