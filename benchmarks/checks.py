"""What benchmarks refuse before anything is started, in the words in which the commands do; it needs the standard library alone."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastdeploy_pd.errors import ConfigError, FastDeployPDError
from fastdeploy_pd.flags import directory, integer, number
from fastdeploy_pd.sim.fields import json_object, reason, whole

SCALE = number(float, 1e-6, 1e3, "a number above 0, from 1e-6 to 1000")
_RATE = number(float, 1e-6, 1e6, "a number")
_COUNT = "import sys; from rdma_comm.cuda.driver import num_gpus; sys.stdout.write(str(num_gpus()))"
COUNT_TIMEOUT_S = 60.0
ROOT = Path(__file__).parent.parent


def ended(main: Callable[[], int]) -> int:
    """Returns: the exit status of what a benchmark does; 2 if it refuses something, of which one line then says what."""
    try:
        return main()
    except FastDeployPDError as error:
        sys.stdout.flush()
        sys.stderr.write(f"error: {error.message}\n")
        return 2


def rates(text: str) -> list[float]:
    """Returns: "1,2.5" as numbers. Raises: ArgumentTypeError: one is none above 0."""
    try:
        return [_RATE(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be numbers above 0, from 1e-6 to 1e6, joined by commas, as in 1,2.5"
        ) from None


def integers(text: str) -> list[int]:
    """Returns: "64,512" as numbers. Raises: ArgumentTypeError: one is none above 0; says what is allowed."""
    try:
        return [integer(1)(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} (several: 64,512)") from error


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Returns: what reads names joined by commas. It raises ArgumentTypeError: one is not known; says which, and all there are."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is not allowed; it must be names joined by commas, of {', '.join(known)}"
                )
        return names

    return parse


def model_directory(text: str) -> Path:
    """Returns: the directory of a model; the word demo is that of the demo model. Raises: ArgumentTypeError: it is not there."""
    return Path(directory(text))


def model_facts(model: Path) -> tuple[int, int]:
    """Returns: vocab_size and max_position_embeddings of config.json. Raises: ConfigError: it has them not, or cannot be read."""
    path = model / "config.json"
    fields = read_object(path, "--model")
    try:
        return whole(fields, "vocab_size", 1), whole(fields, "max_position_embeddings", 1)
    except ValueError as error:
        raise ConfigError(f"--model: {path} {error}") from error


def read_object(path: Path, flag: str) -> dict[str, Any]:
    """Returns: a file's JSON object. Raises: ConfigError: it cannot be read or is none; names the flag and the file."""
    try:
        return json_object(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: {path} {reason(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{flag}: {path} {error}") from error


def need_fields(report: dict[str, Any], names: Iterable[str], flag: str, path: Path, what: str) -> None:
    """Raises: ConfigError: a report lacks one of these fields, so that it is none of `what`."""
    if missing := [name for name in names if name not in report]:
        raise ConfigError(f"{flag}: {path} has no {missing[0]}; it must be what {what} wrote with --json")


def need_gpus(given: str, count: int, visible: Sequence[str] = ()) -> None:
    """Raises: ConfigError: there is no NVIDIA driver, or it has not so many GPUs.

    Args:
        given: what asks for them, for the message.
        visible: as CUDA_VISIBLE_DEVICES takes them; () for those that this process sees.
    """
    # A process of its own: what CUDA_VISIBLE_DEVICES says is read once in a process.
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(visible)} if visible else {})}
    command = [sys.executable, "-c", _COUNT]
    try:
        asked = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=COUNT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the NVIDIA driver has not answered for {COUNT_TIMEOUT_S:g} s; see nvidia-smi") from None
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or [": it says nothing"])[-1].partition(": ")[2]
        raise ConfigError(f"{given} needs {count} GPUs, and there is no NVIDIA driver or GPU here: {said}")
    if int(asked.stdout) < count:
        raise ConfigError(f"{given} needs {count} GPUs, and {asked.stdout} can be used here; see nvidia-smi -L")
