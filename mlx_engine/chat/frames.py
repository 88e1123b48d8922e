"""How each family writes calls and content, in the one form that bound answers have."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from mlx_engine.chat.answer_format import AnswerFormat, ToolFormat
from mlx_engine.chat.call_syntax import HeadedCall
from mlx_engine.chat.family_calls import MINICPM_5


@dataclass(frozen=True, slots=True)
class Frame:
    """The calls of an answer, as they are written.

    In its texts ``NAME`` is the tool's name, ``INDEX`` a number, and ``\\n?`` a newline that may be
    missing.

    Attributes:
        marker: what tells calls from text; empty if the content begins with them.
        head: what is before a call's arguments.
        tail: what is behind them.
        open: what is between the marker and the first call.
        between: what is between two calls; ``None`` if there is only one.
        close: what is behind the last.
        arguments: how they are written: as one JSON object; ``python`` as those of a function;
            ``tags`` between tags of their own; ``gemma`` as an object in the dialect that is read.
        argument, end: for ``tags``, what is before and behind a value; ``KEY`` is the argument's
            name, and ``IS_TEXT`` whether its value is text.
        turn: what is between reasoning and the marker.
        needs: special tokens without which a model does not write so.
        reads: how the parser reads such calls; ``None`` is the family's format with that marker.
    """

    marker: str
    head: str
    tail: str = ""
    open: str = ""
    between: str | None = None
    close: str = ""
    arguments: Literal["json", "python", "tags", "gemma"] = "json"
    argument: str = ""
    end: str = ""
    turn: str = ""
    needs: tuple[str, ...] = ()
    reads: ToolFormat | None = None


@dataclass(frozen=True, slots=True)
class ContentFrame:
    """The beginning of content.

    Attributes:
        openings: markers of which one is written before it.
        turn: what is between reasoning and those.
    """

    openings: tuple[str, ...]
    turn: str = ""


def _wrapped(
    marker: str, end: str, frame: Frame, space: str = "\n", join: str = "\n", close: str = ""
) -> Frame:
    """A frame in which every call stands between markers of its own."""
    return replace(
        frame,
        marker=marker,
        open=space,
        tail=frame.tail + space + end,
        between=join + marker + space,
        close=close,
    )


def _together(open_: str, close: str, frame: Frame, join: str = ", ") -> Frame:
    """A frame in which all calls stand between one pair of markers."""
    marker, _, behind = open_.partition("|->|")
    return replace(frame, marker=marker, open=behind, between=join, close=close)


def _object(name: str = "name", arguments: str = "arguments") -> Frame:
    return Frame("", f'{{"{name}": "NAME", "{arguments}": ', "}")


def _tags(head: str, argument: str, end: str, tail: str) -> Frame:
    return Frame("", head, tail, arguments="tags", argument=argument, end=end)


_PYTHON = Frame("", "NAME(", ")", arguments="python")
_XML = _tags("<function=NAME>\n", "<parameter=KEY>\n", "\n</parameter>\n", "</function>")
_INVOKE = _tags('<invoke name="NAME">\n', '<parameter name="KEY">', "</parameter>\n", "</invoke>\n")
_M3 = "]<]minimax[>["
_K3 = "<|open|>{}<|sep|>", "<|close|>{}<|sep|>"
_HARMONY = ToolFormat(
    "<|channel|>commentary to=functions.",
    body=(HeadedCall(r"(?P<name>[\w.\-]{1,256}) <\|constrain\|>json<\|message\|>"),),
)
_MINICPM_5 = ToolFormat("", body=(MINICPM_5,))

# By family; where there are several, the first whose special tokens a tokenizer has.
FRAMES: dict[str, tuple[Frame, ...]] = {
    "harmony": (Frame(_HARMONY.open, "NAME <|constrain|>json<|message|>",
                      turn="<|start|>assistant", reads=_HARMONY),),
    "hermes": (_wrapped("<tool_call>", "</tool_call>", _object()),),
    "qwen3-coder": (_wrapped("<tool_call>", "</tool_call>", _XML),),
    "seed-oss": (_wrapped("<seed:tool_call>", "</seed:tool_call>", _XML),),
    "mistral": (Frame("[TOOL_CALLS]", "NAME[ARGS]", between="[TOOL_CALLS]", needs=("[ARGS]",)),
                _together("[TOOL_CALLS]|->|[", "]", _object())),
    "llama-3": (Frame("", '{"name": "NAME", "parameters": ', "}", between="; "),),
    "llama-4": (_together("|->|[", "]", _PYTHON),),
    "glm": (_wrapped("<tool_call>", "</tool_call>", _tags(
        "NAME\n?", "<arg_key>KEY</arg_key>\n?<arg_value>", "</arg_value>\n?", ""), ""),),
    "longcat": (_wrapped("<longcat_tool_call>", "</longcat_tool_call>", _tags(
        "NAME\n", "<longcat_arg_key>KEY</longcat_arg_key>\n<longcat_arg_value>",
        "</longcat_arg_value>\n", ""), "", close="\n?"),),
    "minimax-m1": (_together("<tool_calls>|->|\n", "\n</tool_calls>", _object(), "\n"),),
    "minimax-m2": (_together("<minimax:tool_call>|->|\n", "</minimax:tool_call>", _INVOKE, ""),),
    "minimax-m3": (_together(f"{_M3}<tool_call>|->|\n", f"{_M3}</tool_call>", _tags(
        f'{_M3}<invoke name="NAME">', f"{_M3}<KEY>", f"{_M3}</KEY>", f"{_M3}</invoke>\n"), ""),),
    "deepseek-r1": (_together("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", Frame(
        "", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        "\n```<｜tool▁call▁end｜>"), "\n"),),
    "deepseek-v3.1": (_together("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", Frame(
        "", "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>", "<｜tool▁call▁end｜>"), ""),),
    "deepseek-v3.2": (_together("<｜DSML｜function_calls>|->|\n", "</｜DSML｜function_calls>",
        _tags('<｜DSML｜invoke name="NAME">\n', '<｜DSML｜parameter name="KEY" string="IS_TEXT">',
        "</｜DSML｜parameter>\n", "</｜DSML｜invoke>\n"), ""),),
    "kimi-k2": (_together("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", Frame(
        "", "<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>",
        "<|tool_call_end|>"), ""),),
    "kimi-k3": (_together(_K3[0].format("tools"), _K3[1].format("tools"), _tags(
        _K3[0].format('call tool="NAME" index="INDEX"'), _K3[0].format('argument key="KEY"'),
        _K3[1].format("argument"), _K3[1].format("call")), ""),),
    "command-a": (_together("<|START_ACTION|>|->|[\n    ", "\n]<|END_ACTION|>", Frame(
        "", '{"tool_call_id": "INDEX", "tool_name": "NAME", "parameters": ', "}"), ",\n    "),),
    "command-r": (_together("Action:|->| ```json\n[\n", "\n]\n```", _object(
        "tool_name", "parameters"), ",\n"),),
    "gemma-3": (_together("```tool_code|->|\n", "\n```", _PYTHON, "\n"),),
    "gemma-4": (_wrapped("<|tool_call>", "<tool_call|>", Frame(
        "", "call:NAME", arguments="gemma"), "", ""),),
    "functiongemma": (_wrapped("<start_function_call>", "<end_function_call>", Frame(
        "", "call:NAME", arguments="gemma"), "", ""),),
    "apertus": (_together("<|tools_prefix|>|->|[", "]<|tools_suffix|>",
                         Frame("", '{"NAME": ', "}")),),
    "nemotron": (_together("<TOOLCALL>|->|[", "]</TOOLCALL>", _object()),),
    "phi-4-mini": (_together("<|tool_call|>|->|[", "]<|/tool_call|>", _object()),),
    "granite-3": (replace(_together("<|tool_call|>|->|[", "]", _object()),
                          needs=("<|tool_call|>",)),
                  _wrapped("<tool_call>", "</tool_call>", _object())),
    "lfm2": (_together("<|tool_call_start|>|->|[", "]<|tool_call_end|>", _PYTHON),),
    "minicpm-3": (_together("<|tool_call_start|>|->|\n```python\n", "\n```\n<|tool_call_end|>",
                           _PYTHON, "\n"),),
    "minicpm-5": (replace(_tags('<function name="NAME">', '<param name="KEY">', "</param>",
                                "</function>"), between="\n?", reads=_MINICPM_5),),
    "step-3": (_together("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>", _tags(
        '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="NAME">',
        '<steptml:parameter name="KEY">', "</steptml:parameter>",
        "</steptml:invoke><｜tool_call_end｜>"), ""),),
    "hunyuan": (_together("<tool_calls>|->|[", "]</tool_calls>", _object()),),
    "hunyuan-3": (_together("<tool_calls:opensource>|->|\n", "</tool_calls:opensource>", _tags(
        "<tool_call:opensource>NAME<tool_sep:opensource>\n",
        "<arg_key:opensource>KEY</arg_key:opensource>\n<arg_value:opensource>",
        "</arg_value:opensource>\n", "</tool_call:opensource>\n"), ""),),
    "apriel": (_together("<tool_calls>|->|[", "]</tool_calls>", _object()),),
    "ernie": (_wrapped("<tool_call>", "</tool_call>", _object()),),
    "solar-open": (replace(_together("<|tool_calls|>", "<|calls|>", Frame(
        "", "<|tool_call:begin|><|tool_call:name|>NAME<|tool_call:args|>",
        "<|tool_call:end|>"), ""), turn="<|begin|>assistant"),),
    "olmo-3": (_together("<function_calls>|->|\n", "\n</function_calls>", _PYTHON, "\n"),),
    "internlm": (_wrapped("<|action_start|><|plugin|>", "<|action_end|>",
                         Frame("", '\n{"name": "NAME", "parameters": ', "}"), "", ""),),
    "hyperclovax": (replace(_together(" -> tool/function_call\n|->|[", "]", _object()),
                            turn="\n<|im_start|>assistant"),),
    "xlam": (_together("|->|[", "]", _object()),),
    "gigachat-3": (_wrapped("<|message_sep|>\n\nfunction call<|role_sep|>\n", "", _object(),
                            "", ""),),
    "gigachat-3.1": (_wrapped("<|function_call|>", "", _object(), "", ""),),
    "firefunction": (_together(" functools|->|[", "]", _object()),),
    "functionary-3.1": (Frame("", "<function=NAME>", "</function>", between="\n?"),),
    "functionary-3.2": (Frame(">>>", "NAME\n", between=">>>"),),
    "muse": (Frame(" to=", 'NAME<|message|><atem:function_calls>\n<atem:invoke name="NAME">\n',
                   "</atem:invoke>\n</atem:function_calls>",
                   between="<|eom|><|start|>assistant to=", arguments="tags",
                   argument='<atem:parameter name="KEY">', end="</atem:parameter>\n",
                   turn="<|start|>assistant"),),
    "muse-spark": (_together("<atem:function_calls>|->|\n", "</atem:function_calls>", _tags(
        '<atem:invoke name="NAME">\n', '<atem:parameter name="KEY">', "</atem:parameter>\n",
        "</atem:invoke>\n"), ""),),
}  # fmt: skip

# Of families in which content has a beginning.
CONTENT: dict[str, ContentFrame] = {
    "harmony": ContentFrame(("<|channel|>final<|message|>",), "<|start|>assistant"),
    "command-a": ContentFrame(("<|START_RESPONSE|>", "<|START_TEXT|>")),
    "kimi-k3": ContentFrame(("<|open|>response<|sep|>",)),
    "solar-open": ContentFrame(("<|content|>",), "<|begin|>assistant"),
    "hyperclovax": ContentFrame(("\n",), "\n<|im_start|>assistant"),
    "functionary-3.2": ContentFrame((">>>all\n",)),
    "muse": ContentFrame((" to=user<|message|>",), "<|start|>assistant"),
}


def frame_of(form: AnswerFormat, special: Collection[str]) -> tuple[Frame, ToolFormat] | None:
    """How the calls of a format are written, and read; ``None`` if that is not known."""
    found = FRAMES.get(form.name) if form.name != "own" else _own(form.calls[0])
    if not found:
        return None
    frame = next((each for each in found if all(t in special for t in each.needs)), found[-1])
    reads = frame.reads or next((each for each in form.calls if each.open == frame.marker), None)
    return None if reads is None else (frame, reads)


def _own(form: ToolFormat) -> tuple[Frame, ...]:
    """The frame of a user's own format."""
    frames = {"json": _object(), "python": _PYTHON, "xml": _XML}
    if not isinstance(form.body, str):
        return ()
    frame = frames[form.body]
    if form.body == "python":
        return (_together(f"{form.open}|->|[", f"]{form.close}", frame),)
    if form.open and form.close:
        return (_wrapped(form.open, form.close, frame),)
    if form.body == "xml":
        return (replace(frame, marker=form.open, open="\n", between="\n"),)
    return (_together(f"{form.open}|->|[", "]", frame),)
