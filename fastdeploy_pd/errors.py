"""Every error this project raises on purpose: one tree.

Each class says whose fault it is (`fault`: "client", "server" or "operator"), the HTTP status it becomes at the edge
(`status`), OpenAI's error `type` and `code`, and whether the same request may succeed later (`retryable`).
"""

from __future__ import annotations

from typing import ClassVar, Literal


class FastDeployPDError(Exception):
    """Something went wrong inside the cluster."""

    fault: ClassVar[Literal["client", "server", "operator"]] = "server"
    status: int = 500  #: the class's, unless one error says otherwise
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    retryable: ClassVar[bool] = False
    retry_after_s: int = (
        1  #: whole seconds after which a retryable request may succeed; the class's, unless one error says otherwise
    )

    def __init__(self, message: str | None = None, *, param: str | None = None, code: str | None = None) -> None:
        """
        Args:
            message: what went wrong, for a person; the class's docstring when not given.
            param: the request field (dotted path) or flag at fault.
            code: machine-readable code; the class's when not given.
        """
        self.message = message or (self.__doc__ or type(self).__name__).strip().split("\n")[0]
        self.param = param
        self.code = code if code is not None else self.default_code
        super().__init__(self.message)


class InvalidRequest(FastDeployPDError):
    """The request is not valid."""

    fault = "client"
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the tokens asked for do not fit the model's context."""

    default_code = "context_length_exceeded"


class AuthenticationFailed(InvalidRequest):
    """No valid API key was given."""

    status = 401


class ModelNotFound(InvalidRequest):
    """No such model is served here."""

    status = 404
    default_code = "model_not_found"


class Conflict(InvalidRequest):
    """The present state of the instance or its topic does not allow this."""

    status = 409
    default_code = "conflict"


class RequestAborted(FastDeployPDError):
    """The request was aborted."""

    fault = "client"
    status = 499
    type = "request_aborted"


class Overloaded(FastDeployPDError):
    """The cluster has no room for this request now."""

    status = 429
    type = "rate_limit_exceeded"
    default_code = "overloaded"
    retryable = True


class DeadlineUnreachable(Overloaded):
    """The request cannot end by its deadline, as busy as the cluster is."""

    default_code = "deadline_unreachable"

    def __init__(self, message: str | None = None, *, retry_after_s: int = 1) -> None:
        """
        Args:
            retry_after_s: after so long its deadline can be met, as predicted.
        """
        super().__init__(message, param="deadline")
        self.retry_after_s = retry_after_s


class NoCapacity(FastDeployPDError):
    """No instance is left that could serve this request."""

    status = 503
    default_code = "no_capacity"
    retryable = True


class DeadlineExceeded(FastDeployPDError):
    """The request did not finish before its deadline."""

    status = 504
    default_code = "timeout"  # its deadline has passed: who waited for it has no use for another try


class CoordinatorLost(FastDeployPDError):
    """Redis cannot be reached."""

    status = 503
    default_code = "coordinator_lost"
    retryable = True


class ForeignData(CoordinatorLost):
    """A key of ours in Redis holds what somebody else has put there."""

    default_code = "foreign_data"


class QueueFull(Overloaded):
    """The topic's request queue in Redis is full."""

    default_code = "queue_full"


class ConfigError(FastDeployPDError):
    """A flag, environment variable or configuration file is wrong."""

    fault = "operator"


class ModelLoadError(ConfigError):
    """The model directory cannot be served."""


class OutOfBlocks(FastDeployPDError):
    """The KV cache has no free block left."""

    status = 429
    default_code = "overloaded"
    retryable = True


class IllegalTransition(FastDeployPDError):
    """A request may not enter this phase from the one it is in."""


class ProtocolError(FastDeployPDError):
    """A peer sent something this version does not understand."""


class TransferUnavailable(ConfigError):
    """A transfer backend cannot be used on this machine; another may."""


class TransferError(FastDeployPDError):
    """KV blocks could not be moved."""


class IncompatiblePeer(TransferError):
    """The peer's KV cache does not fit ours."""


class ChecksumMismatch(TransferError):
    """The bytes that arrived are not the bytes that were computed."""


class LinkLost(FastDeployPDError):
    """The connection to a peer ended."""

    retryable = True
