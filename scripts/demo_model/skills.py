"""Small things the model can do beside answering: count, repeat, remember a name or a code word, list, greet by name."""

from __future__ import annotations

import random
from collections.abc import Callable

from stories import WORDS, capital

Turn = tuple[str, str]

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SENTENCES = (
    "The fox runs through the forest.", "I like warm bread and butter.", "Prefill reads and decode writes.", "The moon is round tonight.",
    "Every block has a checksum.", "A small light is enough.", "The sea is calm today.", "My cat sleeps all day.", "Rain falls on the roof.",
    "The quick brown fox jumps over the lazy dog.", "Nothing is lost and nothing comes twice.", "The owl reads a book at night.",
)  # fmt: skip


def number(value: int, rng: random.Random) -> str:
    """Returns: a number as somebody may write it: "12" or "twelve"."""
    if value > 99 or rng.random() < 0.65:
        return str(value)
    if value < 20:
        return ONES[value]
    return TENS[value // 10] + (f"-{ONES[value % 10]}" if value % 10 else "")


def count(rng: random.Random) -> list[Turn]:
    """Returns: a wish for counting, fulfilled."""
    roll = rng.random()
    if roll < 0.65:
        stop = rng.choice((5, 10, 10, 12, 15, 20, 20, 25, 30, 40, 50, 100)) if rng.random() < 0.6 else rng.randint(3, 60)
        ask = rng.choice(("Count to {}", "Count to {}.", "count to {}", "Can you count to {}?", "Please count from 1 to {}", "count from one to {}", "Count up to {}"))
        return [(ask.format(number(stop, rng)), ", ".join(map(str, range(1, stop + 1))) + ".")]
    if roll < 0.85:
        start = rng.randint(2, 60)
        stop = start + rng.randint(3, 25)
        ask = rng.choice(("Count from {} to {}", "count from {} to {}", "Count from {} up to {}."))
        return [(ask.format(number(start, rng), number(stop, rng)), ", ".join(map(str, range(start, stop + 1))) + ".")]
    start = rng.choice((5, 10, 10, 10, 15, 20, rng.randint(4, 30)))
    ask = rng.choice(("Count down from {}", "count backwards from {}", "Count backwards from {}.", "countdown from {}"))
    return [(ask.format(number(start, rng)), ", ".join(map(str, range(start, 0, -1))) + ".")]


def repeat(rng: random.Random) -> list[Turn]:
    """Returns: a wish for an echo, fulfilled."""
    if rng.random() < 0.6:
        words = rng.sample(WORDS["animals"] + WORDS["code_words"] + WORDS["nouns"] + WORDS["foods"] + WORDS["cities"], rng.randint(1, 6))
        text = " ".join(words)
    else:
        text = rng.choice(SENTENCES)
    ask = rng.choice(("Repeat: {}", "Repeat after me: {}", "Say: {}", "say {}", "Please repeat this: {}", "Echo: {}"))
    return [(ask.format(text), text)]


def enumerate_things(rng: random.Random) -> list[Turn]:
    """Returns: a wish for a few examples of a kind, fulfilled."""
    amount, size = rng.choice((("two", 2), ("three", 3), ("3", 3), ("four", 4), ("five", 5), ("5", 5)))
    kind, entries = rng.choice((
        ("animals", WORDS["animals"]), ("names", WORDS["he_names"] + WORDS["she_names"]), ("fruits", ["apples", "pears", "plums", "cherries", "grapes", "lemons"]),
        ("colors", ["red", "blue", "green", "yellow", "white", "black", "orange", "purple"]), ("words of this project", ["prefill", "decode", "lease", "block", "epoch", "placement", "checksum"]),
    ))  # fmt: skip
    picked = rng.sample(entries, size)
    ask = rng.choice(("Name {} {}", "name {} {}", "Give me {} {}.", "List {} {}", "Can you name {} {}?", "tell me {} {}"))
    return [(ask.format(amount, kind), capital(", ".join(picked[:-1]) + " and " + picked[-1]) + ".")]


def remembered_name(rng: random.Random) -> tuple[Turn, Turn]:
    """Returns: somebody gives their name; later they ask for it."""
    name = rng.choice(WORDS["he_names"] + WORDS["she_names"])
    hello = rng.choice(("My name is {}.", "my name is {}", "I am {}", "Hello, I am {}.", "Hi, my name is {}", "Call me {}.", "I'm {}, nice to meet you", "hello my name is {}"))
    greeting = rng.choice(("Nice to meet you, {}! How can I help you?", "Hello, {}! Would you like to hear about this project, or a story?", "Hi {}! It is a pleasure to meet you."))
    ask = rng.choice(("What is my name?", "what's my name?", "Do you remember my name?", "Who am I?", "what is my name", "Do you know my name?"))
    return (hello.format(name), greeting.format(name)), (ask, f"Your name is {name}.")


def code_word(rng: random.Random) -> tuple[Turn, Turn]:
    """Returns: somebody gives a code word or number; later they ask for it."""
    kind, value = rng.choice((
        ("code word", rng.choice(WORDS["code_words"] + WORDS["animals"])), ("secret word", rng.choice(WORDS["code_words"] + WORDS["nouns"])),
        ("password", rng.choice(WORDS["code_words"]) + " " + rng.choice(WORDS["animals"])), ("secret number", str(rng.randint(10, 9999))),
        ("code", str(rng.randint(100, 99999))),
    ))  # fmt: skip
    hint = rng.choice(("The {} is {}.", "Remember: the {} is {}.", "Please remember that the {} is {}.", "Remember this: the {} is {}.", "the {} is {}", "Note that the {} is {}."))
    ask = rng.choice(("What is the {}?", "what is the {}", "What was the {}?", "Do you remember the {}?", "Tell me the {}.", "what's the {}?", "Which {} did I give you?"))
    noted = rng.choice(("I will remember that the {} is {}.", "Noted: the {} is {}.", "All right, the {} is {}."))
    return (hint.format(kind, value), noted.format(kind, value)), (ask.format(kind), f"The {kind} is {value}.")


def remember(rng: random.Random) -> list[Turn]:
    """Returns: a short conversation in which something is remembered."""
    return list(rng.choice((remembered_name, code_word))(rng))


def forgotten(rng: random.Random) -> list[Turn]:
    """Returns: somebody asks for what was never said."""
    name = remembered_name(rng)[1][0]
    kind = rng.choice(("code word", "secret word", "password", "secret number"))
    return [rng.choice(((name, "You have not told me your name."), (f"What is the {kind}?", f"You have not told me the {kind}.")))]


SKILLS: tuple[Callable[[random.Random], list[Turn]], ...] = (count, count, repeat, enumerate_things, remember, remember, forgotten)
