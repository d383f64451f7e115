"""How flags are read: names, numbers, ports and lists, each refused in words that say what is allowed."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fastdeploy_pd.errors import ConfigError

DEMO_MODEL = Path(__file__).parent / "demo_model"
NEAR = 0.72  # difflib's ratio above which a flag may be meant by another word


def with_hyphens(argument: str) -> str:
    """FastDeploy's users write both --max_model_len and --max-model-len."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def did_you_mean(word: str, parser: argparse.ArgumentParser) -> str:
    """Returns: which of the parser's flags a word looks like, as the end of a sentence; "" for none."""
    names = [name.removeprefix("--") for name in parser._option_string_actions]  # the hyphens make any two alike
    near = difflib.get_close_matches(word.partition("=")[0].removeprefix("--"), names, 1, NEAR)
    return f"; did you mean --{near[0]}?" if near else ""


class ExactParser(argparse.ArgumentParser):
    """Takes no flag for the beginning of another one; nor do its subcommands."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})


class Parser(ExactParser):
    """Raises ConfigError instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown and unknown[1].startswith("-"):
            message = f"there is no flag {unknown[1]}{did_you_mean(unknown[1], self)}"
        elif unknown:
            message = f"{unknown[1]!r} belongs to no flag; a model is given as --model {unknown[1]}"
        raise ConfigError(re.sub(r"^argument (--[\w-]+): ", r"\1: ", message))


def number(kind: Callable[[str], Any], minimum: float, maximum: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be {what}")
        return value

    return parse


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], Any]:
    return number(int, minimum, maximum, f"an integer from {minimum} to {maximum}")


PORT = integer(1, 65535)


def api_key(text: str) -> str:
    if not text or text != text.strip():  # no client could send it
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be at least one character, without spaces around (to ask for none, leave the flag out)"
        )
    return text


def ports(text: str) -> tuple[int, ...]:
    return tuple(PORT(part.strip()) for part in text.split(","))


def block_size(text: str) -> int:
    value = int(integer(1, 1024)(text))
    if value & (value - 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a power of two up to 1024")
    return value


def topic(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be 1 to 64 of A-Z a-z 0-9 . _ -")
    return text


def protocols(text: str) -> tuple[str, ...]:
    names = tuple(n.strip() for n in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be names separated by commas, each once, e.g. shm,tcp"
        )
    return names


def directory(text: str) -> str:
    if text == "demo":
        return str(DEMO_MODEL)
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a directory; give a Hugging Face checkpoint directory, or `demo` for the model that comes with the package"
        )
    return text


class Help(argparse.HelpFormatter):
    """Shows a flag's default where its text does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "default" in text or text == "":
            return action.help
        value = ",".join(action.default) if isinstance(action.default, tuple) else action.default
        return f"{text} (default: {'demo' if value == str(DEMO_MODEL) else value})".replace("%", "%%")
