"""Ties a child process's life to its parent's, so that nothing is left running whatever kills the parent."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PARENT_PID = "FD_PARENT_PID"  # in the environment of a child: who started it


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGKILL to this process when its parent ends. Linux only; elsewhere it does nothing.

    Args:
        parent_pid: if that is not the parent, which died before this call, the process ends at once.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        prctl = libc.prctl
    except (OSError, AttributeError):
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)
