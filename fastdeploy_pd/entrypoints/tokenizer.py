"""Text to tokens and back: tokenizer.json, the chat template, and streams of text that never take a character back."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastdeploy_pd.errors import InvalidRequest, ModelLoadError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished character decodes to
CONTEXT_TOKENS = 5  # of the text before, decoded along so that spaces come out right
#: marks special-token text that a user typed; from the private-use area, and never left in what is encoded
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, path: Path, template: str | None, special: dict[str, str]) -> None:
        """Raises: ModelLoadError: tokenizer.json or the template cannot be read."""
        self._special = special
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            # A second one that knows no special tokens in text: for what users typed.
            self._plain = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelLoadError(f"{path} is not a tokenizer: {error}") from error
        self._plain.encode_special_tokens = True
        added = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        self._typed_special = (
            re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True))) if added else None
        )
        self._template = _compile(template, path.parent) if template is not None else None

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Raises: ModelLoadError: a file is missing or broken; names it and the field."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise ModelLoadError(f"{directory} has no tokenizer.json")
        config: dict[str, Any] = {}
        config_path = directory / "tokenizer_config.json"
        if config_path.exists():
            try:
                config = json.loads(config_path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelLoadError(f"{config_path} cannot be read: {error}") from error
        template = config.get("chat_template")
        if (directory / "chat_template.jinja").exists():
            template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):  # several named ones
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if template is not None and not isinstance(template, str):
            raise ModelLoadError(f"{config_path}: chat_template must be a string or a list of named templates")
        special = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(name)
            special[name] = value.get("content", "") if isinstance(value, dict) else value or ""
        return cls(path, template, special)

    @property
    def vocab_size(self) -> int:
        """Tokens there are, added ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Returns: token ids of a text in which special tokens are special."""
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns: the text of token ids."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Returns: one token's text, special or not, as log-probabilities show it."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def encode_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Render messages through the chat template and encode them; what a user typed never becomes a special token.

        Raises: InvalidRequest: there is no template, or it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        marked = [
            {**m, "content": self._mark(m["content"])} if isinstance(m.get("content"), str) else m for m in messages
        ]
        try:
            text = self._template.render(
                messages=marked, add_generation_prompt=add_generation_prompt, tools=None, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        return self._encode_marked(text)

    def _mark(self, content: str) -> str:
        content = content.replace(_OPEN, "").replace(_CLOSE, "")
        if self._typed_special is None:
            return content
        return self._typed_special.sub(lambda found: f"{_OPEN}{found[0][:1]}{_CLOSE}{found[0][1:]}", content)

    def _encode_marked(self, text: str) -> list[int]:
        if _OPEN not in text:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        # What stands between a mark and the text after it was typed: the mark splits the special token's text in two.
        for piece in re.split(f"({_OPEN}.{_CLOSE})", text, flags=re.DOTALL):
            if piece.startswith(_OPEN):
                ids += self._plain.encode(piece[1:-1], add_special_tokens=False).ids
            else:
                ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids


def _compile(template: str, directory: Path) -> jinja2.Template:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now(tz=datetime.UTC).strftime(pattern)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelLoadError(f"{directory}: chat_template is not a valid template: {error}") from error


class IncrementalDetokenizer:
    """Turns tokens into text as they come; what it has given out never changes."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        """
        Args:
            before: the tokens that come before; the last few are decoded along.
        """
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(before[-CONTEXT_TOKENS:])
        self._prefix, self._read = 0, len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns: the text that is certain now; characters whose bytes are incomplete wait."""
        text = ""
        for token_id in token_ids:
            self._ids.append(token_id)
            known = self._decode(self._prefix, self._read)
            whole = self._decode(self._prefix, len(self._ids))
            if len(whole) > len(known) and not whole.endswith(REPLACEMENT):
                text += whole[len(known) :]
                self._prefix, self._read = self._read, len(self._ids)
        if self._prefix > 64:
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        return text

    def flush(self) -> str:
        """Returns: what was waiting, with replacement characters for bytes that never became a character."""
        known = self._decode(self._prefix, self._read)
        whole = self._decode(self._prefix, len(self._ids))
        self._prefix, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], self._skip_special_tokens)


class StopMatcher:
    """Finds stop strings in a stream of text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = [s for s in stops if s]
        self._include = include_in_output
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns: (text to give out, whether a stop string was found; then nothing may follow)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [(self._held.find(s), s) for s in self._stops if s in self._held]
        if found:
            place, stop = min(found, key=lambda f: f[0])
            return self._held[: place + len(stop)] if self._include else self._held[:place], True
        keep = max(
            (
                n
                for s in self._stops
                for n in range(min(len(s) - 1, len(self._held)), 0, -1)
                if self._held.endswith(s[:n])
            ),
            default=0,
        )
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out, False

    def flush(self) -> str:
        """Returns: what was held back."""
        out, self._held = self._held, ""
        return out
