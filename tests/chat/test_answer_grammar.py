"""Answers that a grammar binds: what a family writes is let through and read, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import jsonschema
import pytest

from mlx_engine.chat.answer_grammar import bound_answer
from mlx_engine.chat.bound_answer import BoundAnswer
from mlx_engine.chat.families import FAMILIES
from mlx_engine.chat.formats import AnswerFormat, ReasoningFormat, ToolFormat, choose_format
from mlx_engine.chat.frames import FRAMES, frame_of
from mlx_engine.chat.tagged_call import TaggedCall
from mlx_engine.constraints import Choice, Constraint, JSONSchema
from mlx_engine.errors import InvalidRequest
from tests.chat.answers import Answer, cuts, parse, random_cuts, told
from tests.chat.test_parser_properties import markers
from tests.chat.walking import ByteTokens, verdict, walk
from tests.chat.writing import WRITERS, Call


def _tool(name: str, schema: Mapping[str, Any] | None, **others: object) -> dict[str, Any]:
    parameters = {} if schema is None else {"parameters": schema}
    return {"type": "function", "function": {"name": name, **parameters, **others}}


def _object(required: Sequence[str] = (), /, **properties: object) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


_TEXT = {"type": "string"}
_LINE = _object(("sku", "n"), sku={"type": "string", "maxLength": 8}, n={"type": "integer"})
_NODE = _object(("v",), v={"type": "integer"}, next={"$ref": "#/$defs/node"})
TOOLS = [
    _tool("get_weather", _object(("city",), city=_TEXT, days={"type": "integer", "maximum": 99})),
    _tool("get_time", _object()),
    _tool("ping", None),
    _tool("write", _object(("text", "note"), text=_TEXT, note={"type": ["string", "null"]},
                           append={"type": "boolean"})),
    _tool("find", _object(("paths", "kind"), paths={"type": "array", "items": _TEXT, "maxItems": 3},
                          limit={"anyOf": [{"type": "integer"}, {"type": "null"}]},
                          kind={"enum": ["file", "dir", 'a "b" <c>']}), strict=True),
    _tool("order", {**_object(
        ("lines", "total"), lines={"type": "array", "items": {"$ref": "#/$defs/line"}},
        total={"type": "number", "minimum": -9.5, "maximum": 1000000}),
        "$defs": {"line": {**_LINE, "additionalProperties": False}}}),
    _tool("tree", {**_object(("node",), node={"$ref": "#/$defs/node"}),
                   "$defs": {"node": {**_NODE, "additionalProperties": False}}}),
    _tool("größe", _object(("länge",), länge={"type": "number", "minimum": 0, "maximum": 10.5},
                           名前={"type": "string", "enum": ["甲", "é😀"]})),
    _tool("code-1.x", _object(("id",), id={"type": "string", "pattern": r"^[A-Z]{2}-\d{3}$"},
                              when={"type": "string", "format": "date"},
                              short={"type": "string", "minLength": 2, "maxLength": 5})),
    _tool("opt", _object((), a={"type": "boolean"}, b={"type": ["integer", "string"]},
                         c={**_object(("x",), x={"type": "boolean"}),
                            "additionalProperties": False})),
]  # fmt: skip
_SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
_NAMED = {"type": "function", "function": {"name": "get_weather"}}

_PARIS: Call = ("get_weather", {"city": "Paris", "days": 77})
_TIME: Call = ("get_time", {})
_FIND: Call = ("find", {"paths": [], "kind": "dir"})
_ANSWERS: list[list[Call]] = [
    [_PARIS],
    [_PARIS, _TIME, ("ping", {}), _PARIS],
    [("write", {"text": "    if a:\n\t{} [] \\ null é😀\n\n", "note": "", "append": True})],
    [("order", {"lines": [{"sku": "a<b", "n": -3}], "total": 2.5})],
    [("größe", {"länge": 1, "名前": "甲"}), ("code-1.x", {"id": "AB-123", "when": "2026-02-28"})],
    [("tree", {"node": {"v": 1, "next": {"v": 2}}}), ("opt", {"b": 7}), ("opt", {"b": "x"})],
]
_WRONG: list[Call] = [
    ("get_tide", {"city": "Paris"}),
    ("get_weather", {"days": 7}),
    ("get_weather", {"city": "Paris", "days": "seven"}),
    ("get_weather", {"city": "Paris", "days": 100}),
    ("get_weather", {"city": "Paris", "else": 1}),
    ("find", {"paths": [], "kind": "link"}),
    ("find", {"paths": [1], "kind": "dir"}),
    ("code-1.x", {"id": "AB-12"}),
]
# Of families that write calls in a way for which a tokenizer has tokens of its own.
_NEEDS = {"mistral": ["[TOOL_CALLS]", "[ARGS]"], "granite-3": ["<|tool_call|>"]}

each_family = pytest.mark.parametrize("family", WRITERS)


def _form(family: str) -> AnswerFormat:
    shows = next(each for each in FAMILIES if each.name == family).reasoning
    return choose_format(None, tool_format=family, reasoning_format=None if shows else "think")


@lru_cache(maxsize=64)
def _markers(family: str) -> tuple[str, ...]:
    return tuple(markers(_form(family)))


@cache
def _tokens(family: str = "", special: bool = False) -> ByteTokens:
    """Tokens of bytes; of a family, with its markers as special tokens if they look like some."""
    if not special and family not in _NEEDS:
        return ByteTokens() if not family else _tokens()
    found = [text for text in _markers(family) if text[0] + text[-1] == "<>" and "\n" not in text]
    found = [text for text in found if text.count("<") == 1 and "{" not in text] if special else []
    return ByteTokens([*found, *_NEEDS.get(family, ())])


def _bound(
    family: str,
    prefix: str = "",
    *,
    constraint: Constraint | None = None,
    tools: Sequence[Mapping[str, Any]] = TOOLS,
    choice: Any = "required",
    parallel: bool = True,
    special: bool = False,
) -> BoundAnswer:
    found = bound_answer(
        _form(family), prefix, constraint=constraint, tools=tools, tool_choice=choice,
        parallel=parallel, special=_tokens(family, special).special,
    )  # fmt: skip
    assert found is not None
    return found


@cache
def _required(family: str) -> BoundAnswer:
    """The answer that most tests look at."""
    return _bound(family)


def _written(family: str, calls: Sequence[Call]) -> str:
    """Calls as the answer to a prompt without reasoning has them, without what ends the answer."""
    text = WRITERS[family](calls)
    for begin in ("<|start|>assistant", "<|begin|>assistant"):
        text = text.removeprefix(begin)
    for end in ("<|call|>", "<|im_end|>", "<|eom|>"):
        text = text.removesuffix(end)
    return text


def _verdict(family: str, bound: BoundAnswer, text: str, special: bool = False) -> str:
    tokens = _tokens(family, special)
    return verdict(tokens, bound.lark, tokens.encode(text))


def _parse(family: str, bound: BoundAnswer, text: str, **options: Any) -> Answer:
    """An answer, the same in every cut."""
    form = _form(family)
    answer = parse(form, text, TOOLS, bound=bound, **options)
    for parts in (cuts(text, 1), random_cuts(text, 1)):
        assert told(parse(form, parts, TOOLS, bound=bound, **options)) == told(answer)
    return answer


def _calls(answer: Answer) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments if call.ok else call.error) for call in answer.calls]


def _reasoned(family: str, bound: BoundAnswer, thought: str) -> str:
    reasoning = _form(family).reasoning
    assert reasoning is not None
    return reasoning.open + thought + bound.reasoning_close()


def test_every_family_of_the_table_has_a_frame() -> None:
    assert set(FRAMES) == {family.name for family in FAMILIES}
    for family in FAMILIES:
        found = frame_of(_form(family.name), ())
        assert found is not None, family.name
        frame, reads = found
        for body in reads.bodies if frame.arguments == "tags" else ():
            if isinstance(body, TaggedCall):
                close = "\n" * body.newlines + body.close.replace("{key}", "KEY")
                assert frame.end.startswith(close), family.name


@pytest.mark.parametrize("special", [False, True])
@each_family
def test_calls_as_a_family_writes_them_are_let_through_and_read(family: str, special: bool) -> None:
    bound = _bound(family, special=True) if special else _required(family)
    for calls in _ANSWERS[: 1 if family == "harmony" else None]:
        text = _written(family, calls)
        assert _verdict(family, bound, text, special) == "complete", text
        answer = _parse(family, bound, text)
        assert _calls(answer) == calls
        assert answer.content == answer.reasoning == ""


@each_family
def test_wrong_calls_and_text_are_refused(family: str) -> None:
    bound = _required(family)
    for call in _WRONG:
        assert _verdict(family, bound, _written(family, [call])) != "complete", call
    for text in ("", "Hello.", _written(family, [_PARIS])[:-2], _written(family, [_PARIS]) + "."):
        assert _verdict(family, bound, text) != "complete", text


@each_family
def test_a_named_tool_is_called_once_and_no_other(family: str) -> None:
    bound = _bound(family, choice=_NAMED, tools=TOOLS[:2])
    assert _verdict(family, bound, _written(family, [_PARIS])) == "complete"
    for calls in ([_TIME], [_PARIS, _PARIS], [_PARIS, _TIME]):
        assert _verdict(family, bound, _written(family, calls)) != "complete"


@each_family
def test_without_parallel_calls_there_is_one(family: str) -> None:
    bound = _bound(family, parallel=False, tools=TOOLS[:2])
    assert _verdict(family, bound, _written(family, [_TIME])) == "complete"
    assert _verdict(family, bound, _written(family, [_PARIS, _TIME])) != "complete"


@each_family
def test_reasoning_comes_before_calls_and_ends_at_the_first_closer(family: str) -> None:
    bound = _required(family)
    close = bound.reasoning.close if bound.reasoning else ""
    call = _written(family, [_TIME])
    thought = f"plan `{call}`" if close not in call else "plan"
    tokens = _tokens(family)
    before, behind = _reasoned(family, bound, "\0").split("\0")
    behind += _written(family, [_PARIS])
    ids = tokens.encode(before) + tokens.spell(thought) + tokens.encode(behind)
    assert verdict(tokens, bound.lark, ids) == "complete"
    text = before + thought + behind
    answer = _parse(family, bound, text)
    assert (answer.reasoning.strip(), answer.content) == (thought, "")
    assert _calls(answer) == [_PARIS]


@each_family
def test_with_a_strict_tool_text_is_free_and_calls_are_bound(family: str) -> None:
    bound = _bound(family, choice="auto", tools=[TOOLS[0], TOOLS[4]])
    opening = bound.openings[0] if bound.openings else ""
    call, find = _written(family, [_PARIS]), _written(family, [_FIND])
    for text in ("Hello, <b> {1} [x] `y`.", ""):
        assert _verdict(family, bound, opening + text) == "complete"
        assert _parse(family, bound, opening + text).content == text
    for good in (call, find):
        assert _verdict(family, bound, good) == "complete"
    assert _calls(_parse(family, bound, find)) == [_FIND]
    mixed = "One: " if bound.trigger and not bound.openings else ""
    assert _verdict(family, bound, mixed + find) == "complete"
    assert _calls(_parse(family, bound, mixed + find)) == [_FIND]
    wrongs: list[Call] = [("find", {"paths": [1], "kind": "dir"}), ("find", {})]
    if bound.trigger:  # else what calls no tool of the request is text
        wrongs.append(("get_tide", {}))
    for wrong in wrongs:
        assert _verdict(family, bound, mixed + _written(family, [wrong])) != "complete", wrong
    loose = ("get_weather", {"days": 100})  # which is not strict
    assert _verdict(family, bound, _written(family, [loose])) == "complete"
    assert _calls(_parse(family, bound, _written(family, [loose]))) == [loose]


@pytest.mark.parametrize("special", [False, True])
@each_family
def test_content_behind_reasoning_is_what_a_constraint_says(family: str, special: bool) -> None:
    schema = {"type": "object", "properties": {"a": _TEXT}, "required": ["a"]}
    constraint: Constraint = Choice([" abc", "d"]) if special else JSONSchema(schema)
    content = " abc" if special else '{"a": "</think> <tool_call> <|end|> [x"}'
    bound = _bound(family, constraint=constraint, choice="auto", special=special)
    opening, thought = bound.openings[0] if bound.openings else "", "plan `</b>`"
    tokens = _tokens(family, special)
    for before, reasoning in ((_reasoned(family, bound, thought), thought), (opening, "")):
        ids = tokens.encode(before) + tokens.spell(content)
        assert verdict(tokens, bound.lark, ids) == "complete", before + content
        assert verdict(tokens, bound.lark, [*ids, *tokens.spell("x")]) != "complete"
        answer = _parse(family, bound, before + content)
        assert (answer.reasoning.strip(), answer.content) == (reasoning, content)


@pytest.mark.parametrize("spelled", [False, True])
def test_a_closer_ends_reasoning_as_a_token_and_as_text(spelled: bool) -> None:
    tokens = _tokens("hermes", True)
    bound = _bound("hermes", "<think>\n", special=True)
    write = tokens.spell if spelled else tokens.encode
    assert "</think>" in tokens.special
    call = tokens.encode(_written("hermes", [_TIME]))
    assert verdict(tokens, bound.lark, write("a `</think>") + call) == "complete"
    assert verdict(tokens, bound.lark, write("a") + call) != "complete"


@pytest.mark.parametrize(
    ("prefix", "text", "reasoning"),
    [
        ("<think>\n", "plan</think>\n\n", "plan"),
        ("<think>\n\n</think>\n\n", "", ""),
        ("", "", ""),
        ("", "<think>\nplan\n</think>\n\n", "plan"),
    ],
)
def test_the_end_of_the_prompt_tells_whether_reasoning_is_open(
    prefix: str, text: str, reasoning: str
) -> None:
    bound = _bound("hermes", prefix)
    text += _written("hermes", [_PARIS])
    assert _verdict("hermes", bound, text) == "complete"
    answer = _parse("hermes", bound, text, prefix=prefix)
    assert (answer.reasoning.strip(), _calls(answer)) == (reasoning, [_PARIS])


def test_a_prompt_that_ends_with_the_marker_of_calls_is_gone_on_with() -> None:
    bound = _bound("functionary-3.2", "assistant\n\n>>>")
    text = _written("functionary-3.2", [_PARIS]).removeprefix(">>>")
    assert _verdict("functionary-3.2", bound, text) == "complete"
    assert _calls(_parse("functionary-3.2", bound, text)) == [_PARIS]


@pytest.mark.parametrize("choice", ["required", "auto"])
@each_family
def test_what_a_grammar_lets_through_is_read_as_calls_that_validate(
    family: str, choice: str
) -> None:
    tools = TOOLS if choice == "required" else [_strict(tool) for tool in TOOLS]
    special = choice == "auto"
    bound = (
        _bound(family, tools=tools, choice="auto", special=True) if special else _required(family)
    )
    text = walk(_tokens(family, special), bound.lark, random.Random(family), _markers(family))
    if text is not None:
        _check(parse(_form(family), text, tools, bound=bound), text, choice)


def _check(answer: Answer, text: str, choice: str) -> None:
    """Its calls are right, and if there must be some, nothing else is there."""
    assert choice == "auto" or (answer.calls and answer.content == "")
    for call in answer.calls:
        assert call.ok, (call.error, text)
        jsonschema.validate(call.arguments, _SCHEMAS[call.name])


def _strict(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}


_OWN = {
    "json": ToolFormat("<call>", "</call>"),
    "json, no end": ToolFormat("CALLS:"),
    "json, bare": ToolFormat(""),
    "python": ToolFormat("<py>", "</py>", "python"),
    "python, bare": ToolFormat("", "", "python"),
    "xml": ToolFormat("<call>", "</call>", "xml"),
    "xml, no end": ToolFormat("<call>", "", "xml"),
}


@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.parametrize("own", _OWN)
def test_a_format_of_ones_own_has_a_frame(own: str, choice: str) -> None:
    form = choose_format(
        None, tool_format=_OWN[own], reasoning_format=ReasoningFormat("[think]", "[done]")
    )
    tools = [_strict(tool) for tool in TOOLS]
    bound = bound_answer(form, "", constraint=None, tools=tools, tool_choice=choice,
                         parallel=True, special={})  # fmt: skip
    assert bound is not None
    called = 0
    for seed in range(4):
        text = walk(_tokens(), bound.lark, random.Random(seed), ["[done]", _OWN[own].open or "["])
        if text is None:
            continue
        answer = parse(form, text, tools, bound=bound)
        _check(answer, text, choice)
        called += len(answer.calls)
    assert called or not bound.trigger


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("hermes", {"tools": [], "choice": "required"}, "tool_choice: there are no tools"),
        ("hermes", {"constraint": Choice(["a"])}, "constraint: is for content"),
        ("hermes", {"choice": {"function": {"name": "no"}}}, "tool_choice: there is no tool 'no'"),
        ("qwen3-coder", {"tools": [_tool("f", _object(**{"a>b": _TEXT}))]},
         r"tools\[0\]\.function\.parameters: tool 'f': argument 'a>b' cannot"),
        ("llama-4", {"tools": [TOOLS[0], _tool("a b", None)]},
         r"tools\[1\]\.function\.name: 'a b' cannot be written"),
        ("glm", {"tools": [_tool("f", {"anyOf": [_object()]})]}, "'anyOf' of an object cannot"),
        ("glm", {"tools": [_tool("f", _object(a={"type": "string", "format": "iri"}))]},
         "format 'iri' cannot be enforced"),
        ("glm", {"tools": [_tool("f", _object(a={"type": "string", "contentEncoding": "x"}))]},
         "'contentEncoding' cannot be enforced"),
        ("gemma-4", {"tools": [_tool("f", _object(a={"type": "array", "uniqueItems": True}))]},
         "'uniqueItems' cannot be enforced"),
    ],
)  # fmt: skip
def test_what_cannot_be_bound_is_refused_by_name(
    family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        _bound(family, **options)


def test_a_model_whose_calls_are_not_known_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"tool_choice: .*tool_format"):
        bound_answer(choose_format(None), "", constraint=None, tools=TOOLS,
                     tool_choice="required", parallel=True, special={})  # fmt: skip


@pytest.mark.parametrize("tools", [TOOLS[:4], None])
@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_that_nothing_binds_is_free(tools: Any, parallel: bool) -> None:
    assert bound_answer(_form("hermes"), "", constraint=None, tools=tools, tool_choice="auto",
                        parallel=parallel, special={}) is None  # fmt: skip
