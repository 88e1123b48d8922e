"""Scripts of a ``FakeEngine`` that no bound model could follow."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine import (
    AnyJSON,
    Choice,
    Constraint,
    GenerationError,
    Grammar,
    InvalidRequest,
    JSONSchema,
    Regex,
    ToolCall,
)
from mlx_engine.testing import FakeAnswer, FakeEngine, Gate, ScriptError

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "Weather?"}]
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "when": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"day": {"type": "integer"}, "hour": {"type": "integer"}},
                },
            },
        },
        "required": ["city"],
    },
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": each} for each in (WEATHER, CLOCK)]
STRICT = [{"type": "function", "function": {**WEATHER, "strict": True}}, TOOLS[1]]
NAMED = {"type": "function", "function": {"name": "weather"}}
GOOD = ("weather", {"city": "Paris"})
DATE = Regex(r"[0-9]{4}-[0-9]{2}")


async def said(answer: Any, *, chat: bool = False, **options: Any) -> Any:
    async with FakeEngine(answer) as engine:
        ask: Any = engine.chat(USER, **options) if chat else engine.generate("x", **options)
        return await ask


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (DATE, "2026-11"),
        (Choice(["yes", "no"]), "no"),
        (Grammar('start: "a"+ "é"'), "aaé"),
        (AnyJSON(), '{"a": [1, null]}'),
        (JSONSchema({"type": "array", "items": {"type": "integer"}}), "[1, 2]"),
        (AnyJSON(), '{"a":"b: c,\\"d","é":[1,2]}'),
        (AnyJSON(), '{\n  "a" : "\\u00e9",\n  "b": [1, 2]\n}\n'),
    ],
)
async def test_what_keeps_to_it_passes(constraint: Constraint, text: str) -> None:
    result = await said(text, constraint=constraint)
    assert (result.text, result.finish_reason) == (text, "stop")
    again = await said(text, constraint=constraint, ignore_eos=True)
    assert (again.text, again.finish_reason) == (text, "stop"), "nothing may follow"
    chat = await said(FakeAnswer(text, reasoning="Hm."), chat=True, constraint=constraint)
    assert chat.text == text


@pytest.mark.parametrize(
    ("constraint", "text", "words"),
    [
        (DATE, "2026/11", "at character 4, '/11' cannot follow '2026'"),
        (DATE, "2026-1", "it wants more behind '2026-1'"),
        (Choice(["yes", "no"]), "maybe", "at character 0, 'maybe' cannot follow ''"),
        (Choice(["yes", "no"]), "yes!", "'!' cannot follow 'yes'"),
        (Choice(["à", "é"]), "è", "at character 0"),
        (AnyJSON(), "Sure: {}", "at character 0"),
        (AnyJSON(), "", "it wants more"),
        (AnyJSON(), "Here it is: {}", "at character 0, 'Here it is: {}' cannot follow ''"),
        (AnyJSON(), '{"a": "\\x"}', "cannot follow"),
        (AnyJSON(), '{"a": "\n"}', "cannot follow"),
        (AnyJSON(), '{"a" "b"}', "cannot follow"),
    ],
)
async def test_what_breaks_it_is_a_mistake_of_the_script(
    constraint: Constraint, text: str, words: str
) -> None:
    with pytest.raises(ScriptError, match="the scripted answer breaks the constraint") as error:
        await said(text, constraint=constraint)
    assert words in str(error.value)
    with pytest.raises(ScriptError, match="the scripted answer breaks the constraint"):
        await said(FakeAnswer(text, reasoning="Hm."), chat=True, constraint=constraint)


async def test_what_is_cut_need_not_be_complete() -> None:
    cut = await said(FakeAnswer("2026", finish_reason="length"), constraint=DATE)
    assert (cut.text, cut.finish_reason) == ("2026", "length")
    assert (await said("2026-11", constraint=DATE, stop="6-")).text == "202"
    assert (await said(["2026", "-11"], constraint=DATE, max_tokens=1)).text == "2026"
    with pytest.raises(GenerationError, match="out of memory"):
        await said(["2026", GenerationError("out of memory")], constraint=DATE)
    with pytest.raises(ScriptError, match="breaks the constraint"):
        await said(FakeAnswer("20x", finish_reason="length"), constraint=DATE)
    for text in ('{"a":"b\\"', '{"a":[1,', '{"a\\"b'):
        cut = await said(FakeAnswer(text, finish_reason="length"), constraint=AnyJSON())
        assert cut.text == text
    gate = Gate()
    gate.open()
    assert (await said(["2026", gate, "-11"], constraint=DATE)).text == "2026-11"


async def test_a_constraint_that_cannot_be_followed_is_refused() -> None:
    for bad in (Grammar("start: nothing"), JSONSchema({"type": "integer", "enum": ["a"]})):
        with pytest.raises(InvalidRequest, match=r"^constraint: "):
            await said("x", constraint=bad)


@pytest.mark.parametrize(
    ("calls", "options"),
    [
        ([GOOD], {"tool_choice": "required"}),
        ([GOOD, ("clock", {})], {"tool_choice": "required"}),
        ([GOOD], {"tool_choice": NAMED, "parallel_tool_calls": False}),
        ([("weather", {"when": [{"hour": 1, "day": 2}], "city": "x"})], {"tool_choice": NAMED}),
        ([GOOD], {"tools": STRICT}),
        ([], {"tools": STRICT}),
        ([("clock", {"any": "thing"})], {"tools": STRICT}),
        ([("weather", {"any": "thing"})], {}),
    ],
)
async def test_calls_that_keep_to_it_pass(calls: Any, options: Any) -> None:
    answer = FakeAnswer(tool_calls=calls, reasoning="Hm.")
    result = await said(answer, chat=True, **{"tools": TOOLS, **options})
    assert [(call.name, call.arguments) for call in result.tool_calls] == calls
    assert all(call.ok for call in result.tool_calls)


@pytest.mark.parametrize(
    ("answer", "options", "words"),
    [
        ("Sunny.", {"tool_choice": "required"}, "content is scripted, but .*'required'"),
        ("", {"tool_choice": "required"}, "no call is scripted, but .*'required'"),
        ("", {"tool_choice": NAMED}, "no call is scripted"),
        (FakeAnswer("Well:", tool_calls=[GOOD]), {"tool_choice": NAMED}, "content is scripted"),
        (FakeAnswer(tool_calls=[("clock", {})]), {"tool_choice": NAMED}, "names 'weather'"),
        (FakeAnswer(tool_calls=[GOOD] * 2), {"tool_choice": NAMED}, "2 calls are scripted"),
        (
            FakeAnswer(tool_calls=[GOOD] * 2),
            {"tool_choice": "required", "parallel_tool_calls": False},
            "2 calls are scripted, but the request allows one",
        ),
        (
            FakeAnswer(tool_calls=[("weather", {"town": "Paris"})]),
            {"tool_choice": "required"},
            "the scripted arguments of 'weather' break its schema: at character 2",
        ),
        (FakeAnswer(tool_calls=[("weather", {})]), {"tools": STRICT}, "break its schema"),
        (
            FakeAnswer(tool_calls=[ToolCall("weather", raw="{", error="no JSON")]),
            {"tools": STRICT},
            r"a malformed call is scripted \(no JSON\)",
        ),
    ],
)
async def test_calls_that_break_it_are_mistakes_of_the_script(
    answer: Any, options: Any, words: str
) -> None:
    with pytest.raises(ScriptError, match=words):
        await said(answer, chat=True, **{"tools": TOOLS, **options})


async def test_a_bound_call_in_which_the_answer_is_cut_may_be_malformed() -> None:
    cut = ToolCall("weather", raw='{"city": "Pa', error="no JSON")
    answer = FakeAnswer(tool_calls=[GOOD, cut], finish_reason="length")
    result = await said(answer, chat=True, tools=STRICT)
    assert [call.ok for call in result.tool_calls] == [True, False]
    assert result.finish_reason == "length"
    answer = FakeAnswer(tool_calls=[cut, GOOD], finish_reason="length")
    with pytest.raises(ScriptError, match="only one in which the answer is cut"):
        await said(answer, chat=True, tools=STRICT)


async def test_a_constraint_leaves_no_place_for_calls() -> None:
    answer = FakeAnswer(tool_calls=[GOOD])
    with pytest.raises(ScriptError, match="the request's constraint allows none"):
        await said(answer, chat=True, tools=TOOLS, constraint=AnyJSON())
