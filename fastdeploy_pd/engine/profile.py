"""Measured step times of a model on a device: the file that `fastdeploy-pd profile` writes and an instance starts from."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import tempfile
from pathlib import Path

import msgspec

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.ops.environment import CPU_INFO, default_num_threads
from rdma_comm.cuda.driver import Gpu

log = logging.getLogger("fastdeploy_pd.engine")

VERSION = 1  #: of the file's form


class Conditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What step times depend on."""

    fingerprint: str  #: of the model
    device: str  #: the kind of GPU, or of CPU and how many threads compute
    dtype: str  #: computed in, and, where it differs, of the KV cache
    ops: str
    tensor_parallel_size: int


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured, and the predictor fitted to it."""

    version: int
    conditions: Conditions
    predictor: Predictor
    prefills: list[tuple[int, int, float]]  #: (tokens, tokens computed before, seconds) of parts of prompts
    decodes: list[tuple[int, int, float]]  #: (sequences, KV tokens in sum, seconds)
    num_blocks: int = (
        0  #: of the pool that was measured in; with the next two what a simulation needs to know; 0: not said
    )
    block_size: int = 0  #: tokens
    kv_bytes_per_token: int = 0  #: in all layers and ranks

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises: ConfigError: that is not possible there; names the path."""
        check_target(path)
        data = msgspec.json.format(msgspec.json.encode(self), indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(data + b"\n")
                os.replace(part, path)
            except OSError:
                os.unlink(part)
                raise
        except OSError as error:
            raise ConfigError(
                f"--profile-path: the profile cannot be written to {path}: {error.strerror or error}"
            ) from error


def check_target(path: Path) -> None:
    """Raises: ConfigError: no profile can be written there. A device or a pipe would be replaced by a file."""
    if os.path.exists(path) and not path.is_file():  # unlike Path.exists, says no where it may not look
        raise ConfigError(f"--profile-path is '{path}'; it must be a file, or one that is not there yet")
    parent = next(p for p in path.absolute().parents if os.path.exists(p))
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(f"--profile-path is '{path}'; {parent} must be a directory that may be written to")


def conditions_of(config: InstanceConfig, fingerprint: str) -> Conditions:
    """Returns: those of an instance on this machine."""
    model = config.model
    if model.device == "cpu":
        found = re.search(r"model name\s*:\s*(.+)", CPU_INFO.read_text())
        kind = found[1].strip() if found else "cpu"
        device = f"{kind}, {default_num_threads(model.tensor_parallel_size)} threads"
    else:
        device = Gpu().name
    kv_dtype = config.cache.kv_cache_dtype
    dtype = model.dtype if kv_dtype == model.dtype else f"{model.dtype}, KV {kv_dtype}"
    return Conditions(fingerprint, device, dtype, model.ops, model.tensor_parallel_size)


def profile_path(config: InstanceConfig, conditions: Conditions) -> Path:
    """Returns: --profile-path, or the place for these conditions."""
    if config.scheduling.profile_path is not None:
        return Path(config.scheduling.profile_path)
    name = hashlib.sha256(msgspec.json.encode(conditions)).hexdigest()[:16]
    return Path(config.scheduling.profile_directory) / f"{name}.json"


def load_predictor(config: InstanceConfig, fingerprint: str) -> Predictor | None:
    """Returns: the stored predictor for this instance; None if there is none, or it is no use, of which the log then says why."""
    conditions = conditions_of(config, fingerprint)
    path = profile_path(config, conditions)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")  # reading a device or a pipe might never end
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
        reason = _why_not(profile, conditions)
    except FileNotFoundError:
        if config.scheduling.profile_path is None:
            return None
        reason = "there is no such file"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
    except (msgspec.MsgspecError, ValueError) as error:
        reason = str(error)
    if reason:
        log.warning(
            "step times are learned from nothing: the profile %s is not used: %s. `fastdeploy-pd profile` with this instance's "
            "flags writes a new one",
            path, reason,
        )  # fmt: skip
        return None
    log.info("step times: %s", path)
    return profile.predictor


def _why_not(profile: Profile, conditions: Conditions) -> str:
    if profile.version != VERSION:
        return f"its version is {profile.version}; it must be {VERSION}"
    for name in Conditions.__struct_fields__:
        theirs, ours = getattr(profile.conditions, name), getattr(conditions, name)
        if theirs != ours:
            return f"{name} is {theirs!r} there and {ours!r} here"
    if not all(math.isfinite(x) and x >= 0 for x in (*profile.predictor.prefill, *profile.predictor.decode)):
        return "a coefficient of its predictor is negative or no finite number"
    return ""
