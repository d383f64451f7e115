"""`make bench`: every benchmark that needs no GPU, one after the other; JSON in bench-results/. Other flags go to the benchmark."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("transfer", "frontend", "step", "serving", "sim")


def main() -> int:
    """Returns: the first failing benchmark's exit status, or 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON files")
    parser.add_argument("--only", choices=NAMES, action="append", help="run this one; may be given several times")
    args, flags = parser.parse_known_args()
    args.out.mkdir(exist_ok=True)
    for name in args.only or NAMES:
        sys.stdout.write(f"== {name}\n")
        sys.stdout.flush()
        status = subprocess.call(
            [sys.executable, "-m", f"benchmarks.bench_{name}", "--json", str(args.out / f"{name}.json"), *flags]
        )
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
