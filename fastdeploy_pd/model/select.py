"""Which runner computes on a device. What a device needs is imported only where there is one."""

from __future__ import annotations

from pathlib import Path

from fastdeploy_pd.model.ops.environment import prepare_environment
from fastdeploy_pd.model.parallel import Rank
from fastdeploy_pd.model.runner import ModelRunner, not_installed


def make_runner(
    directory: Path,
    ops_name: str,
    dtype: str = "float32",
    num_threads: int | None = None,
    device: str = "cpu",
    rank: Rank | None = None,
) -> ModelRunner:
    """Returns: the runner for a device. Raises: see ModelRunner."""
    if device == "cpu":
        return ModelRunner(directory, ops_name, dtype, num_threads, rank=rank)
    prepare_environment()
    try:
        from fastdeploy_pd.model.ops.torch import find_device

        find_device(device)  # first: a torch without CUDA comes without Triton too
        from fastdeploy_pd.model.device_runner import DeviceRunner
    except ImportError as error:
        raise not_installed(ops_name, error) from error
    return DeviceRunner(directory, ops_name, dtype, num_threads, device, rank)
