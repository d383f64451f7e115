"""Examples of the documents that a user would install as packages of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def install(name: str, place: Path) -> Path:
    """Returns: where pip has installed an example, below `place`."""
    source = shutil.copytree(EXAMPLES / name, place / "source")  # building leaves files behind
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(place / "site"), str(source)], check=True, timeout=120)
    return place / "site"
