"""The text of single tokens."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

from mlx_lm.utils import load_tokenizer

from mlx_engine.models.fast_decoder import bytes_of_token
from mlx_engine.models.token_text import TokenTexts


def test_the_parts_of_a_character_are_replacement_characters(tiny_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_path)
    text = TokenTexts(tokenizer)
    parts = tokenizer.encode("é", add_special_tokens=False)
    assert len(parts) == 2, "a byte is a token"
    assert [text(part) for part in parts] == [("\ufffd", b"\xc3"), ("\ufffd", b"\xa9")]
    (space,) = tokenizer.encode(" ", add_special_tokens=False)
    assert text(space) == (" ", b" ")


def test_the_strings_of_tokens_tell_their_bytes() -> None:
    assert [bytes_of_token(string) for string in ("<0xE9>", "Ã", "Ġa")] == [b"\xe9", b"\xc3", b" a"]


def test_no_tokenizer_is_kept(tiny_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_path)
    TokenTexts(tokenizer)(tokenizer.encode("b", add_special_tokens=False)[0])
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None
