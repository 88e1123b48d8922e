"""Attributes that people look for, and what they are called here: for errors that say so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from inspect import isfunction
from typing import TYPE_CHECKING, ClassVar, NoReturn

# Attributes that things have elsewhere, and what they are called here: of several lines the first
# that is of the same thing, or of a part of it.
_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("stream", "astream", "generate_stream", "chat_stream", "stream_completion"),
        "stream_generate() or stream_chat()",
    ),
    (("complete", "completion", "create", "invoke", "run", "ask"), "generate() or chat()"),
    (("batch", "generate_many", "map_prompts"), "map() or generate_batch()"),
    (("tokenizer", "tokenize", "detokenize"), "encode(), decode(), count_tokens()"),
    (("name", "model_name", "model_id", "model_path"), "model"),
    (
        ("is_running", "running", "is_ready", "ready", "is_alive", "alive", "status"),
        "state, or stats()",
    ),
    (("close", "aclose", "unload"), "stop()"),
    (("close", "stop", "abort", "interrupt"), "aclose(), or cancel()"),
    (("stop", "abort", "interrupt"), "close(), or cancel()"),
    (("load", "load_model"), "start()"),
    (("metrics", "statistics", "health"), "stats()"),
    (("pid", "process", "processes"), "replicas"),
    (("max_context", "context_window", "n_ctx"), "context_length"),
    (("calls", "last_request", "history"), "requests"),
    (("model_dump", "dict", "json", "as_dict", "asdict", "_asdict"), "to_dict()"),
    (("content", "output", "output_text", "choices", "answer", "text_stream"), "text"),
    (("text", "content", "message"), "prompt, or messages, or result().text"),
    (("thinking", "reasoning_content", "reasoning_text"), "reasoning"),
    (("text", "content", "answer", "value", "response", "output"), "unwrap(), or result"),
    (("exception", "exc", "failure"), "error"),
    (("success", "succeeded", "is_ok"), "ok"),
    (("ttft", "first_token"), "time_to_first_token"),
    (("tps", "decode_tokens_per_second"), "tokens_per_second"),
    (("duration", "elapsed", "seconds"), "total"),
    (("total",), "total_tokens"),
    (("queue", "queued", "pending", "queue_length"), "waiting"),
    (("active", "used", "current"), "use"),
    (("active", "in_flight"), "running"),
    (("kv", "kv_bytes", "kv_cache"), "live"),
    (("output_tokens", "generated_tokens"), "completion_tokens"),
    (("input_tokens",), "prompt_tokens"),
    (("stop_reason", "done_reason"), "finish_reason"),
    (("state", "status"), "outcome"),
    (("kwargs",), "options"),
    (("sampling",), "params"),
    (("results", "outcomes", "collect"), "unread; all are what 'async for' gives"),
)


class WithAdvice:
    """Objects that say which of their attributes is meant by one that they lack."""

    __slots__ = ()
    _parts: ClassVar[Mapping[str, type]] = {}  # what it may be an attribute of, and their types
    _advice: ClassVar[Mapping[str, str]] = {}  # on names that are no attribute of anything

    if not TYPE_CHECKING:  # which would take any name

        def __getattr__(self, name: str) -> NoReturn:
            if hasattr(type(self), name):  # a property, within which something was missing
                object.__getattribute__(self, name)
            hint = ""
            if not name.startswith("_"):  # which ``dir`` asks for itself
                hint = self._advice.get(name) or _seen(self, name)
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}{hint and f': {hint}'}",
                name=name,
                obj=self,
            )


class AsyncOnly(WithAdvice):
    """Things to be read with ``async for``: they say so where somebody awaits or iterates them."""

    __slots__ = ()
    _reading: ClassVar[str] = ""  # how that is written

    if not TYPE_CHECKING:  # which know better

        def __await__(self):
            raise TypeError(self._reading)

        __iter__ = __await__
        __enter__ = __await__

        def __exit__(self, *_):
            """Never called."""


def _seen(thing: WithAdvice, name: str) -> str:
    """Where that is which is called ``name`` elsewhere: in an object, or in its parts."""
    there = dir(thing)
    found = next(_called(name, there.__contains__), None)
    if found is None:
        found = _in_parts(type(thing), name)
    elif isfunction(getattr(type(thing), found, None)):
        found = f"{found}()"
    return found and f"see {found}"


def _in_parts(kind: type, name: str) -> str:
    for part, of in getattr(kind, "_parts", {}).items():
        has = dir(of).__contains__
        if inner := name if has(name) else next(_called(name, has), _in_parts(of, name)):
            return f"{part}.{inner}"
    return ""


def _called(name: str, has: Callable[[str], bool]) -> Iterator[str]:
    """Names of ours for ``name`` where there is such a thing."""
    for names, said in _NAMES:
        if name in names and has(re.split(r"\W", said)[0]):
            yield said
