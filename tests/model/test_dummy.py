"""Random weights of a config.json alone: the same on every instance, and never taken for a real model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.errors import ModelLoadError
from fastdeploy_pd.model.checkpoint import ModelConfig, fingerprint
from fastdeploy_pd.model.weights import Checkpoint, DummyCheckpoint, DummyTensor
from tests.model.tiny import FAMILIES, TinyEngine, write_checkpoint


@pytest.fixture(params=[f for f in FAMILIES if f != "llama_linear"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_checkpoint(request.param, tmp_path / "real")
    return tmp_path / "real"


def config_alone(real: Path, directory: Path) -> Path:
    directory.mkdir()
    shutil.copy(real / "config.json", directory)
    return directory / "config.json"


def test_every_backend_computes_the_same_tokens(real: Path, tmp_path: Path) -> None:
    path = config_alone(real, tmp_path / "dummy")
    prompts = [[5, 17, 3], list(range(100))]
    answers = []
    for ops in ("reference", "paddle", "torch"):
        engine = TinyEngine(path, ops)
        answers.append(engine.generate([engine.request(p) for p in prompts]))
    assert answers[0] == answers[1] == answers[2]
    engine = TinyEngine(real, "reference")
    assert engine.generate([engine.request(p) for p in prompts]) != answers[0]


def test_the_fingerprint_is_of_the_config_and_of_no_real_model(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path / "real")
    first, second = (config_alone(tmp_path / "real", tmp_path / n) for n in ("a", "b"))
    beside_weights = fingerprint(tmp_path / "real" / "config.json")
    assert fingerprint(first) == fingerprint(second) == beside_weights != fingerprint(tmp_path / "real")
    values = json.loads(second.read_text())
    second.write_text(json.dumps({**values, "rope_theta": 20000.0}))
    assert fingerprint(first) != fingerprint(second)


def test_tensors_are_normal_and_of_their_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"initializer_range": 0.5}')
    checkpoint = Checkpoint(tmp_path / "config.json")
    assert isinstance(checkpoint, DummyCheckpoint) and isinstance(DummyCheckpoint(tmp_path), DummyCheckpoint)
    tensor = checkpoint.take("model.layers.0.mlp.up_proj.weight", (300, 200))
    values = tensor.to_float32()
    assert values.shape == tensor.shape == (300, 200) and values.dtype == np.float32 and tensor.std == 0.5
    assert abs(values.mean()) < 0.01 and abs(values.std() - 0.5) < 0.01
    assert np.array_equal(values, DummyCheckpoint(tmp_path).take(*_up(0)).to_float32())
    assert checkpoint.take(*_up(1)).seed != tensor.seed < 2**63
    norm = checkpoint.take("model.layers.0.input_layernorm.weight", (8,))
    assert norm == DummyTensor((8,), norm.seed, 0.0) and norm.to_float32().tolist() == [1.0] * 8


def _up(layer: int) -> tuple[str, tuple[int, ...]]:
    return f"model.layers.{layer}.mlp.up_proj.weight", (300, 200)


@pytest.mark.parametrize("value", ["0", "-1", "true", '"0.02"', "NaN"])
def test_a_bad_standard_deviation_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"initializer_range": {value}}}')
    with pytest.raises(ModelLoadError, match=r"initializer_range is .*; it must be a positive number"):
        Checkpoint(tmp_path / "config.json")


def test_flags(tmp_path: Path) -> None:
    def options(*flags: str) -> tuple[str, bool, tuple[str, ...]]:
        model = InstanceConfig.from_args(["--model", str(tmp_path), *flags], {}).model
        return model.model, model.skip_tokenizer_init, model.served_model_name

    name = (tmp_path.name,)
    assert options() == (str(tmp_path), False, name)
    assert options("--skip-tokenizer-init") == (str(tmp_path), True, name)
    assert options("--load-format", "dummy") == (str(tmp_path / "config.json"), True, name)
    (tmp_path / "tokenizer.json").touch()
    assert options("--load-format=dummy") == (str(tmp_path / "config.json"), False, name)
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        ModelConfig.from_directory(tmp_path / "config.json")
