"""Which runner computes on a device. What a device needs is imported only where there is one."""

# Paddle has few types.
# mypy: disable-error-code="attr-defined, no-untyped-call"

from __future__ import annotations

from pathlib import Path

from fastdeploy_pd.config import FP8
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.ops.environment import prepare_environment
from fastdeploy_pd.model.parallel import Rank
from fastdeploy_pd.model.runner import ModelRunner, not_installed
from rdma_comm.cuda.driver import Gpu
from rdma_comm.errors import RdmaError

FP8_CAPABILITY = (8, 9)  # Ada Lovelace; Hopper is (9, 0)
COMPUTE_CAPABILITY = (75, 76)  # major and minor: numbers of cuda.h's CUdevice_attribute


def make_runner(
    directory: Path,
    ops_name: str,
    dtype: str = "float32",
    num_threads: int | None = None,
    device: str = "cpu",
    rank: Rank | None = None,
    kv_dtype: str | None = None,
) -> ModelRunner:
    """Returns: the runner for a device.

    Args:
        kv_dtype: of the pool that it will work on, where a device may be too old for it; None: any does.
    Raises: see ModelRunner; ConfigError: the device cannot have such a pool.
    """
    if device == "cpu":
        return ModelRunner(directory, ops_name, dtype, num_threads, rank=rank)
    prepare_environment()
    if ops_name == "paddle":
        raise ConfigError(f"--ops is 'paddle'; with --device {device} it must be torch: {_why_not_paddle()}")
    try:
        from fastdeploy_pd.model.ops.torch import find_device

        find_device(device)  # first: a torch without CUDA comes without Triton too
        if kv_dtype == FP8:
            gpu = Gpu()
            check_fp8(gpu.name, capability_of(gpu))
        from fastdeploy_pd.model.device_runner import DeviceRunner
    except ImportError as error:
        raise not_installed(ops_name, error) from error
    return DeviceRunner(directory, ops_name, dtype, num_threads, device, rank)


def capability_of(gpu: Gpu) -> tuple[int, int]:
    """Returns: a card's compute capability, major and minor."""
    major, minor = (gpu.attribute(number) for number in COMPUTE_CAPABILITY)
    return major, minor


def check_fp8(card: str, capability: tuple[int, int]) -> None:
    """Raises: ConfigError: for such a card Triton compiles no kernels with e4m3, which would be noticed at the first step."""
    if capability < FP8_CAPABILITY:
        has, needed = (f"{major}.{minor}" for major, minor in (capability, FP8_CAPABILITY))
        raise ConfigError(
            f"--kv-cache-dtype is 'fp8'; on this {card}, of compute capability {has}, it must be auto (fp8 needs {needed} or more)"
        )


def _why_not_paddle() -> str:
    """Returns: which build of Paddle this is, which card, and what is between them."""
    try:
        import paddle
    except ImportError as error:
        return f"Paddle cannot be imported here ({error})"
    build = f"this Paddle ({paddle.__version__}"
    if not paddle.is_compiled_with_cuda():
        return f"{build}) was built without CUDA"
    archs = {int(arch) for arch in paddle.version.cuda_archs()}
    kernels = ", ".join(f"sm_{arch}" for arch in sorted(archs))
    build = f"{build}, CUDA {paddle.version.cuda()}) has kernels for {kernels or 'no card'}"
    try:
        gpu = Gpu()
        major, minor = capability_of(gpu)
    except RdmaError as error:
        return f"{build}, and no card can be used: {error}"
    if 10 * major + minor not in archs:
        return f"{build}, and the card is an {gpu.name}, sm_{major}{minor}"
    return f"{build}, the {gpu.name}'s among them, but this version computes with it on CPUs alone"
