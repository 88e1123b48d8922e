"""The text of streamed tokens is what the tokenizer decodes, for tokenizers of every kind."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import decoders

from mlx_engine import SimpleEngine
from mlx_engine.generation.text import TextAssembler
from mlx_engine.models import detokenizer as detokenizers
from mlx_engine.models.detokenizer import make_detokenizer, mend_decoder
from mlx_engine.models.window_detokenizer import Whole
from tests.conftest import make_tiny
from tests.generation.tokenizers import KINDS, SENTENCEPIECE, Slow, byte_level, fast, slow

some = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@functools.cache
def of(kind: str) -> TokenizerWrapper:
    return KINDS[kind]()


def decoded(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """The whole at once; there is no text for ids that are none."""
    known = [token for token in tokens if token < len(tokenizer)]
    return str(tokenizer.decode(known)) if known else ""


def runs_of(tokenizer: TokenizerWrapper) -> st.SearchStrategy[list[int]]:
    """Tokens: of texts, bytes, added ones, ids beyond them, and the same one many times."""
    size = len(tokenizer)
    ids = st.one_of(
        st.integers(0, size + 4),
        st.integers(max(0, size - 4), size + 4),
        st.integers(0, min(size, 256) - 1),
        st.sampled_from([byte for byte in "é日🙂".encode() if byte < size] or [0]),
    )
    repeated = st.tuples(ids, st.sampled_from([1, 1, 1, 1, 2, 9])).map(lambda t: [t[0]] * t[1])
    texts = [[token] for token in tokenizer.convert_tokens_to_ids(["Ġ", "▁", "'", "."]) if token]
    for text in (" a", "日 🙂é", "it's , a . '", "\n b"):
        with contextlib.suppress(Exception):  # some have no token for what they do not know
            texts.append(tokenizer.encode(text, add_special_tokens=False))
    runs = st.lists(st.one_of(repeated, st.sampled_from(texts or [[0]])), max_size=12)
    return runs.map(lambda runs: list(itertools.chain(*runs)))


def shown(tokenizer: TokenizerWrapper, tokens: Sequence[int], **options: Any) -> list[str]:
    """The text so far after each token, and at the end."""
    assembler = TextAssembler(tokenizer, **options)
    texts, text = [], ""
    for token in tokens:
        text += "".join(piece for _, piece, _ in assembler.add(token))
        texts.append(text)
        if assembler.stopped:
            break
    text += "".join(piece for _, piece, _ in assembler.finish())
    assert assembler.content == text
    return [*texts, text]


@pytest.mark.parametrize("kind", KINDS)
@some
@given(data=st.data())
def test_streamed_text_is_what_the_tokenizer_decodes_wherever_it_ends(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = of(kind)
    tokens = data.draw(runs_of(tokenizer))
    for end in range(len(tokens) + 1):
        *before, text = shown(tokenizer, tokens[:end])
        assert text == decoded(tokenizer, tokens[:end])
        assert all(text.startswith(part) for part in before)


@pytest.mark.parametrize("kind", KINDS)
@some
@given(data=st.data())
def test_a_stop_string_cuts_what_the_tokenizer_decodes(kind: str, data: st.DataObject) -> None:
    tokenizer = of(kind)
    tokens = data.draw(runs_of(tokenizer))
    whole = decoded(tokenizer, tokens)
    parts = [whole[n : n + 3] for n in range(len(whole))]
    stop = data.draw(
        st.lists(st.one_of(st.sampled_from(["zz", *parts]), st.text("ab .\n", min_size=1))), "stop"
    )
    stop = [string for string in stop if "\ufffd" not in string]
    *before, text = shown(tokenizer, tokens, stop=stop)
    used = decoded(tokenizer, tokens[: len(before)])
    assert text == cut(used, stop)
    if text == used:
        assert len(before) == len(tokens)
    assert all(text.startswith(part) for part in before)


def cut(text: str, stop: Sequence[str]) -> str:
    """The slow and obvious way: the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        if ending := [string for string in stop if text[:end].endswith(string)]:
            return text[: end - max(map(len, ending))]
    return text


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback, first space kept"])
@pytest.mark.parametrize("text", [" Paris", "  two", "\n and", " 日本", " "])
def test_the_first_space_of_an_answer_is_kept(kind: str, text: str) -> None:
    tokenizer = of(kind)
    tokens = (
        tokenizer.encode(text, add_special_tokens=False)
        if kind == "byte-level"
        else list(text.encode())
    )
    assert shown(tokenizer, tokens)[-1] == text


@pytest.mark.parametrize("kind", ["byte fallback", "byte fallback, then Metaspace"])
def test_a_byte_that_is_no_text_changes_the_bytes_before_it_as_in_the_whole(kind: str) -> None:
    tokenizer = of(kind)
    run = [*"é🙂".encode(), 0xFF]
    assert shown(tokenizer, run)[-1] == "\ufffd" * 7 == tokenizer.decode(run)
    assert shown(tokenizer, run[:6])[-1] == "é🙂"


def test_a_stop_string_of_bytes_ends_the_answer_at_its_last_byte() -> None:
    """They are held, as a byte behind them could still change them; none comes."""
    tokenizer = of("byte fallback")
    line = [tokenizer.convert_tokens_to_ids("a"), 0x0A]
    for tokens in (line * 3, [0x0A] * 5, [0x20, 0x0A, 0x0A]):
        *before, text = shown(tokenizer, tokens, stop=["\n"])
        assert len(before) == tokens.index(0x0A) + 1
        assert text == tokenizer.decode(tokens[: len(before)]).removesuffix("\n")


