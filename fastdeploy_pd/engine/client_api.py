"""What the API layer needs of the cluster."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from fastdeploy_pd.request import Request, TokenChunk


@dataclass(frozen=True, slots=True)
class HealthReport:
    """Whether a request sent now would be served, and what a person would like to know besides."""

    is_ready: bool
    detail: dict[str, object] = field(default_factory=dict)


class EngineClient(Protocol):
    """Generates tokens, somewhere."""

    def generate(self, request: Request) -> AsyncGenerator[list[TokenChunk], None]:
        """Yield the request's chunks in order, all that are there at once; each token index exactly once; the last has a finish reason.

        Closing the iterator early aborts the request on all instances.
        Raises: FastDeployPDError: the terminal answer is an error.
        """
        ...

    async def health(self) -> HealthReport:
        """Returns: the state of the cluster as this front end sees it."""
        ...
