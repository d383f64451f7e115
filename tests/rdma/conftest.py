"""RDMA without RDMA hardware: a virtual machine whose kernel has soft-RoCE (vm.sh)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ROOT / "rdma_comm"
VM = Path(__file__).with_name("vm.sh")
TOOLS = ("qemu-system-x86_64", "modprobe", "ip", "xz", "flock")
#: the interpreter's own binary (a virtual environment's link does not find its packages in there), then a module to run
RUN_MODULE = (
    "import runpy, sys; sys.path[:0] = sys.argv[1].split(':'); sys.argv = sys.argv[2:]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def run_in_vm(
    *module_and_arguments: str,
    hosts: int = 1,
    timeout_s: int = 240,
    mem_mib: int = 2048,
    env: dict[str, str] | None = None,
    prefix: tuple[str, ...] = (),
    first_path: Path | None = None,
) -> str:
    """Run `python -m MODULE ARGUMENTS` in one machine with a soft-RoCE NIC, or two joined by a wire.

    Args:
        env: variables for it; prefix: what stands before the interpreter; first_path: a folder whose modules come first.
    Returns: what it printed. Raises: AssertionError: it failed; with its output.
    """
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)}: not installed; apt-get install qemu-system-x86 kmod iproute2 xz-utils libibverbs1"
        )
    interpreter = str(Path(sys.executable).resolve())
    packages = ":".join(
        [*([str(first_path)] if first_path else []), str(ROOT), *(p for p in sys.path if p.endswith("site-packages"))]
    )
    command = [
        str(VM), "--hosts", str(hosts), "--timeout", str(timeout_s), "--mem", str(mem_mib), str(ROOT), "--",
        *prefix, interpreter, "-c", RUN_MODULE, packages, *module_and_arguments,
    ]  # fmt: skip
    names = " ".join(env or {})
    done = subprocess.run(
        command,
        env={**os.environ, **(env or {}), "RDMA_VM_ENV": names, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s + 60,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def needs(*programs: str) -> None:
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")


def build_extension(folder: Path, *flags: str) -> None:
    """Compile rdma_comm._verbs into a folder. Raises: AssertionError: with what the compiler says, warnings included."""
    command = [
        "gcc", "-O2", "-fPIC", "-shared", "-std=c11", "-Wall", "-Wextra", "-Wno-missing-field-initializers", *flags,
        f"-I{sysconfig.get_paths()['include']}", *map(str, sorted(SOURCES.glob("*.c"))), "-ldl",
        "-o", str(folder / f"_verbs{sysconfig.get_config_var('EXT_SUFFIX')}"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
