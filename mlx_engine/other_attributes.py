"""Attributes that people look for, and what they are called here: for errors that say so."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn

# Attributes that things have elsewhere, and what they are called here: of several lines the first
# that is of the same thing.
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
    (("close", "stop", "abort"), "aclose(), or cancel()"),
    (("stop", "abort"), "close(), or cancel()"),
    (("load", "load_model"), "start()"),
    (("metrics", "statistics"), "stats()"),
    (("max_context", "context_window", "n_ctx"), "context_length"),
    (("calls", "last_request", "history"), "requests"),
    (("model_dump", "dict", "json", "as_dict", "asdict", "_asdict"), "to_dict()"),
    (("content", "output_text", "choices", "answer"), "text"),
    (("text", "content", "message"), "prompt, or messages"),
    (("text", "content", "answer", "value", "response", "output"), "result, or unwrap()"),
    (("exception", "exc", "failure"), "error"),
    (("success", "succeeded", "is_ok"), "ok"),
    (("ttft", "first_token"), "time_to_first_token"),
    (("ttft", "first_token", "time_to_first_token"), "timings.time_to_first_token"),
    (("tps", "decode_tokens_per_second"), "tokens_per_second"),
    (("tps", "tokens_per_second"), "timings.tokens_per_second"),
    (("duration", "elapsed", "seconds"), "total"),
    (("total",), "total_tokens"),
    (("queue", "queued", "pending", "queue_length"), "waiting"),
    (("active", "in_flight"), "running"),
    (("output_tokens", "generated_tokens"), "completion_tokens"),
    (("input_tokens",), "prompt_tokens"),
    (("completion_tokens", "prompt_tokens", "total_tokens", "cached_tokens"), "usage"),
    (("input_tokens", "output_tokens"), "usage"),
    (("stop_reason", "done_reason"), "finish_reason"),
    (("usage", "timings", "finish_reason", "tool_calls", "tokens"), "result"),
    (("state", "status"), "outcome"),
    (("kwargs", "temperature", "max_tokens", "sampling", "seed", "stop"), "params"),
    (("results", "outcomes", "collect"), "unread; all are what 'async for' gives"),
)


class WithAdvice:
    """Objects that say which of their attributes is meant by one that they lack."""

    __slots__ = ()

    if not TYPE_CHECKING:  # which would take any name

        def __getattr__(self, name: str) -> NoReturn:
            there = [] if name.startswith("__") else dir(self)  # which asks for such itself
            meant = [said for names, said in _NAMES if name in names]
            here = [said for said in meant if re.split(r"\W", said)[0] in there]
            hint = f": see {here[0]}" if here else ""
            kind = type(self).__name__
            raise AttributeError(
                f"{kind!r} object has no attribute {name!r}{hint}", name=name, obj=self
            )
