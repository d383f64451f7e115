"""The tensors of a checkpoint directory, mapped from its safetensors files: nothing is read before it is needed.

A model may also be given by the path of its config.json alone: its weights are random then (`--load-format dummy`).

A safetensors file is 8 bytes (little-endian length of the header), a JSON header (name -> dtype, shape, data_offsets) and the
tensors' bytes. Source: the format's own description, huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from fastdeploy_pd.errors import ModelLoadError

#: safetensors' names -> (NumPy type of the raw bytes, our name); NumPy has no bfloat16
TENSOR_TYPES = {"F32": (np.float32, "float32"), "F16": (np.float16, "float16"), "BF16": (np.uint16, "bfloat16")}
MAX_HEADER_BYTES = 100 * 2**20
SINGLE_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"
DEFAULT_INITIALIZER_RANGE = 0.02


def model_directory(path: Path) -> Path:
    """Returns: the directory of a model, which is given by it or by its config.json alone."""
    return path.parent if path.name == CONFIG_FILE else path


def read_json(path: Path) -> dict[str, Any]:
    """Returns: a JSON object. Raises: ModelLoadError: the file is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is not a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it lies in the file; `array` is a view of the mapping, of uint16 words for bfloat16."""

    array: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's dimensions."""
        return self.array.shape

    def to_float32(self) -> np.ndarray:
        """Returns: the values as float32; a view where they are that already."""
        if self.dtype == "bfloat16":
            words = self.array.astype(np.uint32)
            words <<= 16  # a bfloat16 is the upper half of a float32
            return words.view(np.float32)
        return self.array.astype(np.float32, copy=False)

    def part(self, axis: int, piece: slice) -> RawTensor:
        """Returns: a piece along an axis, as a view."""
        return RawTensor(self.array[_index(axis, piece)], self.dtype)


@dataclass(frozen=True, slots=True)
class DummyTensor:
    """A random tensor that is not made yet: a backend fills it where it computes, or takes it from the CPU."""

    shape: tuple[int, ...]
    seed: int  #: 63 bits, of the tensor's name: every instance has the same weights
    std: float  #: of normal numbers around 0; 0.0: all are ones
    whole: DummyTensor | None = None  #: what this is a piece of ...
    index: tuple[slice, ...] = ()  #: ... and which

    def to_float32(self) -> np.ndarray:
        """Returns: the values, the same on every machine."""
        if self.whole is not None:
            return self.whole.to_float32()[self.index]
        if self.std == 0.0:
            return np.ones(self.shape, np.float32)
        values = np.random.Generator(np.random.PCG64(self.seed)).standard_normal(self.shape, np.float32)
        values *= np.float32(self.std)
        return values

    def part(self, axis: int, piece: slice) -> DummyTensor:
        """Returns: a piece along an axis: the same values as in the whole tensor."""
        size = piece.stop - piece.start
        if size == self.shape[axis]:
            return self
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        return DummyTensor(shape, self.seed, self.std, self, _index(axis, piece))


def _index(axis: int, piece: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, piece)


