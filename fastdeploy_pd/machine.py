"""What the machine that this runs on says of itself."""

from __future__ import annotations

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
