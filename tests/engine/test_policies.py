"""Policies by name, a user's own among them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy_pd.core.multiplexing import Multiplexing
from fastdeploy_pd.engine.policies import check, placement_policy, prefill_policy
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Request

DOCUMENT = Path(__file__).parents[2] / "docs" / "scheduling.md"


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[None]:
    """The document's example, installed as a package would be."""
    code = DOCUMENT.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "short_names.py").write_text(code)
    facts = tmp_path / "short_names-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: short-names\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[fastdeploy_pd.prefill_policies]\nshort-names = short_names:ShortNames\n")
    sys.path.insert(0, str(tmp_path))
    yield
    sys.path.remove(str(tmp_path))
    sys.modules.pop("short_names", None)


def test_ours_by_name() -> None:
    assert prefill_policy("fcfs", lambda: None) is None
    assert isinstance(placement_policy("slo"), Multiplexing)
    with pytest.raises(ConfigError, match=r"--prefill-policy is 'fast'; there are fcfs, .*slack"):
        check("fast", "slo")
    with pytest.raises(ConfigError, match=r"--placement is 'nearest'; there are fewest-tokens, round-robin, slo"):
        check("slack", "nearest")


def test_the_documents_own_policy(installed: None) -> None:
    policy = prefill_policy("short-names", lambda: None)
    assert policy is not None
    prompts = [Request(name, [1, 2]) for name in ("longest", "a", "abc")]
    assert [r.request_id for r in policy.order(prompts, 0.0, 1.0)] == ["a", "abc", "longest"]
    with pytest.raises(ConfigError, match=r"there are .*short-names"):
        prefill_policy("other", lambda: None)
