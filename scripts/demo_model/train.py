"""Trains the demo model: a small Qwen3 decoder on the text of `corpus.py`.

python scripts/demo_model/train.py --out fastdeploy_pd/demo_model --compile    # minutes on a GPU
python scripts/demo_model/train.py --out /tmp/smoke --smoke                    # seconds on a CPU; checks the script only
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import documents, held_out_questions
from network import SHAPE, Qwen3, Shape, continue_greedily
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT_END, START, END = range(3)  # their ids
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPT_WEIGHT = 0.1  # of the loss on what users write: it is noise by design, but a little of it teaches the words
ENCODE_BATCH = 20_000
SAMPLES = (
    "What is prefill?", "whats a kv cache", "What happens if the decode instance dies?", "Hello", "What is the capital of France?",
    "Tell me a story about a fox and a lighthouse", "Write a poem about the moon", "Count to twelve", "What is the difference between a lease and a block?",
)  # fmt: skip


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


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


@dataclass(slots=True)
class Data:
    """Documents as one row of tokens, with the weight of each token's loss."""

    ids: torch.Tensor  # [tokens] int64
    weights: torch.Tensor  # [tokens] float32
    starts: torch.Tensor  # [documents] where each one begins
    long_starts: torch.Tensor  # the same, of documents longer than a short window


def pack(tokenizer: Tokenizer, texts: list[str], length: int, device: str) -> Data:
    """Returns: the documents, tokenised and on the device."""
    parts = []
    for i in range(0, len(texts), ENCODE_BATCH):
        parts += [np.array(e.ids, dtype=np.int16) for e in tokenizer.encode_batch(texts[i : i + ENCODE_BATCH])]
    sizes = np.array([len(p) for p in parts])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    ids = np.concatenate(parts)
    return Data(
        torch.from_numpy(ids.astype(np.int64)).to(device),
        torch.from_numpy(loss_weights(ids, tokenizer)).to(device),
        torch.from_numpy(starts),
        torch.from_numpy(starts[sizes > length] if (sizes > length).any() else starts),
    )


