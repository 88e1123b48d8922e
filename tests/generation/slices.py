"""Saving and loading a prompt cache without an engine: every turn is taken at once, right here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_engine.core.stop import Interrupted
from mlx_engine.generation.cache import prompt_cache_file
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.prompt_cache import PromptCache


class TurnsHere:
    """Turns on the MLX thread for who is on it already.

    Args:
        most: turns after which the work should end.
        between: called before each turn.

    Attributes:
        count: turns that were taken.
    """

    def __init__(
        self, most: int | None = None, between: Callable[[], object] = lambda: None
    ) -> None:
        self.count = 0
        self._most = most
        self._between = between

    def take(self, func: Callable[..., Any], /, *args: Any) -> Any:
        if self.count == self._most:
            raise Interrupted
        self._between()
        self.count += 1
        return func(*args)

    def drop(self, func: Callable[[], None]) -> None:
        func()


def nothing() -> None:
    """A beat that nobody hears."""


def save(path: Path, cache: PromptCache, model: str, turns: TurnsHere | None = None) -> int:
    rest = prompt_cache_file.save(path, cache, model, nothing)
    return rest(turns or TurnsHere())  # type: ignore[arg-type]


def load(
    path: Path, cache: PromptCache, model: str, template: Cache, turns: TurnsHere | None = None
) -> int:
    rest = prompt_cache_file.load(path, cache, model, template, nothing)
    return rest(turns or TurnsHere())  # type: ignore[arg-type]
