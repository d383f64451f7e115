"""The runner on a GPU: steps in flight, and what becomes of one that runs out of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.flags import DEMO_MODEL
from fastdeploy_pd.model.parallel import Rank
from fastdeploy_pd.model.runner import ModelRunner
from fastdeploy_pd.model.select import make_runner
from fastdeploy_pd.request import Request, SamplingParams
from tests.transfer.gpu import has_gpu

pytestmark = pytest.mark.skipif(not has_gpu(), reason="no GPU here")
PROMPT = [int(t) for t in np.random.default_rng(3).integers(2, 200, 150)]


@pytest.fixture
def runner() -> ModelRunner:
    return new_runner(max_num_seqs=4)


def new_runner(max_num_seqs: int, dtype: str = "float32", cache_dtype: str = "") -> ModelRunner:
    from fastdeploy_pd.transfer.device_pool import DevicePool
    from rdma_comm.cuda.driver import Gpu

    runner = make_runner(DEMO_MODEL, "torch", dtype, 1, "cuda")
    layout = runner.kv_layout(runner.config, 64, 64, cache_dtype or dtype)
    runner.attach(DevicePool(layout, Gpu()), layout, max_num_seqs, 1024)
    return runner


def new_request(blocks: list[int], **settings: Any) -> Request:
    request = Request("r", PROMPT, SamplingParams(max_tokens=64, **settings))
    request.local.block_table = blocks
    return request


def launch(runner: ModelRunner, request: Request) -> Any:
    request.local.samples_on_device = runner.samples_on_device(request)
    step = runner.launch(Batch([ScheduledSequence(request, request.local.num_computed_tokens, request.num_tokens)], 64))
    request.local.num_computed_tokens = request.num_tokens
    request.local.num_pending_tokens += 1
    return step


def taken(request: Request, step: Any) -> int:
    """The step's token, which is known now."""
    (output,) = step.outputs()
    request.local.num_pending_tokens -= 1
    request.output_token_ids.append(output.token_id)
    return int(output.token_id)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_step_ahead_yields_the_same_tokens(runner: ModelRunner, temperature: float) -> None:
    alone, ahead = (new_request(blocks, temperature=temperature, seed=5) for blocks in ([1, 2, 3, 4], [9, 8, 7, 6]))
    wanted = [taken(alone, launch(runner, alone)) for _ in range(30)]
    steps = [launch(runner, ahead)]
    tokens = []
    for _ in range(29):
        steps.append(launch(runner, ahead))  # its token is on the device alone
        tokens.append(taken(ahead, steps.pop(0)))
    assert [*tokens, taken(ahead, steps.pop())] == wanted
    assert len(set(wanted)) > 5


def prepare(runner: ModelRunner) -> None:
    """As an idle instance does."""
    runner._free_bytes = lambda: 1 << 40  # whatever else is on this GPU
    runner.warm_up(BlockPool(64, 64), True, 1024, 1024)
    while runner.prepare_more():
        pass


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_launch_waits_for_the_device(runner: ModelRunner, temperature: float, is_prepared: bool) -> None:
    """Neither a prompt's nor one that begins a block: while a step of a large model runs, messages and transfers would wait too."""
    import torch

    if is_prepared:
        prepare(runner)
    first, second = (new_request(blocks, temperature=temperature) for blocks in ([1, 2, 3, 4], [9, 8, 7, 6]))
    for _ in range(3):  # graphs are captured
        taken(first, launch(runner, first))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            taken(second, launch(runner, second))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert second.num_tokens > 3 * 64


