"""Text to tokens: tokenizer.json, and the chat template, in which nothing that a user typed can act as a special token.

`<|im_end|>` in a message is ordinary text. Before the template is rendered, such text is put between two characters that occur nowhere
in the messages; what stands between them afterwards is encoded by a tokenizer that knows no special tokens. Messages without such
text are encoded as one string, so they give exactly the tokens that transformers' `apply_chat_template` gives.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastdeploy_pd.errors import InvalidRequest, ModelLoadError

PRIVATE_USE = range(0xF0000, 0xFFFFD)  # Unicode's supplementary private-use area A: no text has all of them
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's spelling of one byte


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, path: Path, template: str | None, special: dict[str, str]) -> None:
        """
        Args:
            path: of tokenizer.json.
            template: Jinja source; None: the model cannot chat.
            special: bos_token and the like, as templates name them.
        Raises: ModelLoadError: tokenizer.json or the template cannot be read.
        """
        self._special = special
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelLoadError(f"{path} is not a tokenizer: {error}") from error
        added = self._tokenizer.get_added_tokens_decoder()
        special_texts = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)
        self._typed_special = re.compile("|".join(map(re.escape, special_texts))) if special_texts else None
        self._plain: tokenizers.Tokenizer | None = None
        self._texts = {i: text for text, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        self._bytes = _byte_table(self._tokenizer, self._texts)
        self._visible_bytes = (
            {i: b"" if i in added and added[i].special else b for i, b in self._bytes.items()} if self._bytes else None
        )
        self._longest_token_bytes = max((len(t.encode("utf-8", "replace")) for t in self._texts.values()), default=1)
        self._template = _compile(template, path.parent) if template is not None else None
        self._knows_developer = template is not None and "developer" in template

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Raises: ModelLoadError: a file is missing or broken; names it and the field."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise ModelLoadError(f"{directory} has no tokenizer.json (--skip-tokenizer-init serves token ids alone)")
        config = _read_config(directory / "tokenizer_config.json")
        special = {}
        for name in SPECIAL_NAMES:
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if value is not None and not isinstance(value, str):
                raise ModelLoadError(f"{directory / 'tokenizer_config.json'}: {name} is {value!r}; it must be a string")
            if value is not None:
                special[name] = value
        return cls(path, _read_template(directory, config), special)

    @property
    def vocab_size(self) -> int:
        """Tokens there are, added ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Returns: token ids of a text in which special tokens are special, with those that the tokenizer adds (BOS)."""
        return _encode(self._tokenizer, text, True)

    def fewest_tokens(self, text: str) -> int:
        """Returns: a lower bound on the tokens of a text, at no cost: no token of byte-level BPE is longer than the longest."""
        return len(text) // self._longest_token_bytes if self._bytes is not None else 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns: the text of token ids."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns: one token's bytes, special or not; they need not be whole characters."""
        if self._bytes is not None:
            return self._bytes.get(token_id, b"")
        found = BYTE_TOKEN.fullmatch(self._texts.get(token_id, ""))
        return bytes([int(found[1], 16)]) if found else self.decode([token_id], False).encode()

    def token_text(self, token_id: int) -> str:
        r"""Returns: one token as log-probabilities show it: its text, or `bytes:\xe2\x82` if it is a part of a character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)

    def byte_table(self, skip_special_tokens: bool) -> dict[int, bytes] | None:
        """Returns: each token's bytes, for byte-level BPE; None for other kinds."""
        return self._visible_bytes if skip_special_tokens else self._bytes

    def encode_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> list[int]:
        """Render messages through the chat template and encode them; what a user typed never becomes a special token.

        Args:
            messages: role, content (text) and perhaps name.
            continue_final_message: the text ends where the last message's content ends, to be gone on with.
        Raises: InvalidRequest: there is no template, or it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        opening, closing, end = _unused_characters(messages, 3)
        marked = [self._marked(m, opening, closing) for m in messages]
        if continue_final_message:
            marked[-1]["content"] += end
        text = self._render(marked, add_generation_prompt)
        if continue_final_message:
            text, found, _ = text.rpartition(end)
            if not found:
                raise InvalidRequest("the chat template drops the final message", param="continue_final_message")
        return self._encode_marked(text, opening, closing)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        if self._template is None:
            raise InvalidRequest("this model has no chat template", param="messages")
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except TEMPLATE_FAULTS as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error

    def _marked(self, message: dict[str, Any], opening: str, closing: str) -> dict[str, Any]:
        """A message with its special-token text between marks; `developer` becomes `system` where a template predates it."""
        changed = dict(message)
        if changed["role"] == "developer" and not self._knows_developer:
            changed["role"] = "system"
        if self._typed_special is not None:
            for name in ("content", "name"):
                if name in changed:
                    changed[name] = self._typed_special.sub(lambda m: f"{opening}{m[0]}{closing}", changed[name])
        return changed

    def _encode_marked(self, text: str, opening: str, closing: str) -> list[int]:
        if opening not in text and closing not in text:
            return _encode(self._tokenizer, text, False)
        if self._plain is None:
            self._plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            self._plain.encode_special_tokens = True
        ids: list[int] = []
        for piece in re.split(f"({opening}[^{opening}{closing}]*{closing})", text):
            if piece.startswith(opening) and piece.endswith(closing):
                ids += _encode(self._plain, piece[1:-1], False)
            else:  # a template that cuts messages may leave a mark alone: it separates, and is dropped
                for part in re.split(f"[{opening}{closing}]", piece):
                    ids += _encode(self._tokenizer, part, False)
        return ids


#: a server that is one, in refusals
WITHOUT = "has no tokenizer (--skip-tokenizer-init, or --load-format dummy of a directory without tokenizer.json)"


class NoTokenizer:
    """In a `Tokenizer`'s place with --skip-tokenizer-init: token ids come in and go out, and every text is empty."""

    def encode(self, text: str) -> list[int]:
        """Raises: InvalidRequest: always."""
        raise InvalidRequest(
            f"this server {WITHOUT}: give 'prompt' as token ids",
            param="prompt",
        )

    def encode_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> list[int]:
        """Raises: InvalidRequest: always."""
        raise InvalidRequest(
            f"this server {WITHOUT} and cannot chat: post token ids to /v1/completions",
            param="messages",
        )

    def fewest_tokens(self, text: str) -> int:
        """Returns: 0."""
        return 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns: no text."""
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        """Returns: no bytes."""
        return b""

    def token_text(self, token_id: int) -> str:
        """Returns: the id, as vLLM shows it in log-probabilities."""
        return f"token_id:{token_id}"

    def byte_table(self, skip_special_tokens: bool) -> dict[int, bytes]:
        """Returns: no token's bytes."""
        return {}


