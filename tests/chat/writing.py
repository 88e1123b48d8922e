"""Calls and reasoning as the families write them, for tests: a line a family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = tuple[str, Mapping[str, Any]]
Write = Callable[[Sequence[Call]], str]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _object(call: Call, name: str = "name", arguments: str = "arguments") -> str:
    return _json({name: call[0], arguments: call[1]})


def _python(call: Call) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


def _bare(value: object) -> str:
    return value if isinstance(value, str) else _json(value)


def _gemma(quote: str) -> Callable[[object], str]:
    def write(value: object) -> str:
        if isinstance(value, str):
            return quote + value + quote
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{write(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return f"[{','.join(map(write, value))}]"
        return _json(value)

    return write


def each(
    before: str, write: Callable[[Call], str], behind: str, *, join: str = "", around: str = "{}"
) -> Write:
    """Every call between markers of its own; ``around`` is what they stand in together."""
    return lambda calls: around.replace(
        "{}", join.join(before + write(call) + behind for call in calls)
    )


def together(before: str, write: Callable[[Call], str], behind: str, join: str = ", ") -> Write:
    """All calls between one pair of markers."""
    return lambda calls: before + join.join(map(write, calls)) + behind


def tags(head: str, argument: str, close: str, end: str) -> Callable[[Call], str]:
    """A head with the name, and each argument between tags; strings are written as they are."""

    def write(call: Call) -> str:
        arguments = (
            argument.replace("KEY", key).replace("KIND", _json(isinstance(value, str)))
            + _bare(value)
            + close.replace("KEY", key)
            for key, value in call[1].items()
        )
        return head.replace("NAME", call[0]) + "".join(arguments) + end

    return write


def headed(head: str, behind: str = "") -> Callable[[Call], str]:
    """A head with the name, and JSON behind it."""
    return lambda call: head.replace("NAME", call[0]) + _json(call[1]) + behind


_XML = tags("<function=NAME>\n", "<parameter=KEY>\n", "\n</parameter>\n", "</function>")
_KEYS = tags("NAME", "<arg_key>KEY</arg_key><arg_value>", "</arg_value>", "")
_M3 = "]<]minimax[>["
_DSML = tags(
    '<｜DSML｜invoke name="NAME">\n', '<｜DSML｜parameter name="KEY" string="KIND">',
    "</｜DSML｜parameter>\n", "</｜DSML｜invoke>\n",
)  # fmt: skip
_INVOKE = tags('<invoke name="NAME">\n', '<parameter name="KEY">', "</parameter>\n", "</invoke>\n")


def _kimi(calls: Sequence[Call]) -> str:
    every = (
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
        f"{_json(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return "<|tool_calls_section_begin|>" + "".join(every) + "<|tool_calls_section_end|>"


def _command(calls: Sequence[Call]) -> str:
    every = (
        _json({"tool_call_id": str(index), "tool_name": name, "parameters": arguments})
        for index, (name, arguments) in enumerate(calls)
    )
    return "<|START_ACTION|>[\n    " + ",\n    ".join(every) + "\n]<|END_ACTION|>"


WRITERS: dict[str, Write] = {
    "harmony": each("<|start|>assistant<|channel|>commentary to=functions.",
                    headed("NAME <|constrain|>json<|message|>"), "<|call|>"),
    "hermes": each("<tool_call>\n", _object, "\n</tool_call>", join="\n"),
    "qwen3-coder": each("<tool_call>\n", _XML, "\n</tool_call>", join="\n"),
    "seed-oss": each("<seed:tool_call>\n", _XML, "\n</seed:tool_call>", join="\n"),
    "mistral": each("[TOOL_CALLS]", headed("NAME[ARGS]"), ""),
    "llama-3": each("", lambda call: _object(call, arguments="parameters"), "", join="; "),
    "llama-4": together("[", _python, "]"),
    "glm": each("<tool_call>", _KEYS, "</tool_call>", join="\n"),
    "longcat": each("<longcat_tool_call>", tags(
        "NAME\n", "<longcat_arg_key>KEY</longcat_arg_key>\n<longcat_arg_value>",
        "</longcat_arg_value>\n", ""), "</longcat_tool_call>\n"),
    "minimax-m1": together("<tool_calls>\n", _object, "\n</tool_calls>", "\n"),
    "minimax-m2": together("<minimax:tool_call>\n", _INVOKE, "</minimax:tool_call>", ""),
    "minimax-m3": together(f"{_M3}<tool_call>\n", tags(
        f'{_M3}<invoke name="NAME">', f"{_M3}<KEY>", f"{_M3}</KEY>", f"{_M3}</invoke>\n"),
        f"{_M3}</tool_call>", ""),
    "deepseek-r1": each("<｜tool▁call▁begin｜>", headed(
        "function<｜tool▁sep｜>NAME\n```json\n", "\n```"), "<｜tool▁call▁end｜>", join="\n",
        around="<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"),
    "deepseek-v3.1": each("<｜tool▁call▁begin｜>", headed("NAME<｜tool▁sep｜>"),
                          "<｜tool▁call▁end｜>",
                          around="<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"),
    "deepseek-v3.2": together("<｜DSML｜function_calls>\n", _DSML, "</｜DSML｜function_calls>", ""),
    "kimi-k2": _kimi,
    "kimi-k3": together("<|open|>tools<|sep|>", tags(
        '<|open|>call tool="NAME" index="1"<|sep|>', '<|open|>argument key="KEY"<|sep|>',
        "<|close|>argument<|sep|>", "<|close|>call<|sep|>"), "<|close|>tools<|sep|>", ""),
    "command-a": _command,
    "command-r": together("Action: ```json\n[\n", lambda call: _object(
        call, "tool_name", "parameters"), "\n]\n```", ",\n"),
    "gemma-3": together("```tool_code\n", _python, "\n```", "\n"),
    "gemma-4": each("<|tool_call>call:", lambda call: call[0] + _gemma('<|"|>')(call[1]),
                    "<tool_call|>"),
    "functiongemma": each("<start_function_call>call:", lambda call: call[0] + _gemma(
        "<escape>")(call[1]), "<end_function_call>"),
    "apertus": together("<|tools_prefix|>[", lambda call: _json({call[0]: call[1]}),
                        "]<|tools_suffix|>"),
    "nemotron": together("<TOOLCALL>[", _object, "]</TOOLCALL>"),
    "phi-4-mini": together("<|tool_call|>[", _object, "]<|/tool_call|>"),
    "granite-3": together("<|tool_call|>[", _object, "]"),
    "lfm2": together("<|tool_call_start|>[", _python, "]<|tool_call_end|>"),
    "minicpm-3": together("<|tool_call_start|>\n```python\n", _python,
                          "\n```\n<|tool_call_end|>", "\n"),
    "minicpm-5": each("", tags('<function name="NAME">', '<param name="KEY">', "</param>",
                               "</function>"), "", join="\n"),
    "step-3": each("<｜tool_call_begin｜>function<｜tool_sep｜>", tags(
        '<steptml:invoke name="NAME">', '<steptml:parameter name="KEY">',
        "</steptml:parameter>", "</steptml:invoke>"), "<｜tool_call_end｜>",
        around="<｜tool_calls_begin｜>{}<｜tool_calls_end｜>"),
    "hunyuan": together("<tool_calls>[", _object, "]</tool_calls>"),
    "hunyuan-3": together("<tool_calls:opensource>\n", tags(
        "<tool_call:opensource>NAME<tool_sep:opensource>\n",
        "<arg_key:opensource>KEY</arg_key:opensource>\n<arg_value:opensource>",
        "</arg_value:opensource>\n", "</tool_call:opensource>\n"),
        "</tool_calls:opensource>", ""),
    "apriel": together("<tool_calls>[", _object, "]</tool_calls>"),
    "ernie": each("<tool_call>\n", _object, "\n</tool_call>", join="\n"),
    "solar-open": each("<|tool_call:begin|>", headed(
        "<|tool_call:name|>NAME<|tool_call:args|>"), "<|tool_call:end|>",
        around="<|begin|>assistant<|tool_calls|>{}<|calls|>"),
    "olmo-3": together("<function_calls>\n", _python, "\n</function_calls>", "\n"),
    "internlm": each("<|action_start|><|plugin|>\n", lambda call: _object(
        call, arguments="parameters"), "<|action_end|>"),
    "hyperclovax": together(" -> tool/function_call\n[", _object, "]<|im_end|>"),
    "xlam": together("[", _object, "]"),
    "gigachat-3": each("<|message_sep|>\n\nfunction call<|role_sep|>\n", _object, ""),
    "gigachat-3.1": each("<|function_call|>", _object, ""),
    "firefunction": together(" functools[", _object, "]"),
    "functionary-3.1": each("", headed("<function=NAME>", "</function>"), ""),
    "functionary-3.2": each(">>>", headed("NAME\n"), ""),
    "muse": each(" to=", tags(
        'NAME<|message|><atem:function_calls>\n<atem:invoke name="NAME">\n',
        '<atem:parameter name="KEY">', "</atem:parameter>\n",
        "</atem:invoke>\n</atem:function_calls>"), "<|eom|>", join="<|start|>assistant"),
    "muse-spark": together("<atem:function_calls>\n", tags(
        '<atem:invoke name="NAME">\n', '<atem:parameter name="KEY">', "</atem:parameter>\n",
        "</atem:invoke>\n"), "</atem:function_calls>", ""),
}  # fmt: skip
