"""What is read from files, field by field: what is wrong is said in words, as what follows the name of a file or of a line of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

MOST = 1e300  # of a number


def json_object(text: str) -> dict[str, Any]:
    """Returns: a JSON object. Raises: ValueError: it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(reason(error)) from error
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object, as in {...}")
    return found


def field(row: Mapping[str, Any], name: str) -> Any:
    """Returns: a field's value. Raises: ValueError: there is none; names it."""
    if row.get(name) is None:
        raise ValueError(f"has no {name}")
    return row[name]


def whole(row: Mapping[str, Any], name: str, least: int = 0) -> int:
    """Returns: a field's whole number, in JSON or as a table's text. Raises: ValueError: it is none, or too small."""
    found = _converted(row, name, int)
    if type(found) is not int or found < least:
        raise ValueError(f"has {name} {_shown(row[name])}; it must be a whole number of at least {least}")
    return found


def number(row: Mapping[str, Any], name: str) -> float:
    """Returns: a field's number, in JSON or as a table's text. Raises: ValueError: it is none, or not finite."""
    found = _converted(row, name, float)
    if type(found) not in (int, float) or not -MOST <= found <= MOST:
        raise ValueError(f"has {name} {_shown(row[name])}; it must be a finite number")
    return float(found)


def _converted(row: Mapping[str, Any], name: str, kind: Callable[[str], Any]) -> Any:
    """Returns: a field's value, a text as what it says; None: it says no such thing. Raises: ValueError: there is no such field."""
    value = field(row, name)
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        return None


def numbers(row: Mapping[str, Any], name: str) -> list[float]:
    """Returns: a field's list of numbers. Raises: ValueError: it is none, or one is not finite."""
    value = field(row, name)
    if not isinstance(value, list) or not all(type(x) in (int, float) and abs(x) <= MOST for x in value):
        raise ValueError(f"has {name} {_shown(value)}; it must be a list of finite numbers")
    return [float(x) for x in value]


def reason(error: Exception) -> str:
    """Returns: why a file could not be read, in words that follow its name."""
    match error:
        case json.JSONDecodeError():
            line = f"line {error.lineno}, " if "\n" in error.doc.strip() else ""
            return f"is not JSON: {error.msg} at {line}column {error.colno}"
        case RecursionError():
            return "is nested too deeply"
        case UnicodeDecodeError():
            return "is not text in UTF-8"
        case OSError():
            return f"cannot be read: {error.strerror or error}"
        case EOFError():
            return "ends too early"
    return f"cannot be read: {error}"


def _shown(value: Any) -> str:
    text = json.dumps(value) if math.inf != value != -math.inf else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
