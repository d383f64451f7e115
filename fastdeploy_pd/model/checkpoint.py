"""A Hugging Face checkpoint directory: its configuration, checked, and its tensors, mapped.

Nothing of it is executed. What is missing, unsupported or doesn't fit is refused with the file and the field.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_pd.errors import ModelLoadError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3")
#: safetensors' names -> (NumPy type of the raw bytes, our name); NumPy has no bfloat16
TENSOR_TYPES = {"F32": (np.float32, "float32"), "F16": (np.float16, "float16"), "BF16": (np.uint16, "bfloat16")}
MAX_HEADER_BYTES = 100 * 2**20
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

        Raises: ModelLoadError: a file or field is missing, of the wrong type or not supported.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelLoadError(f"model directory {directory} does not exist")
        fields = _Fields(directory / "config.json")
        architecture = fields.architecture()
        num_heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        if "head_dim" not in fields.raw and hidden % num_heads:
            raise fields.error(
                "hidden_size", f"a multiple of num_attention_heads ({num_heads}) when head_dim is not given"
            )
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
        fields.require("hidden_act", "silu", ("silu",))
        if fields.raw.get("use_sliding_window"):
            raise fields.error("use_sliding_window", "false: sliding-window attention is not supported")
        theta, scaling = fields.rope()
        has_bias = bool(fields.raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=fields.integer("head_dim", hidden // num_heads),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=fields.integer("max_position_embeddings"),
            tie_word_embeddings=bool(fields.raw.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "Qwen2ForCausalLM" or has_bias,
            output_bias=has_bias and architecture != "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            eos_token_ids=_eos_token_ids(directory, fields),
        )


class _Fields:
    """config.json with checked access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path)

    def error(self, name: str, allowed: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {name} is {self.raw.get(name)!r}; it must be {allowed}")

    def architecture(self) -> str:
        names = self.raw.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
            raise self.error("architectures", f"one of {', '.join(ARCHITECTURES)}")
        return str(names[0])

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "a positive integer")
        return value

    def number(self, name: str) -> float:
        value = self.raw.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.error(name, "a positive number")
        return float(value)

    def require(self, name: str, default: str, allowed: tuple[str, ...]) -> None:
        if self.raw.get(name, default) not in allowed:
            raise self.error(name, f"one of {', '.join(allowed)}")

    def rope(self) -> tuple[float, RopeScaling]:
        """transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling."""
        parameters: dict[str, Any] = dict(self.raw.get("rope_scaling") or {}) | dict(
            self.raw.get("rope_parameters") or {}
        )
        theta = parameters.get("rope_theta", self.raw.get("rope_theta", 10000.0))
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ModelLoadError(f"{self.path}: rope type is {rope_type!r}; it must be one of {', '.join(ROPE_TYPES)}")
        if rope_type == "default":
            return float(theta), RopeScaling()
        names = ("factor",) if rope_type == "linear" else RopeScaling.__slots__[1:]
        missing = [n for n in names if not isinstance(parameters.get(n), (int, float))]
        if missing:
            raise ModelLoadError(f"{self.path}: rope scaling {rope_type!r} lacks the number {missing[0]}")
        return float(theta), RopeScaling(rope_type, **{n: parameters[n] for n in names})


def read_json(path: Path) -> dict[str, Any]:
    """Raises: ModelLoadError: the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is not a JSON object")
    return value


def _eos_token_ids(directory: Path, fields: _Fields) -> tuple[int, ...]:
    path, value = fields.path, fields.raw.get("eos_token_id")
    if (directory / "generation_config.json").exists():
        generation = read_json(directory / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            path, value = directory / "generation_config.json", generation["eos_token_id"]
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ModelLoadError(f"{path}: eos_token_id is {value!r}; it must be an integer or a list of them")
    return tuple(values)


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it lies in the file; `array` is a view of the mapping, of uint16 words for bfloat16."""

    array: np.ndarray
    dtype: str

    def to_float32(self) -> np.ndarray:
        """Returns: the values as float32; a view where they are that already."""
        if self.dtype == "bfloat16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32, copy=False)