AnyTokenizer = Tokenizer | NoTokenizer


def _encode(tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    # Batches, even of one, are encoded without the GIL and without character offsets.
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids if text else []


def _unused_characters(messages: list[dict[str, Any]], count: int) -> list[str]:
    texts = [m[name] for m in messages for name in ("content", "name") if name in m]
    found: list[str] = []
    for code in PRIVATE_USE:
        if not any(chr(code) in text for text in texts):
            found.append(chr(code))
            if len(found) == count:
                return found
    raise InvalidRequest("the messages use every private-use character there is", param="messages")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} must be a JSON object")
    return config


def _read_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The template's source: a file of its own wins over tokenizer_config.json, as in transformers."""
    if (directory / "chat_template.jinja").exists():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    where = f"{directory / 'tokenizer_config.json'}: chat_template"
    if isinstance(template, list):
        if not all(isinstance(t, dict) and isinstance(t.get("template"), str) for t in template):
            raise ModelLoadError(f"{where} must hold objects with a name and a template")
        named = {t.get("name"): t["template"] for t in template}
        if "default" not in named:
            raise ModelLoadError(f"{where} has the templates {sorted(map(str, named))}, none of them 'default'")
        return str(named["default"])
    if template is not None and not isinstance(template, str):
        raise ModelLoadError(
            f"{where} is a {type(template).__name__}; it must be a string or a list of named templates"
        )
    return template


def _byte_table(tokenizer: tokenizers.Tokenizer, texts: dict[int, str]) -> dict[int, bytes] | None:
    """Each token's bytes if the decoder is byte-level and nothing else. Source: GPT-2's byte-to-unicode table."""
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    if [s.get("type") for s in steps] != ["ByteLevel"]:
        return None
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}

    def to_bytes(text: str) -> bytes:
        # A token with a character outside the table (an added token, with a space) is taken as it is.
        return bytes(byte_of[c] for c in text) if all(c in byte_of for c in text) else text.encode()

    return {i: to_bytes(text) for i, text in texts.items()}


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; for us it is its contents."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Returns: the block's contents."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str, directory: Path) -> jinja2.Template:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlocks]
    )
    environment.filters["tojson"] = _tojson()
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelLoadError(f"{directory}: chat_template is not a valid template: {error}") from error


def _tojson() -> Callable[..., str]:
    # Jinja's own would escape HTML, which no model was trained on.
    return lambda value, **options: json.dumps(value, **({"ensure_ascii": False} | options))
