"""What holds for every format and any text: nothing is lost, and a cut changes nothing."""

from __future__ import annotations

import json
import re

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_engine.chat.families import FAMILIES, REASONING, Family
from mlx_engine.chat.formats import AnswerFormat, choose_format
from mlx_engine.chat.harmony import header as harmony_header
from tests.chat.answers import cuts, parse, random_cuts, told, tool

_TOOLS = [tool("f", a={"type": "string"}, n={"type": "integer"}), tool("g")]
_SOUP = [
    "f", "g", "{", "}", "[", "]", "(", ")", ",", ":", ": ", "=", "\\", "\\u", "d83d", "1", "null",
    '"name"', '"f"', '"arguments"', '"a"', '"', "'", "`", "```", "\n", " ", "word ", "é😀",
    '{"name": "f", "arguments": {"a": "x"}}', 'f(a="1", n=2)', '{"a": "b"}', "<think>", "</think>",
]  # fmt: skip


def markers(form: AnswerFormat) -> list[str]:
    """Every literal that the format has a meaning for, from its patterns too."""
    found = list(form.drop)
    for calls in form.calls:
        found += [calls.open, calls.close]
        for body in calls.bodies:
            for name in ("head", "start", "argument", "close", "end"):
                text = re.sub(r"\\(.)", r"\1", getattr(body, name, ""))
                found += re.findall(r"<[^()>\s]{1,30}>|<\w+=|\[[A-Z_]+\]|\]<\]minimax\[>\[", text)
                found += [text] if name in ("close", "end") else []
    if form.reasoning is not None:
        found += [form.reasoning.open, form.reasoning.close]
    if form.structure == "harmony":
        found += ["<|start|>assistant", "<|channel|>", "analysis", "commentary", "final"]
        found += [" to=functions.f", "<|constrain|>json", "<|message|>", "<|end|>", "<|call|>"]
    return sorted({text for text in found if text})


def formats() -> list[AnswerFormat]:
    found = [
        choose_format(None, tool_format=family.name, reasoning_format=reasoning)
        for family in FAMILIES
        for reasoning in ([None] if family.reasoning else ["think", "none"])
    ]
    return found + [choose_format(None, reasoning_format=name) for name in REASONING]


_FORMATS = formats()


@st.composite
def answers(draw: st.DrawFn) -> tuple[AnswerFormat, str, str]:
    form = draw(st.sampled_from(_FORMATS))
    parts = st.one_of(st.sampled_from(markers(form) or ["x"]), st.sampled_from(_SOUP), st.text())
    text = "".join(draw(st.lists(parts, max_size=25)))
    opened = form.reasoning.open if form.reasoning else ""
    return form, text, draw(st.sampled_from(["", opened]))


@settings(max_examples=400, deadline=None)
@given(answers(), st.booleans(), st.integers(0, 9))
def test_a_cut_changes_nothing_and_nothing_raises(
    answer: tuple[AnswerFormat, str, str], has_tools: bool, seed: int
) -> None:
    form, text, prefix = answer
    tools = _TOOLS if has_tools else None
    whole = told(parse(form, text, tools, prefix))
    for parts in (cuts(text, 1), random_cuts(text, seed)):
        assert told(parse(form, parts, tools, prefix)) == whole


@settings(max_examples=400, deadline=None)
@given(answers())
def test_without_tools_all_text_but_the_markers_is_content_or_reasoning(
    answer: tuple[AnswerFormat, str, str],
) -> None:
    form, text, prefix = answer
    found = parse(form, text, None, prefix)
    assert not found.calls
    opens = form.reasoning.open if form.reasoning else ""
    reasoning = [opens, opens.rstrip("\n"), form.reasoning.close] if form.reasoning else []
    gone = "|".join(re.escape(marker) for marker in [*form.drop, *reasoning]) or "(?!)"
    if form.structure == "harmony":
        gone = harmony_header(ended=True).pattern
    assert _is_text_less(text, found.text, gone)


def _is_text_less(text: str, kept: str, gone: str) -> bool:
    """Whether that is left of the text if none, some or all matches are taken out of it."""
    reached: list[set[int]] = [{0}, *(set() for _ in text)]  # how much of it is kept, by place
    for at, char in enumerate(text):
        ends = {found.end() for found in [regex.compile(gone).match(text, at)] if found}
        for place in reached[at]:
            if kept[place : place + 1] == char:
                reached[at + 1].add(place + 1)
            for end in ends:
                reached[end].add(place)
    return len(kept) in reached[len(text)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_plain_text_is_content_at_once(family: Family) -> None:
    form = choose_format(None, tool_format=family.name, reasoning_format=None)
    text = "Some words, 3 < 4, and a list: [1, 2].\nA `marker` and {braces}.\n"
    answer = parse(form, cuts(text, 4), _TOOLS)
    assert answer.content == text
    assert not answer.calls


@pytest.mark.parametrize("cut", range(1, 8))
@pytest.mark.parametrize("form", _FORMATS, ids=lambda form: form.structure)
def test_what_came_before_a_marker_counts_when_it_was_plain(form: AnswerFormat, cut: int) -> None:
    closing = form.reasoning.close if form.reasoning is not None else "</think>"
    text = f"one `{closing}` two{closing}\nthree\n{closing}\nfour ``{closing}"
    assert told(parse(form, cuts(text, cut), _TOOLS)) == told(parse(form, text, _TOOLS))


def test_deep_json_is_an_error_and_no_recursion() -> None:
    form = choose_format(None, tool_format="hermes", reasoning_format="none")
    deep = "[" * 100_000
    text = f'<tool_call>\n{{"name": "f", "arguments": {{"a": {deep}'
    answer = parse(form, cuts(text, 1000), _TOOLS)
    assert [call.error is None for call in answer.calls] == [False]


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "1e999", "9" * 5000], ids=["nan", "inf", "large", "digits"]
)
def test_numbers_that_json_has_not_are_errors(value: str) -> None:
    form = choose_format(None, tool_format="hermes", reasoning_format="none")
    text = f'<tool_call>\n{{"name": "f", "arguments": {{"n": {value}}}}}\n</tool_call>'
    answer = parse(form, text, _TOOLS)
    assert (answer.calls[0].name, answer.calls[0].ok) == ("f", False)


def test_halves_of_a_character_are_replaced_and_raw_newlines_escaped() -> None:
    form = choose_format(None, tool_format="hermes", reasoning_format="none")
    text = r'<tool_call>{"name": "f", "arguments": {"a": "\ud800 \ud83d\ude00' + "\n\t" + '"}}'
    answer = parse(form, cuts(text, 1), _TOOLS)
    assert answer.calls[0].arguments == {"a": "\ufffd 😀\n\t"}
    assert json.loads(answer.streamed[0][2]) == answer.calls[0].arguments
