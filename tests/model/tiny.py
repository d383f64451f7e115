"""Tiny random checkpoints of each family, written by transformers, and a runner over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import shard
from fastdeploy_pd.model.checkpoint import ModelConfig
from fastdeploy_pd.model.parallel import Rank
from fastdeploy_pd.model.runner import ModelRunner, StepOutput
from fastdeploy_pd.request import Request, SamplingParams

COMMON = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # logits far enough apart that rounding doesn't decide
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True}),
    "llama_linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "attention_bias": True},
    ),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 12, "tie_word_embeddings": True}),
}


def write_checkpoint(family: str, directory: Path, shard: bool = False, **more: object) -> transformers.PreTrainedModel:
    """Returns: the model whose float32 weights were saved; `more` changes its configuration."""
    config_class, changes = FAMILIES[family]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**COMMON, **changes, **more})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.normal_(1, 0.2)
    model.save_pretrained(directory, max_shard_size="60KB" if shard else "5GB")
    return model


class TinyEngine:
    """Runs one or several requests on one backend, with as many or as few tokens a step as asked."""

    def __init__(
        self,
        directory: Path,
        ops: str,
        block_size: int = 64,
        num_blocks: int = 64,
        kv_dtype: str = "float32",
        dtype: str = "float32",
        rank: Rank | None = None,
    ) -> None:
        self.layout = ModelRunner.kv_layout(ModelConfig.from_directory(directory), num_blocks, block_size, kv_dtype)
        if rank is not None:
            self.layout = shard(self.layout, rank.index, rank.count)
        self.pool = np.zeros(self.layout.pool_bytes, np.uint8)
        self.blocks = BlockPool(num_blocks, block_size)
        self.runner = ModelRunner(directory, ops, dtype, num_threads=1, rank=rank)
        self.runner.attach(self.pool, self.layout)

    def request(self, prompt: list[int], max_tokens: int = 8, **sampling: object) -> Request:
        """Returns: a request with a block table of its own for all its tokens."""
        request = Request(
            f"r{len(prompt)}", list(prompt), SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **sampling})
        )
        request.local.block_table = self.blocks.allocate(self.blocks.num_blocks_for(len(prompt) + max_tokens))
        return request

    def step(
        self, requests: list[Request], chunk: int = 10**9, on_layer: Callable[[int], None] | None = None
    ) -> list[StepOutput]:
        """Compute up to `chunk` tokens of each request; append what was sampled."""
        sequences = []
        for request in requests:
            start = request.local.num_computed_tokens
            sequences.append(ScheduledSequence(request, start, min(request.num_tokens, start + chunk)))
        outputs = self.runner.execute(Batch(sequences, self.layout.block_size), on_layer)
        for sequence, output in zip(sequences, outputs, strict=True):
            sequence.request.local.num_computed_tokens = sequence.stop
            if output.token_id is not None:
                sequence.request.output_token_ids.append(output.token_id)
        return outputs

    def generate(self, requests: list[Request], chunk: int = 10**9) -> list[list[int]]:
        """Returns: each request's output tokens, max_tokens of them."""
        while True:
            open_requests = [r for r in requests if len(r.output_token_ids) < r.sampling.max_tokens]
            if not open_requests:
                return [r.output_token_ids for r in requests]
            self.step(open_requests, chunk)
