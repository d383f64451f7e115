"""`make bench`: every benchmark, one after the other; JSON in bench-results/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OUT = Path("bench-results")


def main() -> int:
    """Returns: the first failing benchmark's exit status, or 0."""
    OUT.mkdir(exist_ok=True)
    for name in ("transfer", "frontend", "serving"):
        sys.stdout.write(f"== {name}\n")
        sys.stdout.flush()
        status = subprocess.call(
            [sys.executable, "-m", f"benchmarks.bench_{name}", "--json", str(OUT / f"{name}.json")]
        )
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
