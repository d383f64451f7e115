"""A request's whole life: what it asks, where it is, and the only table by which it may move on.

The same class travels through every module: the front end makes it (ARRIVED), placement chooses instances (PLACED), decode
reserves blocks (RESERVED), prefill computes (PREFILLING), KV moves (TRANSFERRING), decode generates (DECODING), and it ends
in exactly one of FINISHED, ABORTED, FAILED. `Request.to_wire` is what crosses processes; `Request.local` stays at home.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastdeploy_pd.errors import IllegalTransition, InvalidRequest

MAX_ATTEMPT = 10_000  # of a request; a front end gives up long before
MAX_SLO_S = 1e6  # eleven days
MAX_TOKEN_ID = 2**32 - 1  # tokens are hashed, and sent to frameworks, as 32 bits


class Phase(enum.Enum):
    """Where a request is in its life."""

    ARRIVED = "arrived"  #: validated and tokenised, not placed yet
    PLACED = "placed"  #: instances chosen, decode asked
    RESERVED = "reserved"  #: decode holds blocks for it (or it waits to be scheduled)
    PREFILLING = "prefilling"  #: its prompt's KV is being computed
    TRANSFERRING = "transferring"  #: computed; its last blocks are on their way to decode
    DECODING = "decoding"  #: output tokens are being generated
    FINISHED = "finished"  #: ended by itself
    ABORTED = "aborted"  #: ended by its client
    FAILED = "failed"  #: ended by an error

    __hash__ = object.__hash__  # there is one of each; Enum's own is written in Python, and each step asks for some


TERMINAL_PHASES = frozenset({Phase.FINISHED, Phase.ABORTED, Phase.FAILED})

_ENDS = (Phase.ABORTED, Phase.FAILED)

#: from -> allowed next phases. Going back to ARRIVED is a new attempt at the front end; back to RESERVED is a preemption
#: (blocks given up, computed again later) or a hand-over that failed and is prefilled again.
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.ARRIVED: frozenset({Phase.PLACED, *_ENDS}),
    Phase.PLACED: frozenset({Phase.RESERVED, Phase.ARRIVED, *_ENDS}),
    Phase.RESERVED: frozenset({Phase.PREFILLING, Phase.ARRIVED, *_ENDS}),
    Phase.PREFILLING: frozenset(
        {Phase.TRANSFERRING, Phase.DECODING, Phase.RESERVED, Phase.ARRIVED, Phase.FINISHED, *_ENDS}
    ),
    Phase.TRANSFERRING: frozenset({Phase.DECODING, Phase.RESERVED, Phase.ARRIVED, Phase.FINISHED, *_ENDS}),
    Phase.DECODING: frozenset({Phase.RESERVED, Phase.ARRIVED, Phase.FINISHED, *_ENDS}),
    Phase.FINISHED: frozenset(),
    Phase.ABORTED: frozenset(),
    Phase.FAILED: frozenset(),
}


class FinishReason(enum.StrEnum):
    """Why a request ended; the values are OpenAI's words."""

    STOP = "stop"  #: end-of-sequence token, stop token id or stop string
    LENGTH = "length"  #: max_tokens or the context's end
    ABORT = "abort"  #: the client went away or asked for it
    ERROR = "error"  #: see the chunk's error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. Checked when made."""

    max_tokens: int = 16  #: most output tokens, >= 1
    min_tokens: int = 0  #: no end of sequence before so many output tokens
    temperature: float = 1.0  #: 0 is greedy
    top_p: float = 1.0  #: [0, 1]; of 0 too the likeliest token is left
    top_k: int = 0  #: 0 keeps all tokens
    min_p: float = 0.0  #: [0, 1], relative to the likeliest token
    seed: int = 0  #: random numbers are a function of (seed, position)
    repetition_penalty: float = 1.0  #: [0.01, 10], over prompt and output
    presence_penalty: float = 0.0  #: [-2, 2], over output
    frequency_penalty: float = 0.0  #: [-2, 2], over output
    logit_bias: dict[int, float] = field(default_factory=dict)  #: token id -> added to its logit
    stop: tuple[str, ...] = ()  #: strings that end generation; matched at the front end, where text is made
    stop_token_ids: tuple[int, ...] = ()  #: token ids that end generation
    ignore_eos: bool = False  #: go on past the end-of-sequence token
    logprobs: int | None = None  #: so many likeliest alternatives a token; 0 is the sampled token alone; None is off
    prompt_logprobs: int | None = None  #: the same for the prompt's tokens

    def __post_init__(self) -> None:
        """Raises: InvalidRequest: a field is outside its range; names field, value and range."""
        self._check("max_tokens", self.max_tokens >= 1, ">= 1")
        self._check(
            "min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"between 0 and max_tokens ({self.max_tokens})"
        )
        self._check("temperature", 0.0 <= self.temperature <= 2.0, "between 0 and 2")
        self._check("top_p", 0.0 <= self.top_p <= 1.0, "between 0 and 1")
        self._check("top_k", 0 <= self.top_k < 2**31, "from 0, which keeps all, to below 2**31")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        self._check("seed", -(2**63) <= self.seed < 2**63, "a signed 64-bit integer")
        self._check("repetition_penalty", 0.01 <= self.repetition_penalty <= 10.0, "between 0.01 and 10")
        self._check("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2")
        self._check("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2")
        self._check("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20")
        self._check(
            "prompt_logprobs", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "between 0 and 20"
        )

    def _check(self, name: str, is_valid: bool, allowed: str) -> None:
        if not is_valid:
            raise InvalidRequest(
                f"{name} is {getattr(self, name)!r}; it must be {allowed}.", param=name, code="invalid_value"
            )


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request's user expects, in seconds; None: nothing said. Checked when made."""

    ttft_s: float | None = None  #: from arrival to the first token
    tpot_s: float | None = None  #: mean of each token after the first
    deadline_s: float | None = None  #: from arrival to the end

    def __post_init__(self) -> None:
        """Raises: InvalidRequest: a field is not a number above 0."""
        for name in ("ttft_s", "tpot_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and 0 < value < MAX_SLO_S):
                raise InvalidRequest(
                    f"slo.{name} is {value!r}; it must be above 0 and below {MAX_SLO_S:g}.",
                    param=name,
                    code="invalid_value",
                )


@dataclass(slots=True)
class Timeline:
    """When a request first entered each phase, in seconds on this process's monotonic clock."""

    stamps: dict[Phase, float] = field(default_factory=dict)

    def stamp(self, phase: Phase, now_s: float) -> None:
        """Record the first entry into a phase; later entries (after a preemption) don't move it."""
        self.stamps.setdefault(phase, now_s)

    def seconds_between(self, start: Phase, stop: Phase) -> float | None:
        """Returns: seconds from the first entry into `start` to that into `stop`; None if either never happened."""
        if start not in self.stamps or stop not in self.stamps:
            return None
        return self.stamps[stop] - self.stamps[start]


@dataclass(slots=True)
class Local:
    """What one instance knows of a request; never sent."""

    block_table: list[int] = field(default_factory=list)  #: block ids in token order
    num_computed_tokens: int = 0  #: tokens whose KV is in the pool, or will be when the launched steps have run
    num_cached_tokens: int = 0  #: of these, how many came from the prefix cache at admission
    num_matched_tokens: int = 0  #: tokens of it that the prefix cache had when it was last looked up
    num_pending_tokens: int = 0  #: newest tokens, sampled by launched steps, whose ids are not known here yet
    last_step: int = 0  #: number of the newest launched step that computes it
    num_preemptions: int = 0
    is_preemptible: bool = True  #: False while a transfer reads its blocks as they are computed
    ends_with_next_token: bool = False  #: another instance goes on after the token that follows the prompt
    samples_on_device: bool = False  #: its next token can be computed before the CPU knows the last one
    block_hashes: list[bytes] = field(default_factory=list)  #: chain hashes of the first full blocks
    num_findable_blocks: int = 0  #: of block_table, how many are in the prefix cache (or were when they were added)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)  #: of the prompt's tokens computed so far


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to generate: `num_computed_tokens` chases `num_tokens` until it ends."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""  #: prefix-cache entries are shared only under the same salt
    priority: int = 0  #: lower is served first where the policy looks at it
    attempt: int = 1  #: raised by the front end each time the request is placed again
    output_token_ids: list[int] = field(default_factory=list)  #: what the client has, then what is generated
    front_end_id: str = ""  #: who owns the request and receives its tokens
    slo: Slo = field(default_factory=Slo)
    arrival_s: float = 0.0  #: when its client sent it, on this process's clock; its age is what crosses processes
    tenant: str = ""  #: who shares an instance fairly with others under --fairness vtc
    phase: Phase = Phase.ARRIVED
    timeline: Timeline = field(default_factory=Timeline)
    local: Local = field(default_factory=Local)

    @property
    def num_tokens(self) -> int:
        """Tokens there are: prompt, output, and what launched steps will have added to it."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.local.num_pending_tokens

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose ids are known here: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_done(self) -> bool:
        """Whether the request has had its terminal answer."""
        return self.phase in TERMINAL_PHASES

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Returns: token ids at positions [start, stop) of prompt + output; 0 stands for a pending token."""
        num_prompt = len(self.prompt_token_ids)
        num_unknown = stop - num_prompt - len(self.output_token_ids)
        if num_unknown > 0:
            return self.token_ids(start, stop - num_unknown) + [0] * num_unknown
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]

    def advance(self, phase: Phase, now_s: float) -> None:
        """Enter a phase; the only way to change it.

        Raises: IllegalTransition: the table does not allow it. Nothing has changed then.
        """
        if phase not in TRANSITIONS[self.phase]:
            raise IllegalTransition(f"request {self.request_id} cannot go from {self.phase.name} to {phase.name}")
        self.phase = phase
        self.timeline.stamp(phase, now_s)

    def finish_reason_after(self, token_id: int, max_model_len: int) -> FinishReason | None:
        """Whether `token_id`, already appended to the output, ends the request.

        Args:
            token_id: the newest output token.
            max_model_len: most tokens a sequence may have.
        Returns: the reason, or None to go on.
        """
        sampling = self.sampling
        num_output = len(self.output_token_ids)
        if num_output >= sampling.min_tokens:
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP
            if token_id in self.eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP
        if num_output >= sampling.max_tokens or self.num_known_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None

    def to_wire(self, now_s: float = 0.0) -> dict[str, Any]:
        """Returns: plain values for MessagePack: everything but phase, timeline and local; the age in place of the arrival."""
        wire = {name: getattr(self, name) for name in _WIRE_FIELDS}
        wire["slo"], wire["age_s"] = asdict(self.slo), now_s - wire.pop("arrival_s")
        wire["sampling"] = {**asdict(self.sampling), "logit_bias": [list(i) for i in self.sampling.logit_bias.items()]}
        for values, name in ((wire, "eos_token_ids"), (wire["sampling"], "stop"), (wire["sampling"], "stop_token_ids")):
            values[name] = list(values[name])  # what MessagePack gives back
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any], now_s: float = 0.0) -> Request:
        """Raises: InvalidRequest: a field is missing, unknown or out of range."""
        values = dict(wire)
        try:
            age_s = values.pop("age_s", 0.0)
            if not (type(age_s) in (int, float) and 0 <= age_s < MAX_SLO_S):
                raise InvalidRequest(f"age_s is {age_s!r}; it must be from 0 to below {MAX_SLO_S:g}")
            values["slo"], values["arrival_s"] = Slo(**values.get("slo", {})), now_s - age_s
            sampling = dict(values.pop("sampling"))
            sampling["logit_bias"] = {int(k): float(v) for k, v in sampling.get("logit_bias", ())}
            sampling["stop"] = tuple(sampling.get("stop", ()))
            sampling["stop_token_ids"] = tuple(sampling.get("stop_token_ids", ()))
            values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
            values["prompt_token_ids"] = list(values["prompt_token_ids"])
            values["output_token_ids"] = list(values.get("output_token_ids", ()))
            unknown = set(values) - set(_WIRE_FIELDS)
            if unknown:
                raise InvalidRequest(f"unknown request fields {sorted(unknown)}")
            for name, code in (("prompt_token_ids", "I"), ("output_token_ids", "I"), ("eos_token_ids", "q")):
                array(code, values[name])  # integers and nothing else; blocks are hashed by the first two
            request = cls(sampling=SamplingParams(**sampling), **values)
            for name, kind in (
                ("request_id", str),
                ("cache_salt", str),
                ("tenant", str),
                ("front_end_id", str),
                ("priority", int),
                ("attempt", int),
            ):
                if type(getattr(request, name)) is not kind:
                    raise TypeError(f"{name} is {getattr(request, name)!r}; it must be {kind.__name__}")
            if not 1 <= request.attempt <= MAX_ATTEMPT:
                raise InvalidRequest(f"attempt is {request.attempt}; it must be from 1 to {MAX_ATTEMPT}")
            return request
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"not a request: {error}") from error


