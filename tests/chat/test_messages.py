"""What callers send, and what of it a model's chat template gets, trait by trait."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from mlx_lm.chat_templates import deepseek_v32

from mlx_engine import InvalidRequest
from mlx_engine.chat.messages import short_id
from mlx_engine.chat.template import ChatTemplate, RenderedPrompt
from mlx_engine.requests import ChatPrompt
from tests.chat.traits import TEMPLATES, THINKS, TOOLS, loop, wrapped

HELLO = {"role": "user", "content": "Hello there."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOKYO = '{"city": "Tokyo"}'


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def call(arguments: Any = TOKYO, call_id: str | None = "call_1", **message: Any) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    if call_id is not None:
        made["id"] = call_id
    return {"role": "assistant", "content": "", "tool_calls": [made], **message}


def result(content: Any = "Sunny", call_id: str | None = "call_1") -> dict[str, Any]:
    given = {} if call_id is None else {"tool_call_id": call_id}
    return {"role": "tool", "content": content, **given}


def rendered(
    template: Any, messages: list[Any], tools: Any = None, **options: Any
) -> RenderedPrompt:
    before = copy.deepcopy(messages)
    tokenizer = template if hasattr(template, "_tokenizer") else wrapped(template)
    found = ChatTemplate.of(tokenizer).render(ChatPrompt.of(messages, tools, **options))
    assert messages == before, "a caller's messages are the caller's"
    return found


DEVELOPER = [{"role": "developer", "content": "Answer in French."}, HELLO]


@pytest.mark.parametrize("trait", ["no branch for developer", "raises on unknown roles"])
def test_a_developers_message_is_a_system_message(trait: str) -> None:
    found = rendered(TEMPLATES[trait], DEVELOPER)
    assert "<|im_start|>system\nAnswer in French." in found.text
    assert found.notes == ()


def test_a_template_that_knows_developers_gets_them() -> None:
    assert (
        "<|im_start|>developer\nAnswer in French."
        in rendered(TEMPLATES["knows developer"], DEVELOPER).text
    )


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_no_content_is_an_empty_text(content: dict[str, Any]) -> None:
    said = {key: value for key, value in call().items() if key != "content"} | content
    found = rendered(TEMPLATES["plain"], [HELLO, said, result()], [WEATHER])
    assert found.text == rendered(TEMPLATES["plain"], [HELLO, call(), result()], [WEATHER]).text
    assert found.notes == ()


def test_reasoning_alone_is_a_message() -> None:
    said = {"role": "assistant", "reasoning_content": "Let me see."}
    assert "<think>\nLet me see.\n</think>" in rendered(THINKS, [HELLO, said, HELLO]).text


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_given_in_the_field_that_is_read(name: str, read: str) -> None:
    template = THINKS.replace("m.reasoning_content", f"m.{read}")
    said = {"role": "assistant", "content": "Hi.", name: "Let me see."}
    found = rendered(template, [HELLO, said, HELLO])
    assert "<think>\nLet me see.\n</think>\n\nHi." in found.text


@pytest.mark.parametrize("arguments", ["null", "", None, {}, "{}"])
def test_no_arguments_are_an_empty_mapping(arguments: Any) -> None:
    found = rendered(
        TEMPLATES["items of arguments"], [HELLO, call(arguments), result(None)], [WEATHER]
    )
    assert "<tool_call>get_weather</tool_call>" in found.text
    assert "<|im_start|>tool\n<|im_end|>" in found.text


@pytest.mark.parametrize("arguments", [TOKYO, json.loads(TOKYO)])
def test_arguments_are_text_where_the_template_wants_that(arguments: Any) -> None:
    found = rendered(TEMPLATES["arguments as text"], [HELLO, call(arguments), result()], [WEATHER])
    assert f"<tool_call>get_weather{TOKYO}</tool_call>" in found.text


@pytest.mark.parametrize("arguments", [TOKYO, json.loads(TOKYO)])
def test_a_renderer_in_the_place_of_a_template_gets_arguments_as_text(arguments: Any) -> None:
    tokenizer = wrapped(None, chat_template=deepseek_v32.apply_chat_template)
    messages = [system("Be brief."), HELLO, call(arguments), result()]
    found = rendered(tokenizer, messages, [WEATHER])
    assert '<｜DSML｜parameter name="city" string="true">Tokyo<' in found.text
    assert "<result>Sunny</result>" in found.text
    assert found.notes == () or "format" in found.notes[0]


def test_ids_are_nine_letters_and_digits_where_they_have_to_be() -> None:
    messages = [HELLO, call(call_id="call_1"), result(), call(call_id="aBc456789"), result("x")]
    messages[-1]["tool_call_id"] = "aBc456789"
    found = rendered(TEMPLATES["ids of nine"], messages, [WEATHER])
    mapped = short_id("call_1")
    assert re.fullmatch("[A-Za-z0-9]{9}", mapped)
    assert found.text.count(mapped) == 2, "the same in call and result"
    assert found.text.count("aBc456789") == 2, "one that suits is kept"
    assert short_id("call_2") != mapped
    bare = rendered(TEMPLATES["ids of nine"], [HELLO, call(call_id=None), result(call_id=None)])
    given = re.findall(r"\[([A-Za-z0-9]{9})\{", bare.text)
    assert bare.text.count(given[0]) == 2


def test_a_template_that_needs_tools_is_not_asked_without() -> None:
    assert "get_weather" in rendered(TEMPLATES["needs tools"], [HELLO], [WEATHER]).text


@pytest.mark.parametrize("kind", [dict, list])
def test_of_several_templates_that_for_tools_is_used_with_tools(kind: type) -> None:
    both: Any = {"default": "plain{{ messages[0].content }}", "tool_use": loop("{{ m.content }}")}
    if kind is list:
        both = [{"name": name, "template": text} for name, text in both.items()]
    tokenizer = wrapped(None)
    tokenizer._tokenizer.chat_template = both
    tokenizer.has_chat_template = True
    assert rendered(tokenizer, [HELLO], [WEATHER]).text.startswith("<|im_start|>tools")
    assert rendered(tokenizer, [HELLO]).text == "plainHello there."


def test_past_calls_and_results_that_do_not_show_are_noted() -> None:
    messages = [HELLO, call(), result(), HELLO]
    (note,) = rendered(TEMPLATES["hides calls and results"], messages, [WEATHER]).notes
    assert "number 1 ('assistant'): its call of get_weather" in note
    assert "number 2 ('tool'): its content" in note
    assert "number 0" not in note
    assert "number 3" not in note


MIDDLE = [system("Aaa."), HELLO, system("Bbb."), {"role": "user", "content": "Goodbye."}]


@pytest.mark.parametrize("trait", ["system at the beginning", "first system only"])
def test_a_system_message_in_the_middle_stands_where_the_template_takes_it(trait: str) -> None:
    found = rendered(TEMPLATES[trait], MIDDLE)
    assert "<|im_start|>system\nAaa.\n\nBbb.<|im_end|>" in found.text
    (note,) = found.notes
    assert "number 2 ('system') stands at the beginning" in note


def test_a_system_message_in_the_middle_stays_where_the_template_takes_it_there() -> None:
    found = rendered(TEMPLATES["plain"], MIDDLE)
    assert found.text.index("Hello") < found.text.index("Bbb.") < found.text.index("Goodbye")
    assert found.notes == ()


def test_several_system_messages_at_the_beginning_become_one() -> None:
    for trait in ("system at the beginning", "first system only"):
        found = rendered(TEMPLATES[trait], [system("Aaa."), system("Bbb."), HELLO])
        assert "system\nAaa.\n\nBbb.<" in found.text
        assert found.notes == ()


def test_without_system_messages_theirs_stands_in_the_users() -> None:
    found = rendered(TEMPLATES["no system"], [system("Aaa."), HELLO])
    assert "user\nAaa.\n\nHello there.<" in found.text
    (note,) = found.notes
    assert "number 0 ('system')" in note


def test_turns_are_made_of_messages_in_a_row() -> None:
    found = rendered(TEMPLATES["turns"], MIDDLE)
    assert all(text in found.text for text in ("Aaa.", "Bbb.", "Hello there.\n\nGoodbye."))
    assert any("number 3 ('user') stands in number 1 ('user')" in note for note in found.notes)
    after = rendered(TEMPLATES["turns"], [HELLO, call(), result(), HELLO], [WEATHER])
    assert "tool\nSunny\n\nHello there." in after.text
    plain = [HELLO, {"role": "assistant", "content": "Hi."}, HELLO]
    assert rendered(TEMPLATES["turns"], plain).notes == ()


def two(first: str = "c2", second: str = "c1") -> list[Any]:
    calls = [call('{"city": "A"}', "c1"), call('{"city": "B"}', "c2")]
    both = {**calls[0], "tool_calls": [c["tool_calls"][0] for c in calls]}
    texts = {"c1": "RA", "c2": "RB"}
    return [HELLO, both, *(result(texts.get(c, "RX"), c) for c in (first, second))]


def test_results_stand_in_the_order_of_their_calls() -> None:
    found = rendered(TEMPLATES["by position"], two(), [WEATHER])
    assert "<result>RA</result><result>RB</result>" in found.text
    assert found.notes == ()
    stays = rendered(TEMPLATES["by position"], two("c9", "c1"), [WEATHER])
    assert "<result>RX</result><result>RA</result>" in stays.text


@pytest.mark.parametrize("trait", ["one call", "raises on two calls"])
def test_calls_stand_in_messages_of_their_own_where_only_one_shows(trait: str) -> None:
    found = rendered(TEMPLATES[trait], two(), [WEATHER])
    places = [found.text.index(text) for text in ('"A"', "RA", '"B"', "RB")]
    assert places == sorted(places)
    assert found.notes == ()


CUT = '{"city": "Tok'


@pytest.mark.parametrize(
    "trait", ["plain", "items of arguments", "arguments as text", "ids of nine", "turns"]
)
def test_a_call_that_was_cut_off_shows_as_it_was(trait: str) -> None:
    messages = [HELLO, call(CUT), result("error: bad arguments")]
    found = rendered(TEMPLATES[trait], messages, [WEATHER])
    assert CUT in found.text.replace('\\"', '"').replace("\\\\", "\\").replace('\\"', '"')
    assert "error: bad arguments" in found.text
    assert found.notes == ()


def test_the_name_of_a_result_is_that_of_its_call() -> None:
    template = loop("{{ m.name }}:{{ m.content }};")
    found = rendered(template, two(), [WEATHER])
    assert "get_weather:RA;get_weather:RB;" in found.text


@pytest.mark.parametrize(
    ("value", "text"),
    [({"a": [1, "ü"]}, '{"a": [1, "ü"]}'), (5, "5"), (None, ""), ([1], "[1]"), (True, "true")],
)
def test_results_may_be_any_json_value(value: Any, text: str) -> None:
    found = rendered(TEMPLATES["plain"], [HELLO, call(), result(value)], [WEATHER])
    assert f"<|im_start|>tool\n{text}<|im_end|>" in found.text


def test_text_parts_of_results_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "tool\nab<" in rendered(TEMPLATES["plain"], [HELLO, call(), result(parts)]).text
    with pytest.raises(InvalidRequest, match=r"number 2 \('tool'\): only text parts"):
        ChatPrompt.of([HELLO, call(), result([{"type": "image_url", "image_url": "x"}])])


def test_calls_as_they_were_before_tools() -> None:
    old = {"role": "assistant", "function_call": {"name": "get_weather", "arguments": TOKYO}}
    answer = {"role": "function", "name": "get_weather", "content": "Sunny"}
    new = [HELLO, call(call_id=None), {**result(call_id=None), "name": "get_weather"}]
    for template in (TEMPLATES["plain"], TEMPLATES["ids of nine"]):
        assert rendered(template, [HELLO, old, answer]).text == rendered(template, new).text


def test_tools_are_completed_where_the_template_does_not_look() -> None:
    bare = {"type": "function", "function": {"name": "get_weather"}}
    assert "get_weather{}" in rendered(TEMPLATES["parameters unlooked"], [HELLO], [bare]).text


def test_tools_show_in_a_system_message_where_they_show_only_there() -> None:
    inside = loop(
        "{{ m.role + ':' + m.content + (m.tools or '') + ';' }}",
        before="",
    )
    assert rendered(inside, [HELLO], [WEATHER]).text.startswith('system:[{"type": "function"')
    assert "system:Aaa.[{" in rendered(inside, [system("Aaa."), HELLO], [WEATHER]).text
    beside = loop("{{ m.content }}{% if m.role == 'system' %}{{ tools | tojson }}{% endif %}", "")
    assert "get_weather" in rendered(beside, [HELLO], [WEATHER]).text
    with pytest.raises(InvalidRequest, match="does not show tools") as caught:
        rendered(loop("{{ m.content }}", before=""), [HELLO], [WEATHER])
    assert caught.value.option == "tools"


def test_a_conversation_with_calls_goes_on_where_neither_they_nor_tools_show() -> None:
    template = loop(
        "{%- if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}", before=""
    )
    tools, lost = rendered(template, [HELLO, call(), result(), HELLO], [WEATHER]).notes[::2]
    assert tools == "tools: this model's chat template does not show get_weather"
    assert "number 1 ('assistant'): its call of get_weather" in lost
    assert "number 2 ('tool'): its content" in lost


def test_tools_are_given_by_the_other_name_that_is_read() -> None:
    template = loop("{{ m.content }}", before="{{ xml_tools | tojson if xml_tools else '' }}")
    assert "get_weather" in rendered(template, [HELLO], [WEATHER]).text
    assert rendered(template, [HELLO]).text.startswith("Hello")


def test_no_tools_are_none_where_the_template_needs_some() -> None:
    assert "Hello there." in rendered(TEMPLATES["needs tools"], [HELLO]).text


def test_ids_are_made_where_there_have_to_be_some() -> None:
    template = loop("{{ m.content }}{% for c in m.tool_calls %}{{ c.id + ';' }}{% endfor %}")
    assert ";Sunny" in rendered(template, [HELLO, call(call_id=None), result(call_id=None)]).text
    assert "call_1;" in rendered(template, [HELLO, call(), result()]).text


def test_calls_may_show_before_the_text_of_their_message() -> None:
    template = loop(
        "{%- for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ m.content }}"
    )
    said = {**call(), "content": "Let me look."}
    assert rendered(template, [HELLO, said, result()], [WEATHER]).notes == ()


def test_texts_are_given_in_parts_where_only_those_show() -> None:
    parts = loop(
        "{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %};"
    )
    found = rendered(parts, [system("Aaa."), HELLO])
    assert "system:Aaa.;user:Hello there.;" in found.text
    assert found.notes == ()


def test_a_refusal_names_the_message() -> None:
    words = "it says stop"
    template = loop(
        "{%- if m.content == 'stop' %}{{ raise_exception('"
        + words
        + "') }}{% endif %}{{ m.content }}"
    )
    answer = {"role": "assistant", "content": "Hi."}
    messages = [HELLO, answer, HELLO, answer, {"role": "user", "content": "stop"}, answer, HELLO]
    with pytest.raises(InvalidRequest, match=rf"number 4 \('user'\): .*{words}"):
        rendered(template, messages)


def test_a_note_names_the_message_that_is_lost_and_no_other() -> None:
    template = loop(
        "{%- if m.content != 'Sunny' %}{{ m.content + ';' }}{% endif %}", before="Sunny tools;"
    )
    asked = {"role": "user", "content": "Is it Sunny?"}
    answer = {"role": "assistant", "content": "Sunny"}
    (note,) = rendered(template, [HELLO, answer, asked]).notes
    assert "number 1 ('assistant'): its content" in note
    assert "number 0" not in note
    assert "number 2" not in note


def test_tools_that_are_not_to_be_called_are_not_shown() -> None:
    found = rendered(TEMPLATES["plain"], [HELLO], [WEATHER], tool_choice="none")
    assert "get_weather" not in found.text
    assert found.tools is None
    assert TOOLS not in found.text


def test_a_prompt_is_bound_when_there_is_something_to_bind_to() -> None:
    found = rendered(TEMPLATES["plain"], [HELLO], [WEATHER])
    assert found.bind(None, dict) is found
    required = rendered(TEMPLATES["plain"], [HELLO], [WEATHER], tool_choice="required")
    bound = required.bind(None, dict)
    assert bound.bound is not None
    assert (bound.text, bound.tools) == (found.text, found.tools)
    parser = bound.parser()
    parser.feed('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>')
    parser.finish()
    assert [call.ok for call in parser.calls] == [True]
