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


def new_runner(max_num_seqs: int) -> ModelRunner:
    from fastdeploy_pd.transfer.device_pool import DevicePool
    from rdma_comm.cuda.driver import Gpu

    runner = make_runner(DEMO_MODEL, "torch", "float32", 1, "cuda")
    layout = runner.kv_layout(runner.config, 64, 64, "float32")
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
    runner.warm_up(pool, True)
    assert pool.num_free == num_blocks
    request = new_request([1, 2, 3])
    assert taken(request, launch(runner, request)) >= 0


def several(runner: ModelRunner, requests: list[Request]) -> Any:
    """Launch all of them as one batch."""
    sequences = []
    for request in requests:
        request.local.samples_on_device = runner.samples_on_device(request)
        sequences.append(ScheduledSequence(request, request.local.num_computed_tokens, request.num_tokens))
    step = runner.launch(Batch(sequences, 64))
    for request in requests:
        request.local.num_computed_tokens = request.num_tokens
        request.local.num_pending_tokens += 1
    return step


def all_taken(requests: list[Request], step: Any) -> None:
    for request, output in zip(requests, step.outputs(), strict=True):
        request.local.num_pending_tokens -= 1
        request.output_token_ids.append(output.token_id)


def mixture() -> tuple[list[Request], list[Request]]:
    """Five that generate, two of which draw, and two whose prompts come later; the last one's tokens are chosen by the CPU."""
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}, {}, {"temperature": 1.1, "seed": 4}, {}]
    old = [new_request([1 + 4 * n, 2 + 4 * n, 3 + 4 * n, 4 + 4 * n], **s) for n, s in enumerate(settings)]
    return old, [
        new_request([41, 42, 43, 44], temperature=0.9, seed=8),
        new_request([45, 46, 47, 48], presence_penalty=0.7),
    ]


@pytest.mark.parametrize("least", [10**6, 2], ids=["together", "apart"])
def test_what_generates_and_prompts_may_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    from fastdeploy_pd.model import device_runner

    alone = new_runner(max_num_seqs=8)
    wanted = [r for part in mixture() for r in part]
    for request in wanted:
        for _ in range(7):
            taken(request, launch(alone, request))
    monkeypatch.setattr(device_runner, "LEAST_DECODES", least)
    monkeypatch.setattr(device_runner, "LEAST_PROMPT_TOKENS", 100)
    runner = new_runner(max_num_seqs=8)
    old, new = mixture()
    all_taken(old, several(runner, old))
    ahead = several(runner, old)  # its tokens are on the device alone when the next one is launched
    batch = [old[0], new[0], *old[1:], new[1]]
    joined = several(runner, batch)
    assert isinstance(joined, device_runner.JoinedStep) == (least == 2)
    all_taken(old, ahead)
    after = several(runner, batch[:-1])  # takes the tokens of both parts where they were chosen
    while not joined.poll():
        pass
    all_taken(batch, joined)
    all_taken(batch[:-1], after)
    for _ in range(3):
        all_taken(batch, several(runner, batch))
    found = {tuple(r.local.block_table): r.output_token_ids for r in batch}
    assert len(found) == 7
    for request in wanted:
        tokens = found[tuple(request.local.block_table)]
        assert len(tokens) >= 4 and tokens == request.output_token_ids[: len(tokens)]


def test_out_of_memory_of_the_prompts_ends_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fastdeploy_pd.model import device_runner

    monkeypatch.setattr(device_runner, "LEAST_DECODES", 2)
    monkeypatch.setattr(device_runner, "LEAST_PROMPT_TOKENS", 100)
    runner = new_runner(max_num_seqs=8)
    old, new = mixture()
    all_taken(old, several(runner, old))
    run_layer = runner.decoder.run_layer

    def fail(index: int, *arguments: Any) -> Any:
        if index == 2:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return run_layer(index, *arguments)

    all_taken(old, several(runner, old))  # the graph is there
    monkeypatch.setattr(runner.decoder, "run_layer", fail)
    step = several(runner, [*old, *new])
    with pytest.raises(FastDeployPDError, match="Tried to allocate 9 GiB"):
        step.outputs()
