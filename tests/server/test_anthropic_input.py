"""Conversations as clients of Anthropic's API send them, and what an engine is given."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine.conversation import checked_messages
from mlx_engine.limits import DEFAULT_LIMITS
from mlx_engine.server.anthropic import Messages
from mlx_engine.server.anthropic_input import Conversation, signature
from mlx_engine.server.asked import Fields
from mlx_engine.server.volatile import steady

TEXT = {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "a"}}
OTHER = {"type": "tool_use", "id": "toolu_2", "name": "read", "input": {}}
IMAGE = {"type": "image", "source": {"type": "base64", "data": ""}}
FUNCTION = {"type": "function", "function": {"name": "read", "arguments": {"path": "a"}}}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def result(content: Any, call: str = "toolu_1", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call, "content": content, **fields}


def tool(text: str, call: str = "toolu_1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": text}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "user", "content": "one"}, [{"role": "user", "content": "one"}]),
        (user(TEXT, TEXT), [{"role": "user", "content": "one\n\none"}]),
        ({"role": "system", "content": [TEXT]}, [{"role": "system", "content": "one"}]),
        ({"role": "system", "content": "one"}, [{"role": "system", "content": "one"}]),
        (user(result("text")), [tool("text")]),
        (user(result([TEXT, TEXT])), [tool("one\none")]),
        (user(result(None)), [tool("")]),
        (user(result([])), [tool("")]),
        (user(result("text", is_error=False)), [tool("text")]),
        (user(result("no file", is_error=True)), [tool("Error: no file")]),
        (user(result([IMAGE])), [tool("[images cannot be shown to this model]")]),
        (
            user(result([{"type": "tool_reference", "tool_name": "Web"}])),
            [tool("The tool Web may be called now.")],
        ),
        (
            user(TEXT, result("b", "toolu_2"), result("a")),
            [tool("b", "toolu_2"), tool("a"), {"role": "user", "content": "one"}],
        ),
        (
            user({"type": "document", "source": {"type": "text", "data": "page"}}, TEXT),
            [{"role": "user", "content": "page\n\none"}],
        ),
        (
            user({"type": "search_result", "title": "t", "source": "s", "content": [TEXT]}),
            [{"role": "user", "content": "t\n\none"}],
        ),
        (
            {"role": "assistant", "content": [TEXT, CALL, TEXT]},
            [
                {
                    "role": "assistant",
                    "content": "oneone",
                    "tool_calls": [{**FUNCTION, "id": "toolu_1"}],
                }
            ],
        ),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "another server's"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "thinking", "thinking": "", "signature": signature(", né")},
                    {"type": "thinking", "thinking": "", "signature": "mlx-engine.?"},
                    {"type": "server_tool_use", "id": "1", "name": "web", "input": {}},
                    TEXT,
                ],
            },
            [{"role": "assistant", "content": "one", "reasoning_content": "hm, né"}],
        ),
    ],
)
def test_every_shape(given: Any, expected: list[Any]) -> None:
    found = Conversation(None, [given]).messages
    assert found == expected
    checked_messages(found, DEFAULT_LIMITS)


def test_system() -> None:
    assert Conversation("one", []).messages == [{"role": "system", "content": "one"}]
    assert Conversation([TEXT, TEXT], []).messages == [{"role": "system", "content": "one\n\none"}]
    assert Conversation("", []).messages == Conversation([], []).messages == []


def test_what_is_left_out_is_said() -> None:
    blocks = [result([IMAGE, IMAGE]), {"type": "container_upload", "file_id": "1"}]
    assert Conversation(None, [user(*blocks)]).skipped == [
        "blocks of type 'image'",
        "blocks of type 'container_upload'",
    ]


def test_each_request_of_a_session_goes_on_from_the_last() -> None:
    """However the client moves marks about, and whether content is blocks or text."""
    turns: list[Any] = [
        user(TEXT, {"type": "text", "text": "Read a"}),
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, CALL, OTHER]},
        user(result("b", "toolu_2"), result([TEXT])),
    ]
    again = [
        user({"type": "text", "text": "one"}, {"type": "text", "text": "Read a"}),
        {"role": "system", "content": "Be brief."},
        *turns[2:],
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks"},
    ]
    first, second = (Conversation([TEXT], each).messages for each in (turns, again))
    assert second[: len(first)] == first


@pytest.mark.parametrize(
    ("messages", "begun"),
    [
        ([user(TEXT)], False),
        ([user(TEXT), {"role": "assistant", "content": "It is"}], True),
        ([user(TEXT), {"role": "assistant", "content": [TEXT, CALL]}], False),
        ([user(TEXT), {"role": "assistant", "content": []}], False),
    ],
)
def test_an_answer_that_is_begun(messages: Any, begun: bool) -> None:
    thinks = {"thinking": {"type": "enabled", "budget_tokens": 5}}
    asked = Messages().read(Fields({"messages": messages, **thinks}))
    assert asked.chat.get("continue_final_message", False) is begun
    assert asked.chat["thinking"] is not begun


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("x-anthropic-billing-header: cc_version=2.1; cch=0a1;\n\nYou are", "You are"),
        ("x-anthropic-billing-header: cc_version=2.1; cch=0a1;", ""),
        ("You are\nx-anthropic-billing-header: is a name", None),
        ("Today is 2026-11-28T15:04:05.123Z, a day.", "Today is 2026-11-28, a day."),
        ("The current date and time: 2026-11-28 15:04", "The current date and time: 2026-11-28"),
        ("Now: 2026-11-28T15:04:05+02:00\nGo", "Now: 2026-11-28\nGo"),
        ("It failed at 2026-11-28T15:04:05Z in the log", None),
        ("today\n2026-11-28T15:04:05Z", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_volatile_text(text: str, left: str | None, role: str) -> None:
    if role == "user" or left is None:
        left = text
    other = {"role": "tool", "content": [1, {"type": "x"}, {"type": "text", "text": text}]}
    given: list[Any] = [
        {"role": role, "content": text},
        {"role": role, "content": [{"type": "text", "text": text}, 7]},
        {"role": role, "content": None},
        other,
        "none",
    ]
    found = steady(given)
    assert found[0] == {"role": role, "content": left}
    assert found[1]["content"] == [{"type": "text", "text": left}, 7]
    assert found[2:] == given[2:]


def test_volatile_text_is_looked_for_in_front_alone() -> None:
    text = "now 2026-11-2 today current " * 500_000  # all of it would take very long
    message = {"role": "system", "content": text + "now: 2026-11-28T15:04:05Z"}
    assert steady([message]) == [message]