_WIRE_FIELDS = tuple(f.name for f in fields(Request) if f.name not in ("phase", "timeline", "local"))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one token and of the likeliest alternatives at its position."""

    token_id: int
    logprob: float  #: natural logarithm, after temperature 1 (raw model distribution)
    top: tuple[tuple[int, float], ...] = ()  #: (token id, logprob), likeliest first


@dataclass(slots=True)  # not frozen: there is one a token, and freezing makes it six times as slow to make
class TokenChunk:
    """Some consecutive output tokens of one request; idempotent by (request_id, attempt, index)."""

    request_id: str
    attempt: int
    index: int  #: position of the first token among the request's output tokens
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  #: set on the last chunk only
    logprobs: tuple[TokenLogprobs, ...] = ()  #: one a token where asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  #: one a prompt token (the first is None), with index 0 only
    num_cached_tokens: int = 0  #: prompt tokens found in the prefix cache
    error: str = ""  #: with FinishReason.ERROR: what happened
    error_code: str = ""
    served_by: str = ""  #: instance that computed these tokens
    stage_s: tuple[tuple[str, float], ...] = ()  #: (stage, seconds) measured by the sender, for metrics and traces
    num_kv_bytes: int = 0  #: KV bytes that were moved for this request, with its first decode chunk


def print_transitions() -> str:
    """Returns: the transition table as docs/life_of_a_request.md shows it, a line a phase."""
    order = list(Phase)
    return "\n".join(
        f"{p.name} -> {', '.join(q.name for q in order if q in TRANSITIONS[p]) or '(final)'}" for p in order
    )
