"""What an instance's processes ask of Python itself: its collector of cyclic garbage, and the lock that its threads share."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_S = 0.0001  # at Python's 5 ms each word of the threads that move K and V waits for the one that computes


@contextmanager
def uncollected() -> Iterator[None]:
    """What is made in here (modules, a model) is kept and never looked through: a sixth less to import torch, shorter stops later."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def share_lock() -> None:
    """Have threads that want the interpreter's lock get it within SWITCH_S."""
    sys.setswitchinterval(SWITCH_S)
