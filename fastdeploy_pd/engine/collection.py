"""Python's collector of cyclic garbage, which starting a process gives nothing to find."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """What is made in here (modules, a model) is kept and never looked through: a sixth less to import torch, shorter stops later."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
