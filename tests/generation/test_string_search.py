"""The first of several strings, in a text that comes in parts, at a cost that texts have."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_engine.generation.string_search import StringSearch, StringSet

few = st.text("ab", max_size=7)


def first(text: str, strings: list[str]) -> tuple[str, str] | None:
    """The slow and obvious way: what is before the string that is complete first, and that."""
    for end in range(len(text) + 1):
        ending = [s for s in strings if s and text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(parts=st.lists(few, max_size=8), strings=st.lists(few, max_size=6))
def test_the_same_string_is_found_however_the_text_is_cut(
    parts: list[str], strings: list[str]
) -> None:
    text = "".join(parts)
    expected = first(text, strings)
    search = StringSearch(StringSet(strings))
    clear = ""
    for n, part in enumerate(parts):
        given_out, found, rest = search.feed(part)
        clear += given_out
        if found is not None:
            assert expected == (clear, found)
            assert clear + found + rest + "".join(parts[n + 1 :]) == text
            return
        seen = "".join(parts[: n + 1])
        held = max((k for s in strings for k in range(len(s)) if seen.endswith(s[:k])), default=0)
        assert clear == seen[: len(seen) - held], "it holds what may begin a string, and no more"
    assert expected is None
    assert clear + search.finish() == text


@pytest.mark.parametrize(
    ("strings", "text"),
    [
        (["x" * 8_000_000], "nothing of the kind " * 200),
        (["x" * 8_000_000], "x" * 3_000 + "y" * 1_000),
        ([f"stop {n}." for n in range(100_000)], "stop it, stop 12, " * 200),
        (["a" * n + "b" for n in range(1_200)], ("a" * 1_150 + "c") * 3),
    ],
    ids=["long", "long, and begun", "many", "each within the next"],
)
def test_long_strings_and_many_cost_nothing_until_a_text_has_them(
    strings: list[str], text: str
) -> None:
    tracemalloc.start()
    try:
        search = StringSearch(StringSet(strings))
        parts = [search.feed(text[n : n + 4]) for n in range(0, len(text), 4)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not any(found for _, found, _ in parts)
    assert "".join(clear for clear, _, _ in parts) + search.finish() == text
    assert peak < 16_000_000, "bytes; they were 1.6 GB for the longest of these"


def test_a_string_of_one_letter_is_found_at_once_behind_a_long_row_of_it() -> None:
    search = StringSearch(StringSet(["a" * 5_000 + "b"]))
    assert search.feed("a" * 20_000) == ("a" * 15_000, None, "")
    assert search.feed("bc") == ("", "a" * 5_000 + "b", "c")
