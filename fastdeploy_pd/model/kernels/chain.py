"""Kernels that are launched while the one before them ends.

Each tells that the next may be launched and waits for the results of the one before it as its first act (what it reads earlier is
constant), so what a launch costs is hidden. Source: CUDA's programmatic dependent launch, from compute capability 9.0 on.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

IS_CHAINED = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
_IS_CHAINED = tl.constexpr(IS_CHAINED)


@triton.jit
def wait_for_inputs():
    """Return when all that was queued before is done and can be seen."""
    if _IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