def loss_weights(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Returns: [tokens] float32: 1 in answers and plain text, PROMPT_WEIGHT in what users and systems say."""
    assistant = tokenizer.encode("assistant").ids[0]
    is_answer = (ids == START) & (np.roll(ids, -1) == assistant)
    # a role starts at <|im_start|>, plain text after <|endoftext|>; what lies between has the last role
    value = np.where(is_answer | (ids == TEXT_END), 1.0, PROMPT_WEIGHT).astype(np.float32)
    is_change = (ids == START) | (ids == TEXT_END)
    is_change[0] = True
    last_change = np.maximum.accumulate(np.where(is_change, np.arange(len(ids)), 0))
    weights: np.ndarray = value[last_change]
    weights[ids == START] = PROMPT_WEIGHT
    return weights


Network = Callable[[torch.Tensor], torch.Tensor]


def loss_of(model: Network, ids: torch.Tensor, weights: torch.Tensor, device: str) -> torch.Tensor:
    """Mean weighted cross-entropy of predicting ids[:, 1:]."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(ids[:, :-1])
    losses = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


def windows(
    data: Data, starts: torch.Tensor, count: int, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns: ids and weights [count, length + 1] of random windows, each from a document's beginning, as requests are."""
    first = starts[torch.randint(len(starts), (count,), generator=generator)].clamp(max=len(data.ids) - length - 1)
    index = (first[:, None] + torch.arange(length + 1)).to(data.ids.device)
    return data.ids[index], data.weights[index]


def make_optimiser(model: Qwen3, rate: float, device: str) -> torch.optim.Optimizer:
    """Returns: AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device == "cuda")


def train(model: Qwen3, data: Data, held_out: Data, options: argparse.Namespace, device: str) -> None:
    """AdamW with a cosine schedule; every fourth step uses windows twice as long, half of them from long documents."""
    optimiser = make_optimiser(model, options.lr, device)
    network: Network = torch.compile(model, dynamic=False) if options.compile else model
    generator = torch.Generator().manual_seed(0)
    start_s = time.monotonic()
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimiser.param_groups:
            group["lr"] = options.lr * rate
        is_long = step % 4 == 3
        length = options.length * (2 if is_long else 1)
        starts = data.long_starts if is_long and step % 8 == 7 else data.starts
        ids, weights = windows(data, starts, options.batch_tokens // length, length, generator)
        loss = loss_of(network, ids, weights, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == options.steps - 1:
            held = held_out_loss(model, held_out, options, device)
            say(f"step {step} loss {loss.item():.4f} held-out {held:.4f} {time.monotonic() - start_s:.0f} s")


@torch.inference_mode()
def held_out_loss(model: Qwen3, held_out: Data, options: argparse.Namespace, device: str) -> float:
    """Returns: the loss on documents of another seed."""
    ids, weights = windows(
        held_out,
        held_out.starts,
        options.batch_tokens // options.length,
        options.length,
        torch.Generator().manual_seed(1),
    )
    return loss_of(model, ids, weights, device).item()


def answer(model: Qwen3, tokenizer: Tokenizer, questions: list[str], max_tokens: int, device: str) -> list[str]:
    """Returns: the greedy answer to each question."""
    prompts = [tokenizer.encode(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n").ids for q in questions]
    answers = []
    for i in range(0, len(prompts), 256):
        answers += continue_greedily(model, prompts[i : i + 256], max_tokens, {TEXT_END, END}, device)
    return [tokenizer.decode(ids) for ids in answers]


def report(model: Qwen3, tokenizer: Tokenizer, options: argparse.Namespace, device: str) -> None:
    """Print sample answers, and how many questions in unseen wordings are answered rightly, word by word."""
    max_tokens = 2 if options.smoke else 90
    pairs = held_out_questions()[: 4 if options.smoke else None]
    answers = answer(model, tokenizer, [q for q, _ in pairs], max_tokens, device)
    wrong = [(q, a) for (q, right), a in zip(pairs, answers, strict=True) if a not in right]
    say(f"unseen wordings: {len(pairs) - len(wrong)} of {len(pairs)} answered rightly")
    for question, text in wrong[:: max(1, len(wrong) // 40)]:
        say(f"  wrong: {question} -> {text}")
    for question, text in zip(SAMPLES, answer(model, tokenizer, list(SAMPLES), 2 * max_tokens, device), strict=True):
        say(f"> {question}\n{text}")


def export(model: Qwen3, tokenizer: Tokenizer, shape: Shape, out: Path) -> None:
    """Write a Hugging Face checkpoint directory."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **shape, "hidden_act": "silu", "attention_bias": False,
        "attention_dropout": 0.0, "rope_scaling": None, "tie_word_embeddings": True, "use_sliding_window": False, "use_cache": True,
        "bos_token_id": TEXT_END, "eos_token_id": END, "torch_dtype": "bfloat16", "initializer_range": 0.02,
    }  # fmt: skip
    generation = {"eos_token_id": [END, TEXT_END], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": shape["max_position_embeddings"], "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": SPECIAL[1:]}
    files = {
        "config": config,
        "generation_config": generation,
        "tokenizer_config": tokenizer_config,
        "special_tokens_map": special,
    }
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))


def read_options() -> argparse.Namespace:
    """Returns: the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--documents", type=int, default=400_000)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=1024, help="tokens a training window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--compile", action="store_true", help="compile the network; faster on a GPU")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model on the CPU")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.documents, options.batch_tokens, options.length = 3, 400, 256, 128
    return options


def main() -> None:
    """Train and export."""
    options = read_options()
    shape = dict(SHAPE)
    if options.smoke:
        tiny = {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        shape.update(tiny)
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    torch.manual_seed(0)
    start_s = time.monotonic()
    texts = documents(1, options.documents)
    tokenizer = train_tokenizer(texts[:20_000])
    data = pack(tokenizer, texts, options.length, device)
    held_out = pack(tokenizer, documents(2, 3000 if not options.smoke else 100), options.length, device)
    model = Qwen3(shape).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{num_parameters:,} parameters, {len(data.ids):,} tokens, vocabulary {tokenizer.get_vocab_size()}, {device}, {time.monotonic() - start_s:.0f} s"
    )
    train(model, data, held_out, options, device)
    export(model, tokenizer, shape, options.out)
    report(model, tokenizer, options, device)


if __name__ == "__main__":
    main()
