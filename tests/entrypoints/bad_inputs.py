"""Reads bad_inputs.jsonl, sends its cases over raw sockets and judges the answers.

A case is a request that a careless or hostile client might send, with the statuses a careful server may answer with (0: it closed the
connection instead) and what the error's body has to say. Values like "$REP:x:1000" are written out when a case is sent.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).with_name("bad_inputs.jsonl")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})")
#: Refusing a whole feature that the server does not have yet, by name, is as good as finding the fault inside it.
NOT_YET = "unsupported_parameter"
OWN_NUMBERS = re.compile(rb'"(id|created)":("[^"]*"|\d+)')  # may contain any digits
NO_BODY_NEEDED = frozenset({404, 405, 408, 414, 431, 501, 505})  # answered before there is an API to speak of


@dataclass(frozen=True)
class Target:
    """The server under test."""

    port: int
    model: str
    key: str
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True)
class Answer:
    """A status (0: closed without one) and a body."""

    status: int
    body: bytes


def load_cases() -> list[dict[str, Any]]:
    """Returns: the catalogue."""
    return [json.loads(line) for line in CATALOGUE.read_text(encoding="utf-8").splitlines() if line]


def expand(value: Any, target: Target) -> Any:
    """Returns: a value with its macros written out."""
    if isinstance(value, list):
        return [expand(v, target) for v in value]
    if isinstance(value, dict):
        return {str(expand(k, target)): expand(v, target) for k, v in value.items()}
    return _expand_text(value, target) if isinstance(value, str) else value


def _expand_text(text: str, target: Target) -> Any:
    whole = {"$VOCAB": target.vocab_size, "$CTX": target.max_model_len, "$CTX_TOKENS": [1] * target.max_model_len}
    if text in whole:
        return whole[text]
    if text.startswith("$REP:"):
        _, unit, count = text.split(":")
        return unit * int(count)
    for macro, replacement in (
        ("$MODEL_UPPER", target.model.upper()),
        ("$MODEL", target.model),
        ("$KEY_PREFIX", target.key[:-1]),
        ("$KEY", target.key),
    ):
        text = text.replace(macro, replacement)
    return text


def body_of(case: dict[str, Any], target: Target) -> bytes | None:
    """Returns: the bytes a case posts; None: it posts nothing."""
    if "body" in case:
        return json.dumps(expand(case["body"], target)).encode()
    if "body_raw_b64" in case:
        return base64.b64decode(case["body_raw_b64"]).replace(b"$MODEL", target.model.encode())
    recipe = case.get("body_gen")
    if recipe is None:
        return None
    if "gzip" in recipe:
        return gzip.compress(expand(recipe["gzip"], target).encode())
    if "gzip_zeros" in recipe:
        return gzip.compress(bytes(recipe["gzip_zeros"]), 9)
    start = expand(recipe["pre"], target)
    if "fmt" in recipe:
        return (start + recipe["sep"].join(recipe["fmt"] % i for i in range(recipe["n"])) + recipe["post"]).encode()
    middle = recipe["unit"] * recipe["n"] + recipe.get("mid", "") + recipe.get("unit2", "") * recipe.get("n2", 0)
    return (start + middle + recipe["post"]).encode()


def wire_bytes(case: dict[str, Any], target: Target) -> list[bytes]:
    """Returns: what to write, piece by piece; the server may have closed the connection before the last one."""
    if "http_raw_b64" in case:
        return [_raw(base64.b64decode(case["http_raw_b64"]), target)]
    if "http_gen" in case:
        return _special(case["http_gen"], target)
    body = body_of(case, target)
    headers = {name: str(expand(value, target)) for name, value in case["headers"].items()}
    headers.setdefault("Authorization", f"Bearer {target.key}")
    if not headers["Authorization"]:
        del headers["Authorization"]
    if body is not None:
        headers["Content-Length"] = str(len(body))
    path = case["endpoint"].replace("$KEY", target.key)
    lines = [f"{case['method']} {path} HTTP/1.1", "Host: test", *(f"{k}: {v}" for k, v in headers.items())]
    return ["\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")]


def _raw(data: bytes, target: Target) -> bytes:
    data = data.replace(b"$MODEL", target.model.encode()).replace(b"$KEY", target.key.encode())
    messages = re.split(rb"(?=POST /v1)", data)
    for index, message in enumerate(messages):
        length = len(message.partition(b"\r\n\r\n")[2])
        messages[index] = message.replace(b"$LEN", str(length).encode())
    return b"".join(messages)


def _special(recipe: dict[str, Any], target: Target) -> list[bytes]:
    body = {"model": target.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True}
    data = json.dumps(body).encode()

    def head(extra: bytes = b"", length: int = len(data)) -> bytes:
        authorization = b"Authorization: Bearer " + target.key.encode() + b"\r\n"
        first = b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        return first + authorization + extra + b"Content-Length: %d\r\n\r\n" % length

    kind = recipe["kind"]
    if kind == "two_auth":
        return [head(b"Authorization: Bearer other\r\n") + data]
    if kind == "header_value":
        return [head(recipe["name"].encode() + b": " + bytes.fromhex(recipe["value_hex"]) + b"\r\n") + data]
    if kind == "many_headers":
        return [head(b"".join(b"X-%d: a\r\n" % i for i in range(recipe["n"]))) + data]
    if kind == "cl_longer_than_body":
        return [head(length=len(data) + 100) + data]
    if kind == "slow_body":
        return [head(), *(data[i : i + 1] for i in range(20))]
    if kind == "half_close":
        return [head() + data, b""]
    raise ValueError(f"unknown kind of request {kind!r}")


def send(case: dict[str, Any], target: Target, limit_s: float) -> Answer:
    """Send a case. Returns: the answer's first response. An empty piece closes our half; pieces but the first come slowly."""
    with socket.create_connection(("127.0.0.1", target.port), timeout=limit_s) as connection:
        first, *rest = wire_bytes(case, target)
        try:
            connection.sendall(first)
            connection.settimeout(0.1)
            for piece in rest:
                if not piece:
                    connection.shutdown(socket.SHUT_WR)
                    break
                if answer := _receive(connection, 0.1):
                    return parse(answer)
                connection.sendall(piece)
        except OSError:
            pass  # closed already: what it said before is still to be read
        connection.settimeout(limit_s)
        return parse(_receive(connection, limit_s))


