"""What front ends, decode and prefill instances say to each other: one frozen dataclass a message.

Every message may be lost, late or repeated; the machines in `engine/` are built for that. Who resends what until which answer
is said in each class. `links.py` puts them on the wire (MessagePack, with PROTOCOL_VERSION). Requests travel in their wire form
(`Request.to_wire`). An attempt is named by (request_id, attempt); a hand-over by its grant_id, unique for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.request import MAX_ATTEMPT, TokenChunk

PROTOCOL_VERSION = 6
MAX_DRAIN_S = 86_400.0
MAX_STEP_S = 86_400.0  # a sender whose steps take longer counts as lost
RoleName = Literal["prefill", "decode", "mixed"]
BlockId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


@dataclass(frozen=True, slots=True)
class Peer:
    """How to reach an instance: part of its member record."""

    instance_id: str
    address: str  #: ZeroMQ endpoint of its links socket


# front end -> decode (or mixed)


@dataclass(frozen=True, slots=True)
class Reserve:
    """Take this request. Resent until Reserved, Refused or Tokens comes, or the link ends. Idempotent by (request_id, attempt)."""

    request: dict[str, Any]
    prefill: Peer | None  #: who computes the prompt; None: the receiver itself
    holder: Peer | None = (
        None  #: whose prefix cache has most of the prompt, as far as the sender knows; maybe the receiver's
    )
    num_held_tokens: int = 0  #: so many of the first ones


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop this attempt (and all earlier ones) and free its blocks. No answer."""

    request_id: str
    attempt: Annotated[int, msgspec.Meta(ge=1, le=MAX_ATTEMPT)]


@dataclass(frozen=True, slots=True)
class Query:
    """No news for a while: send what there is from next_index on. Answered by Progress (and Tokens), or Unknown."""

    request_id: str
    attempt: int
    next_index: int


# decode (or mixed) -> front end


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks are held, the request will be served."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Not served here; place it elsewhere. Nothing is held."""

    request_id: str
    attempt: int
    reason: str
    code: str = "overloaded"
    is_final: bool = False  #: no other instance would take it either (an invalid request)
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Answer to Query: the attempt lives; its phase, for the waiting front end."""

    request_id: str
    attempt: int
    phase: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """Answer to Query: no such attempt here (any more)."""

    request_id: str
    attempt: int


# any engine -> front end


@dataclass(frozen=True, slots=True)
class Tokens:
    """All new tokens of one step for one front end. Front ends order and deduplicate them by index."""

    chunks: tuple[TokenChunk, ...]


# decode -> prefill, and FetchOrder from any of them to a peer


@dataclass(frozen=True, slots=True)
class PrefillOrder:
    """Compute this prompt and write its blocks to mine. Resent until OrderAccepted, OrderRefused or HandOver comes; executed at most once."""

    grant_id: Annotated[str, msgspec.Meta(pattern="^[^@]*$")]  #: an @ is for names of ranks' parts of it
    nonce: int  #: seed of the checksums, 63 bits; differs for every grant
    request: dict[str, Any]
    first_block: int  #: index in the block table of the first block wanted (earlier ones are in decode's prefix cache)
    block_ids: tuple[BlockId, ...]  #: decode's blocks for table positions first_block, first_block + 1, ...
    decode_id: str
    transfers: dict[str, dict[str, Any]]  #: decode's transfer descriptors by backend name
    holder: Peer | None = (
        None  #: whose prefix cache has more of the prompt than others', decode's own perhaps; None: nobody's
    )
    num_held_tokens: int = 0  #: so many of the first ones
    num_generated: int = (
        0  #: tokens that decode has generated, ever, after prompts of this tenant that the receiver computed
    )


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """Write blocks of your prefix cache to mine; compute nothing. Goes on like a PrefillOrder; executed at most once."""

    grant_id: Annotated[str, msgspec.Meta(pattern="^[^@]*$")]
    nonce: int
    block_hashes: tuple[bytes, ...]  #: of consecutive blocks of a prompt
    block_ids: tuple[BlockId, ...]  #: decode's blocks for them
    decode_id: str
    transfers: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class CancelOrder:
    """Stop this grant: send no more of it. Resent until OrderEnded comes, where decode waits for it."""

    grant_id: str


@dataclass(frozen=True, slots=True)
class OrderQuery:
    """Is this grant known and alive? Answered by OrderAccepted, HandOver or OrderEnded."""

    grant_id: str


@dataclass(frozen=True, slots=True)
class HandOverAck:
    """Decode has taken (or given up) this hand-over; prefill may free its blocks."""

    grant_id: str
    is_good: bool


# prefill -> decode


@dataclass(frozen=True, slots=True)
class OrderAccepted:
    """The order is queued or being computed."""

    grant_id: str


@dataclass(frozen=True, slots=True)
class OrderEnded:
    """This grant is over without a hand-over: refused, failed, cancelled or unknown. No write of it is in flight or will follow."""

    grant_id: str
    reason: str
    was_cancelled: bool = False
    num_held_blocks: int = 0  #: of a FetchOrder that asks for more: so many of its first blocks are here


@dataclass(frozen=True, slots=True)
class HandOver:
    """Every block of the grant was written. Resent until HandOverAck."""

    grant_id: str
    chunk: (
        TokenChunk | None
    )  #: the output token that follows the prompt, as prefill has sent it to the front end; of a fetch: None
    digests: tuple[int, ...]  #: checksum of each block in block_ids order, as computed at the source
    num_bytes: Annotated[int, msgspec.Meta(ge=0)]
    backend: str
    stage_s: tuple[tuple[str, float], ...] = ()


# an API process, for its admin endpoints, or the topic's elastic leader -> engine


@dataclass(frozen=True, slots=True)
class Command:
    """Change your role, or drain; with neither, only say how you stand. Resent until Standing comes; idempotent."""

    command_id: str
    role: RoleName | None = None
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_DRAIN_S)] | None = (
        None  #: leave the topic and end when nothing is served any more, at most so many seconds later
    )


@dataclass(frozen=True, slots=True)
class Standing:
    """Answer to Command, once it is obeyed."""

    command_id: str
    role: RoleName
    role_age_s: float  #: since it has this role
    num_requests: int  #: attempts that it serves
    num_orders: int  #: prefill orders that are not over
    drain_left_s: float | None = None  #: not None: it drains, for so long at most


# everyone -> everyone connected


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life: `counter` moves when the sender's main loop does. Dead = unchanged for too long on the observer's clock."""

    counter: int
    outstanding_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    longest_step_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_STEP_S)] = 0.0
    is_draining: bool = False
    load: Load | None = None  #: of an instance that knows what its steps take; says it, too
    role: RoleName | None = None  #: of an engine, as it is now: the member record may come later


Message = (
    Reserve
    | Abort
    | Query
    | Reserved
    | Refused
    | Progress
    | Unknown
    | Tokens
    | PrefillOrder
    | FetchOrder
    | CancelOrder
    | OrderQuery
    | HandOverAck
    | OrderAccepted
    | OrderEnded
    | HandOver
    | Command
    | Standing
    | Beat
)
