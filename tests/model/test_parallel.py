"""Several ranks compute what one does: the same logits but for rounding, the same tokens; and what cannot be dealt out is refused."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.ops.base import StepInputs
from fastdeploy_pd.model.parallel import Rank, decode_step, encode_step
from fastdeploy_pd.model.runner import ModelRunner, OnLayer, attention_plan
from tests.model.tiny import TinyEngine, write_checkpoint

HEADS = {"num_attention_heads": 8, "head_dim": 12}


@contextmanager
def ranks(directory: Path, count: int) -> Iterator[list[TinyEngine]]:
    """Rank 0's engine and its followers, each in a thread of its own, told what to compute as by another process."""
    engines = [TinyEngine(directory, "torch", block_size=16, rank=Rank(index, count)) for index in range(count)]
    path = Path(tempfile.mkdtemp()) / "group"
    steps: list[queue.SimpleQueue[bytes]] = [queue.SimpleQueue() for _ in range(count - 1)]

    def follow(engine: TinyEngine, told: queue.SimpleQueue[bytes]) -> None:
        engine.runner.decoder.ops.join(path, engine.runner.rank.index, count)
        while data := told.get():
            engine.runner.follow(decode_step(data)[0])

    threads = [threading.Thread(target=follow, args=pair, daemon=True) for pair in zip(engines[1:], steps, strict=True)]
    for thread in threads:
        thread.start()
    engines[0].runner.decoder.ops.join(path, 0, count)

    def announce(inputs: StepInputs, on_layer: OnLayer | None) -> OnLayer | None:
        for told in steps:
            told.put(encode_step(inputs, is_watched=False))
        return on_layer

    engines[0].runner.announce = announce
    yield engines
    for told in steps:
        told.put(b"")
    for thread in threads:
        thread.join(10)
    shutil.rmtree(path.parent)


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(2, 199, length).tolist()


def logits_of(engine: TinyEngine, prompt: list[int]) -> np.ndarray:
    request = engine.request(prompt)
    plan = attention_plan([ScheduledSequence(request, 0, len(prompt))], engine.layout.block_size)
    rows = np.arange(len(prompt))
    inputs = StepInputs(np.array(prompt), rows, rows, plan)
    engine.runner.announce(inputs, None)
    return engine.runner.decoder.forward(inputs, engine.runner.caches)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("family", ["llama", "llama_linear", "qwen2", "qwen3"])
def test_ranks_compute_what_one_does(tmp_path: Path, family: str, num_kv_heads: int) -> None:
    """Of 2 KV heads 4 ranks have each a copy. llama_linear has biases, qwen3 norms of Q and K; random weights are the same too."""
    write_checkpoint(family, tmp_path / "real", num_key_value_heads=num_kv_heads, **HEADS)
    (tmp_path / "dummy").mkdir()
    shutil.copy(tmp_path / "real" / "config.json", tmp_path / "dummy")
    for directory in (tmp_path / "real", tmp_path / "dummy" / "config.json"):
        if directory.suffix and family == "llama_linear":
            continue
        alone = TinyEngine(directory, "torch", block_size=16)
        expected_logits = logits_of(alone, prompt_of(40))
        lengths = (1, 16, 33, 70)
        expected = alone.generate([alone.request(prompt_of(n), 12) for n in lengths], chunk=30)
        for count in (2, 4):
            with ranks(directory, count) as engines:
                found = logits_of(engines[0], prompt_of(40))
                assert np.abs(found - expected_logits).max() <= 1e-4 * np.abs(expected_logits).max()
                tokens = engines[0].generate([engines[0].request(prompt_of(n), 12) for n in lengths], chunk=30)
                assert tokens == expected
                held = [engine.layout.num_kv_heads for engine in engines]
                assert held == [max(1, num_kv_heads // count)] * count


def test_pools_of_ranks_are_the_parts_of_the_whole(tmp_path: Path) -> None:
    write_checkpoint("qwen3", tmp_path, num_key_value_heads=4, **HEADS)
    alone = TinyEngine(tmp_path, "torch", block_size=16)
    alone.step([alone.request(prompt_of(50))])
    whole = alone.pool.view(np.float32).reshape(3, 64, 2, 4, -1)
    with ranks(tmp_path, 2) as engines:
        engines[0].step([engines[0].request(prompt_of(50))])
    for index, engine in enumerate(engines):
        part = engine.pool.view(np.float32).reshape(3, 64, 2, 2, -1)
        assert part == pytest.approx(whole[:, :, :, 2 * index : 2 * index + 2], abs=2e-4)
        assert np.abs(part).max() > 0.1


def test_a_step_is_the_same_for_who_is_told_of_it(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    engine = TinyEngine(tmp_path, "reference", block_size=16)
    told: list[StepInputs] = []
    engine.runner.announce = lambda inputs, _: told.append(inputs)
    requests = [engine.request(prompt_of(n), 4) for n in (40, 3, 17)]
    engine.step(requests)
    engine.step(requests)
    sequences = [ScheduledSequence(r, 30, r.num_tokens) for r in requests[:1]]
    engine.runner.execute(Batch(sequences, 16))
    for inputs in told:
        found, is_watched = decode_step(encode_step(inputs, is_watched=True))
        assert is_watched and not decode_step(encode_step(inputs, is_watched=False))[1]
        assert len(found.logit_rows) == 0 and found.sources is None
        assert np.array_equal(found.token_ids, inputs.token_ids) and np.array_equal(found.positions, inputs.positions)
        for name in ("block_ids", "offsets", "fresh_blocks"):
            assert np.array_equal(getattr(found.plan, name), getattr(inputs.plan, name))
        for ours, theirs in zip(found.plan.spans, inputs.plan.spans, strict=True):
            assert (ours.row, ours.num_tokens, ours.start) == (theirs.row, theirs.num_tokens, theirs.start)
            assert np.array_equal(ours.block_ids, theirs.block_ids)
        for group, other in zip(found.plan.groups, inputs.plan.groups, strict=True):
            assert np.array_equal(group.tables, other.tables) and np.array_equal(group.rows, other.rows)
            assert np.array_equal(group.lengths, other.lengths)


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        ({}, 4, r"--tensor-parallel-size is 4; it must divide this model's num_attention_heads \(6\)"),
        ({}, 3, r"is 3; it must divide this model's intermediate_size \(80\)"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4},
            4,
            r"is 4; it must divide this model's num_key_value_heads \(6\) or be a multiple of it",
        ),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(
    tmp_path: Path, changes: dict[str, object], count: int, message: str
) -> None:
    write_checkpoint("llama", tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        ModelRunner(tmp_path, "torch", rank=Rank(0, count))


@pytest.mark.parametrize("ops", ["paddle", "reference"])
def test_other_backends_refuse_several_ranks(tmp_path: Path, ops: str) -> None:
    write_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size is 2; with --ops {ops} it must be 1"):
        ModelRunner(tmp_path, ops, rank=Rank(0, 2))
