"""Directories in TMPDIR that belong to one process: it removes its own, and those that killed ones have left.

Who has one holds a lock on it (flock), which the kernel gives back however the process ends: what can be locked belongs to nobody.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from fastdeploy_pd.errors import ConfigError

TRIES = 100  # another process may take a directory that is not locked yet for a dead one's


class ScratchDirectory:
    """A directory that nobody else uses or removes; `path` is where."""

    def __init__(self, kind: str) -> None:
        """
        Args:
            kind: a word of its name; what killed processes of this user have left of this kind is removed.
        Raises: ConfigError: there is no place for it.
        """
        prefix = f"fastdeploy-pd-{kind}-"
        try:
            for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
                _remove_if_left(path)
            for _ in range(TRIES):
                self.path = Path(tempfile.mkdtemp(prefix=prefix))
                try:
                    opened = _open(self.path)
                except OSError:
                    self.path.rmdir()
                    raise
                if opened is not None:
                    self._opened = opened[0]
                    return
        except OSError as error:
            raise ConfigError(f"no directory can be made in TMPDIR: {error}") from error
        raise ConfigError(f"{self.path} was removed by somebody at once, and so were {TRIES - 1} before it")

    def remove(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        if self._opened >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._opened)
            self._opened = -1


def _open(path: Path) -> tuple[int, bool] | None:
    """Returns: a file descriptor, and whether it holds the lock, as not every file system has locks; None: it is gone, or somebody's.

    Raises: OSError: it cannot be opened.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    is_locked = True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        return None
    except OSError:
        is_locked = False
    if not path.is_dir() or os.fstat(opened).st_uid != os.geteuid():  # who had the lock before may have removed it
        os.close(opened)
        return None
    return opened, is_locked


def _remove_if_left(path: Path) -> None:
    """Remove a directory that nobody has locked."""
    try:
        found = _open(path)
    except OSError:  # no directory, or another user's
        return
    if found is None:
        return
    opened, is_locked = found
    if is_locked:
        shutil.rmtree(path, ignore_errors=True)
    os.close(opened)
