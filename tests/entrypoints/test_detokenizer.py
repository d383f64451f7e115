"""Streams of text equal the text of the whole, whatever the pieces."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_pd.entrypoints.detokenizer import ByteDetokenizer, ContextDetokenizer, StopMatcher, make_detokenizer
from fastdeploy_pd.entrypoints.tokenizer import Tokenizer
from tests.entrypoints.stub_engine import demo_tokenizer

TOKENIZER = demo_tokenizer()


class _Decoder:
    """A tokenizers.Tokenizer of a kind that is not byte-level."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def byte_table(self, skip_special_tokens: bool) -> None:
        return None


def sentencepiece_like() -> _Decoder:
    """Metaspace with byte fallback, as Llama 2's."""
    vocab = {"<unk>": 0, "▁": 1, "▁the": 2, "▁fox": 3, "es": 4, "s": 5, **{f"<0x{b:02X}>": 6 + b for b in range(256)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _Decoder(tokenizer)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_tokens_give_the_tokenizers_text(ids: list[int], skip: bool) -> None:
    stream = make_detokenizer(TOKENIZER, skip_special_tokens=skip)
    assert isinstance(stream, ByteDetokenizer)
    assert "".join(stream.push((t,)) for t in ids) + stream.flush() == TOKENIZER.decode(ids, skip)


@given(st.text(max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_pieces_are_whole_characters(text: str, random: object) -> None:
    ids = TOKENIZER.encode(text)
    stream, pieces, place = make_detokenizer(TOKENIZER, skip_special_tokens=False), [], 0
    while place < len(ids):
        step = random.randint(1, 4)  # type: ignore[attr-defined]
        pieces.append(stream.push(ids[place : place + step]))
        place += step
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_a_character_over_several_tokens_waits_for_its_last_byte() -> None:
    ids = TOKENIZER.encode("🦊")
    assert len(ids) > 1
    stream = make_detokenizer(TOKENIZER)
    assert [stream.push((t,)) for t in ids] == [""] * (len(ids) - 1) + ["🦊"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    stream = make_detokenizer(TOKENIZER)
    assert stream.push(TOKENIZER.encode("a🦊")[:-1]) == "a"
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    ids = TOKENIZER.encode("a🦊")
    assert make_detokenizer(TOKENIZER, ids[:-1]).push(ids[-1:]) == "🦊"


@pytest.mark.parametrize("before", [[], [2]])
def test_spaces_depend_on_what_stands_before(before: list[int]) -> None:
    stream = make_detokenizer(sentencepiece_like(), before)
    assert isinstance(stream, ContextDetokenizer)
    euro = [6 + b for b in "€".encode()]
    pieces = [stream.push((t,)) for t in [2, 3, 4, *euro, 2, *([3] * 200)]]
    assert "".join(pieces) + stream.flush() == (" " if before else "") + "the foxes€ the" + " fox" * 200
    assert pieces[3:6] == ["", "", "€"]


def first_stop(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """The slow and obvious answer: the first place at which some stop string is complete, the longest one there."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return (text[:end] if include else text[: end - max(map(len, found))]), True
    return text, False


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.booleans(),
)
@settings(max_examples=1000, deadline=None)
def test_stops_are_found_wherever_pieces_end(stops: list[str], pieces: list[str], include: bool) -> None:
    matcher, out, is_found = StopMatcher(stops, include), "", False
    for piece in pieces:
        text, is_found = matcher.push(piece)
        out += text
        if is_found:
            break
    out += "" if is_found else matcher.flush()
    assert (out, is_found) == first_stop("".join(pieces), stops, include)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("a < b </e") == ("a < b ", False)
    assert matcher.push("x") == ("</ex", False)


def test_token_text_of_part_of_a_character() -> None:
    first = Tokenizer.encode(TOKENIZER, "🦊")[0]
    assert TOKENIZER.token_text(first).startswith("bytes:\\x")
    assert TOKENIZER.token_bytes(first) == "🦊".encode()[: len(TOKENIZER.token_bytes(first))]