class Checkpoint(Mapping[str, RawTensor]):
    """The tensors of a directory by name."""

    def __new__(cls, directory: Path) -> Checkpoint:
        """Returns: a `DummyCheckpoint` for a config.json alone, as a Path is a PosixPath."""
        return super().__new__(DummyCheckpoint if Path(directory).name == CONFIG_FILE else cls)

    def __init__(self, directory: Path) -> None:
        """Raises: ModelLoadError: no weights, a missing or broken file, a tensor that its file lacks."""
        self.directory = Path(directory)
        self._tensors: dict[str, RawTensor] = {}
        self._file_of: dict[str, Path] = {}
        weight_map = self._weight_map()
        for name in sorted(set(weight_map.values())) if weight_map else [SINGLE_FILE]:
            self._map_file(self.directory / name)
        for tensor, name in weight_map.items():
            if self._file_of.get(tensor) != self.directory / name:
                raise ModelLoadError(
                    f"{self.directory / name} has no tensor {tensor}, though {INDEX_FILE} places it there"
                )

    def __getitem__(self, name: str) -> RawTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> RawTensor | DummyTensor:
        """Returns: a tensor. Raises: ModelLoadError: it is missing or has another shape."""
        tensor = self._tensors.get(name)
        if tensor is None:
            files = ", ".join(sorted({path.name for path in self._file_of.values()}))
            raise ModelLoadError(f"{self.directory} has no tensor {name} in {files}")
        if tensor.array.shape != shape:
            raise ModelLoadError(
                f"{self._file_of[name]}: tensor {name} has shape {list(tensor.array.shape)}; config.json asks for {list(shape)}"
            )
        return tensor

    def _weight_map(self) -> dict[str, str]:
        """Returns: tensor name -> file name; empty when there is one file without an index."""
        index = self.directory / INDEX_FILE
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
                raise ModelLoadError(f"{index}: weight_map must map tensor names to names of files beside it")
            return weight_map
        if (self.directory / SINGLE_FILE).exists():
            return {}
        raise ModelLoadError(
            f"--model is {str(self.directory)!r}, which has neither {SINGLE_FILE} nor {INDEX_FILE} (for random weights, --load-format dummy)"
        )

    def _map_file(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path} cannot be mapped: {error}") from error
        header_bytes = int.from_bytes(mapping[:8], "little")
        if len(mapping) < 8 or header_bytes > min(MAX_HEADER_BYTES, len(mapping) - 8):
            raise ModelLoadError(
                f"{path} is truncated or not a safetensors file: it has {len(mapping)} bytes and its header claims {header_bytes}"
            )
        try:
            header = json.loads(mapping[8 : 8 + header_bytes])
        except ValueError as error:
            raise ModelLoadError(f"{path}: its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise ModelLoadError(f"{path}: its header is not a JSON object")
        for name, entry in header.items():
            if name != "__metadata__":
                self._tensors[name] = _view(path, name, entry, mapping, 8 + header_bytes)
                self._file_of[name] = path


class DummyCheckpoint(Checkpoint):
    """Random tensors under whatever names they are asked for; it lists none."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of config.json, or of its directory. Its initializer_range is the weights' standard deviation.
        Raises: ModelLoadError.
        """
        self.directory = model_directory(Path(path))
        self._tensors, self._file_of = {}, {}
        value = read_json(self.directory / CONFIG_FILE).get("initializer_range", DEFAULT_INITIALIZER_RANGE)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ModelLoadError(
                f"{self.directory / CONFIG_FILE}: initializer_range is {value!r}; it must be a positive number"
            )
        self._std = float(value)

    def take(self, name: str, shape: tuple[int, ...]) -> DummyTensor:
        """Returns: a tensor to be made; those of norms are ones."""
        seed = int.from_bytes(sha256(name.encode()).digest()[:8], "little") >> 1
        return DummyTensor(shape, seed, 0.0 if name.endswith("norm.weight") else self._std)


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and "/" not in value and value not in ("", ".", "..")


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _view(path: Path, name: str, entry: object, mapping: mmap.mmap, base: int) -> RawTensor:
    """Returns: a view of one tensor's bytes. Raises: ModelLoadError: its entry makes no sense or points outside the file."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in TENSOR_TYPES:
        raise ModelLoadError(f"{path}: tensor {name} has dtype {dtype!r}; it must be one of {', '.join(TENSOR_TYPES)}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise ModelLoadError(
            f"{path}: tensor {name} has shape {shape!r} and data_offsets {offsets!r}; both must list counts"
        )
    numpy_type, our_name = TENSOR_TYPES[dtype]
    start, stop = offsets
    count = math.prod(shape)
    num_bytes = count * np.dtype(numpy_type).itemsize
    if stop - start != num_bytes:
        raise ModelLoadError(
            f"{path}: tensor {name} spans {stop - start} bytes; its shape {shape} in {dtype} takes {num_bytes}"
        )
    if base + stop > len(mapping):
        raise ModelLoadError(f"{path} is truncated: tensor {name} ends at byte {base + stop} of {len(mapping)}")
    return RawTensor(np.frombuffer(mapping, numpy_type, count, base + start).reshape(shape), our_name)