def _receive(connection: socket.socket, limit_s: float) -> bytes:
    connection.settimeout(limit_s)
    data = b""
    while not _is_complete(data):
        try:
            piece = connection.recv(65536)
        except (TimeoutError, ConnectionError):
            break
        if not piece:
            break
        data += piece
    return data


def _is_complete(data: bytes) -> bool:
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        return False
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def parse(data: bytes) -> Answer:
    """Returns: status and body of the first response in what was read."""
    found = STATUS_LINE.match(data)
    return Answer(int(found[1]) if found else 0, data.partition(b"\r\n\r\n")[2])


def complaints(case: dict[str, Any], answer: Answer) -> list[str]:
    """Returns: what is wrong with an answer; nothing when it is as the catalogue wants it."""
    expected = case["expect_status"] if isinstance(case["expect_status"], list) else [case["expect_status"]]
    if answer.status == 0 and 413 in expected:
        return []  # closing on somebody who is still sending is all there is
    found = [] if answer.status in expected else [f"status {answer.status}, expected {expected}: {answer.body[:300]!r}"]
    body = OWN_NUMBERS.sub(b"", answer.body)
    found += [f"the body contains {text!r}" for text in case.get("expect_body_not", ()) if text.encode() in body]
    if 400 <= answer.status < 500 and answer.status not in NO_BODY_NEEDED and case["expect_error_type"]:
        found += _error_complaints(case, answer)
    return found


def _error_complaints(case: dict[str, Any], answer: Answer) -> list[str]:
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return [f"no error object: {answer.body[:200]!r}"]
    found = []
    if set(error) != {"message", "type", "param", "code"} or not isinstance(error["message"], str):
        found.append(f"not an error's shape: {error}")
    if error.get("type") != case["expect_error_type"]:
        found.append(f"type {error.get('type')}, expected {case['expect_error_type']}")
    is_about_tools = case["category"] == "tools" or "tool_calls" in json.dumps(case.get("body"))
    if answer.status == 413 or (is_about_tools and error.get("code") == NOT_YET):
        return found
    for name in ("code", "param"):
        wanted = case[f"expect_{'error_code' if name == 'code' else 'param'}"]
        if wanted and error.get(name) != wanted:
            found.append(f"{name} {error.get(name)!r}, expected {wanted!r}")
    return found
