"""Policies by name, a user's own among them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.multiplexing import Multiplexing
from fastdeploy_pd.core.placement import Candidate, Placement
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.engine.lifetime import PARENT_PID
from fastdeploy_pd.engine.policies import check, placement_policy, prefill_policy
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Phase, Request, Slo

WRONG = """
from fastdeploy_pd.core.placement import Placement
from fastdeploy_pd.request import Request

class Typo(ShortNames):
    def order(self, prompts, now_s, stretch):
        return sorted(prompts, key=lambda request: request.num_tokens_left)

class Twice(ShortNames):
    def order(self, prompts, now_s, stretch):
        return [*prompts, prompts[0]]

class Stranger(ShortNames):
    def order(self, prompts, now_s, stretch):
        return [Request("stranger", [1])]

class InPlace(ShortNames):
    def order(self, prompts, now_s, stretch):
        prompts.sort(key=lambda request: -request.num_tokens)

class Broken:
    def __init__(self, predictor):
        raise OSError("no such file")

class Nothing:
    def __init__(self, predictor):
        pass

class Elsewhere:
    def place(self, num_tokens, candidates, rng, slo, age_s):
        return Placement(None, "nowhere")
"""
DOCUMENT = Path(__file__).parents[2] / "docs" / "scheduling.md"


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[None]:
    """The document's example and some that are wrong, installed as a package would be."""
    code = DOCUMENT.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "short_names.py").write_text(code + WRONG)
    facts = tmp_path / "short_names-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: short-names\nVersion: 1\n")
    wrong = "".join(
        f"{name} = short_names:{name}\n" for name in ("Typo", "Twice", "Stranger", "InPlace", "Broken", "Nothing")
    )
    (facts / "entry_points.txt").write_text(
        f"[fastdeploy_pd.prefill_policies]\nshort-names = short_names:ShortNames\n{wrong}"
        "[fastdeploy_pd.placement_policies]\nElsewhere = short_names:Elsewhere\n"
    )
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


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Typo", "AttributeError: 'Request' object has no attribute 'num_tokens_left'"),
        ("Twice", "ValueError: `order` returned a prompt twice"),
        ("Stranger", "something that is none of the prompts"),
        ("InPlace", "TypeError: 'NoneType' object is not iterable"),
    ],
)
@pytest.mark.parametrize("fairness", ["none", "vtc"])
def test_where_a_policy_fails_requests_go_on_by_slack(
    installed: None, caplog: pytest.LogCaptureFixture, name: str, error: str, fairness: str
) -> None:
    failures: list[str] = []
    make = partial(prefill_policy, on_failure=lambda: failures.append(name))
    options = SchedulerOptions(8, 64, 4096, prefill_policy=name, fairness=fairness)
    scheduler = Scheduler(BlockPool(100, 16), options, make_policy=make)
    for number, ttft_s in enumerate((9.0, 1.0, 5.0)):
        request = Request(f"{number}", [number] * 64, slo=Slo(ttft_s=ttft_s))
        request.advance(Phase.PLACED, 0.0)
        request.advance(Phase.RESERVED, 0.0)
        scheduler.add(request)
    order = []
    for _ in range(3):
        batch = scheduler.schedule(0.0)
        order += [s.request.request_id for s in batch.sequences]
        scheduler.launched(batch)
        scheduler.computed(batch.sequences)
        for sequence in batch.sequences:
            scheduler.remove(sequence.request)
    assert order == ["1", "2", "0"] and failures == [name] * 3
    (record,) = caplog.records
    assert f"--prefill-policy {name} failed" in record.message and "slack" in record.message
    assert error in caplog.text and "Traceback" in caplog.text


def test_a_policy_that_cannot_be_made_is_a_wrong_flag(installed: None) -> None:
    with pytest.raises(ConfigError, match="--prefill-policy is 'Broken', which cannot be made: OSError: no such file"):
        check("Broken", "slo")
    with pytest.raises(ConfigError, match="--prefill-policy is 'Nothing'; a Nothing has no method 'order'"):
        check("Nothing", "slo")


def test_where_a_placement_fails_requests_are_placed_all_the_same(
    installed: None, caplog: pytest.LogCaptureFixture
) -> None:
    policy = placement_policy("Elsewhere")
    for _ in range(2):
        placed = policy.place(10, [Candidate("m", True, True)], random.Random(1))
        assert placed == Placement(None, "m")
    (record,) = caplog.records
    assert "--placement Elsewhere failed" in record.message and "decode_id='nowhere'" in caplog.text


def test_what_ends_an_engine_is_in_its_log(tmp_path: Path) -> None:
    (tmp_path / "run" / "engine.json.part").mkdir(parents=True)  # it cannot announce itself
    environment = {**os.environ, "FD_RUN_DIR": str(tmp_path / "run"), "FD_LOG_DIR": str(tmp_path / "log")}
    environment[PARENT_PID] = str(os.getpid())
    flags = ["--model", "demo", "--scheduler-name", "local", "--num-gpu-blocks-override", "64"]
    command = [sys.executable, "-m", "fastdeploy_pd.engine.process", *flags]
    assert subprocess.run(command, env=environment, timeout=100, check=False).returncode == 1
    log = (tmp_path / "log" / "engine.log").read_text()
    assert "the engine ends by a defect" in log and "Traceback" in log and "IsADirectoryError" in log
