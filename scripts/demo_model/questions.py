"""How people ask: frames for questions about a thing, politeness, haste and typing errors."""

from __future__ import annotations

import random
import re

THING_FORMS = (
    "What is {}?", "What is {}?", "what is {}", "What's {}?", "whats {}", "Explain {}.", "explain {}", "Explain {} to me", "What does {} mean?",
    "Tell me about {}.", "tell me about {}", "Can you explain {}?", "Please explain {}", "{}?", "{}", "What do you mean by {}?", "Define {}",
    "Describe {}", "Could you tell me what {} is?", "I don't understand {}", "How would you explain {}?", "What exactly is {}?", "so what is {}?",
    "Tell me what {} is", "Do you know what {} is?", "What do you know about {}?", "How does {} work?", "how does {} work", "What is {} for?",
    "What is the meaning of {}?", "Give me a definition of {}", "What is meant by {}?", "I want to know what {} is", "Help me understand {}",
    "Why is {} important?", "what is {} used for", "What is the purpose of {}?", "Why do we need {}?", "who or what is {}", "and what is {}?",
    "What is {} in this project?", "can you describe {}", "Say something about {}", "i have never heard of {}", "what about {}?",
    "What is {} and how does it work?", "what is {} and why do we need it", "What is {} and what is it good for?", "explain {} and how it is used",
    "{} and why", "What is {}, and where is it used?", "what is {} and who needs it", "teach me about {}", "give me a short explanation of {}", "what's the idea of {}", "What is the point of {}?",
)
#: frames that training never sees: they measure whether the model understands new ones
HELD_OUT_FORMS = (
    "Would you tell me what {} is?", "I'd like to understand {}", "Explain briefly what {} is.", "What can you tell me about {}?",
    "Hi, I am new here. What is {}?", "what is {} and why does it matter",
)
OPENERS = ("Hello! ", "Hi, ", "Please tell me: ", "Quick question: ", "Hey, ", "One question: ", "Okay. ", "Thanks! ", "Now, ", "I have a question. ", "And ")
ENDERS = (" Thanks!", " please", ", please", " Keep it short.", " I am curious.", " in short", " in simple words", " thank you")
KEYS = {"a": "s", "e": "r", "i": "o", "o": "p", "t": "r", "n": "m", "s": "d", "r": "t", "l": "k", "h": "j", "c": "v", "d": "f", "u": "i"}
SYLLABLES = ("bla", "dri", "zo", "quin", "fle", "mor", "tak", "wib", "gru", "nex", "po", "sli", "vra", "kel", "umb", "arg", "pli", "sno", "xar", "dub")


def bare(name: str) -> str:
    """Returns: the name without its article."""
    return re.sub(r"^(a|an|the) ", "", name)


def expand(question: str, rng: random.Random) -> str:
    """Returns: the question with one part of each [a/b] left."""
    return re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("/")), question)


def ask_about(name: str, rng: random.Random, forms: tuple[str, ...] = THING_FORMS) -> str:
    """Returns: a question about a thing."""
    form = rng.choice(forms)
    if form in ("{}?", "{}") or rng.random() < 0.2:
        name = bare(name)
    if form == "{}?" or form == "{}":
        name = name[0].upper() + name[1:] if rng.random() < 0.5 else name
    question = form.format(name)
    if name.endswith("s") and name == bare(name) and not name.endswith(("ss", "is", "as")) and rng.random() < 0.7:
        question = question.replace("hat is ", "hat are ").replace("What's ", "What are ").replace("does ", "do ")
    return question


def typo(text: str, rng: random.Random) -> str:
    """Returns: the text with one typing error inside a longer word."""
    places = [m.start() + i for m in re.finditer(r"[A-Za-z]{4,}", text) for i in range(1, len(m[0]) - 1)]
    if not places:
        return text
    at = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if kind == 1:
        return text[:at] + text[at + 1 :]
    if kind == 2:
        return text[:at] + text[at] + text[at:]
    return text[:at] + KEYS.get(text[at].lower(), text[at]) + text[at + 1 :]


def vary(question: str, rng: random.Random) -> str:
    """Returns: the question as somebody might type it."""
    if rng.random() < 0.08:
        question = rng.choice(OPENERS) + (question if rng.random() < 0.5 else question[0].lower() + question[1:])
    if rng.random() < 0.05:
        question = question.rstrip(".?!") + rng.choice(ENDERS)
    if rng.random() < 0.18:
        question = question.lower()
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    elif question[-1] not in "?.!" and rng.random() < 0.3:
        question += "?" if rng.random() < 0.7 else "."
    if rng.random() < 0.12:
        question = typo(question, rng)
    if rng.random() < 0.015:
        question = question.upper()
    return question


def pseudo_word(rng: random.Random) -> str:
    """Returns: a word that does not exist."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def gibberish(rng: random.Random) -> str:
    """Returns: what a cat on a keyboard types."""
    letters = "asdfghjklqwertyuiopzxcvbnm"
    return " ".join("".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(rng.randint(1, 5)))
