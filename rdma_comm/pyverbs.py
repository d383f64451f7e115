"""rdma-core's own Python binding, where the system has it (Debian: python3-pyverbs): what devices and GIDs libibverbs itself reports."""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import sys
from functools import cache
from pathlib import Path
from typing import Any

from rdma_comm.devices import Gid

SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")  # which virtual environments don't look into
TYPES = {0: "IB/RoCE v1", 1: "IB/RoCE v1", 2: "RoCE v2"}  # of ibv_gid_type, as sysfs calls them
MAX_GIDS = 1024


@cache
def find() -> Any:
    """Returns: the module pyverbs.device; None: it is not here, or is another Python's."""
    try:
        return importlib.import_module("pyverbs.device")
    except ImportError:
        pass
    initial = SYSTEM_PACKAGES / "pyverbs" / "__init__.py"
    spec = importlib.util.spec_from_file_location("pyverbs", initial, submodule_search_locations=[str(initial.parent)])
    if not initial.exists() or spec is None or spec.loader is None:
        return None
    sys.modules["pyverbs"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("pyverbs.device")
    except ImportError:
        del sys.modules["pyverbs"]
        return None


def gid_tables() -> dict[tuple[str, int], tuple[Gid, ...]]:
    """Returns: by device and port, what addresses libibverbs reports; nothing where it has no devices, or pyverbs is not here."""
    device = find()
    if device is None:
        return {}
    error: type[Exception] = importlib.import_module("pyverbs.pyverbs_error").PyverbsError
    found: dict[tuple[str, int], tuple[Gid, ...]] = {}
    try:
        for entry in device.get_device_list():
            name = entry.name.decode()
            with device.Context(name=name) as context:
                for gid in context.query_gid_table(MAX_GIDS):
                    address = ipaddress.IPv6Address(gid.gid_str())
                    kind = TYPES.get(gid.gid_type, TYPES[0])
                    key = name, gid.port_num
                    found[key] = (*found.get(key, ()), Gid(gid.gid_index, address, kind))
    except error:  # no kernel support, no rights: sysfs says more
        return found
    return found
