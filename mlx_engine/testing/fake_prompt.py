"""Prompts of a ``FakeEngine`` -> tokens, and the text that its model would get."""

from __future__ import annotations

import json

from mlx_engine.requests import ChatPrompt, TextPrompt
from mlx_engine.testing.fake_tokens import TokenTexts, words


def encode(source: TextPrompt | ChatPrompt, texts: TokenTexts) -> list[int]:
    """The token ids of a prompt.

    A word is a token, of tools as JSON, too; so is the role of each message.
    """
    if isinstance(source, TextPrompt):
        given = source.prompt
        return [texts.token(w) for w in words(given)] if isinstance(given, str) else list(given)
    parts = words(json.dumps(source.offered, default=str)) if source.offered else []
    for message in source.messages:
        parts += [message["role"], *words(str(message.get("content") or ""))]
        parts += [json.dumps(call, default=str) for call in message.get("tool_calls") or ()]
    if not source.continue_final_message:
        parts.append("assistant")
    return [texts.token(part) for part in parts]


def render(source: ChatPrompt) -> str:
    """The text of a conversation, up to where the answer begins."""
    lines = [f"tools: {json.dumps(source.offered, default=str)}"] if source.offered else []
    for message in source.messages:
        calls = [json.dumps(call, default=str) for call in message.get("tool_calls") or ()]
        lines.append(" ".join([f"{message['role']}: {message.get('content') or ''}", *calls]))
    return "\n".join(lines if source.continue_final_message else [*lines, "assistant: "])
