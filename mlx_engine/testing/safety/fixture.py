"""An engine as the operations of the table find it: what is asked of it, and what is true then."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_engine.core.lifecycle import EngineState
from mlx_engine.engine.base import BaseEngine
from mlx_engine.outputs import GenerationResult, ProgressCallback
from mlx_engine.testing.safety.fault import Fault


class Fixture(abc.ABC):
    """An engine, and what whoever tries it asks of it.

    Attributes:
        engine: may be replaced by another one of its kind.
        options: of each request.
        on_progress: of chats and batches.
        to_save, to_load: files of the prompt cache.
    """

    engine: BaseEngine
    options: dict[str, Any]
    on_progress: ProgressCallback | None = None
    to_save: Path
    to_load: Path

    @abc.abstractmethod
    def prompt(self) -> str | Sequence[int]:
        """A prompt to be continued."""

    def prompts(self) -> list[str | Sequence[int]]:
        """Prompts of a batch: two."""
        return [self.prompt(), self.prompt()]

    @abc.abstractmethod
    def messages(self) -> list[dict[str, Any]]:
        """Messages of a chat."""

    @abc.abstractmethod
    def told(self, result: GenerationResult) -> Any:
        """An answer in the form in which it is compared, which is not ``None``.

        Raises:
            Fault: it is not what it should be.
        """

    @abc.abstractmethod
    async def another(self) -> Any:
        """Do another request, which is not cancelled."""

    @abc.abstractmethod
    async def blocking(self, stop: threading.Event, on_cancel: Callable[[], None] | None) -> Any:
        """Run a function inside MLX that takes a while, less if it is told to stop."""

    async def watched(self) -> Any:
        """Do a request that can be seen inside MLX, where that is possible."""
        return await self.another()

    async def visit(self) -> Any:
        """Run a function inside MLX that stays as long as it likes, where that is possible."""
        return await self.another()

    def must_be(self, *states: EngineState) -> bool:
        """See that the engine is in one of these states; always true.

        Raises:
            Fault: it is in another one.
        """
        if self.engine.state not in states:
            raise Fault(f"afterwards the engine is {self.engine.state.value}")
        return True
