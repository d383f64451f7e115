"""What the numerical libraries read from the environment when they are loaded, how many threads they use, and what is said where they
find no GPU.

Several instances share a host. OpenMP's threads spin while they wait; once there are more of them than idle cores, a step takes
20 times as long (measured: two spinning threads on two busy cores, 285 ms a decode step instead of 11).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from fastdeploy_pd.errors import ConfigError

CPU_INFO = Path("/proc/cpuinfo")


def no_gpu(device: str, reason: Exception) -> ConfigError:
    """Returns: what to say where --device asks for a GPU and the driver has none."""
    return ConfigError(
        f"--device is {device!r}; torch cannot use one here: there is no NVIDIA driver or GPU: {reason}; "
        "see nvidia-smi and CUDA_VISIBLE_DEVICES, or give --device cpu"
    )


def default_num_threads(num_ranks: int = 1) -> int:
    """Returns: OMP_NUM_THREADS where it is set to a number, else a rank's part of half of this process's cores, at least 1."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) >= 1:
        return int(wanted)
    return max(1, len(os.sched_getaffinity(0)) // 2 // num_ranks)


def prepare_environment() -> None:
    """Set what is not set yet; to be called before paddle or torch is imported, after which it has no effect."""
    warnings.filterwarnings("ignore", message="No ccache found")  # Paddle's advice for who compiles
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle warns of compilers that a server doesn't need
    if CPU_INFO.exists() and "AuthenticAMD" in CPU_INFO.read_text(encoding="utf-8"):
        # Paddle bundles a MKL of 2019 that takes its slowest path on AMD unless told there is AVX2: 2.7 times slower.
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
