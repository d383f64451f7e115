"""rdma_comm/_abi.h says what the system's infiniband/verbs.h says, member by member; and the C compiles without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.rdma.conftest import SOURCES, build_extension, needs

VERBS_H = Path("/usr/include/infiniband/verbs.h")
RENAMED = {
    ("device", "ops"): "_ops",
    ("send_wr", "imm_data"): "imm_data",
    ("send_wr", "rkey"): "wr.rdma.rkey",
    ("send_wr", "remote_addr"): "wr.rdma.remote_addr",
}
PREFIXES = {"cq", "qp"}  # the library makes them; we look at their beginning only
OURS_ALONE = {"before_poll", "before_post", "after_post", "other_kinds"}
CONSTANTS = {
    "ACCESS_LOCAL_WRITE": "IBV_ACCESS_LOCAL_WRITE", "ACCESS_REMOTE_WRITE": "IBV_ACCESS_REMOTE_WRITE",
    "ACCESS_REMOTE_READ": "IBV_ACCESS_REMOTE_READ", "ACCESS_RELAXED_ORDERING": "IBV_ACCESS_RELAXED_ORDERING",
    "QP_TYPE_RC": "IBV_QPT_RC", "STATE_INIT": "IBV_QPS_INIT", "STATE_RTR": "IBV_QPS_RTR", "STATE_RTS": "IBV_QPS_RTS",
    "STATE_ERR": "IBV_QPS_ERR", "OP_WRITE": "IBV_WR_RDMA_WRITE", "OP_WRITE_IMM": "IBV_WR_RDMA_WRITE_WITH_IMM",
    "OP_READ": "IBV_WR_RDMA_READ", "SEND_SIGNALED": "IBV_SEND_SIGNALED", "WC_FLUSHED": "IBV_WC_WR_FLUSH_ERR",
    "WC_FLAG_IMM": "IBV_WC_WITH_IMM", "LINK_ETHERNET": "IBV_LINK_LAYER_ETHERNET", "MASK_STATE": "IBV_QP_STATE",
    "MASK_ACCESS": "IBV_QP_ACCESS_FLAGS", "MASK_PKEY": "IBV_QP_PKEY_INDEX", "MASK_PORT": "IBV_QP_PORT", "MASK_AV": "IBV_QP_AV",
    "MASK_MTU": "IBV_QP_PATH_MTU", "MASK_TIMEOUT": "IBV_QP_TIMEOUT", "MASK_RETRY": "IBV_QP_RETRY_CNT",
    "MASK_RNR_RETRY": "IBV_QP_RNR_RETRY", "MASK_RQ_PSN": "IBV_QP_RQ_PSN", "MASK_RD_ATOMIC": "IBV_QP_MAX_QP_RD_ATOMIC",
    "MASK_RNR_TIMER": "IBV_QP_MIN_RNR_TIMER", "MASK_SQ_PSN": "IBV_QP_SQ_PSN", "MASK_DEST_RD_ATOMIC": "IBV_QP_MAX_DEST_RD_ATOMIC",
    "MASK_DEST_QPN": "IBV_QP_DEST_QPN",
}  # fmt: skip


def compile_c(text: str, directory: Path) -> str:
    """Returns: what the compiler complains about."""
    source = directory / "check.c"
    source.write_text(text)
    done = subprocess.run(
        ["gcc", "-std=gnu11", "-fsyntax-only", f"-I{SOURCES}", str(source)], capture_output=True, text=True, check=False
    )
    return done.stderr


def structs() -> dict[str, list[str]]:
    """Returns: members of each struct of _abi.h that libibverbs has as well."""
    text = re.sub(r"/\*.*?\*/", "", (SOURCES / "_abi.h").read_text(), flags=re.S)
    found = {}
    for name, body in re.findall(r"struct abi_(\w+) \{\n(.*?)\n\};", text, re.S):
        body = re.sub(r"struct \{.*?\} (\w+);", r"\1;", body, flags=re.S)
        body = re.sub(r"\(\*(\w+)\)\([^;]*\)", r"\1", body)
        names = [
            re.search(r"(\w+)(\[\d+\])?$", part.strip())
            for line in body.split(";")
            for part in line.split(",")
            if part.strip()
        ]
        found[name] = [n.group(1) for n in names if n and n.group(1) not in OURS_ALONE]
    return found


def test_structs_and_constants_are_the_library_s(tmp_path: Path) -> None:
    needs("gcc")
    if not VERBS_H.exists():
        pytest.skip(f"{VERBS_H} is not there; apt-get install libibverbs-dev")
    lines = ["#include <infiniband/verbs.h>", '#include "_abi.h"']
    for struct, members in structs().items():
        if struct not in PREFIXES:
            lines.append(f'_Static_assert(sizeof(struct abi_{struct}) == sizeof(struct ibv_{struct}), "{struct}");')
        for member in members:
            theirs = RENAMED.get((struct, member), member)
            lines.append(
                f"_Static_assert(offsetof(struct abi_{struct}, {member}) == offsetof(struct ibv_{struct}, {theirs}) && "
                f"sizeof(((struct abi_{struct} *)0)->{member}) == sizeof(((struct ibv_{struct} *)0)->{theirs}), "
                f'"{struct}.{member}");'
            )
    lines += [f'_Static_assert((int){ours} == (int){theirs}, "{ours}");' for ours, theirs in CONSTANTS.items()]
    assert len(lines) > 150
    assert compile_c("\n".join(lines) + "\n", tmp_path) == ""
    lines.append('_Static_assert(offsetof(struct abi_wc, qp_num) != offsetof(struct ibv_wc, qp_num), "must fail");')
    assert "must fail" in compile_c("\n".join(lines) + "\n", tmp_path)


def test_the_extension_compiles_without_a_warning(tmp_path: Path) -> None:
    needs("gcc")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        pytest.skip("Python.h is not there; apt-get install python3-dev")
    build_extension(tmp_path, "-Werror")


def test_importing_works_anywhere_and_opening_says_why_not() -> None:
    code = (
        "import rdma_comm\nfrom rdma_comm import _verbs\n"
        "try: _verbs.Device('nic0'); print('opened')\n"
        "except rdma_comm.RdmaUnavailable as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert any(reason in said for reason in ("libibverbs", "no RDMA support loaded", "no RDMA device nic0"))
