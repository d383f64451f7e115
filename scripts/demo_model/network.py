"""The demo model's network in plain PyTorch: a small Qwen3 decoder whose parameter names are the checkpoint's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

Shape = dict[str, Any]

SHAPE: Shape = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096,
}  # fmt: skip


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape."""
        return functional.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), SHAPE["rms_norm_eps"]).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves convention."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with QK norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = (
            shape["num_attention_heads"],
            shape["num_key_value_heads"],
            shape["head_dim"],
        )
        hidden = shape["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.dim), RMSNorm(self.dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, hidden], cos and sin [tokens, dim / 2]."""
        batch, tokens, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, tokens, -1, self.dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, tokens, -1, self.dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, -1, self.dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        projected: torch.Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))
        return projected


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape["hidden_size"], shape["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(shape["hidden_size"], shape["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(shape["intermediate_size"], shape["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        y: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), MLP(shape)
        self.input_layernorm = RMSNorm(shape["hidden_size"])
        self.post_attention_layernorm = RMSNorm(shape["hidden_size"])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Qwen3(nn.Module):
    """The decoder with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape["vocab_size"], shape["hidden_size"])
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape["num_hidden_layers"]))
        self.norm = RMSNorm(shape["hidden_size"])
        inverse = shape["rope_theta"] ** (-torch.arange(0, shape["head_dim"], 2) / shape["head_dim"])
        angles = torch.outer(torch.arange(shape["max_position_embeddings"]).float(), inverse)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(initialise)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] -> normed hidden states [batch, tokens, hidden]."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        y: torch.Tensor = self.norm(x)
        return y

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] -> logits [batch, tokens, vocab]."""
        return functional.linear(self.hidden(ids), self.embed_tokens.weight)


def initialise(module: nn.Module) -> None:
    """Small normal weights."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


@torch.inference_mode()
def continue_greedily(
    model: Qwen3, prompts: list[list[int]], max_tokens: int, ends: set[int], device: str
) -> list[list[int]]:
    """Returns: each prompt's greedy continuation without its end token. No KV cache: simple, and quick enough for short prompts."""
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()) + max_tokens, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)
    for step in range(max_tokens):
        longest = int(lengths.max()) + step
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            hidden = model.hidden(ids[:, :longest])[rows, lengths + step - 1]
            ids[rows, lengths + step] = functional.linear(hidden, model.embed_tokens.weight).argmax(-1)
    answers = []
    for row, prompt in enumerate(prompts):
        tokens = ids[row, len(prompt) : len(prompt) + max_tokens].tolist()
        answers.append(tokens[: next((i for i, t in enumerate(tokens) if t in ends), max_tokens)])
    return answers
