"""Tokens of stored prompts: all of a prompt cache that may be looked at from other threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_engine.generation.cache.stored_prompt import Entry, Tokens, common_prefix, usable


@dataclass(frozen=True, slots=True, eq=False)
class _Outline:
    """A stored prompt without its KV cache; the attributes are those of ``Entry``."""

    tokens: Tokens
    first: int
    last: int
    marks: tuple[int, ...]


class PromptIndex:
    """Index of the prompts in a prompt cache, which keeps it. It holds no arrays of MLX's.

    Args:
        step: multiples of so many tokens can be reused.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._lock = threading.Lock()
        self._outlines: dict[int, _Outline] = {}

    def put(self, key: int, entry: Entry) -> None:
        """Have an entry under this key, in the place of another one if there was one."""
        marks = tuple(mark.tokens for mark in entry.marks)
        outline = _Outline(entry.tokens, entry.first, entry.last, marks)
        with self._lock:
            self._outlines[key] = outline

    def drop(self, key: int) -> None:
        """Have it no more."""
        with self._lock:
            del self._outlines[key]

    def clear(self) -> None:
        """Have none any more."""
        with self._lock:
            self._outlines.clear()

    def cached(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens of a prompt ``PromptCache.fetch`` would give now."""
        with self._lock:
            outlines = tuple(self._outlines.values())
        prompt = np.array(tokens, dtype=np.int32)
        end = max(len(prompt) - 1, 0)
        found = 0
        for one in outlines:
            common = min(common_prefix(one.tokens, prompt), end)
            found = max(found, usable(common, self._step, one.first, one.last, one.marks))
        return found
