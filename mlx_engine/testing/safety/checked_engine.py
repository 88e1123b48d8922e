"""An engine under the check: what is asked of it, and what must be true of its answers."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mlx_engine.engine.base import BaseEngine
from mlx_engine.outputs import EngineState, GenerationResult
from mlx_engine.testing.safety.fault import Fault
from mlx_engine.testing.safety.operations import Fixture, Need, Operation
from mlx_engine.testing.safety.overlap_check import OverlapCheck

TOKENS: Final = 4  # of each answer
FUNCTION_SECONDS: Final = 0.005  # that a function stays inside MLX
REFERENCE: Final = "The capital of France is"

_LACKING: Final[dict[Need, str]] = {
    "chat template": "the model has no chat template",
    "logits processors": "the engine takes no functions as logits processors",
    "functions": "the engine runs no functions of others",
}

Tokens = tuple[int, ...]


class CheckedEngine(Fixture):
    """An engine under the check.

    Args:
        engine: see ``Fixture``.
        prompt: of requests that are cancelled; each begins with another number, so that the
            prompt cache has nothing of it.
        folder: where files go.
        seed: the first number.

    Attributes:
        overlaps: sees that no two are inside MLX at once.
        reference: tokens of the reference request; set once they are known.
        exact: whether it gives them whatever is in work beside it.
        compared, same: requests beside cancelled ones, and those of them with the same tokens.
        has: what not every engine has; set once it is known, but for the chat template.
    """

    def __init__(self, engine: BaseEngine, prompt: str, folder: Path, seed: int) -> None:
        self.engine = engine
        self.options = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
        self.to_save = self.to_load = folder / "prompts"
        self.overlaps = OverlapCheck()
        self.reference: Tokens | None = None
        self.exact = False
        self.compared = self.same = 0
        self.has: set[Need] = set()
        self._prompt = prompt
        self._numbers = itertools.count(seed)
        self._calls = itertools.count(1)

    def impossible(self, operation: Operation) -> str | None:
        """Reason why it cannot be done; ``None`` if it can, as far as is known."""
        has = self.has | ({"chat template"} if self.engine.has_chat_template else set())
        need = operation.need
        return None if need is None or need in has else _LACKING[need]

    # What is asked, and told

    def prompt(self) -> str:
        """See ``Fixture``."""
        return f"{next(self._numbers)} {self._prompt}"

    def messages(self) -> list[dict[str, Any]]:
        """See ``Fixture``."""
        return [{"role": "user", "content": self.prompt()}]

    def told(self, result: GenerationResult) -> Tokens:
        """See ``Fixture``."""
        if result.finish_reason != "length":
            raise Fault(f"a request ended by {result.finish_reason!r}, not by 'length'")
        if len(result.tokens) != TOKENS:
            raise Fault(f"a request for {TOKENS} tokens gave {len(result.tokens)}")
        return result.tokens

    # Inside MLX

    async def watched(self) -> Any:
        """See ``Fixture``."""
        return await (self.processed() if "logits processors" in self.has else self.generate())

    async def processed(self) -> Tokens:
        """Do a request with a logits processor."""
        name = f"request {next(self._calls)}"
        with self.overlaps.until_told(name) as told:

            def processor(_: Any, logits: Any) -> Any:
                if told():
                    self.overlaps.complain("work went on inside MLX after its caller was told")
                with self.overlaps.inside(name):
                    time.sleep(FUNCTION_SECONDS / 5)
                return logits

            options = {**self.options, "logits_processors": [processor]}
            result = await self.engine.generate(self.prompt(), **options)
        return self.told(result)

    async def visit(self) -> Any:
        """See ``Fixture``."""
        return await (self.run_deaf() if "functions" in self.has else self.generate())

    async def blocking(self, stop: threading.Event, on_cancel: Callable[[], None] | None) -> Any:
        """See ``Fixture``."""
        number = next(self._calls)
        name = f"function {number}"
        seconds = FUNCTION_SECONDS * (1 if on_cancel is None else 4)

        def function() -> int:
            with self.overlaps.inside(name):
                stop.wait(seconds)
            return number

        with self.overlaps.until_told(name):
            gave = await self.engine.run_blocking(function, on_cancel=on_cancel)
        if gave != number:
            raise Fault(f"run_blocking gave {gave!r}, and the function had returned {number}")
        return True

    # Beside and after them

    async def ask(self) -> Tokens:
        """Do the reference request."""
        return self.told(await self.engine.generate(REFERENCE, **self.options))

    async def another(self) -> None:
        """Do the reference request beside others; its tokens are compared if it is exact."""
        tokens = await self.ask()
        self.compared += 1
        self.same += tokens == self.reference
        if self.exact and tokens != self.reference:
            raise Fault(f"a request beside it gave the tokens {tokens}, not {self.reference}")

    async def probe(self) -> None:
        """See that the next request has the right tokens."""
        tokens = await self.ask()
        if self.reference is not None and tokens != self.reference:
            raise Fault(f"the next request gave the tokens {tokens}, not {self.reference}")

    async def look_at_file(self) -> None:
        """See that what was saved is whole, and that nothing else is there."""
        if self.to_load.exists():
            await self.engine.load_prompt_cache(self.to_load)
        left = {path.name for path in self.to_save.parent.iterdir()} - {self.to_save.name}
        if left:
            raise Fault(f"files are left: {', '.join(sorted(left))}")

    # Its life

    async def live_on(self) -> None:
        """See that a start that was cancelled has happened or has not, and can be done again."""
        self.must_be(EngineState.CREATED, EngineState.RUNNING, EngineState.STOPPED)
        await self.engine.start()
        await self.probe()
        await self.stop()

    async def stop_and_live_on(self) -> None:
        """See the same of a stop, and that it can be done again."""
        self.must_be(EngineState.CREATED, EngineState.RUNNING, EngineState.STOPPED)
        await self.stop_and_live()

    async def stop_and_live(self) -> None:
        """See that it can be stopped and started again, whatever has become of it."""
        await self.stop()
        await self.live_on()
