"""Token ids to text as they come: nothing that has been given out is ever taken back, and no stop string slips through.

A token of byte-level BPE stands for bytes, and a character may be spread over several tokens. Where the tokenizer is of that kind,
its bytes go through an incremental UTF-8 decoder, which keeps an unfinished character to itself. Other kinds (SentencePiece,
WordPiece) decode a token differently at the beginning of a text, so a few tokens before it are decoded along.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished character decodes to
CONTEXT_TOKENS = 5  # of the text before, decoded along so that spaces come out right
MAX_KEPT_TOKENS = 64  # decoded tokens that are kept before they are dropped together


class TokenDecoder(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns: the text of token ids."""
        ...

    def byte_table(self, skip_special_tokens: bool) -> dict[int, bytes] | None:
        """Returns: each token's bytes, if its bytes do not depend on its neighbours."""
        ...


class Detokenizer(Protocol):
    """Turns tokens into text as they come."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns: the text that is certain now; characters whose bytes are incomplete wait."""
        ...

    def flush(self) -> str:
        """Returns: what was waiting, with replacement characters for bytes that never became a character."""
        ...


class ByteDetokenizer:
    """For byte-level BPE."""

    def __init__(self, table: dict[int, bytes], before: Sequence[int]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.push(before[-CONTEXT_TOKENS:])  # a prompt of token ids may end inside a character

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns: the text that is certain now."""
        table = self._table
        if len(token_ids) == 1:
            return self._decoder.decode(table.get(token_ids[0], b""))
        return self._decoder.decode(b"".join([table.get(t, b"") for t in token_ids]))

    def flush(self) -> str:
        """Returns: what was waiting."""
        return self._decoder.decode(b"", True)


class ContextDetokenizer:
    """For tokenizers whose tokens look different in different company."""

    def __init__(self, decoder: TokenDecoder, before: Sequence[int], skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(before[-CONTEXT_TOKENS:])
        self._prefix, self._read = 0, len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns: the text that is certain now."""
        text = ""
        for token_id in token_ids:
            self._ids.append(token_id)
            known = self._decode(self._prefix, self._read)
            whole = self._decode(self._prefix, len(self._ids))
            if len(whole) > len(known) and not whole.endswith(REPLACEMENT):
                text += whole[len(known) :]
                self._prefix, self._read = self._read, len(self._ids)
        if self._prefix > MAX_KEPT_TOKENS:
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        return text

    def flush(self) -> str:
        """Returns: what was waiting."""
        known = self._decode(self._prefix, self._read)
        whole = self._decode(self._prefix, len(self._ids))
        self._prefix, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._decoder.decode(self._ids[start:stop], self._skip_special_tokens)


def make_detokenizer(
    decoder: TokenDecoder, before: Sequence[int] = (), skip_special_tokens: bool = True
) -> Detokenizer:
    """Returns: the fastest detokenizer that is right for a tokenizer.

    Args:
        before: the tokens that come before the first pushed one; their text is not given out.
    """
    table = decoder.byte_table(skip_special_tokens)
    if table is not None:
        return ByteDetokenizer(table, before)
    return ContextDetokenizer(decoder, before, skip_special_tokens)


class StopMatcher:
    """Finds the stop string that is complete first, and holds back what may be the beginning of one.

    The answer depends on the text alone, not on the pieces it comes in. Each stop string is a Knuth-Morris-Pratt automaton, so
    that a character costs the same however long and repetitive the stop strings are (Knuth, Morris, Pratt, SIAM J. Comput. 1977).
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        """
        Args:
            stops: none of them empty.
            include_in_output: give out the stop string itself too.
        """
        self.is_empty = not stops
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._include = include_in_output
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns: (text to give out, whether a stop string was found; then nothing may follow)."""
        if self.is_empty:
            return text, False
        start = len(self._held)
        self._held += text
        for place, character in enumerate(text, start):
            length = self._advance(character)
            if length:
                end = place + 1
                return self._held[: end if self._include else end - length], True
        cut = len(self._held) - max(self._matched)
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """Returns: what was held back."""
        out, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return out

    def _advance(self, character: str) -> int:
        """Feed one character. Returns: the length of the longest stop string that it completes, or 0."""
        found = 0
        for number, (stop, failures) in enumerate(self._stops):
            matched = self._matched[number]
            while matched and stop[matched] != character:
                matched = failures[matched - 1]
            if stop[matched] == character:
                matched += 1
            self._matched[number] = matched
            if matched == len(stop):
                found = max(found, matched)
        return found


def _failures(stop: str) -> list[int]:
    """Returns: for each prefix of a string, the length of its longest proper prefix that is also its suffix."""
    failures = [0] * len(stop)
    matched = 0
    for place in range(1, len(stop)):
        while matched and stop[place] != stop[matched]:
            matched = failures[matched - 1]
        matched += stop[place] == stop[matched]
        failures[place] = matched
    return failures
