"""The signals that end an instance, remembered from its first moment on: who comes to wait for them sees what has come before.

A handler that raised would raise in the middle of an import or of a destructor, where others swallow it.
"""

from __future__ import annotations

import signal

#: the last one is our own SIGTERM, between processes of an instance: a SIGTERM that follows or went before is the operator's only one
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """Those that this process has received."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.install()

    def install(self) -> None:
        """Remember what comes from now on; again after an event loop, which takes its own handlers away."""
        for number in SIGNALS:
            signal.signal(number, lambda number, _frame: self.received.append(number))

    def ignore(self) -> None:
        """All is done that they ask for."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @property
    def is_gentle(self) -> bool:
        """Whether the first one lets running requests end."""
        return self.received[:1] in ([signal.SIGTERM], [signal.SIGUSR1])

    @property
    def is_hurried(self) -> bool:
        """Whether one came that doesn't want to wait for what the first one began."""
        num_from_operators = sum(number != signal.SIGUSR1 for number in self.received)
        return num_from_operators > 1 or signal.SIGINT in self.received[1:]
