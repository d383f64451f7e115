"""GPU memory between processes of one machine: CUDA IPC, peer access, and copies of scattered blocks by one kernel launch.

Works from raw pointers, so for any framework; needs neither CUDA at build time nor a CUDA package: the driver (libcuda.so.1) is loaded
when a GPU is first asked for, and the kernels come as PTX, which it compiles for the GPU it has.
"""

from rdma_comm.cuda.driver import CudaError, CudaUnavailable, Gpu

__all__ = ["CudaError", "CudaUnavailable", "Gpu"]
