"""Pictures of real reports; what is wrong or missing is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.entrypoints.sim_plots import load, queueing
from fastdeploy_pd.errors import ConfigError

SIMULATE = [
    "simulate", "--trace", "synthetic", "--num-prompts", "40", "--num-blocks", "4000", "--kv-bytes-per-token", "1000",
    "--prefill-coefficients=1e-9,1e-4,5e-3", "--decode-coefficients=1e-7,1e-4,1e-2", "--per-request",
]  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two layouts at three rates, one of them at one alone."""
    folder = tmp_path_factory.mktemp("reports")
    for layout, rates in (("2M", "2,4,40"), ("1P1D", "4")):
        assert main([*SIMULATE, "--layout", layout, "--rate", rates, "--json", str(folder / f"{layout}.json")]) == 0
    return [str(folder / "2M.json"), f"apart={folder / '1P1D.json'}"]


def test_names_and_runs(reports: list[str]) -> None:
    mixed, apart = load([Path(r) for r in reports])
    assert (mixed.name, apart.name) == ("2M fewest-tokens", "apart")
    assert [round(r["rate"]) for r in mixed.runs] != sorted({round(r["rate"]) for r in apart.runs})
    assert len(mixed.runs) == 3 and len(apart.runs) == 1
    assert mixed.colour != apart.colour and mixed.marker != apart.marker


def test_names_that_repeat(reports: list[str], tmp_path: Path) -> None:
    """Files tell them apart, by as much of the path as that takes; one file twice is an error."""
    first = Path(reports[0])
    same, other = tmp_path / "a" / "2M.json", tmp_path / "b" / "x.json"
    for copy in (same, other):
        copy.parent.mkdir()
        copy.write_bytes(first.read_bytes())
    assert [s.name for s in load([first, other])] == [f"2M fewest-tokens ({n})" for n in ("2M.json", "x.json")]
    names = [s.name for s in load([first, other, same, Path(f"mine={first}")])]
    assert names[1:] == ["2M fewest-tokens (x.json)", "2M fewest-tokens (a/2M.json)", "mine"]
    with pytest.raises(ConfigError, match=r"2M\.json is given twice; each must have a name of its own then"):
        load([first, first])


def test_what_is_no_report_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("[]", "{}", '{"flags": {}, "runs": []}', "no"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"x\.json is not a report of `simulate --json`"):
            load([path])


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_without_matplotlib(reports: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", *reports, "--out", str(tmp_path)]) == 2
    assert "pip install 'fastdeploy-pd[plot]'" in capsys.readouterr().err


def test_pictures(reports: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each as PNG and SVG; the same reports give the same SVG; lines carry their names."""
    pytest.importorskip("matplotlib")
    svgs = []
    for out in (tmp_path / "1", tmp_path / "2"):
        assert main(["plot", *reports, "--out", str(out)]) == 0
        svgs.append({p.name: p.read_bytes() for p in sorted(out.glob("*.svg"))})
        assert len(list(out.glob("*.png"))) == len(svgs[-1])
    assert svgs[0] == svgs[1]
    names = {n.split("_")[0].removesuffix(".svg") for n in svgs[0]}
    assert names == {"attainment", "queueing", "pareto", "latency"}
    assert sum(n.startswith("pareto_") for n in svgs[0]) == sum(n.startswith("latency_cdf_") for n in svgs[0]) >= 3
    from matplotlib import pyplot

    figure = queueing(load([Path(r) for r in reports]))
    figure.draw_without_rendering()
    left, right = figure.axes
    ends = [text.get_window_extent().x1 for text in left.texts]
    assert max(ends) + 10 < min(label.get_window_extent().x0 for label in right.get_yticklabels()), "names keep off"
    pyplot.close("all")
    for content in svgs[0].values():
        ElementTree.fromstring(content)
    assert b"<!-- apart -->" in svgs[0]["attainment.svg"] and b"<!-- 2M fewest-tokens -->" in svgs[0]["attainment.svg"]
    assert main(["plot", *reports, "--out", str(tmp_path / "x"), "--goal", "2"]) == 2
    assert "--goal is 2.0; it must be above 0 and at most 1" in capsys.readouterr().err
    taken = tmp_path / "taken" / "attainment.png"
    taken.mkdir(parents=True)
    assert main(["plot", *reports, "--out", str(taken.parent)]) == 2
    assert capsys.readouterr().err == f"error: --out: {taken} cannot be written: Is a directory\n"