class Checkpoint(Mapping[str, RawTensor]):
    """The tensors of a directory by name, mapped from its safetensors files."""

    def __init__(self, directory: Path) -> None:
        """Raises: ModelLoadError: no weights, a missing or broken file."""
        self.directory = Path(directory)
        self._tensors: dict[str, RawTensor] = {}
        self._file_of: dict[str, str] = {}
        for name in self._file_names():
            self._map_file(self.directory / name)

    def __getitem__(self, name: str) -> RawTensor:
        return self._tensors[name]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> RawTensor:
        """Returns: a tensor. Raises: ModelLoadError: it is missing or has another shape."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelLoadError(f"{self.directory}: the weights have no tensor {name}")
        if tensor.array.shape != shape:
            raise ModelLoadError(
                f"{self.directory / self._file_of[name]}: tensor {name} has shape {list(tensor.array.shape)}; config.json asks for {list(shape)}"
            )
        return tensor

    def _file_names(self) -> list[str]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(v, str) and "/" not in v for v in weight_map.values()
            ):
                raise ModelLoadError(f"{index}: weight_map must map tensor names to file names")
            return sorted(set(weight_map.values()))
        if (self.directory / "model.safetensors").exists():
            return ["model.safetensors"]
        raise ModelLoadError(f"{self.directory} has neither model.safetensors nor model.safetensors.index.json")

    def _map_file(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path} cannot be mapped: {error}") from error
        header_bytes = int.from_bytes(mapping[:8], "little")
        if len(mapping) < 8 or header_bytes > min(MAX_HEADER_BYTES, len(mapping) - 8):
            raise ModelLoadError(f"{path} is not a safetensors file, or is truncated")
        try:
            header = json.loads(mapping[8 : 8 + header_bytes])
            for name, entry in header.items():
                if name != "__metadata__":
                    self._tensors[name] = self._view(path, name, entry, mapping, 8 + header_bytes)
                    self._file_of[name] = path.name
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{path}: its header is broken: {error}") from error

    def _view(self, path: Path, name: str, entry: dict[str, Any], mapping: mmap.mmap, base: int) -> RawTensor:
        if entry["dtype"] not in TENSOR_TYPES:
            raise ModelLoadError(
                f"{path}: tensor {name} has dtype {entry['dtype']}; it must be one of {', '.join(TENSOR_TYPES)}"
            )
        numpy_type, dtype = TENSOR_TYPES[entry["dtype"]]
        start, stop = entry["data_offsets"]
        count = int(np.prod(entry["shape"], dtype=np.int64))
        if start < 0 or stop - start != count * np.dtype(numpy_type).itemsize or base + stop > len(mapping):
            raise ModelLoadError(f"{path}: tensor {name} lies outside the file; it is truncated")
        array = np.frombuffer(mapping, numpy_type, count, base + start).reshape(entry["shape"])
        return RawTensor(array, dtype)


def fingerprint(directory: Path) -> str:
    """A short name of exactly this model: instances exchange KV blocks only with their like.

    Returns: 16 hexadecimal digits over config.json and each tensor's name, type, shape and first and last bytes.
    """
    directory = Path(directory)
    checkpoint = Checkpoint(directory)
    state = sha256(json.dumps(read_json(directory / "config.json"), sort_keys=True).encode())
    for name in sorted(checkpoint):
        tensor = checkpoint[name]
        flat = tensor.array.reshape(-1).view(np.uint8)
        state.update(f"{name}:{tensor.dtype}:{tensor.array.shape}".encode())
        state.update(flat[:FINGERPRINT_SAMPLE_BYTES].tobytes() + flat[-FINGERPRINT_SAMPLE_BYTES:].tobytes())
    return state.hexdigest()[:16]
