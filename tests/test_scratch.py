"""A directory of one process: it stays while the process lives, however many begin meanwhile, and goes when it has been killed."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.scratch import ScratchDirectory

HOLD = "from fastdeploy_pd.scratch import ScratchDirectory; d = ScratchDirectory('test'); print(d.path, flush=True); input()"


@pytest.fixture(autouse=True)
def _tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def hold() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def make_and_remove(_: int) -> bool:
    """Returns: whether the directory was there as long as it was to be."""
    for _ in range(200):
        directory = ScratchDirectory("test")
        (directory.path / "file").write_text("kept")
        is_there = (directory.path / "file").read_text() == "kept"
        directory.remove()
        if not is_there or directory.path.exists():
            return False
    return True


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    process, left = hold()
    (left / "metrics").mkdir()
    (left / "metrics" / "file").write_text("text")
    other = ScratchDirectory("other")
    first = ScratchDirectory("test")
    assert left.is_dir()
    process.kill()
    process.wait()
    ScratchDirectory("other").remove()
    assert left.is_dir()  # of another kind
    second = ScratchDirectory("test")
    assert not left.exists() and first.path.is_dir()
    for directory in (first, second, other):
        directory.remove()
        directory.remove()
    assert not list(tmp_path.iterdir())


def test_no_directory_of_ours_is_touched(tmp_path: Path) -> None:
    goal = tmp_path / "goal"
    goal.mkdir()
    (goal / "file").write_text("text")
    (tmp_path / "fastdeploy-pd-test-link").symlink_to(goal)
    (tmp_path / "fastdeploy-pd-test-file").write_text("text")
    ScratchDirectory("test").remove()
    assert (goal / "file").exists() and (tmp_path / "fastdeploy-pd-test-file").exists()


def test_somebody_takes_it_for_a_dead_ones_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, num_removed = fcntl.flock, 0

    def late(opened: int, how: int) -> None:
        nonlocal num_removed
        if num_removed < 2:
            (path,) = tmp_path.iterdir()
            path.rmdir()
            num_removed += 1
            if num_removed == 2:
                raise BlockingIOError
        flock(opened, how)

    monkeypatch.setattr(fcntl, "flock", late)
    directory = ScratchDirectory("test")
    assert num_removed == 2 and [directory.path] == list(tmp_path.iterdir())
    directory.remove()


def test_a_place_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"TMPDIR.*none"):
        ScratchDirectory("test")


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(opened: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = ScratchDirectory("test"), ScratchDirectory("test")
    assert first.path.is_dir() and second.path.is_dir()
    first.remove()
    second.remove()
    assert not list(tmp_path.iterdir())


def test_many_begin_at_once() -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        assert all(pool.map(make_and_remove, range(4)))
