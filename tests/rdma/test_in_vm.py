"""Runs what needs an RDMA device in a virtual machine that has one."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy_pd.flags import DEMO_MODEL
from tests.model.tiny import TinyEngine
from tests.rdma.conftest import ROOT, SOURCES, build_extension, run_in_vm

#: without what an emulated processor would import for nothing: plugins, and conftest.py files above the tests
PYTEST = (
    "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={ROOT}", "-p", "pytest_timeout", "--timeout=200",
)  # fmt: skip
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
INSIDE, TRANSFER = "--confcutdir=tests/rdma/inside", "--confcutdir=tests/transfer"


def find_sanitizer() -> Path | None:
    """Returns: AddressSanitizer's library; None: gcc has none here."""
    if shutil.which("gcc") is None:
        return None
    asked = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(asked.stdout.strip())
    return path.resolve() if path.is_absolute() else None


@pytest.mark.timeout(700)
def test_the_compiled_part_and_the_communicator() -> None:
    # What runs under the sanitizer below need not run twice: a minute each.
    rest = ("-k", "thousand or test_communicator or test_pyverbs") if find_sanitizer() else ()
    printed = run_in_vm(*PYTEST, INSIDE, "tests/rdma/inside", *rest, timeout_s=600, env=NO_PLUGINS)
    assert " passed" in printed and "failed" not in printed


@pytest.mark.timeout(700)
def test_the_transfer_contract_on_rdma() -> None:
    files = ("tests/transfer/test_contract.py", "tests/transfer/test_connect.py")
    printed = run_in_vm(*PYTEST, TRANSFER, *files, "-k", "rdma", timeout_s=600, env=NO_PLUGINS)
    assert " passed" in printed and "failed" not in printed


@pytest.mark.timeout(800)
def test_the_compiled_part_under_address_sanitizer(tmp_path: Path) -> None:
    library = find_sanitizer()
    if library is None:
        pytest.skip("there is no gcc with libasan here")
    package = tmp_path / "rdma_comm"
    shutil.copytree(SOURCES, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build_extension(package, "-fsanitize=address", "-g", "-O1")
    options = "ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:verify_asan_link_order=0"
    printed = run_in_vm(
        *PYTEST, INSIDE, "tests/rdma/inside/test_verbs.py", "tests/rdma/inside/test_endpoint.py", "-k", "not thousand", "--import-mode=append",
        timeout_s=700, env=NO_PLUGINS, mem_mib=3000, first_path=tmp_path, prefix=("env", f"LD_PRELOAD={library}", options, "PYTHONMALLOC=malloc"),
    )  # fmt: skip
    assert " passed" in printed and "failed" not in printed and "AddressSanitizer" not in printed
    assert f"tested {package}/_verbs" in printed


@pytest.mark.timeout(800)
def test_prefill_and_decode_on_two_machines_answer_like_one_engine(tmp_path: Path) -> None:
    engine, chooser = TinyEngine(DEMO_MODEL, "reference", num_blocks=64), random.Random(5)
    cases = []
    for length, num_tokens in ((70, 8), (9, 12), (130, 8)):
        prompt = [chooser.randrange(10, 1500) for _ in range(length)]
        request = engine.request(prompt, num_tokens)
        (tokens,) = engine.generate([request])
        engine.blocks.release(request.local.block_table)
        cases.append({"prompt": prompt, "tokens": tokens})
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    printed = run_in_vm("tests.rdma.two_hosts", hosts=2, timeout_s=700, mem_mib=2500, env={"RDMA_CASES": str(file)})
    sys.stdout.write(printed)
    assert printed.count("ended well") == 2


@pytest.mark.timeout(600)
def test_the_doctor_finds_rdma_between_two_machines() -> None:
    printed = run_in_vm("tests.rdma.two_doctors", hosts=2, timeout_s=500, mem_mib=1500)
    sys.stdout.write(printed)
    assert re.search(r"^\[1\] ok +pair rdma: rxe0 .* the same bytes; MTU 4096 here, 4096 there", printed, re.M)
    assert re.search(r"^\[1\] ok +pair backend: .* takes rdma \(shm: .*3 blocks handed over", printed, re.M)
    for name in ("nics", "link", "gid", "mtu", "memlock", "backend rdma", "peer"):
        assert re.search(rf"^\[1\] ok +{name}: ", printed, re.M), name
    assert not re.search(r"^\[\d\] fail ", printed, re.M)
