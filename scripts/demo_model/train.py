"""Trains the demo model: a small Qwen3 decoder on the text of `corpus.py`.

python scripts/demo_model/train.py --out fastdeploy_pd/demo_model        # minutes on a GPU
python scripts/demo_model/train.py --out /tmp/smoke --smoke              # seconds on a CPU; checks the script, not the model
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from corpus import documents
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Returns: a byte-level BPE tokenizer of SHAPE's vocabulary, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape."""
        return functional.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), SHAPE["rms_norm_eps"]).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with QK norm; parameter names are the checkpoint's."""

    def __init__(self, shape: dict) -> None:
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
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves convention."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape["hidden_size"], shape["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(shape["hidden_size"], shape["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(shape["intermediate_size"], shape["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), MLP(shape)
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(shape["hidden_size"]),
            RMSNorm(shape["hidden_size"]),
        )

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """The decoder with tied embeddings."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape["vocab_size"], shape["hidden_size"])
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape["num_hidden_layers"]))
        self.norm = RMSNorm(shape["hidden_size"])
        inverse = shape["rope_theta"] ** (-torch.arange(0, shape["head_dim"], 2) / shape["head_dim"])
        angles = torch.outer(torch.arange(shape["max_position_embeddings"]).float(), inverse)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(initialise)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] -> logits [batch, tokens, vocab]."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.norm(x), self.embed_tokens.weight)


def initialise(module: nn.Module) -> None:
    """Small normal weights."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def pack(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Returns: [tokens] int64, all documents one after the other."""
    return torch.tensor([i for e in tokenizer.encode_batch(texts) for i in e.ids], dtype=torch.int64)


def loss_of(model: nn.Module, ids: torch.Tensor, device: str) -> torch.Tensor:
    """Mean cross-entropy of predicting ids[:, 1:]."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(ids[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module, data: torch.Tensor, held_out: torch.Tensor, options: argparse.Namespace, device: str
) -> None:
    """AdamW with a cosine schedule over random windows; every fourth step uses windows twice as long, for long prompts."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(0)
    start_s = time.monotonic()
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimiser.param_groups:
            group["lr"] = options.lr * rate
        length = options.length * (2 if step % 4 == 3 else 1)
        rows = max(1, options.batch_tokens // length)
        starts = torch.randint(0, len(data) - length - 1, (rows,), generator=generator)
        ids = torch.stack([data[s : s + length + 1] for s in starts.tolist()]).to(device)
        loss = loss_of(model, ids, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 250 == 0 or step == options.steps - 1:
            with torch.no_grad():
                held = loss_of(model, held_out[: 8 * 513].view(8, 513).to(device), device).item()
            sys.stdout.write(
                f"step {step} loss {loss.item():.4f} held-out {held:.4f} {time.monotonic() - start_s:.0f} s\n"
            )
            sys.stdout.flush()


def export(model: nn.Module, tokenizer: Tokenizer, shape: dict, out: Path) -> None:
    """Write a Hugging Face checkpoint directory."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    end, text_end = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **shape,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "use_cache": True,
        "bos_token_id": text_end,
        "eos_token_id": end,
        "torch_dtype": "bfloat16",
        "initializer_range": 0.02,
    }
    generation = {"eos_token_id": [end, text_end], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": shape["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": SPECIAL[1:]}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", special),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))


def main() -> None:
    """Train and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--documents", type=int, default=120_000)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=1024, help="tokens a training window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model on the CPU")
    options = parser.parse_args()
    shape = dict(SHAPE)
    if options.smoke:
        options.steps, options.documents, options.batch_tokens, options.length = 3, 400, 256, 128
        shape.update(
            num_hidden_layers=1, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1
        )
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    torch.manual_seed(0)
    texts = documents(1, options.documents)
    tokenizer = train_tokenizer(texts[:20_000])
    data, held_out = pack(tokenizer, texts), pack(tokenizer, documents(2, 400))
    model = Qwen3(shape).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    sys.stdout.write(
        f"{num_parameters:,} parameters, {len(data):,} tokens, vocabulary {tokenizer.get_vocab_size()}, {device}\n"
    )
    train(model, data, held_out, options, device)
    export(model, tokenizer, shape, options.out)


if __name__ == "__main__":
    main()
