"""The decoder of llama, qwen2 and qwen3, written once over `ops`. The families differ by `ModelConfig` alone: biases, QK norm, tying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastdeploy_pd.model.checkpoint import ModelConfig, RopeScaling
from fastdeploy_pd.model.ops.base import Ops, StepInputs, Tensor
from fastdeploy_pd.model.parallel import Rank
from fastdeploy_pd.model.weights import Checkpoint, DummyTensor, RawTensor


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle a position adds to each pair of dimensions.

    Returns: [head_dim / 2] float64.
    Source: Su et al., RoFormer; "llama3" scaling as published with Llama 3.1: low frequencies divided by the factor, high ones
    kept, those between blended.
    """
    base = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling.rope_type == "linear":
        return base / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3_frequencies(base, scaling)
    return base


def _llama3_frequencies(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_max_position_embeddings * base / (2 * np.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return base / scaling.factor * (1 - blend) + base * blend


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer. Q, K, V are one matrix, gate and up another: fewer and larger products."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  #: [num_heads + num_kv_heads, head_dim]
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """Weights of a model, or a rank's part of them, in a backend's tensors, and the forward pass."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, ops: Ops, rank: Rank | None = None) -> None:
        """Raises: ModelLoadError: a tensor is missing or has another shape than config.json says."""
        self.config = config
        self.ops = ops
        self.rank = rank or Rank()
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = ops.weight(checkpoint.take("model.embed_tokens.weight", shape))
        with ThreadPoolExecutor(ops.num_loaders) as threads:
            self.layers = list(threads.map(partial(self._load_layer, checkpoint), range(config.num_layers)))
        self.final_norm = ops.weight(checkpoint.take("model.norm.weight", (config.hidden_size,)))
        self.head = self.embedding
        if self.rank.is_first and not config.tie_word_embeddings:  # it alone computes logits
            self.head = ops.weight(checkpoint.take("lm_head.weight", shape))
        ops.rope(rope_frequencies(config), config.max_position_embeddings)

    def forward(
        self, inputs: StepInputs, caches: Sequence[Any], on_layer: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """One step.

        Args:
            caches: a layer's blocks each, written and read.
            on_layer: called when a layer's K and V are in the cache.
        Returns: [m, vocab_size] float32 logits.
        """
        logits = self.run(self.ops.prepare(inputs), caches, len(inputs.logit_rows), on_layer)
        return np.zeros((0, self.config.vocab_size), np.float32) if logits is None else self.ops.to_numpy(logits)

    def run(
        self,
        step: Any,
        caches: Sequence[Any],
        num_logit_rows: int,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor | None:
        """Queue a step's operations.

        Args:
            step: the backend's `prepare`d inputs.
            num_logit_rows: how many rows' logits the inputs want.
            on_layer: called when what writes a layer's K and V is queued.
        Returns: [num_logit_rows, vocab_size] logits in the backend's tensors; None: there are none.
        """
        x = self.ops.embedding(self.embedding, step)
        for index in range(len(self.layers)):
            x = self.run_layer(index, x, step, caches[index], on_layer)
        return self.run_head(x, step) if num_logit_rows else None

    def run_layer(
        self, index: int, x: Tensor, step: Any, cache: Any, on_layer: Callable[[int], None] | None = None
    ) -> Tensor:
        """Queue a layer: [n, hidden] -> [n, hidden]; the memory of x may be reused."""
        q = self.run_projections(index, x, step, cache)
        if on_layer is not None:
            on_layer(index)
        return self.run_rest(index, x, self.ops.attention(q, cache, step))

    def run_projections(self, index: int, x: Tensor, step: Any, cache: Any) -> Tensor:
        """Queue what comes before a layer's attention, and its K and V into the cache. Returns: what attention takes."""
        layer, eps = self.layers[index], self.config.rms_norm_eps
        qkv = self.ops.norm_linear(x, layer.input_norm, eps, layer.qkv, layer.qkv_bias)
        return self.ops.rotate_and_store(qkv, layer.qk_norm, eps, cache, step)

    def run_rest(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """Queue what follows a layer's attention: the layer's x, [n, num_heads * head_dim] -> [n, hidden]; the memory of x may be reused."""
        ops, layer, eps = self.ops, self.layers[index], self.config.rms_norm_eps
        residual = x if self.rank.is_first else None
        x = ops.all_reduce(ops.linear_add(attended, layer.output, layer.output_bias, residual))
        residual = x if self.rank.is_first else None
        hidden = ops.norm_swiglu(x, layer.post_norm, eps, layer.gate_up)
        return ops.all_reduce(ops.linear_add(hidden, layer.down, None, residual))

    def run_head(self, x: Tensor, step: Any) -> Tensor:
        """Queue what follows the layers: [n, hidden] -> [m, vocab_size] logits of the rows that are wanted."""
        return self.ops.logits(x, self.final_norm, self.config.rms_norm_eps, self.head, step)

    def _load_layer(self, checkpoint: Checkpoint, index: int) -> LayerWeights:
        config, prefix, rank = self.config, f"model.layers.{index}.", self.rank
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        q, kv = (rank.part(count, config.head_dim) for count in (config.num_heads, config.num_kv_heads))
        inner = rank.part(config.intermediate_size)

        def take(name: str, *shape: int) -> RawTensor | DummyTensor:
            return checkpoint.take(prefix + name, shape)

        def weight(name: str, *shape: int) -> Tensor:
            return self.ops.weight(take(name, *shape))

        sizes = {"q": (q_size, q), "k": (kv_size, kv), "v": (kv_size, kv)}
        qkv = [
            take(f"self_attn.{n}_proj.weight", size, config.hidden_size).part(0, own)
            for n, (size, own) in sizes.items()
        ]
        bias = [
            take(f"self_attn.{n}_proj.bias", size).part(0, own) for n, (size, own) in sizes.items() if config.qkv_bias
        ]
        counts = {"q": rank.num_of(config.num_heads), "k": rank.num_of(config.num_kv_heads)} if config.qk_norm else {}
        qk_norm = [
            np.tile(take(f"self_attn.{n}_norm.weight", config.head_dim).to_float32(), (count, 1))
            for n, count in counts.items()
        ]
        gate_up = [
            take(f"mlp.{n}_proj.weight", config.intermediate_size, config.hidden_size).part(0, inner)
            for n in ("gate", "up")
        ]
        has_bias = config.output_bias and rank.is_first
        return LayerWeights(
            input_norm=weight("input_layernorm.weight", config.hidden_size),
            qkv=self.ops.weight(*qkv),
            qkv_bias=self.ops.weight(*bias) if bias else None,
            qk_norm=self.ops.weight(*qk_norm) if config.qk_norm else None,
            output=self.ops.weight(take("self_attn.o_proj.weight", config.hidden_size, q_size).part(1, q)),
            output_bias=weight("self_attn.o_proj.bias", config.hidden_size) if has_bias else None,
            post_norm=weight("post_attention_layernorm.weight", config.hidden_size),
            gate_up=self.ops.weight(*gate_up),
            down=self.ops.weight(
                take("mlp.down_proj.weight", config.hidden_size, config.intermediate_size).part(1, inner)
            ),
        )
