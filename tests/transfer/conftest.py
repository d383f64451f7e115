"""The example of a backend of one's own, installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "examples" / "own_backend"


@pytest.fixture(scope="session")
def built_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns: where pip has installed it."""
    place = tmp_path_factory.mktemp("own_backend")
    source = shutil.copytree(EXAMPLE, place / "source")  # building leaves files behind
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(place / "site"), str(source)], check=True, timeout=120)
    return place / "site"


@pytest.fixture
def installed_example(built_example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns: the directory that its two ends share; the package can be imported while the test runs."""
    (tmp_path / "shared").mkdir()
    monkeypatch.syspath_prepend(str(built_example))
    monkeypatch.setenv("KV_FILES_DIR", str(tmp_path / "shared"))
    return tmp_path / "shared"
