"""An engine as its flags say, and as its runner has memory for."""

from __future__ import annotations

from typing import Any

import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.engine.build import build_engine
from fastdeploy_pd.engine.context import NoObserver
from fastdeploy_pd.model.runner import ModelRunner


@pytest.mark.parametrize("most", [300, 128])
def test_a_prompt_that_is_alone_has_as_many_tokens_as_there_is_memory_for(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[Any, ...]]()
    monkeypatch.setattr(ModelRunner, "warm_up", lambda *arguments: (asked.append(arguments[2:]), most)[1])
    flags = ["--scheduler-name", "local", "--ops", "torch", "--num-gpu-blocks-override", "64"]
    flags += ["--max-num-batched-tokens", "64", "--max-lone-prompt-tokens", "300"]
    built = build_engine(InstanceConfig.from_args(flags, {}), NoObserver(), None)
    assert asked == [(True, 64, 300)]
    assert built.engine.context.scheduler.options.max_lone_prompt_tokens == most
