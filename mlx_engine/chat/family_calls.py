"""One call, as families write it: what the table of families is made of."""

from __future__ import annotations

import re
from dataclasses import replace

from mlx_engine.chat.answer_format import ToolFormat
from mlx_engine.chat.call_syntax import RUNS_CODE, Body, CodeCall, HeadedCall, JSONCall
from mlx_engine.chat.tagged_call import TaggedCall

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
SEED = TaggedCall(
    head=QWEN_CODER.head,
    argument=QWEN_CODER.argument,
    close="</parameter>",
    end="</function>",
    after=("</seed:tool_call>",),
    newlines=True,
    is_marked=True,
)
MISTRAL: tuple[Body, ...] = (
    HeadedCall(
        r"(?P<name>[^\s\[\]{}\",]{1,256})\s{0,16}(?:\[CALL_ID\]\s{0,16}(?P<id>[\w.:\-]{1,256}))?"
        r"\s{0,16}(?:\[ARGS\])?\s{0,16}(?=\{)"
    ),
    JSONCall(late_id=True),
)


def arguments_with_keys(prefix: str = "") -> TaggedCall:
    """``name<arg_key>a</arg_key><arg_value>1</arg_value>``, with a prefix in the tags' names."""
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    end = f"</{prefix}tool_call>"
    return TaggedCall(
        head=rf"(?P<name>[^\s<>{{}}\[\]]{{1,256}})(?=\s{{0,64}}(?:<{key}>|{end}))",
        argument=rf"<{key}>{{key}}</{key}>\s{{0,64}}<{value}>",
        close=f"</{value}>",
        after=(end,),
    )


def invocations(
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


def deepseek(head: str, tail: str = "") -> tuple[ToolFormat, ...]:
    """Heads with the name between the markers of DeepSeek, and JSON behind them."""
    body = HeadedCall(
        head, start="<｜tool▁call▁begin｜>", tail=tail, end="<｜tool▁call▁end｜>", is_marked=True
    )
    calls = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", (body,), True)
    return (ToolFormat(*calls),)


KIMI = HeadedCall(
    r"<\|tool_call_begin\|>\s{0,16}(?P<id>(?:functions\.)?(?P<name>[^<\s]{1,256}?)"
    r"(?::\d{1,9}|(?P<wrong>\.\d{1,9})|(?=[\s<])))\s{0,16}<\|tool_call_argument_begin\|>",
    start=r"<\|tool_call_begin\|>",
    end="<|tool_call_end|>",
    is_marked=True,
)
M3 = "]<]minimax[>["
MINIMAX_M3 = TaggedCall(
    head=re.escape(M3) + rf"<invoke name=(?P<name>{_ARROW})>",
    argument=re.escape(M3) + r"<(?!/){key}>",
    close=M3 + "</{key}>",
    end=M3 + "</invoke>",
    element=M3,
)

CALL_NAME = r"call:(?P<name>[\w.\-:/]{1,256})\s{0,16}(?=\{)"
DSML = invocations("｜DSML｜", extra=r'(?:\s{1,4}string="?(?P<type>true|false)"?)?')
_K3_CALL = r'<\|open\|>call tool="(?P<name>[^"\n]{1,256})"[^<\n]{0,64}<\|sep\|>'
KIMI_K3: tuple[Body, ...] = (
    HeadedCall(
        _K3_CALL + r"\s{0,64}<\|open\|>json[^<\n]{0,64}<\|sep\|>",
        tail=r"<\|close\|>json<\|sep\|>",
        end="<|close|>call<|sep|>",
        entities=True,
    ),
    TaggedCall(
        head=_K3_CALL,
        argument=r'<\|open\|>argument key="{key}"(?:\s{1,4}type="(?P<type>\w{1,16})")?<\|sep\|>',
        close="<|close|>argument<|sep|>",
        end="<|close|>call<|sep|>",
        entities=True,
    ),
)
SOLAR = HeadedCall(
    r"<\|tool_call:begin\|>\s{0,16}(?:(?P<id>[\w.:\-]{1,256})\s{0,16})?<\|tool_call:name\|>"
    r"(?P<name>[^<\n]{1,256})<\|tool_call:args\|>",
    start=r"<\|tool_call:begin\|>",
    end="<|tool_call:end|>",
    is_marked=True,
)
HUNYUAN_3 = TaggedCall(
    head=r"<tool_call:opensource>\s{0,64}(?P<name>[^\s<>{}]{1,256})\s{0,64}<tool_sep:opensource>",
    argument=r"<arg_key:opensource>{key}</arg_key:opensource>\s{0,64}<arg_value:opensource>",
    close="</arg_value:opensource>",
    end="</tool_call:opensource>",
)
_ATEM = invocations("atem:", extra=r"[^<>\n]{0,64}")
_ATEM_END = r"</atem:function_calls>"
# The first of a message to a tool stands behind its address.
MUSE: tuple[Body, ...] = (
    replace(
        _ATEM,
        head=r"[\w.\-]{1,256}<\|message\|>\s{0,64}<atem:function_calls>\s{0,64}" + _ATEM.head,
        start="",
        tail=_ATEM_END,
    ),
    replace(_ATEM, tail=_ATEM_END),
)
PYTHON_TAG = ToolFormat("<|python_tag|>", "", (CodeCall(),), only_with=RUNS_CODE)
FUNCTIONARY = HeadedCall(r"(?P<name>[\w.\-]{1,256})\n\s{0,64}(?=\{)")
FUNCTIONARY_CODE = ToolFormat(">>>python\n", "", (CodeCall(end=">>>"),), only_with=RUNS_CODE)
APERTUS = HeadedCall(r'\{\s{0,64}"(?P<name>[^"\\]{1,256})"\s{0,16}:\s{0,64}(?=\{)', tail=r"\}")

STEP_3 = TaggedCall(
    head=r"(?:<｜tool_call_begin｜>function<｜tool_sep｜>\s{0,64})?"
    rf"<steptml:invoke name=(?P<name>{_ARROW})>",
    argument=r"<steptml:parameter name=\"?{key}\"?>",
    close="</steptml:parameter>",
    end="</steptml:invoke>",
    tail="<｜tool_call_end｜>",
)
HUNYUAN: tuple[Body, ...] = (
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
JSON_IN_TAG = HeadedCall(
    rf"<function=(?P<name>{_ARROW})>\s{{0,64}}(?=\{{)", end="</function>", is_marked=True
)
MINICPM_5 = TaggedCall(
    head=r"<function name=\"?(?P<name>[^<>\n\"]{1,256})\"?>",
    argument=r"<param name=\"?{key}\"?>",
    close="</param>",
    end="</function>",
    is_marked=True,
    cdata=True,
)
