"""What the demo model knows: reads the hand-written text files in `knowledge/`.

A topic is a paragraph of lines. The first character of a line says what it is:

    # name | other name        things that are asked about as "What is NAME?"; the first one is the usual one
    ? question | question      whole questions
    = answer                   one of several equally good answers: the same fact in other words
    + more                     what to say to "Tell me more"
    ~ simple                   one simple sentence
    ! example                  what to say to "Give me an example"

Answers of a topic say the same in different words, so that the model learns the fact and not the wording.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

KNOWLEDGE = Path(__file__).parent / "knowledge"
TOPIC_FILES = ("phases", "memory", "cluster", "transfer", "serving", "field", "smalltalk")


@dataclass(slots=True)
class Topic:
    """One thing that can be asked about, and what to say."""

    names: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)
    simple: str = ""
    example: str = ""


@dataclass(slots=True)
class Unknown:
    """Questions outside the model's world; {x} is filled with a word of `kind`."""

    kind: str
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def paragraphs(name: str) -> list[list[str]]:
    """Returns: the paragraphs of a knowledge file as lists of lines."""
    text = (KNOWLEDGE / f"{name}.txt").read_text(encoding="utf-8")
    return [[line.strip() for line in p.splitlines() if line.strip()] for p in text.split("\n\n") if p.strip()]


def split(text: str) -> list[str]:
    """Returns: the parts between bars."""
    return [part.strip() for part in text.split("|") if part.strip()]


def read_topic(lines: list[str]) -> Topic:
    """Returns: the topic of one paragraph."""
    topic = Topic()
    for line in lines:
        mark, text = line[0], line[1:].strip()
        if mark == "#":
            topic.names += split(text)
        elif mark == "?":
            topic.questions += split(text)
        elif mark == "=":
            topic.answers.append(text)
        elif mark == "+":
            topic.more.append(text)
        elif mark == "~":
            topic.simple = text
        elif mark == "!":
            topic.example = text
        else:
            raise ValueError(f"a topic's line begins with {mark!r}: {line}")
    return topic


def topics() -> dict[str, list[Topic]]:
    """Returns: the topics of every file, by the file's name."""
    return {name: [read_topic(p) for p in paragraphs(name)] for name in TOPIC_FILES}


def unknowns() -> list[Unknown]:
    """Returns: the groups of unknown.txt."""
    groups: list[Unknown] = []
    for line in (KNOWLEDGE / "unknown.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("@"):
            groups.append(Unknown(line[1:].strip()))
        elif line.startswith("?"):
            groups[-1].questions += split(line[1:])
        elif line.startswith("="):
            groups[-1].answers.append(line[1:].strip())
    return groups


def words() -> dict[str, list[str]]:
    """Returns: the word lists of words.txt; entries are separated by commas, those of "places" by lines."""
    lists: dict[str, list[str]] = {}
    name = ""
    for line in (KNOWLEDGE / "words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("@"):
            name = line[1:].strip()
            lists[name] = []
        elif name and line.strip():
            parts = [line] if name == "places" else line.split(",")
            lists[name] += [part.strip() for part in parts if part.strip()]
    return lists


def marked_blocks(name: str) -> list[tuple[list[str], list[str]]]:
    """Returns: (words after the star, lines that follow) of each block of plots.txt or poems.txt."""
    blocks: list[tuple[list[str], list[str]]] = []
    for line in (KNOWLEDGE / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("*"):
            blocks.append((split(line[1:]), []))
        elif line.strip() and not line.startswith("#"):
            blocks[-1][1].append(line.strip())
    return blocks
