"""How kernels are launched: while the one before them ends, or, before the first, only to be compiled.

Each tells that the next may be launched and waits for the results of the one before it as its first act (what it reads earlier is
constant), so what a launch costs is hidden. Source: CUDA's programmatic dependent launch, from compute capability 9.0 on.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl

IS_CHAINED = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
_IS_CHAINED = tl.constexpr(IS_CHAINED)
MOST_COMPILERS = 16  # threads
_only_compiles: ContextVar[bool] = ContextVar("only_compiles", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel; inside `compiling` it is not run."""
    if _only_compiles.get():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


@contextmanager
def compiling() -> Iterator[None]:
    """Kernels launched inside are compiled, side by side, by the time it ends. What they would have written is left as it is."""
    with ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1)) as threads, triton.AsyncCompileMode(threads):
        token = _only_compiles.set(True)
        try:
            yield
        finally:
            _only_compiles.reset(token)


@triton.jit
def wait_for_inputs():
    """Return when all that was queued before is done and can be seen."""
    if _IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
