"""These run where there is an RDMA device: in the machine that tests/rdma/test_in_vm.py starts, or on real hardware."""

from __future__ import annotations

import pytest

from rdma_comm import _verbs
from rdma_comm.devices import list_nics

if not any(nic.active_port for nic in list_nics()):
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which build was tested."""
    terminalreporter.write_line(f"tested {_verbs.__file__}")
