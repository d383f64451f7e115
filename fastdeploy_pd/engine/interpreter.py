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


def keep() -> None:
    """What is in use by now is kept and never looked through again. Called again and again: tokens that are kept for repeats are many, and
    to look through them all stops streams for 0.1 s and more."""
    gc.collect(1)
    gc.freeze()


def share_lock() -> None:
    """Have threads that want the interpreter's lock get it within SWITCH_S."""
    sys.setswitchinterval(SWITCH_S)
