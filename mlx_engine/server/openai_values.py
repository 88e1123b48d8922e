"""Values that OpenAI's APIs have in common."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from mlx_engine.outputs import TokenLogprob, Usage
from mlx_engine.server.answers import Answer
from mlx_engine.server.asked import Fields
from mlx_engine.server.failures import Failure, Kind
from mlx_engine.server.field_table import SAMPLING
from mlx_engine.server.given_constraint import constraint_of

MOST_LOGPROBS = 20  # at the place of a token

_TYPES: dict[Kind, str] = {
    "key": "authentication_error",
    "forbidden": "permission_error",
    "busy": "rate_limit_error",
    "unavailable": "server_error",
    "failed": "server_error",
}
_CODES: dict[Kind, str] = {
    "context": "context_length_exceeded",
    "key": "invalid_api_key",
    "not_found": "model_not_found",
    "path": "unknown_url",
    "busy": "rate_limit_exceeded",
    "unavailable": "engine_unavailable",
}
_LEAST = -9999.0  # what OpenAI gives for a probability of none; JSON has no infinity


def new_id(prefix: str) -> str:
    """An id that nothing else has."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def sampling(fields: Fields, *limits: str) -> dict[str, Any]:
    """Keyword arguments of an engine, out of the fields that say how to choose tokens.

    Args:
        limits: names of an API's own for the tokens of the answer.

    Raises:
        InvalidRequest: the answer can have no such form.
    """
    options = fields.options(SAMPLING)
    given = fields.options((*limits, "max_completion_tokens", "max_tokens"))
    for limit in list(given.values())[:1]:
        options["max_tokens"] = limit
    if constraint := constraint_of(fields):
        options["constraint"] = constraint
    return options


def wants_usage(fields: Fields) -> tuple[bool, list[str]]:
    """Whether a stream is to end with token counts; and what else of ``stream_options`` is meant.

    Raises:
        InvalidRequest: they are no object.
    """
    options = fields.mapping("stream_options")
    others = [f"stream_options.{n}" for n, v in options.items() if n != "include_usage" and v]
    return bool(options.get("include_usage")), others


def error_body(failure: Failure, request_id: str) -> dict[str, Any]:
    """The body of an error."""
    message = failure.message
    if failure.context_length is not None:  # agents shorten their context by these words
        message = (
            f"This model's maximum context length is {failure.context_length} tokens. "
            f"However, your messages resulted in {failure.prompt_tokens or 'more'} tokens. "
            f"({message})"
        )
    kind = _TYPES.get(failure.kind, "invalid_request_error")
    code = _CODES.get(failure.kind)
    return {
        "error": {"message": message, "type": kind, "param": failure.option, "code": code},
        "request_id": request_id,
    }


def usage_of(answers: Sequence[Answer], prompts: int = 1) -> dict[str, Any]:
    """Token counts of all answers; those to one prompt count it once.

    Args:
        prompts: how many there are, each with as many answers.
    """
    usages = [answer.result.usage for answer in answers]
    each: list[Usage] = usages[:: max(1, len(usages) // prompts)]
    prompt = sum(usage.prompt_tokens for usage in each)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in each)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(answer.reasoning_tokens for answer in answers)
        },
    }


def logprob(value: float) -> float:
    """A log-probability that JSON has a form for."""
    return max(value, _LEAST)


def content_logprobs(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities of the tokens of a message."""
    return [
        {**_token(token), "top_logprobs": [_token(other) for other in token.top]}
        for token in tokens
    ]


def _token(token: TokenLogprob) -> dict[str, Any]:
    # What is part of a character has no text of its own, but bytes.
    return {"token": token.text, "logprob": logprob(token.logprob), "bytes": list(token.bytes)}
