"""OpenAI's ``/v1/completions``: plain prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import GenerationChunk, TokenLogprob
from mlx_engine.server.answers import Answer
from mlx_engine.server.api import event
from mlx_engine.server.asked import MOST_CHOICES, Asked, Fields
from mlx_engine.server.failures import Failure
from mlx_engine.server.field_table import COMPLETIONS, quiet
from mlx_engine.server.openai_values import (
    MOST_LOGPROBS,
    error_body,
    logprob,
    new_id,
    now,
    sampling,
    usage_of,
    wants_usage,
)

_REFUSED = {
    "echo": "is not there: an answer begins behind its prompt",
    "suffix": "is not there: an answer continues its prompt, and fills no gap",
}


class Completions:
    """The API."""

    name = "completions"
    table = COMPLETIONS
    counts_first = False

    def read(self, fields: Fields) -> Asked:
        """See ``Api``."""
        for name, why in _REFUSED.items():
            if fields.take(name):
                raise InvalidRequest(name, why)
        prompts = _prompts(fields.take("prompt"))
        options = sampling(fields)
        if (top := fields.integer("logprobs", -1, low=-1, high=MOST_LOGPROBS)) >= 0:
            options["logprobs"] = top
        usage, others = wants_usage(fields)
        return Asked(
            model=fields.text("model") or "",
            options=options,
            prompts=prompts,
            n=fields.integer("n", 1, low=1, high=MOST_CHOICES // len(prompts)),
            stream=fields.flag("stream"),
            user=fields.user(),
            usage=usage,
            ignored=(*fields.ignored(quiet(self.table)), *others),
        )

    def whole(self, asked: Asked, answers: Sequence[Answer], model: str) -> dict[str, Any]:
        """See ``Api``."""
        wants = "logprobs" in asked.options
        choices = [
            {
                "index": index,
                "text": answer.result.text,
                "logprobs": _logprobs(answer.logprobs, 0)[0] if wants else None,
                "finish_reason": answer.result.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        usage = usage_of(answers, len(asked.prompts))
        return {**_base(model), "choices": choices, "usage": usage}

    def events(self, asked: Asked, model: str) -> CompletionEvents:
        """See ``Api``."""
        return CompletionEvents(asked, model)

    def error(self, failure: Failure, request_id: str) -> dict[str, Any]:
        """See ``Api``."""
        return error_body(failure, request_id)


class CompletionEvents:
    """Pieces of a completion; see ``Events``."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._base = _base(model) | ({"usage": None} if asked.usage else {})
        self._offsets = [0] * asked.choices

    def begin(self, prompt_tokens: int, cached_tokens: int) -> bytes:
        """Nothing: the first piece says all."""
        return b""

    def chunk(self, index: int, chunk: GenerationChunk) -> bytes:
        """Its text."""
        if not (chunk.text or chunk.logprobs or chunk.finish_reason):
            return b""
        logprobs = None
        if chunk.logprobs:
            logprobs, self._offsets[index] = _logprobs(chunk.logprobs, self._offsets[index])
        return self._event(index, chunk.text, logprobs, chunk.finish_reason)

    def pulse(self) -> bytes:
        """A piece without text."""
        return self._event(0, "")

    def end(self, answers: Sequence[Answer]) -> bytes:
        """Token counts, if they were asked for."""
        counts = b""
        if self._asked.usage:
            usage = usage_of(answers, len(self._asked.prompts))
            counts = event({**self._base, "choices": [], "usage": usage})
        return counts + b"data: [DONE]\n\n"

    def fail(self, failure: Failure) -> bytes:
        """The error, which clients raise."""
        return event(error_body(failure, str(self._base["id"])))

    def _event(
        self, index: int, text: str, logprobs: object = None, reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return event({**self._base, "choices": [choice]})


def _base(model: str) -> dict[str, Any]:
    return {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": model}


def _prompts(given: object) -> list[Any]:
    """Prompts: a text, token ids, or a list of either."""
    if not isinstance(given, list):
        prompts = [given]
    elif given and isinstance(given[0], str | list):
        prompts = given
    else:
        prompts = [given]
    if len(prompts) > MOST_CHOICES:
        said = f"has {len(prompts)} prompts; {MOST_CHOICES} are the most"
        raise InvalidRequest("prompt", said)
    for prompt in prompts:
        if not isinstance(prompt, str | list):
            raise InvalidRequest("prompt", f"must be text or token ids, not {shown(prompt)}")
    return prompts


def _logprobs(tokens: Iterable[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
    """Log-probabilities, and where in the text the next token is."""
    offsets = list[int]()
    kept = list(tokens)
    for token in kept:
        offsets.append(offset)
        offset += len(token.text)
    found = {
        "tokens": [token.text for token in kept],
        "token_logprobs": [logprob(token.logprob) for token in kept],
        "top_logprobs": [{t.text: logprob(t.logprob) for t in token.top} for token in kept],
        "text_offset": offsets,
    }
    return found, offset