def test_out_of_memory_with_several_ranks_is_no_step_s_own(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on with the sums of this step and would meet those of the next one: the instance has to end."""
    import torch

    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    runner.rank = Rank(0, 2)
    monkeypatch.setattr(runner.decoder, "run_layer", fail)
    with pytest.raises(torch.OutOfMemoryError):
        launch(runner, new_request([1, 2, 3])).outputs()


def test_out_of_memory_ends_the_step_alone(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    good = taken(new_request([1, 2, 3]), launch(runner, new_request([1, 2, 3])))
    run_layer = runner.decoder.run_layer

    def fail(index: int, *arguments: Any) -> Any:
        if index == 2:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return run_layer(index, *arguments)

    monkeypatch.setattr(runner.decoder, "run_layer", fail)
    step = launch(runner, new_request([1, 2, 3]))
    with pytest.raises(FastDeployPDError, match=r"--gpu-memory-utilization.*Tried to allocate 9 GiB"):
        step.outputs()
    monkeypatch.undo()
    assert taken(new_request([1, 2, 3]), launch(runner, new_request([1, 2, 3]))) == good


def test_out_of_memory_of_a_draw_ends_the_step_alone(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fastdeploy_pd.model.device_sampler import Draw

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    request = new_request([1, 2, 3], temperature=0.9)
    taken(request, launch(runner, request))
    monkeypatch.setattr(Draw, "apply", fail)
    step = launch(runner, request)
    with pytest.raises(FastDeployPDError, match="Tried to allocate 2 GiB"):
        step.outputs()


def test_out_of_memory_before_a_step_is_queued_leaves_nothing(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 1 GiB")

    monkeypatch.setattr(runner.decoder.ops, "prepare", fail)
    with pytest.raises(FastDeployPDError, match=r"in a step: lower --gpu-memory-utilization.*Tried to allocate 1 GiB"):
        launch(runner, new_request([1, 2, 3]))
    monkeypatch.undo()
    request = new_request([1, 2, 3])
    assert taken(request, launch(runner, request)) >= 0


@pytest.mark.parametrize(("max_num_seqs", "num_blocks"), [(1, 64), (4, 1)])
def test_warm_up_keeps_to_what_there_is(max_num_seqs: int, num_blocks: int) -> None:
    runner, pool = new_runner(max_num_seqs), BlockPool(num_blocks, 64)
    runner.warm_up(pool, True, 512, 512)
    assert pool.num_free == num_blocks
    request = new_request([1, 2, 3])
    assert taken(request, launch(runner, request)) >= 0


def test_what_is_prepared_while_idle_waits_for_nothing_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that comes meanwhile waits for one chore, not for the device."""
    import torch

    def waits(*_: Any) -> None:
        raise AssertionError("it waits for the device")

    runner, pool, wanted = new_runner(max_num_seqs=80), BlockPool(64, 64), new_request([1, 2, 3, 4])
    tokens = [taken(wanted, launch(runner, wanted)) for _ in range(3)]
    runner.warm_up(pool, True, 1024, 1024)
    held = runner._ops._layers.clone()
    assert max(runner._graphs._graphs) <= 64
    monkeypatch.setattr(torch.cuda, "synchronize", waits)  # which the mode below does not see
    monkeypatch.setattr(torch.cuda, "empty_cache", waits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        num_chores = sum(1 for _ in iter(runner.prepare_more, False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert num_chores > 20 and not runner.prepare_more()
    assert max(runner._graphs._graphs) == 80
    assert torch.equal(runner._ops._layers, held)
    request = new_request([5, 6, 7, 8])
    assert [taken(request, launch(runner, request)) for _ in range(3)] == tokens


def test_a_rank_that_lacks_memory_for_preparation_says_so_once(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first rank goes on and tells it of more."""
    import torch

    from fastdeploy_pd.model.parallel import Chore

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(runner, "_compute_rows", fail)
    for num_rows in (512, 256):
        runner._do(Chore("rows", num_rows))
    assert [r.message for r in caplog.records] == [
        "what is not prepared yet comes when it is needed: Tried to allocate 9 GiB"
    ]


def test_ranks_prepare_no_graph_that_may_lack_memory(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of it the others would wait for this one's sums."""
    from fastdeploy_pd.model.parallel import Chore

    def announce(*_: Any) -> None:
        raise AssertionError("the other ranks are told")

    runner.rank = Rank(0, 2)
    monkeypatch.setattr(runner, "announce", announce)
    monkeypatch.setattr(runner, "_free_bytes", lambda: 0)
    runner._chores += [Chore("capture", 80), Chore("capture", 96), Chore("rows", 16)]
    assert runner.prepare_more() and [c.what for c in runner._chores] == ["rows"]


def test_memory_that_lacks_at_the_start_is_a_sentence(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(runner._graphs, "capture", fail)
    with pytest.raises(FastDeployPDError, match=r"--gpu-memory-utilization.*Tried to allocate 9 GiB"):
        runner.warm_up(BlockPool(64, 64), True, 512, 512)


def test_products_have_numbers_of_rows_that_were_prepared_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may be of kernels that are not loaded yet; to load one waits for the device."""
    import torch

    counts: set[int] = set()
    addmm, linear = torch.addmm, torch.nn.functional.linear
    monkeypatch.setattr(torch, "addmm", lambda c, a, *b, **k: (counts.add(len(a)), addmm(c, a, *b, **k))[1])
    monkeypatch.setattr(torch.nn.functional, "linear", lambda a, *b: (counts.add(len(a)), linear(a, *b))[1])
    runner, pool = new_runner(max_num_seqs=40), BlockPool(64, 64)
    runner.warm_up(pool, True, 2600, 2600)
    while runner.prepare_more():
        pass
    prepared, rng = set(counts), np.random.default_rng(1)
    runner._layer_graphs._pieces.clear()  # to see what they were made for
    counts.clear()
    for _ in range(30):
        requests = [Request(str(n), PROMPT[: rng.integers(2, 64)]) for n in range(rng.integers(1, 41))]
        for number, request in enumerate(requests):
            request.local.block_table = [number]
        batch = Batch([ScheduledSequence(r, 0, r.num_tokens) for r in requests], 64)
        assert all(output.token_id is not None for output in runner.launch(batch).outputs())
    assert len(counts) > 5 and counts <= prepared


def test_a_capture_that_lacks_memory_leaves_what_steps_in_flight_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failure is not the last word: what is cached is given back."""
    import torch

    runner, fails = new_runner(max_num_seqs=8), [True, True]
    run = runner._graphs._decoder.run

    def fail(*arguments: Any) -> Any:
        if torch.cuda.is_current_stream_capturing() and fails and fails.pop():
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return run(*arguments)

    wanted = new_request([1, 2, 3, 4])
    tokens = [taken(wanted, launch(runner, wanted)) for _ in range(4)]
    other = new_runner(max_num_seqs=8)
    run = other._graphs._decoder.run
    monkeypatch.setattr(other._graphs._decoder, "run", fail)
    request = new_request([1, 2, 3, 4])
    found = [taken(request, launch(other, request))]
    with pytest.raises(FastDeployPDError, match="Tried to allocate 9 GiB"):
        launch(other, request)  # twice
    assert not fails
    fails.append(True)
    found += [taken(request, launch(other, request)) for _ in range(3)]
    assert not fails and found == tokens


@pytest.mark.parametrize("is_prepared", [False, True])
def test_layers_are_handed_over_in_groups(runner: ModelRunner, is_prepared: bool) -> None:
    from fastdeploy_pd.model.device_runner import ends_group

    if is_prepared:
        prepare(runner)
    request, handed = new_request([1, 2, 3, 4]), list[int]()
    request.local.samples_on_device = True
    batch = Batch([ScheduledSequence(request, 0, request.num_tokens)], 64)
    runner.launch(batch, handed.append).outputs()
    num_layers = runner.config.num_layers
    assert handed == [n for n in range(num_layers) if ends_group(n, num_layers)]


def test_it_says_when_the_next_step_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdeploy_pd.model import device_runner

    runner, wanted = new_runner(max_num_seqs=4), new_request([1, 2, 3, 4])
    tokens = [taken(wanted, launch(runner, wanted)) for _ in range(3)]
    monkeypatch.setattr(device_runner, "LAYERS_AT_ONCE", 1)
    request = new_request([5, 6, 7, 8])
    assert runner.is_nearly_done and not runner.can_advance
    step = launch(runner, request)
    while not step.is_queued:
        assert runner.can_advance and not runner.is_nearly_done
        step.poll()
    while not step.poll():
        pass
    runner._advance()  # as the next poll does: the last layers may have ended after this one looked
    assert runner.is_nearly_done and not runner.can_advance
    assert [taken(request, step), *(taken(request, launch(runner, request)) for _ in range(2))] == tokens


def test_no_more_layers_are_queued_than_the_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdeploy_pd.model import device_runner

    runner, wanted = new_runner(max_num_seqs=4), new_request([1, 2, 3, 4])
    tokens = [taken(wanted, launch(runner, wanted)) for _ in range(3)]
    monkeypatch.setattr(device_runner, "MOST_KERNELS_AHEAD", 2 * device_runner.KERNELS_A_LAYER)
    monkeypatch.setattr(device_runner, "LAYERS_AT_ONCE", 1)
    request = new_request([5, 6, 7, 8])
    step, most = launch(runner, request), 0
    while not step.poll():
        most = max(most, len(runner._ahead))
    assert 1 <= most <= 2
    runner._advance()
    assert not runner._ahead and runner._num_kernels_ahead == 0
    assert [taken(request, step), *(taken(request, launch(runner, request)) for _ in range(2))] == tokens


def random_steps(seed: int, num_steps: int) -> list[list[tuple[int, int, int]]]:
    """Steps of up to 6 sequences: (sequence, start, stop) each, of up to 1,000 tokens of prompts and single tokens behind them."""
    rng, computed = np.random.default_rng(seed), [0] * 6
    steps = []
    for _ in range(num_steps):
        step, room = [], int(rng.choice([12, 100, 600, 1000]))
        for index in rng.permutation(6)[: rng.integers(1, 7)]:
            most = min(room, 640 - computed[index])
            if most < 1:
                computed[index] = 0  # another one in its blocks
                continue
            count = 1 if computed[index] and rng.random() < 0.4 else int(rng.integers(min(2, most), most + 1))
            step.append((int(index), computed[index], computed[index] + count))
            computed[index] += count
            room -= count
        if step:
            steps.append(step)
    return steps


def run_steps(runner: ModelRunner, steps: list[list[tuple[int, int, int]]]) -> tuple[list[list[int | None]], Any]:
    """Returns: tokens of each step, and the pool. Each step is launched before the one ahead of it is read."""
    prompt = [int(t) for t in np.random.default_rng(9).integers(2, 200, 646)]
    tokens, ahead = [], []
    for step in steps:
        parts = []
        for number, start, stop in step:
            request = Request(f"r{number}", prompt[number : number + stop])  # so long that this part yields a token
            request.local.block_table = list(range(10 * number, 10 * number + 10))
            request.local.samples_on_device = True
            parts.append(ScheduledSequence(request, start, stop))
        ahead.append(runner.launch(Batch(parts, 64), lambda _: None))
        if len(ahead) > 1:
            tokens.append([output.token_id for output in ahead.pop(0).outputs()])
    tokens += [[output.token_id for output in last.outputs()] for last in ahead]
    return tokens, runner._ops._layers.clone()


@pytest.mark.parametrize(("dtype", "cache_dtype"), [("float32", ""), ("bfloat16", ""), ("bfloat16", "float8_e4m3")])
def test_graphs_compute_what_kernels_one_by_one_do(
    dtype: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: they are the same kernels."""
    import torch

    from fastdeploy_pd.model import layer_graphs

    plain = new_runner(8, dtype, cache_dtype)
    layer = plain.decoder.layers[0]
    num_weights = sum(matrix.numel() for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down))
    monkeypatch.setattr(layer_graphs, "MOST_PRODUCTS", 1030 * num_weights)
    graphs = new_runner(8, dtype, cache_dtype)
    prepare(graphs)
    prepared = sorted(graphs._layer_graphs._pieces)
    assert prepared == [1, *range(16, 513, 16), 640, 768, 896, 1024] and not plain._layer_graphs._pieces
    counts, run = list[int](), graphs._layer_graphs.run
    graphs._layer_graphs.run = lambda step, *others: (counts.append(len(step.token_ids)), run(step, *others))[1]
    steps = [*random_steps(4, 60), [(0, 0, 1)]]
    (wanted, wanted_pool), (got, pool) = (run_steps(runner, steps) for runner in (plain, graphs))
    assert len(counts) == len(steps) and len(set(counts)) > 10
    assert got == wanted and len({t for step in got for t in step}) > 5
    assert torch.equal(pool.view(torch.uint8), wanted_pool.view(torch.uint8))


def test_graphs_take_tokens_that_are_on_the_device_alone() -> None:
    """A prompt beside a stream whose last token is pending, then two prompts, whose tokens are all known."""
    found = []
    for is_prepared in (False, True):
        runner = new_runner(8)
        if is_prepared:
            prepare(runner)
        stream, prompts = new_request([1, 2, 3, 4]), [new_request([n, n + 1, n + 2]) for n in (10, 20, 30)]
        for request in (stream, *prompts):
            request.local.samples_on_device = True
        parts = [ScheduledSequence(r, 0, len(PROMPT)) for r in (stream, *prompts)]
        first = runner.launch(Batch(parts[:1], 64))
        stream.local.num_computed_tokens, stream.local.num_pending_tokens = len(PROMPT), 1
        beside = ScheduledSequence(stream, stream.num_tokens - 1, stream.num_tokens)
        assert beside.num_pending
        steps = [first, runner.launch(Batch([beside, parts[1]], 64)), runner.launch(Batch(parts[2:], 64))]
        found.append([[output.token_id for output in step.outputs()] for step in steps])
    assert found[0] == found[1]
    assert found[0][1][1] == found[0][2][0] == found[0][2][1] == found[0][0][0]


def test_a_step_has_no_more_tokens_than_memory_for_them(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    compute = runner._compute_rows

    def fail(num_rows: int) -> None:
        if num_rows > 700:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        compute(num_rows)

    monkeypatch.setattr(runner, "_compute_rows", fail)
    assert runner._with_room(128, 8192) == 512  # the model takes 1,024
    small = runner._step_bytes
    assert runner._with_room(2048, 8192) == 2048
    assert caplog.messages == [
        "a prompt that is alone has at most 512 tokens in a step: memory lacks for more",
        "a step of 2048 tokens may lack GPU memory: lower --gpu-memory-utilization or --max-num-batched-tokens",
    ]
    monkeypatch.undo()
    assert runner.warm_up(BlockPool(64, 64), True, 128, 8192) == 1024
    assert runner._step_bytes > small > 0


def test_a_rank_that_lacks_memory_is_the_one_that_counts(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[bytes]()
    runner.rank = Rank(0, 2)
    monkeypatch.setattr(runner, "announce", lambda data, on_layer: told.append(data))
    monkeypatch.setattr(runner._ops, "all_reduce", lambda x: x)  # the other has none
    assert runner._with_room(128, 1024) == 128
    assert [runner._listener.hear(data)[0].chore.count for data in told] == [144, 1024, 512, 256]
    assert runner._step_bytes == 0


def test_layers_whose_graphs_lack_memory_are_queued_one_by_one(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    run_rest, calls = runner.decoder.run_rest, [0]

    def fail(*arguments: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            calls[0] += 1
            if calls[0] in (20, 21):  # in the middle of some number of rows, and once more
                raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return run_rest(*arguments)

    wanted = new_request([1, 2, 3, 4])
    tokens = [taken(wanted, launch(runner, wanted)) for _ in range(3)]
    monkeypatch.setattr(runner.decoder, "run_rest", fail)
    from fastdeploy_pd.model.parallel import Chore

    for num_rows in (512, 256, 160, 128):
        runner._do(Chore("layers", num_rows))
    assert [r.message for r in caplog.records] == [
        "steps of few tokens take longer than with graphs: Tried to allocate 9 GiB"
    ]
    assert [n for n in (512, 256, 160, 128) if runner._layer_graphs.has(n)] == [512, 256]
    request = new_request([5, 6, 7, 8])
    assert [taken(request, launch(runner, request)) for _ in range(3)] == tokens
    monkeypatch.undo()
    other = Request("long", (PROMPT * 2)[:250])  # by what was captured before
    other.local.block_table, other.local.samples_on_device = [10, 11, 12, 13], True
    batch = Batch([ScheduledSequence(other, 0, 250)], 64)
    (by_graphs,) = runner.launch(batch).outputs()
    runner._layer_graphs._pieces.clear()
    (one_by_one,) = runner.launch(batch).outputs()
    assert by_graphs.token_id == one_by_one.token_id


def test_no_layers_are_captured_where_steps_need_the_memory(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fastdeploy_pd.model.parallel import Chore

    monkeypatch.setattr(runner, "_free_bytes", lambda: 100 << 20)
    for num_rows in (512, 256):
        runner._do(Chore("layers", num_rows))
    assert [r.message for r in caplog.records] == [
        "steps of few tokens take longer than with graphs: 100 MiB of GPU memory are free"
    ]
    assert not runner._layer_graphs._pieces


def test_attention_that_lacks_memory_between_two_graphs_ends_the_step_alone(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    prepare(runner)
    wanted = taken(new_request([1, 2, 3]), launch(runner, new_request([1, 2, 3])))
    attention, calls = runner._ops.attention, [0]

    def fail(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return attention(*arguments)

    monkeypatch.setattr(runner._ops, "attention", fail)
    step = launch(runner, new_request([1, 2, 3]))
    with pytest.raises(FastDeployPDError, match="Tried to allocate 9 GiB"):
        step.outputs()
    monkeypatch.undo()
    assert calls == [3] and taken(new_request([1, 2, 3]), launch(runner, new_request([1, 2, 3]))) == wanted
