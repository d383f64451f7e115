"""The demo model's training text: conversations and stories made from `facts` and `stories`, the same for the same seed."""

from __future__ import annotations

import random

from facts import FOLLOW_UPS, QUESTIONS, THINGS, UNKNOWN, UNKNOWN_QUESTIONS
from stories import story, story_request

Turn = tuple[str, str]  # (question, answer)

THING_FORMS = (
    "What is {}?",
    "what is {}",
    "What's {}?",
    "Explain {}.",
    "explain {}",
    "Explain {} to me",
    "What does {} mean?",
    "Tell me about {}.",
    "tell me about {}",
    "Can you explain {}?",
    "Please explain {}",
    "{}?",
    "What do you mean by {}?",
    "Define {}",
    "Describe {}",
    "Could you tell me what {} is?",
    "I don't understand {}",
    "How would you explain {}?",
    "What exactly is {}?",
    "so what is {}?",
    "What are {}?",
    "Tell me what {} is",
    "Do you know what {} is?",
)
SIMPLER = (
    "Can you explain it more simply?",
    "Simpler please",
    "Explain like I am five",
    "In one sentence?",
    "Shorter, please",
)
FILLERS = {
    "place": (
        "France",
        "Japan",
        "Brazil",
        "Kenya",
        "Canada",
        "Norway",
        "Berlin",
        "Paris",
        "London",
        "India",
        "the moon",
        "Peru",
        "Egypt",
    ),
    "language": ("Python", "Java", "Rust", "C", "JavaScript", "Haskell"),
    "food": ("pasta", "rice", "soup", "a cake", "curry", "bread"),
    "tongue": ("French", "German", "Spanish", "Chinese", "Latin"),
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Answer in simple words.",
)


def vary(question: str, rng: random.Random) -> str:
    """Returns: the question as a hurried user might type it."""
    roll = rng.random()
    if roll < 0.15:
        question = question.lower()
    elif roll < 0.25:
        question = question.rstrip("?.!")
    elif roll < 0.32:
        question = rng.choice(("Hello! ", "Hi, ", "Please tell me: ", "Quick question: ")) + question
    elif roll < 0.38 and len(question) > 8:
        place = rng.randrange(1, len(question) - 1)
        question = question[:place] + question[place + 1] + question[place] + question[place + 2 :]
    return question


def unknown(rng: random.Random) -> Turn:
    """Returns: a question outside the model's world, and that it doesn't know."""
    fillers = {name: rng.choice(values) for name, values in FILLERS.items()}
    question = rng.choice(UNKNOWN_QUESTIONS).format(n=rng.randrange(2, 99), m=rng.randrange(2, 99), **fillers)
    return vary(question, rng), rng.choice(UNKNOWN)


def thing(rng: random.Random) -> list[Turn]:
    """Returns: a question about a thing, perhaps followed by the wish for something shorter."""
    names, answers = rng.choice(THINGS)
    answer = rng.choice(answers)
    turns = [(vary(rng.choice(THING_FORMS).format(rng.choice(names)), rng), answer)]
    if rng.random() < 0.15:
        turns.append((rng.choice(SIMPLER), min(answers, key=len).split(". ")[0].rstrip(".") + "."))
    return turns


def turns(rng: random.Random) -> list[Turn]:
    """Returns: one topic of a conversation."""
    roll = rng.random()
    if roll < 0.42:
        return thing(rng)
    if roll < 0.70:
        questions, answers = rng.choice(QUESTIONS)
        return [(vary(rng.choice(questions), rng), rng.choice(answers))]
    if roll < 0.80:
        return [unknown(rng)]
    if roll < 0.84:
        question = rng.choice(tuple(FOLLOW_UPS))
        return [*thing(rng), (question, rng.choice(FOLLOW_UPS[question]))]
    return [story_request(rng)]


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """Returns: messages of a conversation of one to several topics."""
    messages: list[dict[str, str]] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for _ in range(1 if rng.random() < 0.6 else rng.randint(2, 5)):
        for question, answer in turns(rng):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def chat_text(messages: list[dict[str, str]]) -> str:
    """Returns: messages in ChatML, as the tokenizer's chat template renders them."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def document(rng: random.Random) -> str:
    """Returns: one training document: mostly conversations, some plain stories."""
    if rng.random() < 0.12:
        return story(rng) + "<|endoftext|>"
    return chat_text(conversation(rng)) + "<|endoftext|>"


def documents(seed: int, num_documents: int) -> list[str]:
    """Returns: num_documents documents, the same for the same seed."""
    rng = random.Random(seed)
    return [document(rng) for _ in range(num_documents)]
