"""What the machine that this runs on says of itself, and the files that commands write there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from fastdeploy_pd.errors import ConfigError


def free_memory_bytes() -> int | None:
    """Returns: memory that the machine could give now (MemAvailable); None: it does not say, as where there is no Linux."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def why_not_written(path: Path) -> str:
    """Returns: why no file can be written there, as far as that can be told without doing it; "": it can."""
    if os.path.isdir(path):  # unlike Path.is_dir, says no where it may not look
        return "it is a directory"
    if os.path.exists(path):
        return "" if os.access(path, os.W_OK) else "it may not be written to"
    return why_not_written_below(path.parent)


def why_not_written_below(folder: Path) -> str:
    """Returns: why no file can be written into a directory; "": it can."""
    if not os.path.isdir(folder):
        return f"{folder} is {'no directory' if os.path.exists(folder) else 'not there'}"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} may not be written to"


def check_output(path: Path | None) -> None:
    """Raises: ConfigError: the file cannot be written, which is better known before a long run than behind it."""
    if path is not None and (why := why_not_written(path)):
        raise ConfigError(
            f"--json {path} cannot be written: {why}; it must be a file in a directory that is there and may be written to"
        )


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Raises: ConfigError: the file cannot be written."""
    try:
        path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror or error}") from error
