"""What is read of JSON that is still being written."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_engine.chat.json_text import DEEPEST
from mlx_engine.chat.partial_json import PartialJSON

TEXTS = st.text(st.characters(exclude_categories=()), max_size=6)  # halves of characters, too
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def begins(part: Any, whole: Any) -> bool:
    """Whether one value is what may be there of another."""
    match part, whole:
        case str(), str():
            return whole.startswith(part)
        case list(), list():
            return len(part) <= len(whole) and all(map(begins, part, whole))
        case dict(), dict():
            return [*part] == [*whole][: len(part)] and all(
                begins(part[name], whole[name]) for name in part
            )
    return type(part) is type(whole) and part == whole


def read(*pieces: str) -> Any:
    partial = PartialJSON()
    for piece in pieces:
        partial.add(piece)
    return partial.value


@settings(max_examples=60)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_every_beginning_is_a_part_of_the_whole(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    growing, last = PartialJSON(), None
    for end in range(len(text) + 1):
        growing.add(text[end - 1 : end] if end else "")
        part = growing.value
        assert part == read(text[:end]), "however it is cut into pieces"
        assert part is None or begins(part, value)
        assert last is None or begins(last, part), "it grows"
        last = part
    assert read(text, " ") == value, "a number at the top is complete with what follows"
    if isinstance(value, str | list | dict):
        assert last == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        (" \n", None),
        ("12", None),
        ("tru", None),
        ("12 ", 12),
        ('"', ""),
        ('"a\\', "a"),
        ('"a\\u00e', "a"),
        ('"a\\u00e9', "aé"),
        ('"\\ud83d', ""),
        ('"\\ud83d\\', ""),
        ('"\\ud83d\\ude0', ""),
        ('"\\ud83d\\ude00', "😀"),
        ('"\\ud83dx', "\ud83dx"),
        ("{", {}),
        ('{"na', {}),
        ('{"name"', {}),
        ('{"name":', {}),
        ('{"name": "', {"name": ""}),
        ('{"n": 1', {}),
        ('{"n": 1,', {"n": 1}),
        ('{"n": [1, 2', {"n": [1]}),
        ('{"n": [1, {"x": [', {"n": [1, {"x": []}]}),
        ('{"n": {"x": "y"}, "m": nul', {"n": {"x": "y"}}),
    ],
)
def test_what_may_still_change_is_not_there(text: str, value: Any) -> None:
    assert read(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", None),
        ("}", None),
        ('{"a": "b" "c": 1}', {"a": "b"}),
        ('{"a": "b\\x"}', {"a": "b"}),
        ('{"a": "b", 5: 1}', {"a": "b"}),
        ('{"a" "b"}', {}),
        ("[1, 2}", [1, 2]),
        ("[1, 2 3]", [1, 2]),
        ("[1, 1e, 3]", [1]),
        ("[1, ,2]", [1]),
        ("[1]]", [1]),
        ("[[1], -, 2]", [[1]]),
        ("9" * 5000 + " ", None),  # more than Python reads
    ],
)
def test_where_it_is_no_json_it_stays_what_it_is(text: str, value: Any) -> None:
    assert read(text) == value
    assert read(*text, ' "more"]}') == value
    step_by_step = PartialJSON()
    for char in text:
        step_by_step.add(char)
        step_by_step.value  # noqa: B018 - reads
    assert step_by_step.value == value


def test_lists_in_lists_have_a_bottom() -> None:
    value, depth = read("[" * 100_000), 0
    while value:
        value, depth = value[0], depth + 1
    assert depth == DEEPEST - 1


def test_earlier_values_do_not_change() -> None:
    partial, seen = PartialJSON(), []
    for char in '{"a": [1, {"b": "xyz"}, [2, 3]], "c": {"d": "e"}}':
        partial.add(char)
        seen.append((partial.value, json.dumps(partial.value)))
    assert all(json.dumps(value) == then for value, then in seen)


def test_all_of_it_is_read_once() -> None:
    """Were it read anew for each piece, this would take minutes."""
    text = json.dumps(
        {"rows": [{"name": "x" * 40, "n": n} for n in range(4000)], "t": "y" * 40_000}
    )
    partial = PartialJSON()
    began = time.process_time()
    for at in range(0, len(text), 8):
        partial.add(text[at : at + 8])
        if at % 128 == 0:
            partial.value  # noqa: B018 - reads
    assert partial.value == json.loads(text)
    assert time.process_time() - began < 5
