"""Step times are those of the grids at their points, and what lies between."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim.latency import MODELS, Curve, read

DATA = Path(__file__).parent / "data"
PROFILE = "70b-h200-tp4"


def test_the_grid() -> None:
    latency = read(DATA, PROFILE)
    assert latency.alone_s(2048) == pytest.approx(0.125601)
    assert latency.alone_s(2560) == pytest.approx((0.125601 + 0.206853) / 2)
    assert latency.step_s([], 4, 4 * 8192) == pytest.approx(0.013253)
    assert latency.step_s([], 4, 4 * 6144) == pytest.approx((0.012539 + 0.013253) / 2), "between contexts"
    assert latency.step_s([], 3, 3 * 8192) == pytest.approx((0.012309 + 0.013253) / 2), "between batch sizes"
    assert latency.step_s([], 512, 512 * 1024) > latency.step_s([], 256, 256 * 1024), "beyond the grid"


def test_formulas() -> None:
    latency = read(DATA, PROFILE, "formula")
    assert latency.alone_s(10_000) == pytest.approx((2.23742e-7 * 1e8 + 0.06298007 * 1e4 + 7.4444192) / 1e3)
    assert latency.step_s([], 8, 50_000) == pytest.approx((2.1978225e-5 * 5e4 + 0.0210529 * 8 + 12.61818) / 1e3)


@pytest.mark.parametrize("model", ["grid", "formula"])
def test_a_prompt_in_chunks_takes_what_it_takes_whole(model: str) -> None:
    latency = read(DATA, PROFILE, model)
    fixed = latency.alone_s(0)
    chunks = [(0, 8000, False), (8000, 16_000, False), (16_000, 20_000, True)]
    total = sum(latency.step_s([chunk], 0, 0) for chunk in chunks)
    assert total == pytest.approx(latency.alone_s(20_000) + 2 * fixed)
    together = latency.step_s([(0, 1000, True), (0, 2000, True)], 3, 3000)
    apart = latency.alone_s(1000) + latency.alone_s(2000) - fixed + latency.step_s([], 3, 3000)
    assert together == pytest.approx(apart)


def test_like_dynosim() -> None:
    """Two of its own passes: 3,000 tokens alone, and the last 3,616 of 20,000 (bilinear grids of the same formula: 0.02 ms apart)."""
    latency = read(DATA, PROFILE, "dynosim")
    assert latency.step_s([(0, 3000, True)], 0, 0) == pytest.approx(0.213865, abs=3e-5)
    whole = [(0, 8192, False), (8192, 16_384, False), (16_384, 20_000, True)]
    assert sum(latency.step_s([chunk], 0, 0) for chunk in whole) == pytest.approx(1.331928, abs=3e-5)


def test_sums_are_values_one_by_one() -> None:
    curve = Curve([(0, 5.0), (10, 6.0), (17, 9.5), (30, 9.0)])
    for start, step in ((0, 1), (3, 7), (25, 4), (40, 2)):
        total, expected = 1.0, []
        for n in range(12):
            total += curve(start + n * step) / 1e3
            expected.append(total)
        assert curve.sums(1.0, start, step, 12) == expected


def test_which_profile(tmp_path: Path) -> None:
    for model in MODELS:
        with pytest.raises(ConfigError, match=r"--profile 9b-h200 fits 0 of the profiles .*70B_h200_sxm_tp4"):
            read(DATA, "9b-h200", model)
    (tmp_path / "x-9b_prefill.csv").write_text("isl,ms\n1,2\n")
    with pytest.raises(ConfigError, match=r"is not a grid of isl, prefill_ms"):
        read(tmp_path, "9b")
    (tmp_path / "x-9b_prefill.csv").write_text("isl,prefill_ms\n1,2\n")
    with pytest.raises(ConfigError, match="has 1 rows"):
        read(tmp_path, "9b")
    with pytest.raises(ConfigError, match=r"no \*fits.txt with a line about x-9b"):
        read(tmp_path, "9b", "formula")
