"""The decoder of llama, qwen2 and qwen3, written once over `ops`. The families differ by `ModelConfig` alone: biases, QK norm, tying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdeploy_pd.model.checkpoint import ModelConfig, RopeScaling
from fastdeploy_pd.model.ops.base import AttentionPlan, Ops, Tensor
from fastdeploy_pd.model.weights import Checkpoint


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
    """Weights of a model in a backend's tensors, and the forward pass."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, ops: Ops) -> None:
        """Raises: ModelLoadError: a tensor is missing or has another shape than config.json says."""
        self.config = config
        self.ops = ops
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = ops.weight(checkpoint.take("model.embed_tokens.weight", shape).to_float32())
        self.layers = [self._load_layer(checkpoint, i) for i in range(config.num_layers)]
        self.final_norm = ops.weight(checkpoint.take("model.norm.weight", (config.hidden_size,)).to_float32())
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else ops.weight(checkpoint.take("lm_head.weight", shape).to_float32())
        )
        self._frequencies = rope_frequencies(config)

    def forward(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        plan: AttentionPlan,
        caches: Sequence[Any],
        logit_rows: np.ndarray,
        on_layer: Callable[[int], None] | None,
    ) -> np.ndarray:
        """One step.

        Args:
            token_ids: [n] int64, all sequences' new tokens one after the other.
            positions: [n] int64, each token's place in its sequence.
            caches: a layer's blocks each, written and read.
            logit_rows: [m] int64, the rows whose logits are wanted.
            on_layer: called when a layer's K and V are in the cache.
        Returns: [m, vocab_size] float32 logits.
        """
        ops, config = self.ops, self.config
        prepared = ops.plan(plan)
        rotation = ops.rotation(np.outer(positions, self._frequencies), config.num_heads + config.num_kv_heads)
        x = ops.embedding(self.embedding, token_ids)
        marks = []
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            q = self._project(layer, x, rotation, cache, prepared)
            if on_layer is not None:
                mark = ops.mark()
                if mark is None:
                    on_layer(index)
                else:
                    marks.append(mark)
            x = x + ops.linear(ops.attention(q, cache, prepared), layer.output, layer.output_bias)
            hidden = ops.rms_norm(x, layer.post_norm, config.rms_norm_eps)
            x = x + ops.linear(ops.swiglu(ops.linear(hidden, layer.gate_up)), layer.down)
        logits = None
        if len(logit_rows):
            x = ops.rms_norm(ops.rows(x, logit_rows), self.final_norm, config.rms_norm_eps)
            logits = ops.linear(x, self.head)
        for index, mark in enumerate(marks):  # all is queued: layers are told as the device gets through them
            ops.wait(mark)
            if on_layer is not None:
                on_layer(index)
        return np.zeros((0, config.vocab_size), np.float32) if logits is None else ops.to_numpy(logits)

    def _project(self, layer: LayerWeights, x: Tensor, rotation: Any, cache: Any, plan: Any) -> Tensor:
        """Q of the new tokens; their K and V go into the cache. Q and K are normed and turned together."""
        ops, config = self.ops, self.config
        hidden = ops.rms_norm(x, layer.input_norm, config.rms_norm_eps)
        heads = ops.heads(ops.linear(hidden, layer.qkv, layer.qkv_bias), config.head_dim)
        qk, v = ops.split_heads(heads, (config.num_heads + config.num_kv_heads, config.num_kv_heads))
        if layer.qk_norm is not None:
            qk = ops.rms_norm(qk, layer.qk_norm, config.rms_norm_eps)
        q, k = ops.split_heads(ops.rotary(qk, rotation), (config.num_heads, config.num_kv_heads))
        ops.write_kv(cache, plan, k, v)
        return q

    def _load_layer(self, checkpoint: Checkpoint, index: int) -> LayerWeights:
        config, prefix = self.config, f"model.layers.{index}."
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def take(name: str, *shape: int) -> np.ndarray:
            return checkpoint.take(prefix + name, shape).to_float32()

        def weight(name: str, *shape: int) -> Tensor:
            return self.ops.weight(take(name, *shape))

        sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        qkv = [take(f"self_attn.{n}_proj.weight", size, config.hidden_size) for n, size in sizes.items()]
        bias = [take(f"self_attn.{n}_proj.bias", size) for n, size in sizes.items()] if config.qkv_bias else None
        counts = {"q": config.num_heads, "k": config.num_kv_heads} if config.qk_norm else {}
        qk_norm = [
            np.tile(take(f"self_attn.{n}_norm.weight", config.head_dim), (count, 1)) for n, count in counts.items()
        ]
        gate_up = [take(f"mlp.{n}_proj.weight", config.intermediate_size, config.hidden_size) for n in ("gate", "up")]
        return LayerWeights(
            input_norm=weight("input_layernorm.weight", config.hidden_size),
            qkv=self.ops.weight(np.concatenate(qkv)),
            qkv_bias=self.ops.weight(np.concatenate(bias)) if bias else None,
            qk_norm=self.ops.weight(np.concatenate(qk_norm)) if config.qk_norm else None,
            output=weight("self_attn.o_proj.weight", config.hidden_size, q_size),
            output_bias=weight("self_attn.o_proj.bias", config.hidden_size) if config.output_bias else None,
            post_norm=weight("post_attention_layernorm.weight", config.hidden_size),
            gate_up=self.ops.weight(np.concatenate(gate_up)),
            down=weight("mlp.down_proj.weight", config.hidden_size, config.intermediate_size),
        )
