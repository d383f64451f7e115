"""A prefill policy of one's own: the example of docs/scheduling.md, installed as a package of its own, and simulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdeploy_pd.engine.policies import prefill_policy
from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.launch import up
from fastdeploy_pd.request import Request
from tests.own_package import EXAMPLES, install

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns: where pip has installed the example."""
    return install("own_policy", tmp_path_factory.mktemp("own_policy"))


@pytest.fixture
def installed(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example can be imported while the test runs."""
    monkeypatch.syspath_prepend(str(built))


def test_the_documents_own_policy(installed: None) -> None:
    policy = prefill_policy("aging-sjf", lambda: None)
    assert policy is not None
    prompts = [Request(str(n), [1] * n) for n in (9, 8, 3, 5)]
    for request, arrival_s in zip(prompts, (0.0, 1.0, 15.0, 15.0), strict=True):
        request.arrival_s = arrival_s
    assert [r.request_id for r in policy.order(prompts, 5.0, 1.0)] == ["3", "5", "8", "9"]
    assert [r.request_id for r in policy.order(prompts, 20.0, 1.0)] == ["9", "8", "3", "5"], "waited too long"
    with pytest.raises(ConfigError, match=r"there are .*aging-sjf"):
        prefill_policy("other", lambda: None)


def test_it_is_simulated(installed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the document's command; a policy that is not there is named with those that are."""
    text = (ROOT / "docs" / "scheduling.md").read_text()
    command = next(line for line in text.splitlines() if "simulate" in line and "--prefill-policy aging-sjf" in line)
    words = command.replace("benchmarks/data", f"{ROOT}/benchmarks/data").replace("tests/sim", f"{ROOT}/tests/sim")
    found = {}
    for name in ("aging-sjf", "sjf", "fcfs"):
        flags = words.replace("aging-sjf", name).split()[1:]
        assert main([*flags, "--json", str(tmp_path / name), "--per-request"]) == 0
        found[name] = json.loads((tmp_path / name).read_text())
    waits = {name: [r["ttft_s"] for r in report["requests"]] for name, report in found.items()}
    assert sum(waits["aging-sjf"]) < 0.8 * sum(waits["fcfs"]), "short ones come first"
    assert max(waits["aging-sjf"]) < max(waits["sjf"]), "nobody starves"
    for name, report in found.items():
        assert f"{100 * report['slo_attainment']:.1f} %" in text and f"{max(waits[name]):.1f} s" in text, name
    assert main([*words.replace("aging-sjf", "fast").split()[1:]]) == 2
    assert "--prefill-policy is 'fast'; there are fcfs, sjf, ljf, edf, slack, aging-sjf" in capsys.readouterr().err


def test_up_finds_it_before_anything_is_started(installed: None) -> None:
    config = up.check_instances(["--prefill-policy", "aging-sjf"], "t", ["prefill", "decode"])
    assert config.scheduling.prefill_policy == "aging-sjf"
    with pytest.raises(ConfigError, match=r"--prefill-policy is 'other'; there are .*, aging-sjf"):
        up.check_instances(["--prefill-policy", "other"], "t", ["prefill", "decode"])


def test_the_document_shows_it_as_it_is() -> None:
    text = (ROOT / "docs" / "scheduling.md").read_text()
    for path in (EXAMPLES / "own_policy").iterdir():
        if path.is_file():
            assert f"\n{path.read_text()}```\n" in text, path.name
