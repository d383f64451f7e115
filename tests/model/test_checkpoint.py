"""What a checkpoint directory may contain, and how it is refused: by file, field, value and what is allowed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_pd.errors import ModelLoadError
from fastdeploy_pd.model.checkpoint import ModelConfig, RopeScaling, fingerprint
from fastdeploy_pd.model.weights import Checkpoint
from tests.model.tiny import TinyEngine, write_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3")
    write_checkpoint("qwen3", directory)
    return directory


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path: Path, header: object, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"architectures is \['Mixtral.*one of LlamaForCausalLM, Qwen2"),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be silu"),
        ({"use_sliding_window": True}, "use_sliding_window is True; it must be false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .* full_attention"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*quantised"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"hidden_size": "48"}, "hidden_size is '48'; it must be a positive integer"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; it must be a positive number"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads is 4; it must be a divisor of num_attention_heads \(6\)"),
        ({"head_dim": None, "hidden_size": 50}, "hidden_size is 50; it must be a multiple of num_attention_heads"),
        ({"head_dim": 11}, "head_dim is 11; it must be even"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'; it must be one of default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of the rotary embedding is None"),
        ({"rope_parameters": None, "rope_theta": "1e4"}, "rope_theta of the rotary embedding is '1e4'"),
        ({"rope_scaling": 3}, "rope_scaling is 3; it must be an object"),
    ],
)
def test_config_is_refused(directory: Path, changes: dict[str, Any], message: str) -> None:
    change_json(directory / "config.json", lambda c: c.update(changes))
    with pytest.raises(ModelLoadError, match=r"config\.json: .*" + message):
        ModelConfig.from_directory(directory)


@pytest.mark.parametrize("name", ["num_hidden_layers", "intermediate_size", "max_position_embeddings", "vocab_size"])
def test_missing_field_is_named(directory: Path, name: str) -> None:
    change_json(directory / "config.json", lambda c: c.pop(name))
    with pytest.raises(ModelLoadError, match=rf"config\.json: {name} is missing; it must be a positive integer"):
        ModelConfig.from_directory(directory)


def test_missing_or_broken_json(directory: Path) -> None:
    with pytest.raises(ModelLoadError, match="absent does not exist"):
        ModelConfig.from_directory(directory / "absent")
    (directory / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"config\.json is not a JSON object"):
        ModelConfig.from_directory(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read"):
        ModelConfig.from_directory(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        ModelConfig.from_directory(directory)


def test_rope_fields_of_older_transformers(directory: Path) -> None:
    scaling = {
        "type": "llama3",
        "factor": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    change_json(
        directory / "config.json",
        lambda c: (c.pop("rope_parameters", None), c.update({"rope_theta": 5e5, "rope_scaling": scaling})),
    )
    config = ModelConfig.from_directory(directory)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


def test_eos_token_ids(directory: Path) -> None:
    def eos(config: object, generation: object) -> tuple[int, ...]:
        change_json(directory / "config.json", lambda c: c.update(eos_token_id=config))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        return ModelConfig.from_directory(directory).eos_token_ids

    assert eos(3, None) == (3,)
    assert eos(3, [5, 6]) == (5, 6)
    assert eos(None, 4) == (4,)
    assert eos(None, None) == ()
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: eos_token_id is 'x'; it must be a token id"):
        eos(3, "x")
    (directory / "generation_config.json").unlink()
    assert ModelConfig.from_directory(directory).eos_token_ids == (3,)


def test_bfloat16_and_float16_values(directory: Path) -> None:
    path = directory / "model.safetensors"
    values = np.array([1.0, -2.5, 0.15625, 3e38], np.float32)
    halves = np.array([1.0, -2.5], np.float16)
    body = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes() + halves.tobytes()
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [8, 12]},
    }
    write_header(path, header, body)
    checkpoint = Checkpoint(directory)
    assert sorted(checkpoint) == ["a", "b"]
    assert checkpoint["a"].to_float32().ravel().tolist() == [1.0, -2.5, 0.15625, pytest.approx(3e38, rel=1e-2)]
    assert checkpoint.take("b", (2,)).to_float32().tolist() == [1.0, -2.5]


def test_tensors_are_views_of_the_file(directory: Path) -> None:
    tensor = Checkpoint(directory)["model.embed_tokens.weight"]
    assert not tensor.array.flags.owndata
    assert tensor.to_float32().base is not None


def test_missing_tensor_and_wrong_shape(directory: Path) -> None:
    path = directory / "model.safetensors"
    header, body = read_header(path)
    name = "model.layers.1.mlp.down_proj.weight"
    write_header(path, {k: v for k, v in header.items() if k != name}, body)
    with pytest.raises(ModelLoadError, match=rf"no tensor {re.escape(name)} in model\.safetensors"):
        TinyEngine(directory, "reference")
    header[name]["shape"] = header[name]["shape"][::-1]
    write_header(path, header, body)
    with pytest.raises(
        ModelLoadError,
        match=r"model\.safetensors: tensor .*down_proj.weight has shape \[80, 48\]; config.json asks for \[48, 80\]",
    ):
        TinyEngine(directory, "reference")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F64"}, "dtype 'F64'; it must be one of F32, F16, BF16"),
        ({"shape": [48, -1]}, r"shape \[48, -1\].* must list counts"),
        ({"data_offsets": [0]}, r"data_offsets \[0\]; both must list counts"),
        ({"data_offsets": [0, 4]}, "spans 4 bytes; its shape .* takes"),
        ({"shape": None}, "shape None"),
    ],
)
def test_broken_entry(directory: Path, entry: dict[str, Any], message: str) -> None:
    path = directory / "model.safetensors"
    header, body = read_header(path)
    header["model.norm.weight"].update(entry)
    write_header(path, header, body)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: tensor model\.norm\.weight .*" + message):
        Checkpoint(directory)


def test_truncated_and_foreign_files(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for content, message in (
        (data[:-100], r"model\.safetensors is truncated: tensor \S+ ends at byte"),
        (data[:50], r"truncated or not a safetensors file: it has 50 bytes"),
        (b"\x02", "it has 1 bytes"),
        (b"", "cannot be mapped"),
        (b"\x02\0\0\0\0\0\0\0{}"[:9] + b"x", "header is not JSON"),
        (b"\x02\0\0\0\0\0\0\0[]", "header is not a JSON object"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelLoadError, match=message):
            Checkpoint(directory)
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint(directory)


def test_shards(tmp_path: Path) -> None:
    write_checkpoint("qwen2", tmp_path, shard=True)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    assert set(Checkpoint(tmp_path)) == set(weight_map)
    shard = sorted(set(weight_map.values()))[1]
    change_json(index, lambda i: i["weight_map"].update({"model.extra.weight": shard}))
    with pytest.raises(ModelLoadError, match=rf"{re.escape(shard)} has no tensor model\.extra\.weight"):
        Checkpoint(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(ModelLoadError, match=rf"{re.escape(shard)} cannot be mapped"):
        Checkpoint(tmp_path)
    change_json(index, lambda i: i["weight_map"].update({"x": "../secret.safetensors"}))
    with pytest.raises(ModelLoadError, match=r"index\.json: weight_map must map"):
        Checkpoint(tmp_path)


def test_fingerprint_follows_config_and_weights(directory: Path) -> None:
    first = fingerprint(directory)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert fingerprint(directory) == first
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = fingerprint(directory)
    change_json(directory / "config.json", lambda c: c.update(rms_norm_eps=1e-5))
    assert len({first, second, fingerprint(directory)}) == 3
