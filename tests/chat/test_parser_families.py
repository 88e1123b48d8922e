"""Each family of the table: plain text, reasoning, calls right and wrong, and what quotes them."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine.chat.families import FAMILIES
from mlx_engine.chat.formats import AnswerFormat, choose_format
from tests.chat.answers import Answer, cuts, parse, random_cuts, told, tool
from tests.chat.test_parser_properties import markers
from tests.chat.writing import WRITERS

_TOOLS = [
    tool("get_weather", city={"type": "string"}, days={"type": "integer"}),
    tool("get_time"),
    tool("write", text={"type": "string"}, note={"type": "string"}),
]
_PARIS = ("get_weather", {"city": "Paris", "days": 77})
_TIME: tuple[str, dict[str, Any]] = ("get_time", {})
_BARE = {"llama-3", "llama-4", "xlam"}  # whose calls are an answer's beginning


def _form(family: str) -> AnswerFormat:
    shows = next(each for each in FAMILIES if each.name == family).reasoning
    return choose_format(None, tool_format=family, reasoning_format=None if shows else "think")


def _parse(family: str, text: str) -> Answer:
    """An answer, the same in every cut."""
    form = _form(family)
    answer = parse(form, text, _TOOLS)
    for parts in (cuts(text, 1), cuts(text, 3), random_cuts(text, 1), random_cuts(text, 2)):
        assert told(parse(form, parts, _TOOLS)) == told(answer)
    return answer


def _calls(answer: Answer) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments if call.ok else "error") for call in answer.calls]


def _thought(family: str, text: str) -> str:
    reasoning = _form(family).reasoning
    assert reasoning is not None
    if family == "harmony":
        return f"<|channel|>analysis<|message|>{text}<|end|>"
    return reasoning.open + text + reasoning.close


each_family = pytest.mark.parametrize("family", WRITERS)


def test_every_family_of_the_table_is_tried() -> None:
    assert set(WRITERS) == {family.name for family in FAMILIES}


@each_family
def test_reasoning_and_text_are_told_apart(family: str) -> None:
    final = "<|start|>assistant<|channel|>final<|message|>" if family == "harmony" else ""
    answer = _parse(family, _thought(family, "plan") + final + "Hello.")
    assert (answer.reasoning.strip(), answer.content, answer.calls) == ("plan", "Hello.", ())


@each_family
def test_one_call_behind_reasoning(family: str) -> None:
    answer = _parse(family, _thought(family, "plan") + WRITERS[family]([_PARIS]))
    assert _calls(answer) == [_PARIS]
    assert (answer.reasoning.strip(), answer.content) == ("plan", "")


@each_family
def test_two_calls_of_which_one_has_no_arguments(family: str) -> None:
    answer = _parse(family, WRITERS[family]([_PARIS, _TIME]))
    assert _calls(answer) == [_PARIS, _TIME]
    assert answer.content == ""


@each_family
def test_a_malformed_call_leaves_its_neighbour_alone(family: str) -> None:
    text = WRITERS[family]([_PARIS, _TIME]).replace("77", "seven")
    answer = _parse(family, text)
    assert _calls(answer) == [("get_weather", "error"), _TIME]
    assert "seven" in answer.calls[0].raw
    assert answer.content == ""


@each_family
def test_a_call_that_is_cut_off_is_an_error(family: str) -> None:
    text = WRITERS[family]([_TIME, _PARIS])
    answer = _parse(family, text[: text.index("77") + 1])
    assert _calls(answer) == [_TIME, ("get_weather", "error")]
    assert answer.calls[1].raw.endswith("7")


@each_family
def test_a_name_that_is_no_tool_is_an_error_with_the_name(family: str) -> None:
    calls = [("get_time", {}), ("get_tide", {"city": "Paris"})]
    answer = _parse(family, WRITERS[family](calls))
    assert _calls(answer) == [_TIME, ("get_tide", "error")]


@each_family
def test_markers_in_prose_and_code_are_text(family: str) -> None:
    call = WRITERS[family]([_PARIS])
    text = f"In code:\n```\n{call}\n```\nIt begins with `{_marker(family)}`, or {_marker(family)}."
    if "```" in call:  # what is fenced itself cannot stand in a fence
        text = text[text.index("It") :]
    answer = _parse(family, text)
    assert (answer.content, answer.calls) == (text, ())


def _marker(family: str) -> str:
    opens = [calls.open for calls in _form(family).calls if calls.open]
    return opens[0] if opens else "[get_time"


@each_family
def test_a_string_comes_out_to_the_letter_with_markers_in_it(family: str) -> None:
    form = _form(family)
    quotes = {'<|"|>', "<escape>"}
    every = " x ".join(marker for marker in markers(form) if marker not in quotes)
    text = f"    if a:\n\tprint(\"é😀\", 'b\\n')  # {{}} [] \\\\ null\n{every} x\n\n"
    call = ("write", {"text": text, "note": "None"})
    answer = _parse(family, WRITERS[family]([call, _TIME]))
    assert _calls(answer) == [call, _TIME]
