"""Guidance for whoever explores an engine: its own names, and an answer to wrong guesses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mlx_engine.other_attributes import WithAdvice

# What other rooms ask of an engine: completion does not offer it to users.
_INNER = frozenset(
    (
        "answer",
        "check_running",
        "check_strategies",
        "counters",
        "limit_memory",
        "queue_limits",
        "submit",
        "takes_priority",
    )
)


class Guided(WithAdvice):
    """The common half of all engines, as it is seen in a prompt of Python's."""

    _advice: ClassVar = dict.fromkeys(
        ("cancel", "abort", "interrupt"),
        "cancel the task that awaits the answer, or stream.cancel(); shutdown() ends all requests",
    )

    if not TYPE_CHECKING:  # for which it cannot be used in this way

        def __enter__(self):
            raise TypeError(
                "an engine is entered with 'async with'; without asyncio, write "
                "'with engine.sync() as llm:'"
            )

        def __exit__(self, *_):
            """Never called."""

        def __dir__(self):
            return sorted(set(super().__dir__()) - _INNER)
