"""Traces are read as they were written; equal beginnings become equal block hashes."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim.trace import Offered, Synthetic, at_rate, load, own_rate, repeated

MOONCAKE = [
    {"timestamp": 500, "input_length": 1000, "output_length": 3, "hash_ids": [0, 7]},
    {"timestamp": 1500, "input_length": 520, "output_length": 0, "hash_ids": [0, 9]},
    {"timestamp": 2500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 7, 12]},
]


def write_mooncake(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mooncake(tmp_path: Path) -> None:
    path = write_mooncake(tmp_path / "t.jsonl", MOONCAKE)
    offered = load(path)
    assert [(o.number, o.arrival_s, o.num_input, o.num_output) for o in offered] == [
        (0, 0.0, 1000, 3),
        (1, 1.0, 520, 1),
        (2, 2.0, 1100, 5),
    ]
    zipped = tmp_path / "t.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert load(zipped) == offered
    assert load(zipped, 2) == offered[:2]


@pytest.mark.parametrize("block_size", [16, 64, 512])
def test_equal_ids_are_equal_blocks(block_size: int) -> None:
    first = Offered(0, 0.0, 1000, 1, (0, 7)).block_hashes(block_size)
    second = Offered(1, 0.0, 1100, 1, (0, 7, 12)).block_hashes(block_size)
    other = Offered(2, 0.0, 1000, 1, (0, 8)).block_hashes(block_size)
    num_blocks = 1000 // block_size
    assert len(first) == 1001 // block_size and len(second) == 1101 // block_size
    assert len({*first[:num_blocks], *second, *other}) == len(second) + len(other) - 512 // block_size
    assert second[:num_blocks] == first[:num_blocks]
    assert other[: 512 // block_size] == first[: 512 // block_size]


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.5000000,40,10\n"
        "2023-11-17 00:00:00.7500000,3000,8\n"
    )
    assert load(path) == [Offered(0, 0.0, 40, 10), Offered(1, 1.25, 3000, 8)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", json.dumps(MOONCAKE[0]) + "\n{}\n", "line 2"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}\n', "at least 1"),
        (
            "t.jsonl",
            '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}\n',
            "2 hash_ids for 9",
        ),
        ("t.jsonl", '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1.5]}\n', "wrong hash_ids"),
        ("t.jsonl", json.dumps(MOONCAKE[0]) + "\n", "has 1 requests"),
        ("t.csv", "TIMESTAMP,ContextTokens\nyesterday,4\n", "line 2"),
        ("t.jsonl.gz", "not zipped", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_rates(tmp_path: Path) -> None:
    offered = load(write_mooncake(tmp_path / "t.jsonl", MOONCAKE))
    assert own_rate(offered) == 1.0
    assert [o.arrival_s for o in at_rate(offered, 4.0)] == [0.0, 0.25, 0.5]


def test_repeated(tmp_path: Path) -> None:
    once = load(write_mooncake(tmp_path / "t.jsonl", MOONCAKE))
    twice = list(repeated(once, 2))
    assert list(repeated(once, 1)) == once
    assert [o.number for o in twice] == list(range(6))
    assert [o.arrival_s for o in twice] == [0, 1, 2, 3, 4, 5], "at the same rate"
    assert [(o.num_input, o.num_output) for o in twice[3:]] == [(o.num_input, o.num_output) for o in once]
    first, second = ([set(o.block_hashes(64)) for o in part] for part in (twice[:3], twice[3:]))
    assert not set.union(*first) & set.union(*second)
    assert [len(a & second[0]) for a in second] == [len(a & first[0]) for a in first]


def test_every_block_has_a_hash() -> None:
    """What is not shared is like nobody else's, whoever asks how often."""
    trace = [Offered(n, 0.0, 1100, 300, (0, 7, 12)[: n + 1]) for n in range(3)]
    plain = [Offered(n, 0.0, 1100, 300, num_shared=500) for n in range(3, 6)]
    found = [o.block_hashes(64) for o in (*trace, *plain)]
    assert found == [o.block_hashes(64) for o in (*trace, *plain)]
    assert {len(set(hashes)) for hashes in found} == {1400 // 64}
    assert [len({*found[0]} & {*h}) for h in found[1:]] == [8, 8, 0, 0, 0]
    assert [len({*found[2]} & {*h}) for h in found] == [8, 16, 1400 // 64, 0, 0, 0]
    assert found[3][:7] == found[4][:7] and len({*found[3]} & {*found[4]}) == 500 // 64
    assert [o.prefix_ids() for o in trace] == [[0], [0, 7], [0, 7]]


def test_synthetic() -> None:
    kind = Synthetic(2000, 100, 20, 0.5, random_prefix_len=30)
    offered = kind.offered(5.0, random.Random(1))
    assert offered == kind.offered(5.0, random.Random(1)) != kind.offered(5.0, random.Random(2))
    assert {o.num_input for o in offered} == set(range(80, 181))
    assert {o.num_output for o in offered} == set(range(10, 31))
    assert own_rate(offered) == pytest.approx(5, rel=0.1)
    first, second = offered[0].block_hashes(16), offered[1].block_hashes(16)
    assert first[0] == second[0] and len({*first, *second}) == len(first) + len(second) - 1
    assert len(offered[0].prompt()) == offered[0].num_input
    with pytest.raises(ConfigError, match=r"--random-range-ratio is 1\.0"):
        Synthetic(random_range_ratio=1.0).offered(1.0, random.Random(0))
