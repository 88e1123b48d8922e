"""Text from tokens: characters, stop strings, segments and tool calls, across all borders."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlx_engine.chat.formats import choose_format
from mlx_engine.chat.parser import AnswerParser
from mlx_engine.core.stream import Piece
from mlx_engine.generation.text import TextAssembler
from tests.tiny import make_tokenizer

FORMAT = choose_format(None, tool_format="hermes", reasoning_format="think")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def wrap(tokenizer: PreTrainedTokenizerFast) -> TokenizerWrapper:
    return TokenizerWrapper(tokenizer, BPEStreamingDetokenizer)


def parser(prefix: str | None) -> AnswerParser | None:
    """A parser of what comes behind this end of a prompt."""
    return None if prefix is None else AnswerParser(FORMAT, TOOLS, prefix)


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return wrap(make_tokenizer())


def assemble(
    tokenizer: TokenizerWrapper,
    text: str | Sequence[int],
    stop: Sequence[str] = (),
    prefix: str | None = None,
) -> tuple[TextAssembler, list[Piece], int]:
    """Feed text byte by byte; give the assembler, all pieces, and the tokens that it took."""
    assembler = TextAssembler(tokenizer, stop=stop, parser=parser(prefix))
    tokens = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
    pieces: list[Piece] = []
    used = 0
    for token in tokens:
        used += 1
        pieces += assembler.add(token)
        if assembler.stopped:
            break
    return assembler, pieces + assembler.finish(), used


def joined(pieces: list[Piece], segment: str) -> str:
    return "".join(text for kind, text, _ in pieces if kind == segment)


@pytest.mark.parametrize(
    "text",
    ["plain", "naïve café", "日本語のテキスト", "🙂👍🏽👨‍👩‍👧", "a\u00a0b \n\n c", "e\u0301"],
)
def test_characters_split_over_tokens_come_out_whole(
    tokenizer: TokenizerWrapper, text: str
) -> None:
    assembler, pieces, _ = assemble(tokenizer, text)
    assert assembler.content == text
    assert joined(pieces, "content") == text
    assert not any("\ufffd" in piece for _, piece, _ in pieces)


def test_bytes_that_are_no_text_are_replaced_not_lost(tokenizer: TokenizerWrapper) -> None:
    stray = tokenizer.encode("é", add_special_tokens=False)[:1]
    after = tokenizer.encode("xyz", add_special_tokens=False)
    assembler, _, _ = assemble(tokenizer, [*stray, *after])
    assert assembler.content == "\ufffdxyz"


def test_an_answer_that_ends_inside_a_character(tokenizer: TokenizerWrapper) -> None:
    cut = tokenizer.encode("ok 🙂", add_special_tokens=False)[:-1]
    assembler, pieces, _ = assemble(tokenizer, cut)
    assert assembler.content.startswith("ok ")
    assert assembler.content == joined(pieces, "content")


def test_half_a_character_before_a_token_that_is_not_ascii() -> None:
    """mlx_lm's byte-level detokenizer raises KeyError at the end here."""
    plain = make_tokenizer()
    plain.add_special_tokens({"additional_special_tokens": ["<｜end▁of▁turn｜>"]})
    tokenizer = wrap(plain)
    stray = tokenizer.encode("é", add_special_tokens=False)[:1]
    special = tokenizer.encode("<｜end▁of▁turn｜>", add_special_tokens=False)
    partial = tokenizer.encode("é", add_special_tokens=False)[:1]
    assembler, _, _ = assemble(tokenizer, [*stray, *special, *partial])
    assert "<｜end▁of▁turn｜>" in assembler.content


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one two three", ["two"], "one ", True),
        ("one two three", ["four"], "one two three", False),
        ("one two", ["o"], "", True),
        ("aaab", ["aab"], "a", True),
        ("abababac", ["abac"], "abab", True),
        ("x\n\ny", ["\n\n"], "x", True),
        ("ends with part of the st", ["stop"], "ends with part of the st", False),
        ("first of several", ["several", "of"], "first ", True),
        ("the longer one", ["longer one", "longer"], "the ", True),
        ("größe 🙂 ende", ["🙂"], "größe ", True),
        ("日本語", ["本"], "日", True),
        ("A</s>B", ["</s>"], "A", True),
        ("nested stop", ["stop", "nested stop"], "nested ", True),
    ],
)
def test_stop_strings_end_the_text_and_are_no_part_of_it(
    tokenizer: TokenizerWrapper, text: str, stop: list[str], expected: str, stopped: bool
) -> None:
    if text == "nested stop":
        expected = ""  # both end at the same character: the longer one has begun earlier
    assembler, pieces, used = assemble(tokenizer, text, stop)
    assert assembler.content == expected
    assert joined(pieces, "content") == expected
    assert assembler.stopped is stopped
    if stopped:
        consumed = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:used])
        assert consumed.endswith(tuple(stop)), "it stopped later than at the string's last byte"


def test_no_part_of_a_stop_string_is_ever_shown(tokenizer: TokenizerWrapper) -> None:
    assembler = TextAssembler(tokenizer, stop=["###END"])
    shown = ""
    for token in tokenizer.encode("text ##not ###END", add_special_tokens=False):
        shown += "".join(text for _, text, _ in assembler.add(token))
        assert "text ##not ".startswith(shown)
    assert shown == "text ##not "


