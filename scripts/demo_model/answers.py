"""Writes the demo model's greedy answers to a fixed set of prompts, computed by transformers in float32 on the CPU.

    python scripts/demo_model/answers.py --model fastdeploy_pd/demo_model --out tests/model/demo_answers.json

A test compares our engine with them, token by token. Two computations of the same float32 logits differ in their last digits,
so prompts at whose answers two tokens are nearly equal (`MIN_GAP`) are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MIN_GAP = 1e-3  # between the best and the second logit at every token; float32 rounding stays far below
MAX_TOKENS = 256
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
PROMPTS: tuple[tuple[str, ...], ...] = (
    ("What is prefill?",),
    ("What is decode?",),
    ("Why split prefill and decode?",),
    ("What is a KV cache?",),
    ("What is TTFT?",),
    ("what does tpot mean",),
    ("What is goodput?",),
    ("How does a request travel through the cluster?",),
    ("What happens if the decode instance dies?",),
    ("What is Redis used for?",),
    ("explain continuous batching",),
    ("chunked prefill?",),
    ("What is prefix caching?",),
    ("What is a block table?",),
    ("Tell me about RDMA.",),
    ("How do you know that the blocks are correct?",),
    ("Who are you?",),
    ("Hello",),
    ("What can you do?",),
    ("Tell me a story about a fox and a lighthouse",),
    ("Write a short poem about the sea.",),
    ("What is the capital of France?",),
    ("Count to twenty",),
    ("What is a KV cache?", "Tell me more", "Give me an example"),
    ("My name is Anna.", "What is a lease?", "What is my name?"),
    ("Tell me a story about an owl", "What was the name of the owl?"),
)


def greedy(model: Any, ids: list[int], ends: list[int]) -> tuple[list[int], float]:
    """Returns: the greedy continuation with its end token, and the smallest gap between best and second logit."""
    tokens: list[int] = []
    gap = float("inf")
    past, step = None, torch.tensor([ids])
    with torch.inference_mode():
        while len(tokens) < MAX_TOKENS:
            output = model(input_ids=step, past_key_values=past, use_cache=True)
            past = output.past_key_values
            best, second = output.logits[0, -1].float().topk(2).values.tolist()
            gap = min(gap, best - second)
            tokens.append(int(output.logits[0, -1].argmax()))
            if tokens[-1] in ends:
                break
            step = torch.tensor([[tokens[-1]]])
    return tokens, gap


def converse(
    model: Any, tokenizer: Any, questions: tuple[str, ...], ends: list[int], with_system: bool
) -> dict[str, Any] | None:
    """Returns: the conversation's last answer, or None if it ends too late or is nearly a tie."""
    messages = [SYSTEM] if with_system else []
    for i, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        token_ids, gap = greedy(model, prompt_ids, ends)
        if gap < MIN_GAP or token_ids[-1] not in ends:
            sys.stdout.write(f"left out (gap {gap:.2e}): {question}\n")
            return None
        answer = tokenizer.decode(token_ids[:-1])
        if i < len(questions) - 1:
            messages.append({"role": "assistant", "content": answer})
    return {
        "messages": messages,
        "prompt_token_ids": prompt_ids,
        "answer": answer,
        "answer_token_ids": token_ids,
        "min_gap": round(gap, 4),
    }


def main() -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ends = json.loads((options.model / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    answers = [converse(model, tokenizer, questions, ends, i % 8 == 7) for i, questions in enumerate(PROMPTS)]
    kept = [answer for answer in answers if answer is not None]
    options.out.write_text(json.dumps({"max_tokens": MAX_TOKENS, "answers": kept}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(kept)} of {len(PROMPTS)} answers written to {options.out}\n")


if __name__ == "__main__":
    main()
