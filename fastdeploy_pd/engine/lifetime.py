"""What a process asks of the kernel when it starts: to end with its parent, so that nothing is left running whatever kills that one,
and as many open files as it may have.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PARENT_PID = "FD_PARENT_PID"  # in the environment of a child: who started it
MAX_FILES = 65536  # more would only make what closes all files of a child slow, where there is no limit


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


def raise_file_limit() -> None:
    """Raise this process's limit of open files, and that of its children, to `allowed_files`: shells give 1024, and each client and
    peer takes one.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed_files(), hard))


def allowed_files() -> int:
    """Returns: how many open files an instance may have: what it was given, or more where the hard limit lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return soft if soft == resource.RLIM_INFINITY else max(soft, MAX_FILES)
    return min(hard, max(soft, MAX_FILES))