def given_out(tokenizer: TokenizerWrapper, text: str, **options: Any) -> list[str]:
    """All that has been given out, after each token; a token is a byte."""
    assembler = TextAssembler(tokenizer, **options)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    so_far, shown = "", []
    for token in tokens:
        so_far += "".join(piece for _, piece, _ in assembler.add(token))
        shown.append(so_far)
    assert so_far + "".join(piece for _, piece, _ in assembler.finish()) == text
    return shown


def may_begin(text: str, strings: Sequence[str]) -> int:
    """Characters at the end of ``text`` that one of ``strings`` may begin with."""
    return max(n for s in strings for n in range(len(s)) if text.endswith(s[:n]))


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("-" * 500, ["--END"]),
        ("--EN--E" * 50, ["--END"]),
        ("ab" * 200, ["abab" * 3 + "c", "bb"]),
        ("\n" * 300, ["\n\nHuman:", "\n\n\nx"]),
    ],
)
def test_what_cannot_become_a_stop_string_is_never_held(
    tokenizer: TokenizerWrapper, text: str, stop: list[str]
) -> None:
    for n, shown in enumerate(given_out(tokenizer, text, stop=stop), 1):
        assert shown == text[: n - may_begin(text[:n], stop)]


CALL = '{"name": "f", "arguments": {"x": 1}}'
THINKING = f"<think>let me\nsee</think>The answer<tool_call>{CALL}</tool_call>done"


def test_segments(tokenizer: TokenizerWrapper) -> None:
    assembler, pieces, _ = assemble(tokenizer, THINKING, prefix="")
    assert assembler.reasoning == "let me\nsee" == joined(pieces, "reasoning")
    assert assembler.content == "The answerdone" == joined(pieces, "content")
    assert CALL in joined(pieces, "tool_call")
    (call,) = assembler.tool_calls
    assert (call.name, call.arguments, call.error) == ("f", {"x": 1}, None)
    assert pieces[0].segment == "reasoning"


def test_markers_are_plain_text_in_a_completion(tokenizer: TokenizerWrapper) -> None:
    assembler, pieces, _ = assemble(tokenizer, THINKING)
    assert assembler.content == THINKING
    assert assembler.tool_calls == ()
    assert {piece.segment for piece in pieces} == {"content"}


def test_a_stop_string_inside_reasoning_ends_the_answer(tokenizer: TokenizerWrapper) -> None:
    assembler, _, _ = assemble(tokenizer, "<think>a b STOP c", ["STOP"], "")
    assert (assembler.reasoning, assembler.content, assembler.stopped) == ("a b ", "", True)


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer: TokenizerWrapper) -> None:
    """The matrix of a model may be padded to more rows than there are tokens."""
    tokens = tokenizer.encode("ab", add_special_tokens=False)
    assembler, _, _ = assemble(tokenizer, [tokens[0], len(tokenizer) + 3, tokens[1]])
    assert assembler.content == "ab"


def byte_fallback_tokenizer() -> TokenizerWrapper:
    """A tokenizer that mlx_lm can only ``decode``: words with a mark, and bytes for the rest."""
    words = ["▁a", "▁b", "a", "b", "c", "▁", "\n", "▁▁"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + i for i, word in enumerate(words)}
    plain = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="b"))


def test_a_tokenizer_that_can_only_decode_gives_the_text_of_the_whole() -> None:
    tokenizer = byte_fallback_tokenizer()
    assert type(tokenizer.detokenizer) is NaiveStreamingDetokenizer
    dice = random.Random(3)
    characters = ["é", "🎉", "Ω", "日"]
    for _ in range(300):
        tokens: list[int] = []
        for _ in range(dice.randrange(1, 20)):
            if dice.random() < 0.4:
                tokens += dice.choice(characters).encode()
            else:
                tokens.append(256 + dice.randrange(8))
        assembler, pieces, _ = assemble(tokenizer, tokens)
        assert assembler.content == joined(pieces, "content") == tokenizer.decode(tokens)
        assert not any("\ufffd" in text for _, text, _ in pieces)


def cut_at_first_stop(text: str, stop: Sequence[str]) -> str:
    """The slow and obvious way: the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def test_random_texts_are_cut_and_joined_as_the_obvious_way_does() -> None:
    dice = random.Random(5)
    tokenizer = wrap(make_tokenizer())
    parts = ["a", "b", "ab", " ", "\n", "é", "🙂", "<think>", "</think>", "<", "th", "ST", "OP"]
    for _ in range(300):
        text = "x" + "".join(dice.choice(parts) for _ in range(dice.randrange(30)))
        stop = dice.choice([(), ("STOP",), ("ab", "a b", "bab"), ("\n\n", "\n"), ("🙂é", "é")])
        assembler, pieces, _ = assemble(tokenizer, text, stop)
        expected = cut_at_first_stop(text, stop)
        assert assembler.content == joined(pieces, "content") == expected
        assert assembler.stopped is (expected != text)
        chat, pieces, _ = assemble(tokenizer, text, stop, dice.choice(["", "<think>"]))
        assert joined(pieces, "content") == chat.content
        assert joined(pieces, "reasoning") == chat.reasoning
        assert chat.stopped is assembler.stopped
