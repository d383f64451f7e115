"""What one engine step computes: for each scheduled request a run of consecutive positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdeploy_pd.errors import OutOfBlocks
from fastdeploy_pd.request import Request


def slot_mapping(block_table: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """Slots in the KV cache of the tokens [start, stop) of one request.

    Args:
        block_table: [>= ceil(stop / block_size)] block ids, in token order.
        start, stop: token positions within the request.
        block_size: tokens a block holds.
    Returns: [stop - start] ints, each block_id * block_size + offset.
    Raises: OutOfBlocks: stop lies past the table.
    Source: Kwon et al., SOSP 2023, PagedAttention.
    """
    if stop > len(block_table) * block_size:
        raise OutOfBlocks(f"position {stop - 1} lies past a table of {len(block_table)} blocks of {block_size} tokens")
    return [block_table[p // block_size] * block_size + p % block_size for p in range(start, stop)]


@dataclass(slots=True)  # not frozen: there is one a sequence and step
class ScheduledSequence:
    """The positions [start, stop) of one request, computed in this step.

    While the step runs the request goes on: its block table and token_ids hold as long as `Runner.launch` runs, no longer.
    """

    request: Request
    start: int
    stop: int
    num_pending: int = field(init=False)  #: 1 if the last token is what the step launched before samples; else 0
    needs_sample: bool = field(init=False)  #: whether it reaches the newest token, so that the next one is sampled

    def __post_init__(self) -> None:
        request = self.request
        num_beyond = self.stop - len(request.prompt_token_ids) - len(request.output_token_ids)
        self.num_pending = num_beyond if num_beyond > 0 else 0
        self.needs_sample = num_beyond == request.local.num_pending_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return self.stop - self.start

    @property
    def token_ids(self) -> list[int]:
        """[num_tokens] the token ids to compute; 0 for a pending one."""
        return self.request.token_ids(self.start, self.stop)


@dataclass(slots=True)  # not frozen, like ScheduledSequence
class Batch:
    """One step: every sequence that takes part, in the order of the results."""

    sequences: list[ScheduledSequence] = field(default_factory=list)
    block_size: int = 64

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(s.num_tokens for s in self.sequences)

    def __bool__(self) -> bool:
        return bool(self.sequences)
