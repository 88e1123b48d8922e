"""Chat templates of a few lines, each with a trait that real ones have."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tests.tiny import make_tokenizer

TOOLS = (
    "{%- if tools %}{{ '<|im_start|>tools\\n' }}{% for tool in tools %}"
    "{{ (tool | tojson) + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
)
CALLS = (
    "{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) "
    "+ '</tool_call>' }}{% endfor %}"
)
ITEMS = (
    "{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}{{ '<' + key + '>' + value | string }}"
    "{% endfor %}{{ '</tool_call>' }}{% endfor %}"
)
STRINGS = (
    "{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name "
    "+ call.function.arguments + '</tool_call>' }}{% endfor %}"
)
SAY = "{{- '<|im_start|>' + m.role + '\\n' + m.content }}" + CALLS + "{{- '<|im_end|>\\n' }}"
ASK = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def loop(body: str, before: str = TOOLS, after: str = ASK) -> str:
    return f"{before}{{%- for m in messages %}}{body}{{% endfor %}}{after}"


def only(*roles: str, otherwise: str = "") -> str:
    return f"{{%- if m.role in {list(roles)} %}}{SAY}{{% else %}}{otherwise}{{% endif %}}"


def raising(condition: str, words: str, body: str = SAY) -> str:
    raised = "{{ raise_exception('" + words + "') }}"
    return f"{{%- if {condition} %}}{raised}{{% endif %}}{body}"


KNOWN = ("system", "user", "assistant", "tool")
TEMPLATES = {
    "plain": loop(SAY),
    "no branch for developer": loop(only(*KNOWN)),
    "raises on unknown roles": loop(only(*KNOWN, otherwise="{{ raise_exception('no role') }}")),
    "knows developer": loop(only(*KNOWN, "developer")),
    "items of arguments": loop(SAY.replace(CALLS, ITEMS)),
    "arguments as text": loop(SAY.replace(CALLS, STRINGS)),
    "ids of nine": loop(
        raising(
            "m.tool_call_id is defined and m.tool_call_id | length != 9",
            "Tool call IDs should be alphanumeric strings with length 9!",
            SAY.replace(
                CALLS,
                "{%- for call in m.tool_calls or [] %}"
                + raising(
                    "call.id is not defined or call.id | length != 9",
                    "Tool call IDs should be alphanumeric strings with length 9!",
                    "{{ '[' + call.id + (call.function | tojson) + ']' }}",
                )
                + "{% endfor %}",
            )
            + "{{ m.tool_call_id }}",
        )
    ),
    "needs tools": loop(SAY, "{%- for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}"),
    "hides calls and results": loop(only("system", "user", "assistant").replace(CALLS, "")),
    "system at the beginning": loop(
        raising("m.role == 'system' and not loop.first", "System message must be at the beginning.")
    ),
    "first system only": loop("{%- if m.role != 'system' or loop.first %}" + SAY + "{% endif %}"),
    "no system": loop(raising("m.role == 'system'", "System role not supported")),
    "turns": (
        TOOLS
        + "{%- set ns = namespace(n=0) %}{%- for m in messages %}"
        + "{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
        + "{%- if (m.role == 'user') != (ns.n % 2 == 0) %}"
        + "{{- raise_exception('roles must alternate') }}{% endif %}"
        + "{%- set ns.n = ns.n + 1 %}{% endif %}"
        + SAY
        + "{% endfor %}"
        + ASK
    ),
    "one call": loop(
        SAY.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
    ),
    "raises on two calls": loop(
        raising("m.tool_calls and m.tool_calls | length > 1", "only single tool-calls at once")
    ),
    "by position": loop(
        "{%- if m.role == 'tool' %}{{ '<result>' + m.content + '</result>' }}{% else %}"
        + SAY
        + "{% endif %}"
    ),
    "strips": loop(SAY.replace("m.content", "(m.content | trim)")),
    "parameters unlooked": loop(
        SAY,
        "{%- for tool in tools or [] %}{{ tool.function.name + tool.function.description }}"
        "{{ tool.function.parameters.properties | tojson }}{% endfor %}",
    ),
}
# Reasoning, as families have it.
THINKS = loop(
    "{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}"
    "{% endif %}{{ m.content }}" + CALLS + "{{ '<|im_end|>\\n' }}",
    after="{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
)


def wrapped(template: object, **options: object) -> TokenizerWrapper:
    """A real tokenizer with this template."""
    fast = make_tokenizer()
    fast.chat_template = template
    return TokenizerWrapper(fast, **options)
