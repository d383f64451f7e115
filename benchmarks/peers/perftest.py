"""The `perftest` programs, which everybody measures RDMA with: server and client on one machine, one run a call."""

from __future__ import annotations

import shutil
import subprocess
import time

INSTALL = "apt-get install perftest"
PROGRAMS = ("ib_write_bw", "ib_read_bw", "ib_write_lat", "ib_read_lat")
PORT = 18515
START_S = 20.0


def missing() -> str:
    """Returns: the command that installs what is not here, or ""."""
    return "" if all(shutil.which(p) for p in PROGRAMS) else INSTALL


def run(program: str, device: str, gid_index: int, num_bytes: int, iterations: int) -> float:
    """
    Args:
        num_bytes: of each message; iterations: how many, 5 at least.
    Returns: GB/s on average (`*_bw`), or microseconds typically (`*_lat`).
    Raises: RuntimeError: with what it printed.
    """
    command = [
        program, "-d", device, "-x", str(gid_index), "-F", "-s", str(num_bytes), "-n", str(iterations), "-p", str(PORT),
        *(["-N"] if program.endswith("bw") else []),
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _await_listener()
        client = subprocess.run([*command, "127.0.0.1"], capture_output=True, text=True, timeout=120, check=False)
        server.communicate(timeout=30)
    finally:
        server.kill()
    rows = [line.split() for line in client.stdout.splitlines() if line.split()[:1] == [str(num_bytes)]]
    if client.returncode or not rows:
        raise RuntimeError(f"{program} returned {client.returncode}: {client.stdout}{client.stderr}")
    # bytes, iterations, peak, average, messages/s; or bytes, iterations, least, most, typical ...
    return float(rows[0][3]) * 2**20 / 1e9 if program.endswith("bw") else float(rows[0][4])


def _await_listener() -> None:
    """Wait until the server listens: a client that calls before gives up."""
    wanted, end_s = f":{PORT:04X} ", time.monotonic() + START_S
    while time.monotonic() < end_s:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            with open(table) as file:
                if any(wanted in line and " 0A " in line for line in file):
                    return
        time.sleep(0.01)
    raise RuntimeError(f"nothing listens on port {PORT} after {START_S:g} s")
