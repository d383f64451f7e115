"""Makes blocks.ptx from blocks.cu with NVRTC, e.g. the one that PyTorch brings: `python -m rdma_comm.cuda.compile [LIBNVRTC]`."""

from __future__ import annotations

import ctypes
import glob
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ARCHITECTURE = "compute_80"
PTX_VERSION = "7.4"  # the oldest that has what the kernels use: drivers of CUDA 11.4 and later take it


def find_library() -> str:
    """Returns: NVRTC's path, from the system or a package. Raises: FileNotFoundError."""
    places = [f"{p}/nvidia/*/lib/libnvrtc.so*" for p in sys.path] + ["/usr/local/cuda*/lib64/libnvrtc.so*"]
    for place in places:
        found = sorted(f for f in glob.glob(place) if "builtins" not in f and "alt" not in f)
        if found:
            return found[0]
    raise FileNotFoundError("libnvrtc is not here")


def compile_ptx(source: str, library: str | None = None) -> str:
    """Returns: PTX for ARCHITECTURE and later. Raises: RuntimeError: with the compiler's words; FileNotFoundError."""
    nvrtc = ctypes.CDLL(library or find_library())
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"blocks.cu", 0, None, None)
    options = [f"--gpu-architecture={ARCHITECTURE}".encode(), b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        said = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, said)
        raise RuntimeError(said.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, text)
    body = re.sub(r"//.*\n", "", text.value.decode())
    return re.sub(r"\.version [\d.]+", f".version {PTX_VERSION}", body)


if __name__ == "__main__":
    (HERE / "blocks.ptx").write_text(
        compile_ptx((HERE / "blocks.cu").read_text(), sys.argv[1] if len(sys.argv) > 1 else None)
    )
