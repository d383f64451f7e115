"""RDMA for Python: bytes, regions and peers. docs/rdma_comm.md has one entry a call."""

from rdma_comm.errors import CompletionFailed, HandshakeFailed, RdmaError, RdmaUnavailable, VerbsError

__all__ = ["CompletionFailed", "HandshakeFailed", "RDMACommunicator", "RdmaError", "RdmaUnavailable", "VerbsError"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Late: it needs the compiled part, which a machine without a C compiler lacks.
    if name == "RDMACommunicator":
        from rdma_comm.communicator import RDMACommunicator

        return RDMACommunicator
    raise AttributeError(f"module 'rdma_comm' has no attribute {name!r}")
