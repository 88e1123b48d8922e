"""The families of models: how each writes its calls and its reasoning, and how its template shows.

Facts about the markers are those of the models' own chat templates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mlx_engine.chat.answer_format import ReasoningFormat, ToolFormat
from mlx_engine.chat.bodies import Body, HeadedCall, JSONCall, PythonCall, TaggedCall
from mlx_engine.chat.literal import FUNCTION_GEMMA, GEMMA


@dataclass(frozen=True, slots=True)
class Family:
    """A line of the table.

    Attributes:
        name: for people, and for the option ``tool_format``.
        marks: texts of which a template of the family has all of one group.
        calls: how its calls are written.
        drop: markers around the content.
        reasoning: the name of its reasoning format, where its templates do not show it.
        structure: of its answers.
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    calls: tuple[ToolFormat, ...] = ()
    drop: tuple[str, ...] = ()
    reasoning: str = ""
    structure: Literal["tagged", "harmony"] = "tagged"


REASONING: dict[str, ReasoningFormat] = {
    "think": ReasoningFormat("<think>", "</think>", "\n</think>\n\n"),
    "seed-think": ReasoningFormat("<seed:think>", "</seed:think>"),
    "mistral-think": ReasoningFormat("[THINK]", "[/THINK]"),
    "command": ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>"),
    "harmony": ReasoningFormat(
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "gemma-4": ReasoningFormat("<|channel>thought\n", "<channel|>"),
    "kimi-k3": ReasoningFormat(
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        "<|close|>think<|sep|><|open|>response<|sep|>",
    ),
    "minicpm-3": ReasoningFormat("<|thought_start|>", "<|thought_end|>"),
    "granite-3.2": ReasoningFormat("Here is my thought process:", "Here is my response:"),
    "apertus": ReasoningFormat("<|inner_prefix|>", "<|inner_suffix|>"),
    "longcat-think": ReasoningFormat("<longcat_think>", "</longcat_think>"),
    "think-start": ReasoningFormat("<|think:start|>", "<|think:end|>"),
}

_ARROW = r"[^<>\n]{1,256}"
QWEN_CODER = TaggedCall(
    head=rf"<function=(?P<name>{_ARROW})>",
    argument="<parameter={key}>",
    close="</parameter>",
    end="</function>",
    after=("</tool_call>",),
    newlines=True,
    is_marked=True,
)
_SEED = TaggedCall(
    head=QWEN_CODER.head,
    argument=QWEN_CODER.argument,
    close="</parameter>",
    end="</function>",
    after=("</seed:tool_call>",),
    newlines=True,
    is_marked=True,
)
_MISTRAL: tuple[Body, ...] = (
    HeadedCall(
        r"(?P<name>[^\s\[\]{}\",]{1,256})\s{0,16}(?:\[CALL_ID\]\s{0,16}(?P<id>[\w.:\-]{1,256}))?"
        r"\s{0,16}(?:\[ARGS\])?\s{0,16}(?=\{)"
    ),
    JSONCall(late_id=True),
)


def _arguments_with_keys(prefix: str = "") -> TaggedCall:
    """``name<arg_key>a</arg_key><arg_value>1</arg_value>``, with a prefix in the tags' names."""
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    end = f"</{prefix}tool_call>"
    return TaggedCall(
        head=rf"(?P<name>[^\s<>{{}}\[\]]{{1,256}})(?=\s{{0,64}}(?:<{key}>|{end}))",
        argument=rf"<{key}>{{key}}</{key}>\s{{0,64}}<{value}>",
        close=f"</{value}>",
        after=(end,),
    )


def _invocations(
    before: str, name: str = "parameter", extra: str = "", after: str = ""
) -> TaggedCall:
    """``<invoke name="f"><parameter name="a">1</parameter></invoke>``, each tag behind a prefix."""
    open_, shut = re.escape(f"<{before}"), f"</{before}"
    return TaggedCall(
        head=rf"{open_}invoke name=(?P<name>{_ARROW})>",
        argument=rf"{open_}{name} name=\"?{{key}}\"?{extra}>",
        close=f"{shut}{name}>",
        end=f"{shut}invoke>",
        after=(re.escape(after),) if after else (),
    )


def _deepseek(head: str, tail: str = "") -> tuple[ToolFormat, ...]:
    body = HeadedCall(
        head, start="<｜tool▁call▁begin｜>", tail=tail, end="<｜tool▁call▁end｜>", is_marked=True
    )
    calls = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", (body,), True)
    return (ToolFormat(*calls),)


_KIMI = HeadedCall(
    r"<\|tool_call_begin\|>\s{0,16}(?P<id>(?:functions\.)?(?P<name>[^<\s]{1,256}?)"
    r"(?::\d{1,9}|(?P<wrong>\.\d{1,9})|(?=[\s<])))\s{0,16}<\|tool_call_argument_begin\|>",
    start=r"<\|tool_call_begin\|>",
    end="<|tool_call_end|>",
    is_marked=True,
)
_M3 = "]<]minimax[>["

_CALL_NAME = r"call:(?P<name>[\w.\-:/]{1,256})\s{0,16}(?=\{)"
_DSML = _invocations("｜DSML｜", extra=r'(?:\s{1,4}string="?(?P<type>true|false)"?)?')
_K3_CALL = r'<\|open\|>call tool="(?P<name>[^"\n]{1,256})"[^<\n]{0,64}<\|sep\|>'
_KIMI_K3: tuple[Body, ...] = (
    HeadedCall(
        _K3_CALL + r"\s{0,64}<\|open\|>json[^<\n]{0,64}<\|sep\|>",
        tail=r"<\|close\|>json<\|sep\|>",
        end="<|close|>call<|sep|>",
    ),
    TaggedCall(
        head=_K3_CALL,
        argument=r'<\|open\|>argument key="{key}"(?:\s{1,4}type="(?P<type>\w{1,16})")?<\|sep\|>',
        close="<|close|>argument<|sep|>",
        end="<|close|>call<|sep|>",
    ),
)
_APERTUS = HeadedCall(r'\{\s{0,64}"(?P<name>[^"\\]{1,256})"\s{0,16}:\s{0,64}(?=\{)', tail=r"\}")

_STEP_3 = TaggedCall(
    head=r"(?:<｜tool_call_begin｜>function<｜tool_sep｜>\s{0,64})?"
    rf"<steptml:invoke name=(?P<name>{_ARROW})>",
    argument=r"<steptml:parameter name=\"?{key}\"?>",
    close="</steptml:parameter>",
    end="</steptml:invoke>",
    tail="<｜tool_call_end｜>",
)
_HUNYUAN: tuple[Body, ...] = (
    JSONCall(),
    HeadedCall(
        rf"<tool_call>\s{{0,64}}(?P<name>{_ARROW})\n\s{{0,64}}```(?:json)?\s{{0,64}}(?=\{{)",
        tail="```",
        end="</tool_call>",
    ),
    TaggedCall(
        head=r"<tool_call>\s{0,64}(?P<name>[^\s<>{}]{1,256})\s{0,64}(?:<tool_sep>|(?=<arg_key>))",
        argument=r"<arg_key>{key}</arg_key>\s{0,64}<arg_value>",
        close="</arg_value>",
        end="</tool_call>",
    ),
)
_JSON_IN_TAG = HeadedCall(
    rf"<function=(?P<name>{_ARROW})>\s{{0,64}}(?=\{{)", end="</function>", is_marked=True
)
_MINICPM_5 = TaggedCall(
    head=r"<function name=\"?(?P<name>[^<>\n\"]{1,256})\"?>",
    argument=r"<param name=\"?{key}\"?>",
    close="</param>",
    end="</function>",
    is_marked=True,
)

FAMILIES: tuple[Family, ...] = (
    Family("step-3", (("steptml:invoke",),),
           (ToolFormat("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>", (_STEP_3,), True),)),
    Family("hunyuan", (("<tool_sep>",), ("<tool_calls>", "<answer>")),
           (ToolFormat("<tool_calls>", "</tool_calls>", _HUNYUAN),),
           drop=("<answer>", "</answer>")),
    Family("minicpm-3", (("<|tool_call_start|>", "<|thought_start|>"),),
           (ToolFormat("<|tool_call_start|>", "<|tool_call_end|>", "python"),)),
    Family("minicpm-5", (("<function name=", "<param name="),),
           (ToolFormat("<tool_call>", "</tool_call>", (_MINICPM_5,)),)),
    Family("command-r", (("Action:", "```json", "directly_answer"),),
           (ToolFormat("Action:", "", (JSONCall(),)),)),
    Family("gemma-3", (("tool_code",), ("<start_of_turn>", "func_name1(")),
           (ToolFormat("```tool_code", "```", "python"), ToolFormat("", "", "python"),
            ToolFormat(""))),
    Family("deepseek-v3.2", (("DSML",),),
           (ToolFormat("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", (_DSML,)),
            ToolFormat("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", (_DSML,)))),
    Family("kimi-k3", (("<|open|>", "<|close|>", "<|sep|>"),),
           (ToolFormat("<|open|>tools<|sep|>", "<|close|>tools<|sep|>", _KIMI_K3, True),),
           drop=("<|open|>response<|sep|>", "<|close|>response<|sep|>",
                 "<|close|>message<|sep|>", "<|end_of_msg|>"),
           reasoning="kimi-k3"),
    Family("gemma-4", (("<|tool_call>",),),
           (ToolFormat("<|tool_call>", "<tool_call|>", (HeadedCall(_CALL_NAME, dialect=GEMMA),)),),
           reasoning="gemma-4"),
    Family("functiongemma", (("<start_function_call>",),),
           (ToolFormat("<start_function_call>", "<end_function_call>",
                       (HeadedCall(_CALL_NAME, dialect=FUNCTION_GEMMA),)),)),
    Family("apertus", (("<|tools_prefix|>",),),
           (ToolFormat("<|tools_prefix|>", "<|tools_suffix|>", (_APERTUS,), True),),
           reasoning="apertus"),
    Family("nemotron", (("<TOOLCALL>",),), (ToolFormat("<TOOLCALL>", "</TOOLCALL>"),)),
    Family("phi-4-mini", (("<|tool_call|>", "<|/tool_call|>"), ("<|tool|>", "<|/tool|>")),
           (ToolFormat("<|tool_call|>", "<|/tool_call|>"),)),
    Family("granite-3", (("<|tool_call|>",),),
           (ToolFormat("<|tool_call|>"), ToolFormat("<tool_call>", "</tool_call>")),
           drop=("<response>", "</response>")),
    Family("longcat", (("<longcat_tool_call>",),),
           (ToolFormat("<longcat_tool_call>", "</longcat_tool_call>",
                       (_arguments_with_keys("longcat_"), JSONCall())),)),
    Family("muse-spark", (("<atem:function_calls>",),),
           (ToolFormat("<atem:function_calls>", "</atem:function_calls>",
                       (_invocations("atem:", extra=r"[^<>\n]{0,64}"),)),)),
    Family("minimax-m1", (("<tool_calls>",),), (ToolFormat("<tool_calls>", "</tool_calls>"),)),
    Family("minimax-m3", ((_M3,),), (ToolFormat(f"{_M3}<tool_call>", f"{_M3}</tool_call>",
           (TaggedCall(
               head=re.escape(_M3) + rf"<invoke name=(?P<name>{_ARROW})>",
               argument=re.escape(_M3) + r"<(?!/){key}>",
               close=_M3 + "</{key}>",
               end=_M3 + "</invoke>",
           ),)),)),
    Family("minimax-m2", (("<minimax:tool_call>",),),
           (ToolFormat("<minimax:tool_call>", "</minimax:tool_call>",
                       (_invocations("", after="</minimax:tool_call>"),)),)),
    Family("glm", (("<arg_key>",),),
           (ToolFormat("<tool_call>", "</tool_call>", (_arguments_with_keys(), JSONCall())),)),
    Family("deepseek-r1", (("<｜tool▁sep｜>", "```json"),),
           _deepseek(r"<｜tool▁call▁begin｜>(?:function)?<｜tool▁sep｜>(?P<name>[^\n`<]{1,256})"
                     r"\n\s{0,16}(?:```(?:json)?\s{1,16})?(?=[^`\s])", r"```")),
    Family("deepseek-v3.1", (("<｜tool▁sep｜>",),),
           _deepseek(r"<｜tool▁call▁begin｜>(?P<name>[^\n`<]{1,256})<｜tool▁sep｜>")),
    Family("kimi-k2", (("<|tool_calls_section_begin|>",),),
           (ToolFormat("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
                       (_KIMI,), True),)),
    Family("command-a", (("<|START_ACTION|>",),),
           (ToolFormat("<|START_ACTION|>", "<|END_ACTION|>", "json", True),),
           drop=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
           reasoning="command"),
    Family("lfm2", (("<|tool_call_start|>",), ("<|tool_list_start|>",)),
           (ToolFormat("<|tool_call_start|>", "<|tool_call_end|>", (PythonCall(), JSONCall())),)),
    Family("harmony", (("<|channel|>", "<|message|>", "<|start|>"),), structure="harmony",
           calls=(ToolFormat("<|channel|>"),), reasoning="harmony"),
    Family("seed-oss", (("<seed:tool_call>",),),
           (ToolFormat("<seed:tool_call>", "</seed:tool_call>", (_SEED,)),)),
    Family("qwen3-coder", (("<function=", "<tool_call>"),),
           (ToolFormat("<tool_call>", "</tool_call>", (QWEN_CODER, JSONCall())),)),
    Family("mistral", (("[TOOL_CALLS]",),), (ToolFormat("[TOOL_CALLS]", "", _MISTRAL),)),
    Family("hermes", (("<tool_call>",),),
           (ToolFormat("<tool_call>", "</tool_call>", (JSONCall(), _JSON_IN_TAG, QWEN_CODER)),)),
    Family("llama-4", (("<|python_start|>",), ("<|header_start|>", "tools")),
           (ToolFormat("<|python_start|>", "<|python_end|>", "python"),
            ToolFormat("", "", "python"),
            ToolFormat(""))),
    Family("llama-3", (("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
           (ToolFormat("<|python_tag|>", "", (JSONCall(), PythonCall(), _JSON_IN_TAG)),
            ToolFormat(""))),
)  # fmt: skip
