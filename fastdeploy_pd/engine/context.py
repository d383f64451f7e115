"""What the parts of one engine share: scheduler, pool, transfers, outbox, counters and the options of the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.core.scheduler import Scheduler
from fastdeploy_pd.engine.outbox import Outbox
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.request import Request, TokenLogprobs
from fastdeploy_pd.transfer.base import Transfer


class StepOutput(Protocol):
    """What a step yields for one sequence."""

    token_id: int | None  #: sampled iff the sequence reached its last known token
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    error: FastDeployPDError | None  #: why this sequence, and it alone, cannot go on


class Step(Protocol):
    """A batch that is being computed. Steps end in the order in which they were launched."""

    def poll(self) -> bool:
        """Hand over the layers whose K and V of the whole batch are in the pool by now, in order. Does not wait.

        Returns: whether all layers were handed over and the outputs are there. Raises: see `outputs`.
        """
        ...

    def outputs(self) -> Sequence[StepOutput]:
        """Returns: one output a sequence; waits for them.

        Raises: FastDeployPDError: none of them can go on; the step writes nothing any more.
        """
        ...


class Runner(Protocol):
    """Computes batches; see `model/runner.py`."""

    depth: int  #: steps that may be in flight: 1, or 2: the next is launched before this one's outputs are known

    @property
    def is_nearly_done(self) -> bool:
        """Whether the steps in flight end soon, or nobody knows when."""
        ...

    @property
    def is_queued(self) -> bool:
        """Whether the device has the steps in flight wholly; if not, what is launched waits behind the rest of them."""
        ...

    @property
    def can_advance(self) -> bool:
        """Whether `poll` would queue more of a step at once; if not, it waits for the device, or for a launch."""
        ...

    def prepare_more(self) -> bool:
        """Do a bit, of up to 90 ms, of what would make a later step begin late. Called while there is nothing to compute.

        Returns: whether there was any.
        """
        ...

    def samples_on_device(self, request: Request) -> bool:
        """Whether a request's next token can be computed before the CPU knows its last one. Constant for a request.

        False where sampling looks at the tokens so far or the CPU takes part in it (penalties, log-probabilities, ...).
        """
        ...

    def launch(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> Step:
        """Begin to compute a batch; what it needs of the requests (block tables, token ids) is read before this returns.

        A sequence's pending token is the one that the step launched before samples for the same request.

        Args:
            on_layer: called by `poll`, or here already, with the index of a layer when its K and V, and those of all layers before it,
                are in the pool: with rising ones, the last one's at the end.
        Raises: FastDeployPDError: none of them can go on, and nothing was launched.
        """
        ...


class HandOverObserver(Protocol):
    """Receives what happens at hand-overs, and to a user's policy, for the metrics."""

    def handover(self, stages: Mapping[str, float], num_bytes: int, backend: str) -> None:
        """A hand-over was verified."""
        ...

    def handover_failed(self, reason: str) -> None:
        """A hand-over ended without success; `reason` is one of a few words."""
        ...

    def fetched(self, num_tokens: int, num_bytes: int, seconds: float) -> None:
        """A prefix was fetched from a peer and verified."""
        ...

    def fetch_failed(self, reason: str) -> None:
        """A prefix was not fetched after all; `reason` is one of a few words."""
        ...

    def fell_back(self, peer_id: str, backend: str, passed_over: Sequence[str]) -> None:
        """A hand-over takes another backend than the first named; `passed_over` has "name: reason" of each preferred one."""
        ...

    def no_backend(self, peer_id: str, reason: str) -> None:
        """An order is refused because no backend fits both pools; the reason names what differs."""
        ...

    def policy_failed(self) -> None:
        """A user's prefill policy failed for one step."""
        ...


class NoObserver:
    """Observes nothing."""

    def handover(self, stages: Mapping[str, float], num_bytes: int, backend: str) -> None:
        """See HandOverObserver."""

    def handover_failed(self, reason: str) -> None:
        """See HandOverObserver."""

    def fetched(self, num_tokens: int, num_bytes: int, seconds: float) -> None:
        """See HandOverObserver."""

    def fetch_failed(self, reason: str) -> None:
        """See HandOverObserver."""

    def fell_back(self, peer_id: str, backend: str, passed_over: Sequence[str]) -> None:
        """See HandOverObserver."""

    def no_backend(self, peer_id: str, reason: str) -> None:
        """See HandOverObserver."""

    def policy_failed(self) -> None:
        """See HandOverObserver."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The protocol's times, in seconds, and bounds."""

    resend_s: float = 1.0  #: an unanswered message is sent again
    query_s: float = 2.0  #: an accepted order that says nothing is asked after
    arrival_s: float = 30.0  #: a hand-over whose bytes don't come is given up
    fetch_s: float = 5.0  #: a prefix that has not come from a peer by then is computed
    stuck_s: float = (
        5.0  #: an instance that computes nothing for so long, for lack of blocks, gives up an order that waits for them
    )
    min_fetch_tokens: int = 0  #: see core/fetch.py; 0: nothing is fetched
    local_prefill_tokens: int = 0  #: no more left of a prompt than so many: decode computes them itself
    beat_s: float = 0.25
    peer_timeout_s: float = 3.0  #: a prefill instance whose step counter stands still is lost
    front_end_timeout_s: float = 7.0  #: a silent front end's requests are aborted
    record_s: float = 60.0  #: ended requests and grants are remembered so long, for repeated messages
    max_records: int = 20_000
    max_queued_tokens: int = 1_000_000  #: more is refused: back-pressure starts here
    max_queued_requests: int = 4_096


@dataclass(slots=True)
class EngineContext:
    """Shared by the engine's parts; single-threaded."""

    instance_id: str
    scheduler: Scheduler
    backends: Mapping[
        str, Transfer | str
    ]  #: by name, in order of preference; a string says why one cannot be used here
    options: EngineOptions = field(default_factory=EngineOptions)
    outbox: Outbox = field(default_factory=Outbox)
    observer: HandOverObserver = field(default_factory=NoObserver)
    new_id: Callable[[], str] = field(kw_only=True)  #: makes ids that are unique for ever
    new_nonce: Callable[[], int] = field(kw_only=True)  #: makes 63-bit random numbers

    num_layers: int = field(default=0, kw_only=True)  #: of the KV pool; 0: its cached blocks are not sent to peers
    transfers: Mapping[str, Transfer] = field(init=False)  #: the backends that can be used here

    def __post_init__(self) -> None:
        self.transfers = {name: backend for name, backend in self.backends.items() if not isinstance(backend, str)}

    def revoke(self, epoch: str) -> None:
        """After it returns no write of the epoch lands, whatever the backend."""
        for transfer in self.transfers.values():
            transfer.revoke(epoch)
