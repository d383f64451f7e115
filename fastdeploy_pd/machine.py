"""What the machine that this runs on says of itself."""

from __future__ import annotations

import os
import re
from pathlib import Path


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
