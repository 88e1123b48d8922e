"""Signatures of functions whose options are named in a ``TypedDict``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

F = TypeVar("F", bound=Callable[..., object])


def spelled_out(options: type[Any], defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """A decorator for functions with ``**options: Unpack[...]``, which type checkers and editors
    read: ``inspect.signature``, ``help`` and notebooks see each option and its default as well.

    Args:
        options: the ``TypedDict``.
        defaults: of its options; others stay in ``**options``.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = list(signature.parameters.values())
        hints = get_type_hints(options)
        rest = own[-1:] if hints.keys() - defaults.keys() else []
        each = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint
            )
            for name, hint in hints.items()
            if name in defaults
        ]
        shown = signature.replace(parameters=[*own[:-1], *each, *rest])
        function.__signature__ = shown  # type: ignore[attr-defined]
        return function

    return decorate
