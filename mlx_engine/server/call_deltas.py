"""Tool calls of a streamed answer, as far as clients may see them."""

from __future__ import annotations

import json
from dataclasses import replace

from mlx_engine.outputs import ToolCallDelta


class CallDeltas:
    """Deltas for a client, out of those of one answer.

    A call that is wrong from its first delta on is none to a client: what the model wrote is text.
    Of one that goes wrong later, the arguments are no JSON in the end, so that nobody makes it.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # of calls that the client sees, by the engine's
        self._arguments: list[str] = []  # of the last one
        self._hidden = -1  # the engine's number of the last one that it does not see

    def add(self, delta: ToolCallDelta, text: str) -> tuple[ToolCallDelta | None, str]:
        """The delta for the client, or the text that is given in its place.

        Args:
            text: the model's own, of this delta.
        """
        if delta.index not in self._numbers:
            if delta.id is None or delta.error is not None:
                self._hidden = delta.index
            if delta.index == self._hidden:
                return None, text
            self._numbers[delta.index] = len(self._numbers)
            self._arguments.clear()
        arguments = delta.arguments
        self._arguments.append(arguments)
        if delta.error is not None:
            spoiled = f" <{delta.error}>" if self._is_whole() else ""
            arguments += spoiled
        if not arguments and delta.id is None:
            return None, ""
        return replace(delta, index=self._numbers[delta.index], arguments=arguments), ""

    def _is_whole(self) -> bool:
        try:  # to some clients, no arguments are empty ones
            json.loads("".join(self._arguments).strip() or "{}")
        except (ValueError, RecursionError):
            return False
        return True
