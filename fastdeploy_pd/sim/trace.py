"""What is offered to a simulated cluster: requests of a recorded trace, or random ones.

A request's prompt is known by its length and by what it shares with others, as the trace says it (Mooncake: an id for each 512
tokens, equal ids being equal beginnings). Block hashes are made from that; there are no tokens, and none is ever hashed.
"""

from __future__ import annotations

import csv
import gzip
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, cast

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim.fields import field, json_object, number, reason, whole
from fastdeploy_pd.sim.progress import Progress

UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error)  #: what reading a file may raise
NOTED_EVERY = 1000  # requests, by the progress line
TRACE_BLOCK_TOKENS = 512  # that a hash id of a Mooncake trace stands for
OWN_HASHES = 2_654_435_761  # kept apart for a request's own blocks; a number that spreads them well in a hash table


@dataclass(frozen=True, slots=True)
class Offered:
    """One request as it is offered; times from the first one on."""

    number: int  #: from 0, in order of arrival
    arrival_s: float
    num_input: int  #: prompt tokens, >= 1
    num_output: int  #: output tokens, >= 1
    hash_ids: tuple[int, ...] = ()  #: one for each 512 prompt tokens, each standing for all of the prompt up to its end
    num_shared: int = 0  #: first tokens that all such requests have in common
    shift: int = 0  #: is added to hash_ids

    def prompt(self) -> list[int]:
        """Returns: [num_input] token ids that take no room; which ones is nobody's matter, blocks have their hashes."""
        return cast("list[int]", range(self.num_input))

    def block_hashes(self, block_size: int) -> list[bytes]:
        """Returns: hashes of all full blocks that the request will ever have; block_size must divide 512.

        They are numbers: equal ones stand for equal beginnings, and nobody needs more of a hash here.
        """
        num_blocks = (self.num_input + self.num_output) // block_size
        per_id = TRACE_BLOCK_TOKENS // block_size
        hashes: list[int] = []
        for hash_id in self.hash_ids:
            first = (hash_id + self.shift) * per_id
            hashes += range(first, first + per_id)
        del hashes[self.num_input // block_size :]
        hashes += range(-1 - len(hashes), -1 - min(self.num_shared, self.num_input) // block_size, -1)
        own = -OWN_HASHES * (self.number + 1)
        hashes += range(own - num_blocks + len(hashes), own)
        return cast("list[bytes]", hashes)

    def prefix_ids(self) -> list[int]:
        """Returns: hash ids of the prompt's full 512 tokens, unlike those of another time (`repeated`)."""
        return [hash_id + self.shift for hash_id in self.hash_ids[: self.num_input // TRACE_BLOCK_TOKENS]]


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Random requests as `vllm bench serve` makes them (its flags' names)."""

    num_prompts: int = 1000
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0  #: lengths are uniform in [len * (1 - ratio), len * (1 + ratio)]
    random_prefix_len: int = 0  #: tokens that every prompt begins with, besides random_input_len
    burstiness: float = 1.0  #: shape of the gamma distribution between arrivals; 1 is Poisson

    def offered(self, rate: float, rng: random.Random) -> list[Offered]:
        """Returns: the requests, `rate` a second on average.

        Raises: ConfigError: a value is out of range.
        """
        if not 0 <= self.random_range_ratio < 1:
            raise ConfigError(f"--random-range-ratio is {self.random_range_ratio}; it must be from 0 to below 1")
        if self.num_prompts == 1:
            raise ConfigError("--num-prompts is 1; it must be at least 2")
        for flag in ("num_prompts", "random_input_len", "random_output_len", "burstiness"):
            if not 0 < getattr(self, flag) <= 1e9:
                raise ConfigError(
                    f"--{flag.replace('_', '-')} is {getattr(self, flag)}; it must be above 0, and 1e9 at most"
                )
        if self.random_prefix_len < 0:
            raise ConfigError(f"--random-prefix-len is {self.random_prefix_len}; it must be 0 or more")
        requests, arrival_s = [], 0.0
        with Progress("making requests", self.num_prompts) as progress:
            for place in range(self.num_prompts):
                num_input = self.random_prefix_len + self._length(self.random_input_len, rng)
                num_output = self._length(self.random_output_len, rng)
                requests.append(Offered(place, arrival_s, num_input, num_output, num_shared=self.random_prefix_len))
                arrival_s += rng.gammavariate(self.burstiness, 1 / (rate * self.burstiness))
                if place % NOTED_EVERY == 0:
                    progress.reach(place)
        return requests

    def _length(self, mean: int, rng: random.Random) -> int:
        ratio = self.random_range_ratio
        return max(1, rng.randint(int(mean * (1 - ratio)), int(mean * (1 + ratio))))


def load(path: Path, max_requests: int | None = None) -> list[Offered]:
    """Read a trace, gzipped or not: Mooncake's JSON lines, or Azure's CSV.

    Returns: in order of arrival, the first at 0 s; at least two, not all at once.
    Raises: ConfigError: it cannot be read, a line is wrong, or it has too few requests.
    """
    try:
        with opened(path) as file:
            is_csv = path.name.removesuffix(".gz").endswith(".csv")
            lines = _noted(file, path)
            requests = _azure(lines, path) if is_csv else _mooncake(lines, path)
    except UNREADABLE as error:
        raise ConfigError(f"--trace {path} {reason(error)}") from error
    requests.sort(key=lambda r: r.arrival_s)
    requests = requests[:max_requests]
    if len(requests) < 2 or requests[0].arrival_s == requests[-1].arrival_s:
        raise ConfigError(f"--trace {path} has {len(requests)} requests; at least 2, not all at one time, are needed")
    first_s = requests[0].arrival_s
    return [replace(r, number=n, arrival_s=r.arrival_s - first_s) for n, r in enumerate(requests)]


def opened(path: Path) -> IO[str]:
    """Returns: a text file, gzipped if its name says so."""
    return cast("IO[str]", gzip.open(path, "rt") if path.suffix == ".gz" else path.open())


def _noted(file: IO[str], path: Path) -> Iterator[str]:
    """Yields: the lines, while a progress line says how much of the file is read; an archive's lines are taken for four times as long."""
    size = path.stat().st_size * (4 if path.suffix == ".gz" else 1)
    num_read = 0
    with Progress("reading", size) as progress:
        for place, line in enumerate(file):
            num_read += len(line)
            if place % NOTED_EVERY == 0:
                progress.reach(num_read)
            yield line


def _mooncake(file: Iterable[str], path: Path) -> list[Offered]:
    """Lines {"timestamp": ms, "input_length", "output_length", "hash_ids": one for each 512 tokens}; Qin et al., FAST 2025."""
    requests = []
    for place, line in enumerate(file, 1):
        try:
            row = json_object(line)
            num_input, num_output = whole(row, "input_length", 1), whole(row, "output_length")
            hash_ids = field(row, "hash_ids")
            if not isinstance(hash_ids, list) or not all(type(i) is int and 0 <= i < 1 << 63 for i in hash_ids):
                raise ValueError("has wrong hash_ids; they must be a list of whole numbers from 0 to below 2^63")
            if len(hash_ids) > -(-num_input // TRACE_BLOCK_TOKENS):
                raise ValueError(
                    f"has {len(hash_ids)} hash_ids for {num_input} tokens; it must be one for each {TRACE_BLOCK_TOKENS}"
                )
            requests.append(Offered(0, number(row, "timestamp") / 1e3, num_input, max(1, num_output), tuple(hash_ids)))
        except ValueError as error:
            raise ConfigError(f"--trace {path} line {place} {error}") from error
    return requests


def _azure(file: Iterable[str], path: Path) -> list[Offered]:
    """Rows TIMESTAMP,ContextTokens,GeneratedTokens (Azure LLM inference traces, 2023); what prompts share is not told."""
    requests = []
    for place, row in enumerate(csv.DictReader(file), 2):
        try:
            arrival_s = (_time(row) - datetime(2000, 1, 1, tzinfo=UTC)).total_seconds()
            num_input, num_output = whole(row, "ContextTokens"), whole(row, "GeneratedTokens")
            requests.append(Offered(0, arrival_s, max(1, num_input), max(1, num_output)))
        except ValueError as error:
            raise ConfigError(f"--trace {path} line {place} {error}") from error
    return requests


def _time(row: dict[str, str]) -> datetime:
    """Returns: TIMESTAMP; the traces of 2024 say where they count from, that of 2023 does not. Raises: ValueError: it is none."""
    text = field(row, "TIMESTAMP")
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"has TIMESTAMP {text!r}; it must be a time, as in 2023-11-16 18:15:46.680590") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def repeated(requests: Sequence[Offered], count: int) -> Iterator[Offered]:
    """Yields: the trace so many times over, one after the other; prompts share nothing with those of another time.

    Args:
        requests: of a recorded trace.
    """
    span_s = _span_s(requests)
    num_ids = 1 + max((i for r in requests for i in r.hash_ids), default=0)
    for n in range(count):
        for r in requests:
            number, arrival_s = n * len(requests) + r.number, n * span_s + r.arrival_s
            yield Offered(number, arrival_s, r.num_input, r.num_output, r.hash_ids, r.num_shared, n * num_ids)


def _span_s(requests: Sequence[Offered]) -> float:
    """Returns: from one time of a repeated trace to the next."""
    return requests[-1].arrival_s * len(requests) / max(1, len(requests) - 1)


def last_arrival_s(requests: Sequence[Offered], count: int) -> float:
    """Returns: when the last one of `repeated` arrives."""
    return (count - 1) * _span_s(requests) + requests[-1].arrival_s


def own_rate(requests: Sequence[Offered]) -> float:
    """Returns: requests a second from the first arrival to the last."""
    return (len(requests) - 1) / (requests[-1].arrival_s - requests[0].arrival_s)


def at_rate(requests: Sequence[Offered], rate: float) -> list[Offered]:
    """Returns: the same requests, sped up or slowed down to `rate` a second."""
    factor = own_rate(requests) / rate
    return [replace(r, arrival_s=r.arrival_s * factor) for r in requests]
