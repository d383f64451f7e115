"""Requests of a recorded trace: when they came, how long they were, and which of them began alike."""

from __future__ import annotations

import gzip
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from fastdeploy_pd.errors import ConfigError

TRACE = Path(__file__).parent / "data" / "mooncake_conversation.jsonl.gz"
NUM_REQUESTS = 300  # of that file
BLOCK_TOKENS = 512  # that a hash id of the trace stands for
MAX_INPUT_TOKENS = 7000


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request."""

    arrival_s: float
    num_input: int
    num_output: int
    block_tokens: int
    hash_ids: tuple[int, ...]

    def prompt(self, vocab_size: int, salt: str) -> list[int]:
        """Returns: random token ids; requests with equal hash ids begin alike, under the same salt."""
        ids: list[int] = []
        for hash_id in self.hash_ids:
            rng = random.Random(f"{salt}:{hash_id}")
            ids += [rng.randrange(vocab_size) for _ in range(self.block_tokens)]
        return ids[: self.num_input]


def load(num_requests: int, max_model_len: int, scale: float = 1.0, path: Path = TRACE) -> list[TraceRequest]:
    """Read a trace's first requests; inputs are cut to MAX_INPUT_TOKENS, outputs to what max_model_len leaves.

    Args:
        scale: of lengths, and of the blocks that may be equal, for a machine that is slower by as much.
    Returns: in order of arrival, the first at 0 s, at the trace's own rate.
    Raises: ConfigError: max_model_len has no room for the longest input and two tokens, or the trace is shorter.
    """
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    if not 2 <= num_requests <= len(rows):
        raise ConfigError(f"--requests is {num_requests}; it must be a whole number from 2 to {len(rows)}")
    rows = rows[:num_requests]
    longest = min(MAX_INPUT_TOKENS, max(row["input_length"] for row in rows))
    num_input = max(2, round(longest * scale))
    if max_model_len < num_input + 2:
        fitting = math.floor(1e4 * (max_model_len - 2) / longest) / 1e4
        raise ConfigError(
            f"--max-model-len is {max_model_len}; prompts of {num_input} tokens need {num_input + 2}: it must be as much, "
            f"or --scale, which is {scale:g}, {fitting:g} at most"
        )
    requests = []
    for row in rows:
        num_input = max(2, round(min(row["input_length"], MAX_INPUT_TOKENS) * scale))
        num_output = min(max_model_len - num_input, max(2, round(row["output_length"] * scale)))
        block_tokens = max(1, round(BLOCK_TOKENS * scale))
        hash_ids = tuple(row["hash_ids"])
        num_input = min(num_input, block_tokens * len(hash_ids))  # rounding
        arrival_s = (row["timestamp"] - rows[0]["timestamp"]) / 1e3
        requests.append(TraceRequest(arrival_s, num_input, num_output, block_tokens, hash_ids))
    return requests


def arrivals(requests: list[TraceRequest], rate: float) -> list[float]:
    """Returns: when each comes, in seconds, with the trace's rhythm at `rate` requests a second."""
    own_rate = (len(requests) - 1) / requests[-1].arrival_s
    return [request.arrival_s * own_rate / rate for request in requests]
