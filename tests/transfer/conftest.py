"""The example of a backend of one's own, installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.own_package import install


@pytest.fixture(scope="session")
def built_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns: where pip has installed it."""
    return install("own_backend", tmp_path_factory.mktemp("own_backend"))


@pytest.fixture
def installed_example(built_example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns: the directory that its two ends share; the package can be imported while the test runs."""
    (tmp_path / "shared").mkdir()
    monkeypatch.syspath_prepend(str(built_example))
    monkeypatch.setenv("KV_FILES_DIR", str(tmp_path / "shared"))
    return tmp_path / "shared"
