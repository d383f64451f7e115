"""The project's walls: imports go one way, files and functions stay small, and some things are not done at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdeploy_pd"
FILES = sorted(PACKAGE.rglob("*.py"))
RDMA = sorted((ROOT / "rdma_comm").rglob("*.py"))
#: what each part may import of the others
ALLOWED = {
    "core": {"errors", "clock", "config", "request"},
    "model": {"errors", "clock", "config", "request", "core"},
    "transfer": {"errors", "clock", "config", "request", "interfaces", "core"},
    "cluster": {"errors", "clock", "config", "request", "core"},
    "observe": {"errors", "clock", "config", "request", "core"},
    "sim": {"errors", "clock", "machine", "request", "core"},
}
BASE = {"errors", "clock", "config", "flags", "request", "interfaces", "machine", "scratch"}
ALLOWED["engine"] = {*BASE, "core", "model", "transfer", "cluster", "observe"}
ALLOWED["launch"] = {*ALLOWED["engine"], "engine", "launch", "entrypoints"}
ALLOWED["doctor"] = {*ALLOWED["engine"], "engine", "launch"}
ALLOWED["entrypoints"] = {*ALLOWED["launch"], "doctor", "sim"}
ALLOWED["client.py"] = {*BASE, "cluster"}
for name in BASE:
    ALLOWED[f"{name}.py"] = BASE


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "fastdeploy_pd"
                else {node.module}
            )
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    part = part_of(path)
    own = {i.split(".")[1] for i in imports(tree) if i.startswith("fastdeploy_pd.")} - {part, "__version__"}
    if part in ALLOWED:
        assert own <= ALLOWED[part], f"{part} may not import {sorted(own - ALLOWED[part])}"
    if part in ("core", "sim") or part.removesuffix(".py") in BASE:
        outside = {i.split(".")[0] for i in imports(tree)} - {"fastdeploy_pd"}
        assert outside <= set(sys.stdlib_module_names), "core and sim need the standard library alone"
    assert not {"pickle", "marshal", "shelve"} & imports(tree)
    if path.name != "clock.py":
        for call in ("time.time(", "time.monotonic("):
            assert call not in source, "time is read in clock.py alone"
    if part not in ("engine", "config.py"):
        assert not asks_for_the_role(tree), "roles are compared in engine/ alone"


@pytest.mark.parametrize("path", [*FILES, *RDMA], ids=lambda p: str(p.relative_to(ROOT)))
def test_length(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 600
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def asks_for_the_role(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {getattr(s, "attr", getattr(s, "id", "")) for s in sides}
            values = {s.value for s in sides if isinstance(s, ast.Constant)}
            is_message_role = path_is_message(values)
            if {"role", "splitwise_role"} & names and not is_message_role:
                return True
    return False


def path_is_message(values: set[object]) -> bool:
    """A chat message has a role too."""
    return bool(values & {"developer", "system", "user", "assistant"})


def test_one_broad_except_a_process() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            ):
                found.append(str(path.relative_to(PACKAGE)))
    assert sorted(found) == [
        "doctor/finding.py",
        "engine/policies.py",  # a user's own code
        "engine/process.py",
        "entrypoints/openai/guard.py",
        "entrypoints/tokenizer.py",
    ]


def test_core_and_the_machines_need_no_framework() -> None:
    code = (
        "import sys; import fastdeploy_pd.core.scheduler, fastdeploy_pd.core.placement, fastdeploy_pd.core.layout, fastdeploy_pd.request;"
        "bad = {'numpy', 'torch', 'paddle', 'redis', 'zmq', 'asyncio', 'msgspec'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
