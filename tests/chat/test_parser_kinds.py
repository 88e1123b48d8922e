"""What families write in a way of their own."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine.chat import tagged_call
from mlx_engine.chat.call_syntax import compiled
from mlx_engine.chat.formats import choose_format
from mlx_engine.chat.parser import AnswerParser
from tests.chat.answers import Answer, cuts, parse, random_cuts, told, tool

_TEXT = {"type": "string"}
_COUNT = {"type": "integer"}
_POINT = {"type": "object", "properties": {"x": _COUNT, "tag": _TEXT}}
_TOOLS = [
    tool("f", a=_TEXT, n=_COUNT),
    tool("plot", points={"type": "array", "items": _POINT}, at=_POINT, notes={"type": "array"},
         either={"anyOf": [_TEXT, _POINT]}),
    tool("python", source=_TEXT),
]  # fmt: skip
_M3 = "]<]minimax[>["


def _parse(family: str, text: str, prefix: str = "", reasoning: str | None = None) -> Answer:
    form = choose_format(None, tool_format=family, reasoning_format=reasoning)
    answer = parse(form, text, _TOOLS, prefix)
    for parts in (cuts(text, 1), cuts(text, 5), random_cuts(text, 3)):
        assert told(parse(form, parts, _TOOLS, prefix)) == told(answer)
    return answer


def _calls(answer: Answer) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments if call.ok else "error") for call in answer.calls]


def _m3(name: str, arguments: str) -> str:
    body = f'{_M3}<invoke name="{name}">{arguments}{_M3}</invoke>'
    return f"{_M3}<tool_call>\n{body}\n{_M3}</tool_call>"


def _element(name: str, *inner: str) -> str:
    return f"{_M3}<{name}>{''.join(inner)}{_M3}</{name}>"


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (
            _element("points", _element("item", _element("x", "3"), _element("tag", " 07 "))),
            {"points": [{"x": 3, "tag": " 07 "}]},
        ),
        (_element("at", _element("x", "4")), {"at": {"x": 4}}),
        (_element("at") + _element("points"), {"at": {}, "points": []}),
        (_element("either", "  plain"), {"either": "  plain"}),
        (_element("either", _element("tag", "p")), {"either": f"{_M3}<tag>p{_M3}</tag>"}),
        (_element("notes", _element("item", "1"), _element("item", "two")), {"notes": [1, "two"]}),
        (_element("points", _element("item", "1"), _element("x", "2")), "error"),
        (_element("at", _element("x", "four")), "error"),
    ],
)
def test_lists_and_objects_may_be_elements(arguments: str, value: object) -> None:
    assert _calls(_parse("minimax-m3", _m3("plot", arguments))) == [("plot", value)]


def test_elements_may_not_be_too_deep() -> None:
    deep = "".join(f"{_M3}<x>" for _ in range(500))
    answer = _parse("minimax-m3", _m3("plot", f"{_M3}<notes>{deep}"))
    assert _calls(answer) == [("plot", "error")]


def test_character_data_ends_with_its_own_marker() -> None:
    value = "</param></function> & <b>"
    text = f'<function name="f"><param name="a"><![CDATA[{value}]]></param></function>'
    assert _calls(_parse("minicpm-5", text)) == [("f", {"a": value})]


def test_names_in_attributes_have_entities() -> None:
    head = '<|open|>call tool="f" index="1"<|sep|><|open|>argument key="KEY" type="string"<|sep|>'
    behind = "v<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>"
    text = "<|open|>tools<|sep|>" + head.replace("KEY", "a &quot;b&quot; &amp; c") + behind
    assert _calls(_parse("kimi-k3", text)) == [("f", {'a "b" & c': "v"})]


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llama-3", "<|python_tag|>print('<')\n{}"),
        ("functionary-3.2", ">>>python\nprint('<')\n{}"),
        (
            "harmony",
            "<|channel|>commentary to=python <|constrain|>code<|message|>print('<')\n{}<|call|>",
        ),
    ],
)
def test_code_is_for_the_tool_that_runs_it(family: str, text: str) -> None:
    assert _calls(_parse(family, text)) == [("python", {"source": "print('<')\n{}"})]
    other = text.replace("print('<')\n{}", "f(n=1)")
    assert family != "llama-3" or _calls(_parse(family, other)) == [("f", {"n": 1})]
    form = choose_format(None, tool_format=family)
    assert all(not call.ok for call in parse(form, text, _TOOLS[:1]).calls)


def test_the_action_of_answering_is_no_call() -> None:
    action = 'Action: ```json\n[{"tool_name": "NAME", "parameters": {}}]\n```'
    assert _parse("command-r", action.replace("NAME", "directly_answer")).calls == ()
    assert _calls(_parse("command-r", action.replace("NAME", "f"))) == [("f", {})]


@pytest.mark.parametrize(
    ("behind", "calls"),
    [("", 1), ("\n", 1), (" or not", 0), ("</think>", 0), (" or not</think>", 0)],
)
@pytest.mark.parametrize("before", ["", "I look. "])
def test_calls_end_reasoning_that_is_not_closed_if_nothing_follows(
    before: str, behind: str, calls: int
) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>'
    answer = _parse("hermes", before + call + behind, "<think>\n", "think")
    assert len(answer.calls) == calls
    assert answer.reasoning == (before if calls else before + call + behind.split("<")[0])
    cut = _parse("hermes", before + call[:-20], "<think>\n", "think")
    assert (cut.calls, cut.reasoning) == ((), before + call[:-20])


def test_reasoning_is_ended_by_what_follows_it() -> None:
    text = "hm<|open|>response<|sep|>Hello.<|close|>response<|sep|>"
    answer = _parse("kimi-k3", text, "<|open|>think<|sep|>")
    assert (answer.reasoning, answer.content) == ("hm", "Hello.")


def test_the_prompt_may_end_with_the_beginning_of_a_marker() -> None:
    assert _parse("functionary-3.2", "all\nHello.", ">>>").content == "Hello."
    assert _calls(_parse("functionary-3.2", 'f\n{"n": 2}', ">>>")) == [("f", {"n": 2})]
    assert _parse("functionary-3.2", "Hello.", ">>>").content == "Hello."


def test_a_message_to_the_user_is_text_whatever_is_in_it() -> None:
    call = '<atem:function_calls>\n<atem:invoke name="f">\n</atem:invoke>\n</atem:function_calls>'
    answer = _parse("muse", f" to=user<|message|>Write {call}.<|eot|>", "<|start|>assistant")
    assert (answer.content, answer.calls) == (f"Write {call}.", ())
    answer = _parse("muse", f" to=f<|message|>{call}<|eot|>", "<|start|>assistant")
    assert (answer.content, _calls(answer)) == ("", [("f", {})])


@pytest.mark.parametrize(
    "header",
    [
        " to=functions.f<|channel|>analysis<|message|>",
        "<|channel|>commentary to=functions.f json<|message|>",
        "<|channel|>analysis to=functions.f <|constrain|>json<|message|>",
    ],
)
def test_the_parts_of_a_header_come_in_any_order(header: str) -> None:
    answer = _parse("harmony", header + '{"n": 1}<|call|>', "<|start|>assistant")
    assert (answer.content, _calls(answer)) == ("", [("f", {"n": 1})])
    told_itself = "<|channel|>commentary to=assistant<|channel|>analysis<|message|>hm<|end|>"
    assert _parse("harmony", told_itself, "<|start|>assistant").reasoning == "hm"


def test_words_before_a_header_take_no_time() -> None:
    text = "<|channel|>commentary " + "w" * 30 + " v" * 20 + " no header"
    assert _parse("harmony", text, "<|start|>assistant").content == text


def test_a_newline_that_was_not_opened_belongs_to_the_value() -> None:
    call = "<seed:tool_call>\n<function=f>\n<parameter=a>VALUE</parameter>\n</function>\n"
    for written, value in (("x\n", "x\n"), ("\nx\n", "x"), ("\nx\n\n", "x\n")):
        text = call.replace("VALUE", written) + "</seed:tool_call>"
        assert _calls(_parse("seed-oss", text)) == [("f", {"a": value})]


@pytest.mark.parametrize(
    ("text", "value"), [("12", 12), ("007", "007"), ("+1", "+1"), ("1.", "1.")]
)
def test_what_may_be_a_text_is_a_number_only_as_json_writes_it(text: str, value: object) -> None:
    form = choose_format(None, tool_format="glm")
    for schema in ({}, {"type": ["string", "number"]}):
        call = f"<tool_call>g<arg_key>v</arg_key><arg_value>{text}</arg_value></tool_call>"
        answer = parse(form, call, [tool("g", v=schema)])
        assert _calls(answer) == [("g", {"v": value})]


@pytest.mark.parametrize("arguments", [2, 20_000])
def test_what_ends_a_value_is_no_pattern_of_all_arguments(
    arguments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def noted(pattern: str) -> Any:
        lengths.append(len(pattern))
        return compiled(pattern)

    monkeypatch.setattr(tagged_call, "compiled", noted)
    tagged_call._value_end.cache_clear()
    many = tool("f", **{f"p{number}": _TEXT for number in range(arguments)})
    form = choose_format(None, tool_format="qwen3-coder")
    value = "a\n<parameter=other>\nb"
    text = f"<tool_call>\n<function=f>\n<parameter=p0>\n{value}\n<parameter=p1>\nc\n"
    answer = parse(form, cuts(text + "</function>\n</tool_call>", 3), [many])
    assert _calls(answer) == [("f", {"p0": value, "p1": "c"})]
    assert max(lengths) < 1_000
    tagged_call._value_end.cache_clear()


@pytest.mark.parametrize("declared", [5, True, None, {"a": 1}, [5, "string"], "no such type"])
def test_types_that_are_none_are_no_types(declared: Any) -> None:
    odd = tool("f", a={"type": declared})
    form = choose_format(None, tool_format="qwen3-coder")
    text = "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>"
    assert _calls(parse(form, text, [odd])) == [("f", {"a": "x"})]


@pytest.mark.parametrize(
    ("arguments", "pieces", "ok"),
    [
        (r"{\"a\": \"one \\\"two\\\" \\u00e9\", \"n\": 3} ", 4, True),
        ("", 0, False),
        ("{} x", 1, False),
        (r"\"f\"", 1, False),
        ("{", 0, False),
    ],
)
def test_arguments_in_a_text_come_as_they_are_written(
    arguments: str, pieces: int, ok: bool
) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": "{arguments}"}}</tool_call>'
    answer = _parse("hermes", text)
    assert [call.ok for call in answer.calls] == [ok]
    if ok:
        assert answer.calls[0].arguments == {"a": 'one "two" é', "n": 3}
    parser = AnswerParser(choose_format(None, tool_format="hermes"), _TOOLS)
    deltas = [piece.call for part in cuts(text, 6) for piece in parser.feed(part)]
    assert sum(bool(delta and delta.arguments) for delta in deltas) >= pieces
