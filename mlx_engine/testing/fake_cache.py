"""The prompt cache of a ``FakeEngine``: the tokens of earlier prompts, without any KV cache."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.errors import InvalidRequest

_FORMAT = "prompt cache of a FakeEngine"
_MOST = 256  # prompts: each of them is compared with each new one
_MOST_TOKENS = 1_000_000  # of all of them together
_OWNERS = 0o600  # prompts are for nobody else


class FakePromptCache:
    """Knows the latest prompts and answers. On the engine's thread, all but ``peek``."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[tuple[int, ...], None] = OrderedDict()  # used last comes last
        self._lock = threading.Lock()  # held to change them, and to look at them elsewhere
        self._tokens = 0
        self._hits = self._misses = self._hit_tokens = 0
        self._stored = self._evicted = self._refused = 0

    def look_up(self, prompt: Sequence[int]) -> int:
        """Number of tokens at its beginning that were seen before; all but its last one at most."""
        cached, best = 0, None
        for seen in self._prompts:
            if (shared := _shared(prompt, seen)) > cached:
                cached, best = shared, seen
        if best is not None:
            with self._lock:
                self._prompts.move_to_end(best)
        cached = min(cached, len(prompt) - 1)
        self._hit_tokens += cached
        if cached:
            self._hits += 1
        else:
            self._misses += 1
        return cached

    def peek(self, prompt: Sequence[int]) -> int:
        """The number that ``look_up`` would give. From any thread."""
        with self._lock:
            prompts = tuple(self._prompts)
        return min(max((_shared(prompt, seen) for seen in prompts), default=0), len(prompt) - 1)

    def store(self, tokens: Sequence[int]) -> None:
        """A prompt and its answer have been seen."""
        with self._lock:
            self._store(tokens)

    def _store(self, tokens: Sequence[int]) -> None:
        prompt = tuple(tokens)
        if len(prompt) > _MOST_TOKENS:
            self._refused += 1
            return
        if prompt in self._prompts:
            self._prompts.move_to_end(prompt)
            return
        self._prompts[prompt] = None
        self._tokens += len(prompt)
        self._stored += 1
        while len(self._prompts) > _MOST or self._tokens > _MOST_TOKENS:
            evicted, _ = self._prompts.popitem(last=False)
            self._tokens -= len(evicted)
            self._evicted += 1

    def stats(self) -> PromptCacheStats:
        """A snapshot. From any thread."""
        return PromptCacheStats(
            entries=len(self._prompts),
            nbytes=self._tokens,  # as if a token took one
            limit=_MOST_TOKENS,
            hits=self._hits,
            misses=self._misses,
            hit_tokens=self._hit_tokens,
            stored=self._stored,
            evicted=self._evicted,
            refused=self._refused,
        )

    def save(self, path: Path) -> int:
        """Write it into a file, which only its owner can read.

        Raises:
            InvalidRequest: that cannot be done, or something else than a file is there.
        """
        path = path.resolve()
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        content = {"format": _FORMAT, "prompts": [list(prompt) for prompt in self._prompts]}
        try:
            if path.exists():
                _check_regular(path)
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
            with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _OWNERS), "w") as file:
                os.fchmod(file.fileno(), _OWNERS)  # the umask may have taken some of it
                json.dump(content, file)
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
            _check_regular(path)  # one would wait for ever at the end of a pipe
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InvalidRequest("path", f"there is no such file: {path}") from None
        except (OSError, ValueError) as error:
            raise InvalidRequest("path", f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InvalidRequest("path", f"{path} is not the {_FORMAT}")
        before = self._stored
        for prompt in content["prompts"]:
            self.store(prompt)
        return self._stored - before


def _check_regular(path: Path) -> None:
    """Raise ``OSError`` unless a file is there."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that both have."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
