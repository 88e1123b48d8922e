"""Anthropic's ``/v1/messages``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.server.answers import Answer
from mlx_engine.server.anthropic_events import (
    MessageEvents,
    Thoughts,
    error_body,
    stop_of,
    usage_of,
)
from mlx_engine.server.anthropic_input import Conversation, choice, functions, signature
from mlx_engine.server.asked import EFFORTS, Asked, Fields, reasoning, switched
from mlx_engine.server.chat_completions import text_of
from mlx_engine.server.failures import Failure
from mlx_engine.server.field_table import MESSAGES, SAMPLING, quiet
from mlx_engine.server.given_constraint import response_format
from mlx_engine.server.openai_values import new_id


class Messages:
    """The API.

    Args:
        name: in logs and metrics.
    """

    table = MESSAGES
    counts_first = True

    def __init__(self, name: str = "messages") -> None:
        self.name = name

    def read(self, fields: Fields) -> Asked:
        """See ``Api``."""
        model = fields.text("model") or ""
        talk = Conversation(fields.take("system"), fields.take("messages", []))
        options = fields.options((*SAMPLING, "max_tokens"))
        if stops := fields.take("stop_sequences"):
            options["stop"] = stops
        output = fields.mapping("output_config")
        wanted = output.get("format") or fields.take("output_format")  # the latter was its beta
        if wanted is not None:
            if not isinstance(wanted, dict):
                said = f"must be an object, not {shown(wanted)}"
                raise InvalidRequest("output_config.format", said)
            fields.form = "output_config.format"
            if constraint := response_format(wanted, fields.form):
                options["constraint"] = constraint
        chat, thoughts = _thinking(fields.mapping("thinking"))
        chat, skipped = _effort(output.get("effort"), chat)
        tools, unknown = functions(fields.take("tools"))
        chosen = choice(fields.mapping("tool_choice"))
        if tools:
            chat |= {"tools": tools, **chosen}
        elif chosen["tool_choice"] not in ("auto", "none"):
            raise InvalidRequest("tool_choice", "a tool must be called, but none is given")
        if talk.is_begun:  # and what has begun is no reasoning
            chat |= {"continue_final_message": True, "thinking": False}
        return Asked(
            model=model,
            options=options,
            messages=talk.messages,
            chat=chat,
            stream=fields.flag("stream"),
            user=_user(fields.take("metadata")),
            ignored=(*fields.ignored(quiet(self.table)), *skipped, *unknown, *talk.skipped),
            extra={"thoughts": thoughts},
        )

    def whole(self, asked: Asked, answers: Sequence[Answer], model: str) -> dict[str, Any]:
        """See ``Api``."""
        result, thoughts = answers[0].result, asked.extra["thoughts"]
        content: list[dict[str, Any]] = []
        if result.reasoning and thoughts == "shown":
            shows = {"thinking": result.reasoning, "signature": signature()}
            content.append({"type": "thinking", **shows})
        elif result.reasoning and thoughts == "omitted":
            shows = {"thinking": "", "signature": signature(result.reasoning)}
            content.append({"type": "thinking", **shows})
        calls = [call for call in result.tool_calls if call.ok]
        if (text := text_of(result)) or not calls:
            content.append({"type": "text", "text": text})
        for call in calls:
            made = {"id": call.id, "name": call.name, "input": call.arguments}
            content.append({"type": "tool_use", **made})
        return {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": content,
            **stop_of(result),
            "usage": usage_of(answers[0]),
        }

    def events(self, asked: Asked, model: str) -> MessageEvents:
        """See ``Api``."""
        return MessageEvents(asked.extra["thoughts"], model)

    def error(self, failure: Failure, request_id: str) -> dict[str, Any]:
        """See ``Api``."""
        return error_body(failure, request_id)


def _thinking(given: dict[str, Any]) -> tuple[dict[str, Any], Thoughts]:
    """Keyword arguments of ``stream_chat``, and what the client gets to see."""
    chat = switched(given)
    if not chat["thinking"]:
        return chat, "hidden"
    return chat, "omitted" if given.get("display") == "omitted" else "shown"


def _effort(effort: object, chat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments with those of an effort, and a remark if there is no such."""
    if effort is None or (isinstance(effort, str) and effort in EFFORTS):
        return reasoning(effort, chat), []
    return chat, ["output_config.effort"]


def _user(metadata: object) -> str:
    """For whom a client asks, as it says itself."""
    user = metadata.get("user_id") if isinstance(metadata, dict) else None
    return user if isinstance(user, str) else ""