@pytest.mark.parametrize(
    ("kind", "token"),
    [("byte-level", "Â"), ("byte-level", "ð"), ("byte fallback", 0xE6), ("byte fallback", 0x80)],
)
def test_halves_of_characters_are_given_out_while_they_last(kind: str, token: str | int) -> None:
    tokenizer = of(kind)
    number = token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token)
    *texts, whole = shown(tokenizer, [number] * 300)
    assert all(n - len(text) <= 3 for n, text in enumerate(texts, 1))
    assert whole == tokenizer.decode([number] * 300)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("slow")][:4])
@pytest.mark.parametrize("token", [0, 0x80 + 3, 0xE6 + 3, "\ufffd", ""])
def test_a_token_costs_as_much_as_the_one_before_whatever_it_is(
    kind: str, token: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = KINDS[kind]()
    number = token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token)
    number = number if number is not None and number < len(tokenizer) else 1
    make_detokenizer(tokenizer)
    lengths: list[int] = []
    plain = type(tokenizer._tokenizer)._decode

    def counted(self: Any, token_ids: list[int], **options: Any) -> str:
        lengths.append(len(token_ids))
        return plain(self, token_ids, **options)

    monkeypatch.setattr(type(tokenizer._tokenizer), "_decode", counted)
    text = shown(tokenizer, [number] * 500)[-1]
    assert max(lengths) <= 64
    assert text == tokenizer.decode([number] * 500)


def test_a_tokenizer_whose_text_changes_from_its_beginning_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = KINDS["slow, a token changes all"]()
    assert isinstance(make_detokenizer(tokenizer)._source, Whole)
    assert "changes with later tokens" in caplog.text
    assert "Counting" in caplog.text


def test_what_a_tokenizer_is_tried_for_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = slow(Slow)
    TextAssembler(tokenizer)
    monkeypatch.setattr(Slow, "_tokenize", None)
    monkeypatch.setattr(Slow, "_decode", None)
    TextAssembler(tokenizer)
    assert tokenizer in detokenizers._recipes


class Upper(Slow):
    """One that decodes in its own way, beyond what its parts say."""

    def _decode(self, *args: Any, **options: Any) -> str:
        return super()._decode(*args, **options).upper()


def test_a_tokenizer_with_a_decode_of_its_own_is_decoded_by_it() -> None:
    tokenizer = slow(Upper)
    tokens = [0, 1, 0, 8, 1]
    assert shown(tokenizer, tokens)[-1] == tokenizer.decode(tokens) == "A B A \n B"


def test_a_decoder_in_python_is_used_as_it_is() -> None:
    class Dashes:
        def decode_chain(self, tokens: list[str]) -> list[str]:
            return [token + "-" for token in tokens]

    tokenizer = of("no decoder")
    tokenizer = TokenizerWrapper(tokenizer._tokenizer)
    plain = tokenizer.backend_tokenizer.decoder
    tokenizer.backend_tokenizer.decoder = decoders.Decoder.custom(Dashes())
    try:
        assert shown(tokenizer, [0, 1, 0])[-1] == "a-b-a-"
    finally:
        tokenizer.backend_tokenizer.decoder = plain


# ── decoders that are wrong ─────────────────────────────────────────────────────────────────


def odd() -> TokenizerWrapper:
    """Bytes in the vocabulary, and a decoder of SentencePiece."""
    return fast(byte_level(decoders.Sequence(SENTENCEPIECE)))


def test_a_decoder_that_shows_bytes_is_replaced() -> None:
    tokenizer = odd()
    text = " a naïve test:\n\n日本語 🙂"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert "Ġ" in tokenizer.decode(tokens)
    make_detokenizer(tokenizer)
    assert mend_decoder(tokenizer)
    assert tokenizer.decode(tokens) == text == shown(tokenizer, tokens)[-1]
    assert not mend_decoder(tokenizer)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "decoder of" not in kind])
def test_a_decoder_that_is_right_is_left_alone(kind: str) -> None:
    tokenizer = KINDS[kind]()
    assert not mend_decoder(tokenizer)


@pytest.mark.anyio
async def test_no_bytes_are_seen_in_answers_of_a_model_with_such_a_decoder(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["decoder"] = json.loads(decoders.Sequence(SENTENCEPIECE).__getstate__())
    file.write_text(json.dumps(content), "utf-8")
    async with SimpleEngine(folder) as engine:
        vocabulary = engine._holder.model().tokenizer.get_vocab()
        space, line, a = (vocabulary[char] for char in ("Ġ", "Ċ", "a"))
        bias = {space: 1000.0, line: 1000.0, a: 1000.0}
        result = await engine.generate(
            "x", max_tokens=200, temperature=1.0, seed=1, logit_bias=bias
        )
    assert set(result.text) == {" ", "\n", "a"}
    assert len(result.text) == 200


@pytest.mark.anyio
async def test_an_answer_begins_with_the_space_that_the_model_gave_it(tiny_path: Path) -> None:
    async with SimpleEngine(tiny_path) as engine:
        space = engine._holder.model().tokenizer.get_vocab()["Ġ"]
        options: dict[str, Any] = {"max_tokens": 3, "logit_bias": {space: 1000.0}}
        assert (await engine.generate("x", **options)).text == "   "
        async with engine.stream_generate("x", **options) as stream:
            assert "".join([chunk.text async for chunk in stream]) == "   "


@pytest.mark.anyio
async def test_text_in_a_stream_is_the_decoded_tokens(tiny_path: Path) -> None:
    async with SimpleEngine(tiny_path) as engine:
        tokenizer = engine._holder.model().tokenizer
        for seed in range(4):
            options: dict[str, Any] = {"max_tokens": 120, "temperature": 2.0, "seed": seed}
            result = await engine.generate("x", ignore_eos=True, **options)
            assert result.text == tokenizer.decode(result.tokens)
