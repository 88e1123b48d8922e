"""The prompt cache of a ``FakeEngine``: the tokens of earlier prompts, without any KV cache."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import PromptCacheStats

_FORMAT = "prompt cache of a FakeEngine"


class FakePromptCache:
    """Knows which prompts and answers have been seen. On the engine's thread."""

    def __init__(self) -> None:
        self._prompts: dict[tuple[int, ...], None] = {}
        self._hits = self._misses = self._hit_tokens = 0

    def look_up(self, prompt: Sequence[int]) -> int:
        """How many tokens at its beginning were seen before; all but its last one at most."""
        cached = max((_shared(prompt, seen) for seen in self._prompts), default=0)
        cached = min(cached, len(prompt) - 1)
        self._hit_tokens += cached
        if cached:
            self._hits += 1
        else:
            self._misses += 1
        return cached

    def store(self, tokens: Sequence[int]) -> None:
        """A prompt and its answer have been seen."""
        self._prompts[tuple(tokens)] = None

    def stats(self) -> PromptCacheStats:
        """A snapshot. From any thread."""
        count = len(self._prompts)
        return PromptCacheStats(
            entries=count,
            hits=self._hits,
            misses=self._misses,
            hit_tokens=self._hit_tokens,
            stored=count,
        )

    def save(self, path: Path) -> int:
        """Write it into a file.

        Raises:
            InvalidRequest: that cannot be done.
        """
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        content = {"format": _FORMAT, "prompts": [list(prompt) for prompt in self._prompts]}
        try:
            part.write_text(json.dumps(content), "utf-8")
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise InvalidRequest("path", f"{path} cannot be written: {error}") from error
        return len(self._prompts)

    def load(self, path: Path) -> int:
        """Add what a file has.

        Raises:
            InvalidRequest: there is no such file, or it is another one.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InvalidRequest("path", f"there is no such file: {path}") from None
        except (OSError, ValueError) as error:
            raise InvalidRequest("path", f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InvalidRequest("path", f"{path} is not the {_FORMAT}")
        before = len(self._prompts)
        for prompt in content["prompts"]:
            self.store(prompt)
        return len(self._prompts) - before


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that both have."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
