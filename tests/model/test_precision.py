"""In bfloat16 a model's logits are as near to float64's as those of transformers in bfloat16, on the CPU and on a GPU, prompts and single tokens.

One operation keeps to a hundredth (test_kernels.py). Layer after layer rounds, so that with four layers transformers is 1.0 to 1.7 % off.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.model.checkpoint import ModelConfig
from fastdeploy_pd.model.ops.base import StepInputs
from fastdeploy_pd.model.runner import ModelRunner, attention_plan
from fastdeploy_pd.model.select import make_runner
from fastdeploy_pd.request import Request, SamplingParams
from tests.model.tiny import write_checkpoint
from tests.transfer.gpu import has_gpu

MOST = 1.15  # times the error of transformers, in the logits' norm
BLOCK_SIZE, NUM_BLOCKS = 64, 40
LENGTHS = (1, 65, 700)  # tokens; the last one is long enough for cuDNN's attention
NUM_DECODED = 4  # tokens after a prompt, one by one
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "initializer_range": 0.03,
}
Model = transformers.PreTrainedModel
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not has_gpu(), reason="no GPU here"))]


@pytest.fixture(scope="module", params=["llama3", "qwen3"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model, Model]:
    """A checkpoint whose weights bfloat16 can hold, and transformers' model in bfloat16 and in float64."""
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, directory, **SIZES).bfloat16().save_pretrained(directory)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return directory, *(load(directory, dtype=dtype).eval() for dtype in (torch.bfloat16, torch.float64))


def make(directory: Path, device: str) -> ModelRunner:
    runner = make_runner(directory, "torch", "bfloat16", 1, device)
    layout = ModelRunner.kv_layout(ModelConfig.from_directory(directory), NUM_BLOCKS, BLOCK_SIZE, "bfloat16")
    runner.attach(pool_of(layout, device), layout, max_num_seqs=4, max_model_len=1024)
    return runner


def pool_of(layout: KVLayout, device: str) -> object:
    """Returns: memory that nobody has written, as the device has it; on the CPU full of what is no number."""
    if device == "cpu":
        return np.full(layout.pool_bytes, 0xFF, np.uint8)
    from fastdeploy_pd.transfer.device_pool import DevicePool
    from rdma_comm.cuda.driver import Gpu

    return DevicePool(layout, Gpu())


def logits_of(runner: ModelRunner, request: Request, start: int, stop: int) -> np.ndarray:
    """Returns: [stop - start, vocab_size] of a request's tokens from `start` to `stop`."""
    sequence = ScheduledSequence(request, start, stop)
    if runner.depth > 1:  # on a device: those that the CPU has asked for
        step = runner.launch(Batch([sequence], BLOCK_SIZE))
        step.outputs()
        (found,) = step.logits.values()  # type: ignore[attr-defined]
        return np.asarray(found)
    rows = np.arange(stop - start)
    inputs = StepInputs(np.array(sequence.token_ids), start + rows, rows, attention_plan([sequence], BLOCK_SIZE))
    return np.asarray(runner.decoder.forward(inputs, runner.caches))


@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_as_near_to_float64_as_transformers(models: tuple[Path, Model, Model], device: str) -> None:
    directory, peer, reference = models
    runner = make(directory, device)
    for length in LENGTHS:
        total = length + NUM_DECODED
        tokens = np.random.default_rng(length).integers(2, SIZES["vocab_size"], total).tolist()
        with torch.no_grad():
            theirs, expected = (m(torch.tensor([tokens])).logits[0].double().numpy() for m in (peer, reference))
        request = Request(f"r{length}", tokens[:length], SamplingParams(max_tokens=8, logprobs=1, prompt_logprobs=1))
        request.local.block_table = list(range(NUM_BLOCKS // 2))
        found = [logits_of(runner, request, 0, length)]
        request.sampling = SamplingParams(max_tokens=8, logprobs=1)  # single tokens without the prompt's: by graphs
        for place in range(length, total):
            request.local.num_computed_tokens = place
            request.output_token_ids.append(tokens[place])
            found.append(logits_of(runner, request, place, place + 1))
        ours = np.concatenate(found)
        for rows in (slice(0, length), slice(length, total)):
            norm = np.linalg.norm(expected[rows])
            error, allowed = (np.linalg.norm(x[rows] - expected[rows]) / norm for x in (ours, theirs))
            assert error <= MOST * allowed, (length, rows, error, allowed)
