"""OpenAI's ``/v1/responses``: each request brings its whole conversation, or names its items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.server.answers import Answer
from mlx_engine.server.asked import Asked, Fields, reasoning
from mlx_engine.server.chat_completions import call_of, text_of
from mlx_engine.server.failures import Failure
from mlx_engine.server.field_table import RESPONSES, quiet
from mlx_engine.server.given_constraint import response_format
from mlx_engine.server.kept import KeptItems
from mlx_engine.server.openai_values import (
    error_body,
    new_id,
    now,
    sampling,
    usage_of,
)
from mlx_engine.server.response_events import ResponseEvents
from mlx_engine.server.response_input import read_input
from mlx_engine.server.response_output import OutputItem
from mlx_engine.server.response_tools import Tools, custom_input

# What would need something that is kept here from one request to the next.
_STATE = ("previous_response_id", "conversation", "prompt", "background")
_SEALED = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"
# Fields that are told back as they came.
_TOLD = (
    *("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "prompt_cache_key"),
    *("reasoning", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "user"),
)


class Responses:
    """The API."""

    name = "responses"
    table = RESPONSES
    counts_first = False

    def __init__(self) -> None:
        self._kept = KeptItems()

    def read(self, fields: Fields) -> Asked:
        """See ``Api``."""
        for name in _STATE:
            if fields.take(name):
                said = "no response is kept here; send the whole conversation with each request"
                raise InvalidRequest(name, f"cannot be honoured: {said}")
        told = fields.copies(_TOLD)
        included = fields.take("include", [])
        if not isinstance(included, list):
            raise InvalidRequest("include", f"must be a list, not {shown(included)}")
        messages, left_out = read_input(
            fields.take("input"), fields.text("instructions"), self._kept.find
        )
        tools = Tools.of(fields.take("tools"), fields.take("tool_choice"))
        chat = fields.options(("parallel_tool_calls",))
        if variables := fields.mapping("chat_template_kwargs"):
            chat["chat_template_kwargs"] = variables
        chat = reasoning(fields.mapping("reasoning").get("effort"), chat)
        if tools.functions:
            chat |= {"tools": tools.functions, "tool_choice": tools.choice}
        options = _options(fields, logprobs=_LOGPROBS in included)
        if fields.take("truncation", "disabled") != "disabled":
            left_out.append("truncation")
        keeps = fields.take("store") is not False
        extra = {"tools": tools, "sealed": _SEALED in included, "told": told, "keeps": keeps}
        return Asked(
            model=fields.text("model") or "",
            options=options,
            messages=messages,
            chat=chat,
            stream=fields.flag("stream"),
            user=fields.user(),
            ignored=(*fields.ignored(quiet(self.table)), *tools.skipped, *left_out),
            extra=extra,
        )

    def whole(self, asked: Asked, answers: Sequence[Answer], model: str) -> dict[str, Any]:
        """See ``Api``."""
        (answer,) = answers
        status = "incomplete" if answer.result.finish_reason == "length" else "completed"
        output = _output(answer, asked.extra["tools"], sealed=asked.extra["sealed"])
        items = [item.item("completed") for item in output[:-1]] + [output[-1].item(status)]
        self._keep(asked, items)
        return _response(_base(asked, model), status, items, answers=answers)

    def events(self, asked: Asked, model: str) -> ResponseEvents:
        """See ``Api``."""
        response = partial(_response, _base(asked, model))
        keep = partial(self._keep, asked)
        return ResponseEvents(response, asked.extra["tools"], asked.extra["sealed"], keep)

    def error(self, failure: Failure, request_id: str) -> dict[str, Any]:
        """See ``Api``."""
        if failure.option == "messages":  # what they are made of
            failure = replace(failure, option="input")
        return error_body(failure, request_id)

    def _keep(self, asked: Asked, items: Sequence[dict[str, Any]]) -> None:
        if asked.extra["keeps"]:
            self._kept.keep(items)


def _options(fields: Fields, *, logprobs: bool) -> dict[str, Any]:
    options = sampling(fields, "max_output_tokens")
    top = fields.take("top_logprobs")
    if top or logprobs:
        options["logprobs"] = top or 0
    form = fields.mapping("text").get("format") or {}
    if not isinstance(form, dict):
        raise InvalidRequest("text.format", f"must be an object, not {shown(form)}")
    if form:
        fields.form = "text.format"
    if constraint := response_format(form, "text.format"):
        if "constraint" in options:
            raise InvalidRequest("text.format", "is one more form than the others ask for")
        options["constraint"] = constraint
    return options


def _output(answer: Answer, tools: Tools, *, sealed: bool) -> list[OutputItem]:
    """The items of a whole answer; there is one at least."""
    result = answer.result
    items: list[OutputItem] = []
    if result.reasoning:
        items.append(OutputItem("reasoning", sealed=sealed))
        items[-1].add(result.reasoning)
    calls = [call for call in result.tool_calls if call.ok]
    if (text := text_of(result)) or not calls:
        items.append(OutputItem("message"))
        items[-1].add(text, answer.logprobs)
    for call in calls:
        named = tools.named(call.name)
        items.append(OutputItem.call(call.id, named))
        if named.custom:
            items[-1].add(custom_input(call.arguments))
        else:
            items[-1].add(call_of(call)["function"]["arguments"])
    return items


def _base(asked: Asked, model: str) -> dict[str, Any]:
    """All of a response that stays the same from its beginning to its end."""
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": now(),
        "model": model,
        "background": False,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        **asked.extra["told"],
    }


def _response(
    base: Mapping[str, Any],
    status: str,
    output: Sequence[dict[str, Any]],
    *,
    answers: Sequence[Answer] = (),
    error: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A response as it is now."""
    why = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {
        **base,
        "status": status,
        "completed_at": now() if status == "completed" else None,
        "error": error,
        "incomplete_details": why,
        "output": output,
        "usage": _usage(answers) if answers else None,
    }


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    counts = usage_of(answers)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }
