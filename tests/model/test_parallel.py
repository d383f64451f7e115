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

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.parallel import Chore, Listener, Rank, Teller, ToldStep, chore_step, integers
from fastdeploy_pd.model.runner import ModelRunner, OnLayer
from fastdeploy_pd.request import Request
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
            engine.runner.follow(data, lambda _: None)

    threads = [threading.Thread(target=follow, args=pair, daemon=True) for pair in zip(engines[1:], steps, strict=True)]
    for thread in threads:
        thread.start()
    engines[0].runner.decoder.ops.join(path, 0, count)

    def announce(data: bytes, on_layer: OnLayer | None) -> OnLayer | None:
        for told in steps:
            told.put(data)
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
    """Of a prompt's last token."""
    found: list[np.ndarray] = []
    forward = engine.runner.decoder.forward

    def keep(*arguments: object) -> np.ndarray:
        found.append(forward(*arguments))
        return found[0]

    engine.runner.decoder.forward = keep
    engine.step([engine.request(prompt)])
    engine.runner.decoder.forward = forward
    return found[0]


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


def test_block_tables_are_told_once_and_then_what_is_new() -> None:
    teller, listener = Teller(), Listener()

    def request(tokens: int, blocks: list[int]) -> Request:
        made = Request("r", [1] * tokens)
        made.local.block_table = blocks
        return made

    def step(*spans: tuple[Request, int, int]) -> tuple[ToldStep, list[list[int]]]:
        sequences = [ScheduledSequence(*span) for span in spans]
        token_ids = np.arange(sum(s.num_tokens for s in sequences))
        told, heard = listener.hear(teller.tell(sequences, token_ids, token_ids - 1, 2, is_decode=True))
        assert [(s.start, s.stop) for s in heard] == [(s.start, s.stop) for s in sequences]
        assert np.array_equal(integers(told.token_ids), token_ids) and integers(told.sources)[0] == -1
        assert (told.num_sampled, told.is_decode, told.is_watched, told.chore) == (2, True, False, None)
        tables = [s.request.local.block_table for s in heard]
        assert tables == [s.request.local.block_table for s in sequences]
        return told, [new for _, new in told.tables]

    one, two, three = request(64, [7, 3, 9]), request(64, [5, 1]), request(64, [2])
    assert step((one, 0, 40), (two, 0, 20))[1] == [[7, 3, 9], [5, 1]]
    two.local.block_table.append(8)
    assert step((two, 20, 21), (three, 0, 3), (one, 40, 41))[1] == [[8], [2], []]
    one.local.block_table = [4, 4, 6]  # preempted and begun anew
    assert step((one, 0, 40), (two, 21, 22))[1] == [[4, 4, 6], []]
    assert step((three, 3, 4), (two, 22, 23))[1] == [[2], []]  # it was away for a step
    told = listener.hear(chore_step(Chore("rows", 2048)))
    assert told[0].chore == Chore("rows", 2048) and told[1] == []


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
