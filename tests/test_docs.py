"""The documents say what the code does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fastdeploy_pd.cluster.keys import Keys
from fastdeploy_pd.config import make_parser
from fastdeploy_pd.request import print_transitions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_phase_diagram_is_the_table() -> None:
    text = (DOCS / "life_of_a_request.md").read_text()
    block = re.search(r"```phases\n(.*?)\n```", text, re.DOTALL)
    assert block is not None
    assert block[1] == print_transitions()


def test_every_link_leads_somewhere() -> None:
    links = {
        (p, link)
        for p in (ROOT / "README.md", *DOCS.glob("*.md"))
        for link in re.findall(r"\]\(([^)#]+)", p.read_text())
    }
    assert len(links) >= 20
    assert [f"{p.name}: {link}" for p, link in links if "://" not in link and not (p.parent / link).exists()] == []


def test_every_invariant_names_a_test_that_exists() -> None:
    text = (DOCS / "invariants.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 19
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        functions = {
            n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        variables = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        assert name in functions | variables, f"{path} has no {name}"


def test_every_key_is_documented() -> None:
    keys, text = Keys("T"), (DOCS / "redis_keys.md").read_text()
    for key in (
        keys.members,
        keys.member("ID"),
        keys.changes,
        keys.leader,
        keys.requests,
        keys.out("REQUEST"),
        keys.cancel("REQUEST"),
        keys.prefixes("ID"),
        keys.prefix_changes("ID"),
    ):
        assert f"`{key}`" in text


def test_every_flag_is_documented() -> None:
    text = (DOCS / "configuration.md").read_text()
    for action in make_parser()._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and not flag.startswith("--no-") and flag != "--help":
                assert f"`{flag}`" in text, flag


def test_every_metric_is_documented() -> None:
    source = (ROOT / "fastdeploy_pd" / "observe" / "metrics.py").read_text()
    names = set(re.findall(r'(?:gauge|counter|histogram|_name)\(\s*"(\w+)"', source))
    text = (DOCS / "metrics.md").read_text()
    assert len(names) > 15
    for name in names:
        assert f"`fastdeploy_pd:{name}" in text, name
