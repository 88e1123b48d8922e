"""Counters of the work that the MLX thread does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class EngineCounters:
    """Counters of the work done. Written on the MLX thread, read from any; see EngineStats.

    All but ``pieces``, of which threads that count at once may lose some: it shows that it goes on.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    batch_size: int = 0
    kv_bytes: int = 0
    preemptions: int = 0
    steps: int = 0
    pieces: int = 0  # of files read or written, on other threads
    phase: Literal["prefill", "decode"] = "prefill"

    def step(self, phase: Literal["prefill", "decode"]) -> None:
        """A prefill chunk or a decode step begins."""
        self.phase = phase
        self.steps += 1

    def piece(self) -> None:
        """A piece of a file has been read or written. On the thread that does it."""
        self.pieces += 1
