"""Pieces of a scripted answer -> text, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_engine.core.stream import Piece
from mlx_engine.outputs import Segment


class FakeText:
    """Builds the text of one answer; holds back what may become a stop string.

    Args:
        stop: strings that end the answer.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._parts: dict[Segment, list[str]] = {"content": [], "reasoning": [], "tool_call": []}
        self._segment: Segment = "content"
        self._held = ""
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete: ``stop_string``."""
        return self.stop_string is not None

    def so_far(self, segment: Segment) -> str:
        """All that has been let out of a segment."""
        return "".join(self._parts[segment])

    def add(self, segment: Segment, text: str) -> list[Piece]:
        """Text that may be let out with this. ``stopped`` tells if a stop string is complete."""
        out = self.finish() if segment != self._segment else []
        self._segment = segment
        self._held += text
        found = [(at + len(s), at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            _, at, self.stop_string = min(found)
            self._held = self._held[:at]
            return out + self.finish()
        return out + self._let_out(len(self._held) - self._begun())

    def finish(self) -> list[Piece]:
        """The text that is held back."""
        return self._let_out(len(self._held))

    def _begun(self) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        lengths = (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n]))
        return max(lengths, default=0)

    def _let_out(self, count: int) -> list[Piece]:
        text, self._held = self._held[:count], self._held[count:]
        if not text:
            return []
        self._parts[self._segment].append(text)
        return [Piece(self._segment, text)]
