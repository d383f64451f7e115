"""Runs in both of two machines with a soft-RoCE NIC each: `fastdeploy-pd doctor --listen` on the first, `--peer` on the second."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

SELF, PEER, INDEX = os.environ["SELF_IP"], os.environ["PEER_IP"], int(os.environ["HOST_INDEX"])
DOCTOR_PORT, END_PORT, WAIT_S = 2333, 2400, 400.0


def doctor(*flags: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "FD_CLUSTER_SECRET": "a secret of thirty-two characters!!", "PYTHONPATH": ":".join(sys.path)}
    # Without torch, which an emulated processor takes a minute to import.
    code = "import sys; sys.modules['torch'] = None; from fastdeploy_pd.entrypoints.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, "doctor", *flags], env=env)


def first_host() -> int:
    """Listen until the second host has done."""
    with socket.create_server((SELF, END_PORT)) as server:
        server.settimeout(WAIT_S)
        process = doctor("--listen", f"{SELF}:{DOCTOR_PORT}")
        try:
            server.accept()[0].close()
        finally:
            process.kill()
    return 0


def second_host() -> int:
    """Examine the pair once the first host listens. Returns: the doctor's exit status."""
    end_s = time.monotonic() + WAIT_S
    while True:
        try:
            socket.create_connection((PEER, DOCTOR_PORT), timeout=2).close()
            break
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.5)
    try:
        return doctor("--peer", PEER).wait(WAIT_S)
    finally:
        socket.create_connection((PEER, END_PORT), timeout=5).close()


if __name__ == "__main__":
    sys.exit((first_host if INDEX == 0 else second_host)())
