"""A second process of a benchmark, joined to this one by a pipe. If it fails, this one says why in a line and ends with status 2."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

WATCHER_S = 2.0  # that a watcher may take to notice an end, which the pipe may have told before
_is_over = threading.Event()  # from then on nobody waits for the others: they are ended with this process
_watchers: list[threading.Thread] = []


def start(target: Callable[..., None], *arguments: Any) -> tuple[Connection, BaseProcess]:
    """Start a process that calls target(pipe, *arguments). Returns: this end of the pipe, and the process.

    Who waits for it, on the pipe or for what it sends through a GPU, may wait for ever once it is gone: a thread watches it, and ends
    this process.
    """
    context = mp.get_context("spawn")
    pipe, other = context.Pipe()
    failures, failed = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(target, other, failed, *arguments), daemon=True)
    process.start()
    other.close()
    failed.close()
    _watchers.append(threading.Thread(target=_watch, args=(process, failures, target.__name__), daemon=True))
    _watchers[-1].start()
    return pipe, process


def watched(main: Callable[[], int]) -> int:
    """Returns: the exit status of what has started processes. What fails in it because one of these is gone is left to its watcher."""
    try:
        return main()
    except Exception:
        for watcher in _watchers:
            watcher.join(WATCHER_S)
        raise
    finally:
        _is_over.set()


def _run(target: Callable[..., None], pipe: Connection, failed: Connection, *arguments: Any) -> None:
    try:
        target(pipe, *arguments)
    except EOFError:
        return  # the parent is gone
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent says it
        failed.send(f"{type(error).__name__}: {error}")
    else:
        failed.send("")


def _watch(process: BaseProcess, failures: Connection, name: str) -> None:
    try:
        why = failures.recv()
    except EOFError:
        process.join()
        while process.exitcode is None:  # another thread, which joins it too, is about to note it
            time.sleep(0.01)
        why = f"exit status {process.exitcode}"
    if why and not _is_over.is_set():
        sys.stdout.flush()
        sys.stderr.write(f"error: {name} has ended: {' '.join(why.split())}\n")
        sys.stderr.flush()
        os._exit(2)
