"""The families of models: how each writes its calls and its reasoning, and how its template shows.

Facts about the markers are those of the models' own chat templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_engine.chat.answer_format import ReasoningFormat, ToolFormat
from mlx_engine.chat.call_syntax import HeadedCall, JSONCall, PythonCall
from mlx_engine.chat.family_calls import (
    APERTUS,
    CALL_NAME,
    DSML,
    FUNCTIONARY,
    FUNCTIONARY_CODE,
    HUNYUAN,
    HUNYUAN_3,
    JSON_IN_TAG,
    KIMI,
    KIMI_K3,
    M3,
    MINICPM_5,
    MINIMAX_M3,
    MISTRAL,
    MUSE,
    PYTHON_TAG,
    QWEN_CODER,
    SEED,
    SOLAR,
    STEP_3,
    arguments_with_keys,
    deepseek,
    invocations,
)
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
        ("<|open|>response<|sep|>", "<|open|>tools<|sep|>"),
    ),
    "minicpm-3": ReasoningFormat("<|thought_start|>", "<|thought_end|>"),
    "granite-3.2": ReasoningFormat("Here is my thought process:", "Here is my response:"),
    "apertus": ReasoningFormat("<|inner_prefix|>", "<|inner_suffix|>"),
    "longcat-think": ReasoningFormat("<longcat_think>", "</longcat_think>"),
    "think-start": ReasoningFormat("<|think:start|>", "<|think:end|>"),
    "minimax-m3": ReasoningFormat("<mm:think>", "</mm:think>"),
    "hunyuan-3": ReasoningFormat("<think:opensource>", "</think:opensource>"),
    "apriel": ReasoningFormat(
        "Here are my reasoning steps:\n",
        "[BEGIN FINAL RESPONSE]",
        "\n[BEGIN FINAL RESPONSE]\n",
    ),
    "solar-open": ReasoningFormat(
        "<|think|>", "<|end|>", "<|end|><|begin|>assistant<|content|>", ("<|begin|>assistant",)
    ),
    "hyperclovax": ReasoningFormat("/think\n", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n"),
    "muse": ReasoningFormat(
        " to=self<|message|>", "<|eom|>", "<|eom|><|start|>assistant to=user<|message|>"
    ),
}

FAMILIES: tuple[Family, ...] = (
    Family("step-3", (("steptml:invoke",),),
           (ToolFormat("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>", (STEP_3,), True),)),
    Family("minicpm-5", (("<function name=", "<param name="),),
           (ToolFormat("<tool_call>", "</tool_call>", (MINICPM_5,)),)),
    Family("hunyuan-3", (("<tool_sep{}>", ":opensource"), ("<tool_sep:opensource>",)),
           (ToolFormat("<tool_calls:opensource>", "</tool_calls:opensource>", (HUNYUAN_3,)),),
           reasoning="hunyuan-3"),
    Family("hunyuan", (("<tool_sep>",), ("<tool_calls>", "<answer>")),
           (ToolFormat("<tool_calls>", "</tool_calls>", HUNYUAN),),
           drop=("<answer>", "</answer>")),
    Family("minicpm-3", (("<|tool_call_start|>", "<|thought_start|>"),),
           (ToolFormat("<|tool_call_start|>", "<|tool_call_end|>", "python"),)),
    Family("command-a", (("<|START_ACTION|>",),),
           (ToolFormat("<|START_ACTION|>", "<|END_ACTION|>", "json", True),),
           drop=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
           reasoning="command"),
    Family("command-r", (("Action:", "```json", '"tool_name"'),),
           (ToolFormat("Action:", "", (JSONCall(none=("directly-answer", "directly_answer")),)),)),
    Family("gemma-3", (("tool_code",), ("<start_of_turn>", "func_name1(")),
           (ToolFormat("```tool_code", "```", "python"), ToolFormat("", "", "python"),
            ToolFormat(""))),
    Family("deepseek-v3.2", (("DSML",),),
           (ToolFormat("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", (DSML,)),
            ToolFormat("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", (DSML,)))),
    Family("kimi-k3", (("<|open|>", "<|close|>", "<|sep|>"),),
           (ToolFormat("<|open|>tools<|sep|>", "<|close|>tools<|sep|>", KIMI_K3, True),),
           drop=("<|open|>response<|sep|>", "<|close|>response<|sep|>",
                 "<|close|>message<|sep|>", "<|end_of_msg|>"),
           reasoning="kimi-k3"),
    Family("gemma-4", (("<|tool_call>",),),
           (ToolFormat("<|tool_call>", "<tool_call|>", (HeadedCall(CALL_NAME, dialect=GEMMA),)),),
           drop=("<|channel>thought\n<channel|>", "<|channel>thought<channel|>", "<channel|>"),
           reasoning="gemma-4"),
    Family("functiongemma", (("<start_function_call>",),),
           (ToolFormat("<start_function_call>", "<end_function_call>",
                       (HeadedCall(CALL_NAME, dialect=FUNCTION_GEMMA),)),)),
    Family("apertus", (("<|tools_prefix|>",),),
           (ToolFormat("<|tools_prefix|>", "<|tools_suffix|>", (APERTUS,), True),),
           reasoning="apertus"),
    Family("nemotron", (("<TOOLCALL>",),), (ToolFormat("<TOOLCALL>", "</TOOLCALL>"),)),
    Family("phi-4-mini", (("<|tool_call|>", "<|/tool_call|>"), ("<|tool|>", "<|/tool|>")),
           (ToolFormat("<|tool_call|>", "<|/tool_call|>"),)),
    Family("ernie", (("<response>", "</response>", "<tool_call>", "<think>"),),
           (ToolFormat("<tool_call>", "</tool_call>"),), drop=("<response>", "</response>")),
    Family("granite-3", (("<|tool_call|>",),),
           (ToolFormat("<|tool_call|>"), ToolFormat("<tool_call>", "</tool_call>")),
           drop=("<response>", "</response>")),
    Family("longcat", (("<longcat_tool_call>",),),
           (ToolFormat("<longcat_tool_call>", "</longcat_tool_call>",
                       (arguments_with_keys("longcat_"), JSONCall())),)),
    Family("muse", (("<atem:function_calls>", "to=self"),), (ToolFormat(" to=", "", MUSE),),
           drop=(" to=user<|message|>", "<|start|>assistant", "<|eom|>", "<|eot|>"),
           reasoning="muse"),
    Family("muse-spark", (("<atem:function_calls>",),),
           (ToolFormat("<atem:function_calls>", "</atem:function_calls>",
                       (invocations("atem:", extra=r"[^<>\n]{0,64}"),)),)),
    Family("apriel", (("[BEGIN FINAL RESPONSE]",),), (ToolFormat("<tool_calls>", "</tool_calls>"),),
           drop=("[END FINAL RESPONSE]",), reasoning="apriel"),
    Family("solar-open", (("<|tool_call:begin|>",),),
           (ToolFormat("<|tool_calls|>", "<|calls|>", (SOLAR,), True),),
           drop=("<|begin|>assistant", "<|content|>", "<|end|>"), reasoning="solar-open"),
    Family("olmo-3", (("<function_calls>", "<functions>"),),
           (ToolFormat("<function_calls>", "</function_calls>", "python", True),)),
    Family("internlm", (("<|action_start|>",),),
           (ToolFormat("<|action_start|><|plugin|>", "<|action_end|>"),
            ToolFormat("<|action_start|> <|plugin|>", "<|action_end|>"))),
    Family("hyperclovax", (("-> tool/function_call",),),
           (ToolFormat(" -> tool/function_call\n"),), drop=("<|im_start|>assistant", "<|im_end|>"),
           reasoning="hyperclovax"),
    Family("gigachat-3.1", (("<|function_call|>",),), (ToolFormat("<|function_call|>"),)),
    Family("gigachat-3", (("function call", "<|role_sep|>", "<|message_sep|>"),),
           (ToolFormat("<|message_sep|>\n\nfunction call<|role_sep|>\n"),)),
    Family("firefunction", (("functools[",),), (ToolFormat(" functools"), ToolFormat("functools"))),
    Family("functionary-3.2", ((">>>all", "<|start_header_id|>"),),
           (ToolFormat(">>>", "", (FUNCTIONARY,)), FUNCTIONARY_CODE), drop=(">>>all\n",)),
    Family("functionary-3.1", (("{start_tag}={function_name}",), ("<function=", "<|python_tag|>")),
           (ToolFormat("", "", (JSON_IN_TAG,)), PYTHON_TAG)),
    Family("minimax-m1", (("<tool_calls>",),), (ToolFormat("<tool_calls>", "</tool_calls>"),)),
    Family("minimax-m3", ((M3,),),
           (ToolFormat(f"{M3}<tool_call>", f"{M3}</tool_call>", (MINIMAX_M3,)),),
           reasoning="minimax-m3"),
    Family("minimax-m2", (("<minimax:tool_call>",),),
           (ToolFormat("<minimax:tool_call>", "</minimax:tool_call>",
                       (invocations("", after="</minimax:tool_call>"),)),)),
    Family("glm", (("<arg_key>",),),
           (ToolFormat("<tool_call>", "</tool_call>", (arguments_with_keys(), JSONCall())),)),
    Family("deepseek-r1", (("<｜tool▁sep｜>", "```json"),),
           deepseek(r"<｜tool▁call▁begin｜>(?:function)?<｜tool▁sep｜>(?P<name>[^\n`<]{1,256})"
                     r"\n\s{0,16}(?:```(?:json)?\s{1,16})?(?=[^`\s])", r"```")),
    Family("deepseek-v3.1", (("<｜tool▁sep｜>",),),
           deepseek(r"<｜tool▁call▁begin｜>(?P<name>[^\n`<]{1,256})<｜tool▁sep｜>")),
    Family("kimi-k2", (("<|tool_calls_section_begin|>",),),
           (ToolFormat("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
                       (KIMI,), True),)),
    Family("lfm2", (("<|tool_call_start|>",), ("<|tool_list_start|>",)),
           (ToolFormat("<|tool_call_start|>", "<|tool_call_end|>", (PythonCall(), JSONCall())),)),
    Family("harmony", (("<|channel|>", "<|message|>", "<|start|>"),), structure="harmony",
           calls=(ToolFormat("<|channel|>"),), reasoning="harmony"),
    Family("seed-oss", (("<seed:tool_call>",),),
           (ToolFormat("<seed:tool_call>", "</seed:tool_call>", (SEED,)),)),
    Family("qwen3-coder", (("<function=", "<tool_call>"),),
           (ToolFormat("<tool_call>", "</tool_call>", (QWEN_CODER, JSONCall())),)),
    Family("mistral", (("[TOOL_CALLS]",),), (ToolFormat("[TOOL_CALLS]", "", MISTRAL),)),
    Family("hermes", (("<tool_call>",),),
           (ToolFormat("<tool_call>", "</tool_call>", (JSONCall(), JSON_IN_TAG, QWEN_CODER)),)),
    Family("llama-4", (("<|python_start|>",), ("<|header_start|>", "tools")),
           (ToolFormat("<|python_start|>", "<|python_end|>", "python"),
            ToolFormat("", "", "python"),
            ToolFormat(""))),
    Family("llama-3", (("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
           (PYTHON_TAG, ToolFormat("<|python_tag|>", "", (JSONCall(), PythonCall(), JSON_IN_TAG)),
            ToolFormat(""))),
    Family("xlam", (("tool_call_name", '"arguments"'),), (ToolFormat(""),)),
)  # fmt: skip
