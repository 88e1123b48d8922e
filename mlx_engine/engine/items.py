"""Items of one call with many prompts: what they are, and the id of each."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.engine.outcome import Job
from mlx_engine.engine.outcomes import Take
from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import GenerationResult

_SOME = 32  # of a list, to be looked at


def check_items(prompts: object) -> None:
    """See that there are many of them, or may be.

    Raises:
        InvalidRequest: it is one prompt, one conversation, or something else.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable | AsyncIterable):
        raise InvalidRequest(
            "prompts",
            f"must be a list, a mapping or an (async) iterator of prompts or conversations, not "
            f"{shown(prompts)}; for one, see generate() and chat()",
        )
    check_not_one_chat(prompts)
    some = prompts[:_SOME] if isinstance(prompts, Sequence) else ()
    for one in some:
        if isinstance(one, Mapping):
            raise InvalidRequest(
                "prompts",
                "each is a prompt or a conversation, and may have an id: (id, prompt) pairs, or "
                f"a mapping {{id: prompt}}; not {shown(one)}",
            )


def check_not_one_chat(prompts: object) -> None:
    """See that a list of prompts is not the messages of one conversation.

    Raises:
        InvalidRequest: it is.
    """
    if not isinstance(prompts, Sequence) or not prompts:
        return
    if all(isinstance(one, Mapping) and "role" in one for one in prompts[:_SOME]):
        raise InvalidRequest(
            "prompts",
            "these are the messages of one conversation; give a list of conversations, "
            "[messages, ...], or use chat()",
        )


def taker(prompts: Any) -> Take[Any]:
    """A function that gives the next item of ``prompts`` as a job, and ``None`` at their end."""
    given = prompts.items() if isinstance(prompts, Mapping) else prompts
    paired = isinstance(prompts, Mapping)
    later = aiter(given) if isinstance(given, AsyncIterable) else None
    now = iter(given) if later is None else None
    index = -1

    async def take() -> Job[Any] | None:
        nonlocal index
        try:
            value = next(now) if now is not None else await anext(later)  # type: ignore[arg-type]
        except (StopIteration, StopAsyncIteration):
            return None
        index += 1
        if paired or _is_pair(value):
            return Job(value[0], index, value[1])
        return Job(index, index, value)

    return take


def _is_pair(value: object) -> bool:
    """Whether an item has an id of its own: ``(id, prompt)``, which no prompt looks like.

    A tuple of two token ids is a prompt, and so is one of two messages.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    first, second = value
    if isinstance(first, Mapping | GenerationResult):
        return False
    return isinstance(second, str | bytes | Sequence) or getattr(second, "ndim", None) == 1
