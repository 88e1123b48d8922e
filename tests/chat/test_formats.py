"""The format is told by the template's own markers, or by an option."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlx_engine.chat.formats import ReasoningFormat, ToolFormat, choose_format
from mlx_engine.errors import InvalidRequest
from tests.chat.answers import parse, tool

_TOOLS = [tool("f", a={"type": "string"})]
_DESCRIBED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<call>", "close": "</call>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "name", "reasoning"),
    [
        ("{{ messages }}", "none", None),
        ("{{ content.split('</think>')[-1] }}", "text", "<think>"),
        ("<tools> <tool_call>\n{name} </think>", "hermes", "<think>"),
        ("<tools> <tool_call>\n<function=f>", "qwen3-coder", None),
        ("<tool_call>{name}<arg_key> </think>", "glm", "<think>"),
        ("<|start|>assistant<|channel|>final<|message|>", "harmony", "<|channel|>"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [THINK][/THINK]", "mistral", "[THINK]"),
        ("<|start_header_id|> <|python_tag|>", "llama-3", None),
        ("]<]minimax[>[ <tool_call>", "minimax-m3", "<mm:think>"),
        ("<minimax:tool_call> <invoke>", "minimax-m2", None),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json", "deepseek-r1", None),
        ("<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "deepseek-v3.1", None),
        ("{% set dsml = '｜DSML｜' %}", "deepseek-v3.2", None),
        ("<|START_THINKING|><|START_ACTION|>", "command-a", "<|START_THINKING|>"),
        ("<|tool_call>call: <|channel>thought\\n<channel|>", "gemma-4", "<|channel>thought\n"),
        ("<|START_ACTION|> Action: ```json", "command-a", "<|START_THINKING|>"),
        ('Action:\\n```json "tool_name"', "command-r", None),
        ('<tool_sep> <function name="f"><param name="a">', "minicpm-5", None),
        ("<|assistant|> <|end|>", "none", None),  # no gpt-oss
        ("[BEGIN FINAL RESPONSE] <tool_calls>", "apriel", "Here are"),
        ("<|think|> <|tool_call:begin|> <|end|>", "solar-open", "<|think|>"),
        (">>>all <|start_header_id|>", "functionary-3.2", None),
        ("functools[", "firefunction", None),
        ("<functions> <function_calls>", "olmo-3", None),
    ],
)
def test_a_template_shows_its_family(template: str, name: str, reasoning: str | None) -> None:
    form = choose_format(template)
    assert form.name == name
    assert form.chosen_by == ("none" if name == "none" else "template")
    opens = form.reasoning.open if form.reasoning else None
    assert (opens or "").startswith(reasoning or "")
    assert (opens is None) == (reasoning is None)


def test_of_several_templates_the_one_for_tools_counts() -> None:
    listed = [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "<|START_ACTION|>"},
    ]
    assert choose_format(listed).name == "command-a"
    assert choose_format({each["name"]: each["template"] for each in listed}).name == "command-a"
    assert choose_format([]).name == choose_format(None).name == "none"


def test_tokens_tell_where_the_template_writes_no_call() -> None:
    tokens = ["<|tool_call_start|>", "<|tool_call_end|>"]
    assert choose_format("{{ tools }}", special_tokens=tokens).name == "lfm2"
    assert choose_format("{{ messages }}", special_tokens=tokens).name == "none"


def test_options_override_the_template() -> None:
    template = "<tool_call>{name} </think>"
    none = choose_format(template, tool_format="none", reasoning_format="none")
    assert (none.has_calls, none.has_reasoning, none.chosen_by) == (False, False, "option")
    assert choose_format(template, tool_format="mistral").calls[0].open == "[TOOL_CALLS]"
    assert choose_format(template, reasoning_format="mistral-think").reasoning_close() == "[/THINK]"


@pytest.mark.parametrize("option", ["tool_format", "reasoning_format"])
def test_an_unknown_name_is_refused_with_near_ones(option: str) -> None:
    with pytest.raises(InvalidRequest, match=r"did you mean (mistral|think)"):
        choose_format(None, **{option: "mistrel" if option == "tool_format" else "thinks"})
    with pytest.raises(InvalidRequest, match=option):
        choose_format(None, **{option: 3})


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("json", '{"name": "f", "arguments": {"a": "x"}}'),
        ("python", "[f(a='x')]"),
        ("xml", "<function=f><parameter=a>x</parameter></function>"),
    ],
)
@pytest.mark.parametrize("open", ["<<", ""])
def test_a_format_of_the_users_own(body: str, text: str, open: str) -> None:
    close = ">>" if open else ""
    form = choose_format(
        "[TOOL_CALLS]",
        tool_format=ToolFormat(open, close, body),  # type: ignore[arg-type]
        reasoning_format=ReasoningFormat("(", ")"),
    )
    answer = parse(form, f"(hm){open}{text}{close}", _TOOLS)
    assert (answer.reasoning, answer.content) == ("hm", "")
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", {"a": "x"})]


def test_the_models_own_description_goes_first() -> None:
    form = choose_format("[TOOL_CALLS]", response_template=_DESCRIBED)
    assert form.chosen_by == "response_template"
    assert form.reasoning_close() == "</think>"
    call = '<call>{"name": "f", "arguments": {"a": "x"}}</call>'
    text = f"<think>hm</think>Hello.{call}\n<call>{{bad</call>{call}"
    prefix = "<|im_start|>assistant\n"
    for parts in ([text], list(text)):
        answer = parse(form, parts, _TOOLS, prefix)
        assert (answer.content, answer.reasoning) == ("Hello.", "hm")
        assert [call.ok for call in answer.calls] == [True, False, True]
        assert answer.calls[1].raw == "{bad"
    assert parse(form, "hm</think>a", _TOOLS, prefix + "<think>").reasoning == "hm"
    assert parse(form, text, None, prefix).calls == ()


def test_bound_answers_are_in_the_format_that_the_template_shows() -> None:
    form = choose_format("[TOOL_CALLS]", response_template=_DESCRIBED)
    assert form.bound_as == choose_format("[TOOL_CALLS]")
    assert choose_format("plain", response_template=_DESCRIBED).bound_as is None


def test_a_description_that_is_none_is_not_used() -> None:
    assert choose_format("[TOOL_CALLS]", response_template={"fields": 3}).name == "mistral"
    named = choose_format(None, response_template=_DESCRIBED, tool_format="hermes")
    assert named.name == "hermes"


@pytest.mark.parametrize(
    ("make", "option", "words"),
    [
        (lambda: ToolFormat(5), "tool_format", "open must be text"),  # type: ignore[arg-type]
        (lambda: ToolFormat("<c>", None), "tool_format", "close must be text"),  # type: ignore[arg-type]
        (lambda: ToolFormat("<c>", body="yaml"), "tool_format", "body must be one of 'json'"),  # type: ignore[arg-type]
        (lambda: ReasoningFormat("<t>", 1), "reasoning_format", "close must be text"),  # type: ignore[arg-type]
        (lambda: ReasoningFormat("<t>", ""), "reasoning_format", "must not be empty"),
    ],
)
def test_a_format_of_ones_own_is_checked(
    make: Callable[[], object], option: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        make()
    assert caught.value.option == option
