"""What a Hugging Face checkpoint directory says of itself: its configuration, checked, and its fingerprint.

Nothing of it is executed. What is missing or unsupported is refused with the file, the field, its value and what is allowed:
a field that changes what a model computes is never passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_pd.errors import ModelLoadError
from fastdeploy_pd.model.weights import CONFIG_FILE, Checkpoint, model_directory, read_json

__all__ = ["ModelConfig", "RopeScaling", "fingerprint", "read_json"]

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3")
FINGERPRINT_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are changed for long contexts."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read config.json and generation_config.json.

        Args:
            directory: of the model, or the path of its config.json.
        Raises: ModelLoadError: a file or field is missing, of the wrong type or not supported.
        """
        directory = model_directory(Path(directory))
        if not directory.is_dir():
            raise ModelLoadError(f"model directory {directory} does not exist")
        fields = _Fields(directory / CONFIG_FILE)
        architecture = fields.architecture()
        fields.refuse_unsupported()
        num_heads, num_kv_heads, head_dim = fields.heads()
        theta, scaling = fields.rope()
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        has_bias = fields.boolean("attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=fields.integer("max_position_embeddings"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
            qkv_bias=is_qwen2 or has_bias,
            output_bias=has_bias and not is_qwen2,
            qk_norm=architecture == "Qwen3ForCausalLM",
            eos_token_ids=_eos_token_ids(directory, fields),
        )


class _Fields:
    """config.json with checked access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path)

    def error(self, name: str, allowed: str) -> ModelLoadError:
        value = repr(self.raw[name]) if name in self.raw else "missing"
        return ModelLoadError(f"{self.path}: {name} is {value}; it must be {allowed}")

    def architecture(self) -> str:
        names = self.raw.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
            raise self.error("architectures", f"a list of one of {', '.join(ARCHITECTURES)}")
        return str(names[0])

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise self.error(name, "a positive integer")
        return value

    def number(self, name: str) -> float:
        value = self.raw.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.error(name, "a positive number")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false")
        return bool(value)

    def refuse_unsupported(self) -> None:
        """Fields that change the computation, and that this decoder doesn't follow."""
        if self.raw.get("hidden_act", "silu") != "silu":
            raise self.error("hidden_act", "silu")
        if self.boolean("mlp_bias"):
            raise self.error("mlp_bias", "false: biases in the MLP are not supported")
        if self.boolean("use_sliding_window"):
            raise self.error("use_sliding_window", "false: sliding-window attention is not supported")
        if any(kind != "full_attention" for kind in self.raw.get("layer_types") or []):
            raise self.error("layer_types", "full_attention for every layer")
        if self.raw.get("quantization_config") is not None:
            raise self.error("quantization_config", "absent: quantised weights are not supported")
        if self.raw.get("partial_rotary_factor", 1.0) not in (1, None):
            raise self.error("partial_rotary_factor", "1: all dimensions of a head are rotated")

    def heads(self) -> tuple[int, int, int]:
        """Returns: num_heads, num_kv_heads, head_dim."""
        num_heads, hidden_size = self.integer("num_attention_heads"), self.integer("hidden_size")
        if self.raw.get("head_dim") is None and hidden_size % num_heads:
            raise self.error(
                "hidden_size", f"a multiple of num_attention_heads ({num_heads}) when head_dim is not given"
            )
        head_dim = self.integer("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise self.error("head_dim", "even, for rotary embeddings")
        num_kv_heads = self.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise self.error("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
        return num_heads, num_kv_heads, head_dim

    def rope(self) -> tuple[float, RopeScaling]:
        """transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling."""
        parameters: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            value = self.raw.get(name)
            if value is not None and not isinstance(value, dict):
                raise self.error(name, "an object or null")
            parameters |= value or {}
        parameters.setdefault("rope_theta", self.raw.get("rope_theta", 10000.0))
        theta = self._rope_number(parameters, "rope_theta")
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ModelLoadError(f"{self.path}: rope_type is {rope_type!r}; it must be one of {', '.join(ROPE_TYPES)}")
        if rope_type == "default":
            return theta, RopeScaling()
        factor = self._rope_number(parameters, "factor")
        if rope_type == "linear":
            return theta, RopeScaling("linear", factor)
        low, high = (self._rope_number(parameters, f"{name}_freq_factor") for name in ("low", "high"))
        if high <= low:
            raise ModelLoadError(f"{self.path}: high_freq_factor is {high}; it must be above low_freq_factor ({low})")
        original = self._rope_number(parameters, "original_max_position_embeddings")
        return theta, RopeScaling("llama3", factor, low, high, int(original))

    def _rope_number(self, parameters: dict[str, Any], name: str) -> float:
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ModelLoadError(
                f"{self.path}: {name} of the rotary embedding is {value!r}; it must be a positive number"
            )
        return float(value)


def _eos_token_ids(directory: Path, fields: _Fields) -> tuple[int, ...]:
    """generation_config.json's, where it names any: it is what chat checkpoints extend."""
    path, value = fields.path, fields.raw.get("eos_token_id")
    if (directory / "generation_config.json").exists():
        generation = read_json(directory / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            path, value = directory / "generation_config.json", generation["eos_token_id"]
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(v) is not int or v < 0 for v in values):
        raise ModelLoadError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return tuple(values)


def fingerprint(directory: Path) -> str:
    """A short name of exactly this model: instances exchange KV blocks only with their like.

    Args:
        directory: of the model, or the path of its config.json, which stands for random weights.
    Returns: 16 hexadecimal digits over config.json and each tensor's name, dtype, shape and first, middle and last bytes.
    Raises: ModelLoadError: a file is missing or broken.
    """
    directory = Path(directory)
    checkpoint = Checkpoint(directory)
    state = sha256(json.dumps(read_json(checkpoint.directory / CONFIG_FILE), sort_keys=True).encode())
    if directory != checkpoint.directory:
        state.update(b"dummy")
    for name in sorted(checkpoint):
        tensor = checkpoint[name]
        flat = tensor.array.reshape(-1).view(np.uint8)
        state.update(f"{name}:{tensor.dtype}:{tensor.array.shape}".encode())
        for first in (0, len(flat) // 2, max(0, len(flat) - FINGERPRINT_SAMPLE_BYTES)):
            state.update(flat[first : first + FINGERPRINT_SAMPLE_BYTES].data)
    return state.hexdigest()[:16]
