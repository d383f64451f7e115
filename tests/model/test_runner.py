"""The runner over the KV pool: what it writes and when, what it reads, and what it refuses."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.checkpoint import ModelConfig
from fastdeploy_pd.model.ops.environment import default_num_threads
from fastdeploy_pd.model.runner import MAX_GROUP_TOKENS, ModelRunner, attention_plan, decode_groups
from fastdeploy_pd.model.select import make_runner
from fastdeploy_pd.request import Request, SamplingParams
from rdma_comm.cuda.driver import CudaUnavailable
from tests.model.tiny import TinyEngine, write_checkpoint
from tests.transfer.gpu import has_gpu

OPS = ["reference", "paddle", "torch"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint("qwen3", path)
    return path


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(2, 199, length).tolist()


def kv_of(engine: TinyEngine, request: Request, layer: int) -> np.ndarray:
    """Returns: [2, num_kv_heads, num_tokens, head_dim] K and V of a request's computed tokens, read from the pool's bytes."""
    layout = engine.layout
    shape = (layout.num_kv_heads, layout.block_size, layout.head_dim)
    size = layout.block_bytes
    pieces = []
    for block_id in request.local.block_table:
        offset = layout.offset(layer, block_id)
        pieces.append(engine.pool[offset : offset + size].view(layout.dtype).reshape(2, *shape))
    return np.concatenate(pieces, axis=2)[:, :, : request.local.num_computed_tokens]


@pytest.mark.parametrize("ops", OPS)
def test_a_layer_is_in_the_pool_when_it_is_announced(directory: Path, ops: str) -> None:
    engine = TinyEngine(directory, ops, block_size=16)
    request, other = engine.request(prompt_of(40), 4), engine.request(prompt_of(17), 4)
    seen: list[tuple[int, int, bytes]] = []

    def on_layer(layer: int) -> None:
        begin, layer_bytes = layer * engine.layout.layer_bytes, engine.layout.layer_bytes
        later = int(np.count_nonzero(engine.pool[begin + layer_bytes :]))
        seen.append((layer, later, engine.pool[begin : begin + layer_bytes].tobytes()))

    engine.step([request, other], on_layer=on_layer)
    assert [(layer, later) for layer, later, _ in seen] == [(0, 0), (1, 0), (2, 0)]
    assert b"".join(content for _, _, content in seen) == engine.pool.tobytes()
    assert all(np.abs(kv_of(engine, request, layer)).min(axis=-1).max() > 0 for layer in range(3))


@pytest.mark.parametrize("ops", ["paddle", "torch"])
def test_pool_holds_what_the_reference_holds(directory: Path, ops: str) -> None:
    engine, oracle = TinyEngine(directory, ops, block_size=16), TinyEngine(directory, "reference", block_size=16)
    for each in (engine, oracle):
        each.generate([each.request(prompt_of(n), 5) for n in (1, 16, 33)])
    assert engine.pool.view(np.float32) == pytest.approx(oracle.pool.view(np.float32), abs=2e-4)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("chunk", [10**9, 7, 1])
def test_nothing_of_other_sequences_is_read(directory: Path, ops: str, chunk: int) -> None:
    """NaN in every foreign byte, so that even a masked read would show; block tables of different widths in one step."""
    clean, dirty = (TinyEngine(directory, ops, block_size=16, num_blocks=40) for _ in range(2))
    dirty.pool.view(np.float32)[:] = np.nan
    lengths = (3, 20, 150)
    tokens = [e.generate([e.request(prompt_of(n), 20) for n in lengths], chunk) for e in (clean, dirty)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("ops", OPS)
def test_no_other_block_is_written(directory: Path, ops: str) -> None:
    engine = TinyEngine(directory, ops, block_size=16, num_blocks=20)
    request = engine.request(prompt_of(40), 9)
    request.local.block_table = [7, 3, 12, 9]
    engine.pool[:] = 0xAB
    engine.generate([request])
    blocks = engine.pool.reshape(engine.layout.num_layers, 20, -1)
    touched = {b for b in range(20) if not (blocks[:, b] == 0xAB).all()}
    assert touched == {7, 3, 12}  # the 49th token's K and V are never needed


@pytest.mark.parametrize("ops", OPS)
def test_prompts_and_decodes_in_one_step(directory: Path, ops: str) -> None:
    engine = TinyEngine(directory, ops, block_size=16, num_blocks=80)
    alone = [engine.generate([engine.request(prompt_of(n), 8)])[0] for n in (30, 200, 50)]
    engine = TinyEngine(directory, ops, block_size=16, num_blocks=80)
    first, second, third = (engine.request(prompt_of(n), 8) for n in (30, 200, 50))
    engine.step([first, second])
    engine.step([first, third, second], chunk=33)  # decode, half a prompt, decode in a group of its own
    assert engine.generate([third, first, second], chunk=33) == [alone[2], alone[0], alone[1]]


@pytest.mark.parametrize("ops", OPS)
def test_seeded_sampling_is_the_same_in_any_batch(directory: Path, ops: str) -> None:
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 3}
    engine = TinyEngine(directory, ops, block_size=16, num_blocks=80)
    alone = engine.generate([engine.request(prompt_of(20), 12, **settings)])[0]
    together = engine.generate([engine.request(prompt_of(n), 12, **settings) for n in (90, 20, 5)], chunk=16)
    assert together[1] == alone
    half = engine.request(prompt_of(20), 12, **settings)
    half.output_token_ids = alone[:5]  # placed again elsewhere with what the client has
    assert engine.generate([half])[0] == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_torch_is_close(directory: Path, dtype: str) -> None:
    exact = TinyEngine(directory, "reference")
    rough = TinyEngine(directory, "torch", kv_dtype=dtype, dtype=dtype)
    outputs = [e.step([e.request(prompt_of(100), 2, logprobs=5)])[0] for e in (exact, rough)]
    assert outputs[0].logprobs is not None
    assert outputs[1].logprobs is not None
    expected = dict(outputs[0].logprobs.top)
    shared = {t: p for t, p in outputs[1].logprobs.top if t in expected}
    assert len(shared) >= 3
    assert list(shared.values()) == pytest.approx([expected[t] for t in shared], abs=0.6)


@pytest.mark.parametrize("ops", OPS)
def test_float16_cache_is_close(directory: Path, ops: str) -> None:
    exact = TinyEngine(directory, "reference")
    rough = TinyEngine(directory, ops, kv_dtype="float16")
    values = []
    for engine in (exact, rough):
        request = engine.request(prompt_of(70), 3)
        engine.generate([request])
        values.append(kv_of(engine, request, 2).astype(np.float32))
    assert values[1] == pytest.approx(values[0], abs=0.03)


def test_fp8_cache_is_close_and_the_same_however_a_prompt_is_cut(directory: Path) -> None:
    torch = pytest.importorskip("torch")
    exact, rough = (TinyEngine(directory, "torch", num_blocks=96, kv_dtype=kind) for kind in ("float32", "float8_e4m3"))
    assert rough.layout.pool_bytes * 4 == exact.layout.pool_bytes
    values = []
    for engine in (exact, rough):
        request = engine.request(prompt_of(70), 1)
        engine.generate([request])
        kind = torch.float32 if engine is exact else torch.float8_e4m3fn
        cache = torch.from_numpy(engine.pool[: engine.layout.layer_bytes]).view(kind).float()
        values.append(cache.view(engine.layout.num_blocks, -1)[request.local.block_table])
    # The first layer's, which are of the same inputs: half a unit in the last of 3 bits, and of the smallest numbers.
    assert values[1].allclose(values[0], rtol=2**-4, atol=2**-10)
    assert not values[1].equal(values[0])
    prompts = [prompt_of(n) for n in (40, 130, 7)]
    whole, pieces = ([rough.generate([rough.request(p, 12)], chunk=chunk)[0] for p in prompts] for chunk in (10**9, 11))
    assert whole == pieces == rough.generate([rough.request(p, 12) for p in prompts], chunk=50)


def test_what_fp8_has_no_number_for_becomes_its_largest() -> None:
    torch = pytest.importorskip("torch")
    from fastdeploy_pd.model.ops.torch import rounded

    found = rounded(torch.tensor([500.0, -1e9, float("inf"), float("nan"), 1.0]), torch.float8_e4m3fn).float()
    assert found[[0, 1, 2, 4]].tolist() == [448, -448, 448, 1] and found[3].isnan()


def test_refusals(directory: Path) -> None:
    config = ModelConfig.from_directory(directory)
    layout = ModelRunner.kv_layout(config, 4, 16, "float32")
    pool = np.zeros(layout.pool_bytes, np.uint8)

    def build(
        ops: str = "reference", pool: np.ndarray = pool, layout: KVLayout = layout, dtype: str = "float32"
    ) -> ModelRunner:
        runner = ModelRunner(directory, ops, dtype)
        runner.attach(pool, layout)
        return runner

    with pytest.raises(ConfigError, match="--ops is 'jax'; it must be one of paddle, torch, reference"):
        build("jax")
    with pytest.raises(ConfigError, match="--dtype is 'bfloat16'; with --ops paddle it must be float32"):
        build("paddle", dtype="bfloat16")
    with pytest.raises(
        ConfigError, match="--dtype is 'float64'; with --ops torch it must be one of float32, bfloat16, float16"
    ):
        build("torch", dtype="float64")
    with pytest.raises(ConfigError, match=r"the KV pool is uint8\[\d+\]; it must be uint8\[\d+\]"):
        build(pool=pool[:-1])
    with pytest.raises(ConfigError, match="layout does not fit the model: num_layers: 5 != 3"):
        build(layout=replace(layout, num_layers=5))
    half = replace(layout, dtype="bfloat16")
    for ops in ("reference", "paddle"):
        with pytest.raises(ConfigError, match="KV dtype is 'bfloat16'"):
            build(ops, pool=pool[: half.pool_bytes], layout=half)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_a_device_that_is_not_there(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"--device is 'cuda'; torch cannot use one here: .*(CUDA|GPU)"):
        make_runner(directory, "torch", "float32", 1, "cuda")


def test_no_other_torch_is_asked_for_where_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdeploy_pd.model.ops import torch as ops

    def none() -> None:
        raise CudaUnavailable("the NVIDIA driver is not here")

    monkeypatch.setattr(ops.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops.torch.version, "cuda", None)
    monkeypatch.setattr(ops, "driver", none)
    with pytest.raises(ConfigError, match="there is no NVIDIA driver or GPU: the NVIDIA driver is not here") as caught:
        ops.find_device("cuda")
    assert "pip install" not in caught.value.message
    monkeypatch.setattr(ops, "driver", lambda: None)
    with pytest.raises(ConfigError, match="was built without CUDA: pip install"):
        ops.find_device("cuda")


@pytest.mark.parametrize("token_id", [-1, 199])
def test_token_outside_the_vocabulary(directory: Path, token_id: int) -> None:
    engine = TinyEngine(directory, "torch")
    bad, good = engine.request([5, token_id, 6]), engine.request([5, 7, 6])
    spoilt, output = engine.step([bad, good])
    assert spoilt.token_id is None
    assert spoilt.error is not None
    assert f"has token id {token_id}; it must be between 0 and 198" in spoilt.error.message
    alone = TinyEngine(directory, "torch")
    assert output.token_id == alone.step([alone.request([5, 7, 6])])[0].token_id


def test_sampling_happens_at_the_last_known_token_only(directory: Path) -> None:
    engine = TinyEngine(directory, "torch")
    request = engine.request(prompt_of(10), 3, logprobs=0, prompt_logprobs=0)
    sequences = [ScheduledSequence(request, 0, 4), ScheduledSequence(request, 4, 10)]
    first, second = (engine.runner.execute(Batch([s], 64))[0] for s in sequences)
    assert first.token_id is None
    assert first.logprobs is None
    assert len(first.prompt_logprobs) == 5
    assert second.token_id is not None
    assert second.logprobs is not None
    assert second.logprobs.token_id == second.token_id
    assert len(second.prompt_logprobs) == 5


def test_groups_don_t_mix_long_and_short() -> None:
    singles = [(row, np.arange(n, dtype=np.int64) + 5, n * 64) for row, n in enumerate((1, 8, 100, 3, 70))]
    groups = decode_groups(singles, 64)
    assert [g.rows.tolist() for g in groups] == [[0, 1, 3], [2, 4]]
    assert groups[0].tables.shape == (3, 8)
    assert groups[0].tables[0].tolist() == [5] * 8
    many = decode_groups([(row, np.arange(256), 256 * 64) for row in range(10)], 64)
    assert all(g.tables.size * 64 <= MAX_GROUP_TOKENS for g in many)
    assert [r for g in many for r in g.rows.tolist()] == list(range(10))


def test_only_begun_and_unfilled_blocks_are_cleared() -> None:
    def fresh(start: int, stop: int) -> list[int]:
        request = Request("r", [1] * 64, SamplingParams())
        request.local.block_table = [10, 11, 12, 13]
        return attention_plan([ScheduledSequence(request, start, stop)], 16).fresh_blocks.tolist()

    assert fresh(0, 16) == []
    assert fresh(0, 17) == [11]
    assert fresh(16, 17) == [11]
    assert fresh(17, 18) == []
    assert fresh(5, 40) == [12]
    assert fresh(31, 32) == []


def test_default_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_num_threads() >= 1


def test_the_last_layers_are_handed_over_by_fewer() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    from fastdeploy_pd.model.device_runner import ends_group

    assert [n for n in range(32) if ends_group(n, 32)] == [7, 15, 23, 27, 29, 30, 31]
    for num_layers in range(1, 130):
        ends = [-1, *(n for n in range(num_layers) if ends_group(n, num_layers))]
        sizes = np.diff(ends)
        assert ends[-1] == num_layers - 1 and sizes.max() <= 8 and sizes[-1] == 1


@pytest.mark.parametrize("ops", ["paddle", "torch"])
def test_steps_leave_nothing(directory: Path, ops: str) -> None:
    """Paddle's to_tensor loses a list a call."""
    engine = TinyEngine(directory, ops, block_size=16, num_blocks=40)

    def num_lists_after(num_rounds: int) -> int:
        for _ in range(num_rounds):
            requests = [engine.request(prompt_of(n), 5) for n in (1, 16, 200)]
            engine.generate(requests)
            for request in requests:
                engine.blocks.release(request.local.block_table)
        gc.collect()
        return sum(type(o) is list for o in gc.get_objects())

    before = num_lists_after(3)
    assert num_lists_after(40) - before < 40
