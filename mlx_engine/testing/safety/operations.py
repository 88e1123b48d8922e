"""What can be asked of an engine, as a caller would, with an eye on what must be true then."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import EngineStopped
from mlx_engine.outputs import EngineState, GenerationResult
from mlx_engine.testing.safety.trial import Company, Fault, Work
from mlx_engine.testing.safety.visits import Visits

TOKENS: Final = 4  # of each answer
FUNCTION_SECONDS: Final = 0.005  # that a function stays inside MLX
REFERENCE: Final = "The capital of France is"

Phase = Literal["files", "requests", "life"]


@dataclass(frozen=True)
class Operation:
    """An operation of an engine.

    Attributes:
        name: what it is called in reports.
        phase: operations of a phase are tried together.
        run: does it; gives something, and raises ``Fault`` if that is not what it should be.
        asks: requests that it makes, as the engine counts them.
        beside: what goes on at the same time, and makes one request.
        company: when that begins.
    """

    name: str
    phase: Phase
    run: Work
    asks: int = 1
    beside: Work | None = None
    company: Company = "before it"


class Stage:
    """An engine, and the operations on it.

    Args:
        engine: may be replaced by another one of its kind.
        prompt: of requests that are cancelled; each begins with another number, so that the
            prompt cache has nothing of it.
        folder: where files go.
        seed: the first number.

    Attributes:
        reference: what the reference request gives; set once that is known.
        exact: whether it does so whatever is in work beside it.
        compared, same: requests beside cancelled ones, and those of them with the same tokens.
        takes_processors: whether functions can be logits processors of it.
        takes_functions: whether functions can take their turn on its thread.
    """

    def __init__(self, engine: BaseEngine, prompt: str, folder: Path, seed: int) -> None:
        self.engine = engine
        self.visits = Visits()
        self.reference: tuple[int, ...] | None = None
        self.exact = self.takes_processors = self.takes_functions = False
        self.compared = self.same = 0
        self._prompt = prompt
        self._folder = folder
        self._numbers = itertools.count(seed)
        self._calls = itertools.count(1)
        self.options: dict[str, Any] = {
            "max_tokens": TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
        }

    def operations(self) -> list[Operation]:
        """All of them; some may not be possible with this engine."""
        ask, each = self.ask_beside, Operation
        return [
            each("save_prompt_cache", "files", self._save),
            each("load_prompt_cache", "files", self._load, beside=ask, company="after it"),
            each("generate, before another", "requests", self._generate, 1, ask, "after it"),
            each("stream_generate", "requests", self._stream, 1, ask, "after it"),
            each("run_blocking, deaf", "requests", self.visit, 1, self.watched, "after it"),
            each("logits processor", "requests", self.watched, 1, self.visit, "after it"),
            each("generate, behind another", "requests", self._generate, beside=ask),
            each("generate_batch", "requests", self._batch, 2, ask, "after it"),
            each("chat", "requests", self._chat),
            each("run_blocking", "requests", self._run_blocking, 1, self.visit, "after it"),
            each("stream_generate, left early", "requests", self._left_stream, beside=ask),
            each("stream_generate, bare", "requests", self._bare_stream),
            each("generate", "requests", self._generate),
            each("stop", "life", self.stop, 0, self.ask_or_stopped),
            each("start", "life", self.start),
            each("async with", "life", self._whole_life),
            each("shutdown", "life", self._drain, 0, self.ask_or_stopped),
        ]

    def impossible(self, operation: Operation) -> str | None:
        """Why it cannot be done; ``None`` if it can, as far as is known."""
        if operation.name == "chat" and not self.engine.has_chat_template:
            return "the model has no chat template"
        if operation.name == "logits processor" and not self.takes_processors:
            return "the engine takes no functions as logits processors"
        if operation.name.startswith("run_blocking") and not self.takes_functions:
            return "the engine runs no functions of others"
        return None

    # Requests

    async def _generate(self) -> Any:
        return self._checked(await self.engine.generate(self._new_prompt(), **self.options))

    async def _stream(self) -> Any:
        async with self.engine.stream_generate(self._new_prompt(), **self.options) as stream:
            tokens = [token async for chunk in stream for token in chunk.tokens]
        if stream.result.tokens != tuple(tokens):
            raise Fault("the result of the stream is not what was streamed")
        return self._checked(stream.result)

    async def _bare_stream(self) -> Any:
        stream = self.engine.stream_generate(self._new_prompt(), **self.options)
        tokens = [token async for chunk in stream for token in chunk.tokens]
        return self._counted(tokens)

    async def _left_stream(self) -> Any:
        async with self.engine.stream_generate(self._new_prompt(), **self.options) as stream:
            async for _ in stream:
                return True
        raise Fault("the stream ended before its first chunk")

    async def _chat(self) -> Any:
        messages = [{"role": "user", "content": self._new_prompt()}]
        return self._checked(await self.engine.chat(messages, **self.options))

    async def _batch(self) -> Any:
        prompts = [self._new_prompt(), self._new_prompt()]
        for result in await self.engine.generate_batch(prompts, **self.options):
            if not isinstance(result, GenerationResult):
                raise result
            self._checked(result)
        return True

    async def _save(self) -> Any:
        await self.engine.save_prompt_cache(self._file)
        return True

    async def _load(self) -> Any:
        await self.engine.load_prompt_cache(self._file)
        return True

    async def watched(self) -> Any:
        """A request that can be seen inside MLX, if the engine takes logits processors."""
        return await (self.with_processor() if self.takes_processors else self._generate())

    async def with_processor(self) -> Any:
        """A request with a logits processor."""
        name = f"request {next(self._calls)}"
        with self.visits.until_told(name) as told:

            def processor(_: Any, logits: Any) -> Any:
                if told():
                    self.visits.complain("work went on inside MLX after its caller was told")
                with self.visits.inside(name):
                    time.sleep(FUNCTION_SECONDS / 5)
                return logits

            options = {**self.options, "logits_processors": [processor]}
            result = await self.engine.generate(self._new_prompt(), **options)
        return self._checked(result)

    async def _run_blocking(self) -> Any:
        stop = threading.Event()
        return await self._run(lambda: stop.wait(4 * FUNCTION_SECONDS), stop.set)

    async def visit(self) -> Any:
        """A function that stays inside MLX for as long as it likes."""
        return await (self.visit_once() if self.takes_functions else self._generate())

    async def visit_once(self) -> Any:
        """The same, whether or not the engine takes functions."""
        return await self._run(lambda: time.sleep(FUNCTION_SECONDS), None)

    async def _run(self, stay: Callable[[], object], on_cancel: Callable[[], None] | None) -> Any:
        number = next(self._calls)
        name = f"function {number}"

        def function() -> int:
            with self.visits.inside(name):
                stay()
            return number

        with self.visits.until_told(name):
            gave = await self.engine.run_blocking(function, on_cancel=on_cancel)
        if gave != number:
            raise Fault(f"run_blocking gave {gave!r}, and the function had returned {number}")
        return True

    # Beside and after them

    async def ask(self) -> GenerationResult:
        """The reference request."""
        result = await self.engine.generate(REFERENCE, **self.options)
        self._checked(result)
        return result

    async def ask_beside(self) -> None:
        """The same, of which no more can be said than that of any, unless it is exact."""
        tokens = (await self.ask()).tokens
        self.compared += 1
        self.same += tokens == self.reference
        if self.exact and tokens != self.reference:
            raise Fault(f"a request beside it gave the tokens {tokens}, not {self.reference}")

    async def probe(self) -> None:
        """The next request has the right tokens."""
        tokens = (await self.ask()).tokens
        if self.reference is not None and tokens != self.reference:
            raise Fault(f"the next request gave the tokens {tokens}, not {self.reference}")

    async def look_at_file(self) -> None:
        """What was saved is whole, and nothing else is there."""
        if self._file.exists():
            await self.engine.load_prompt_cache(self._file)
        left = {path.name for path in self._folder.iterdir()} - {self._file.name}
        if left:
            raise Fault(f"files are left: {', '.join(sorted(left))}")

    # Its life

    async def start(self) -> Any:
        """Load the model."""
        await self.engine.start()
        return True

    async def _whole_life(self) -> Any:
        async with self.engine:
            return await self._generate()

    async def stop(self) -> Any:
        """Let go of it."""
        await self.engine.stop()
        return self._is(EngineState.STOPPED)

    async def _drain(self) -> Any:
        report = await self.engine.shutdown(None)
        if report.aborted:
            raise Fault(f"a shutdown without a limit has aborted {', '.join(report.aborted)}")
        return self._is(EngineState.STOPPED)

    async def ask_or_stopped(self) -> None:
        """A request in flight while the engine is stopped."""
        try:
            await self._generate()
        except EngineStopped:
            pass

    def _is(self, *states: EngineState) -> bool:
        if self.engine.state not in states:
            raise Fault(f"afterwards the engine is {self.engine.state}")
        return True

    async def live_on(self) -> None:
        """A start that was cancelled has happened or has not; it can be started again."""
        self._is(EngineState.CREATED, EngineState.RUNNING, EngineState.STOPPED)
        await self._live()

    async def stop_and_live_on(self) -> None:
        """The same of a stop, and it can be stopped again."""
        self._is(EngineState.CREATED, EngineState.RUNNING, EngineState.STOPPED)
        await self.stop_and_live()

    async def stop_and_live(self) -> None:
        """Whatever has become of it, it can be stopped, and started again."""
        await self.stop()
        await self._live()

    async def _live(self) -> None:
        await self.engine.start()
        await self.probe()
        await self.stop()

    # What all have in common

    @property
    def _file(self) -> Path:
        return self._folder / "prompts"

    def _new_prompt(self) -> str:
        return f"{next(self._numbers)} {self._prompt}"

    def _checked(self, result: GenerationResult) -> Any:
        if result.finish_reason != "length":
            raise Fault(f"a request ended by {result.finish_reason!r}, not by 'length'")
        return self._counted(result.tokens)

    def _counted(self, tokens: Any) -> Any:
        if len(tokens) != TOKENS:
            raise Fault(f"a request for {TOKENS} tokens gave {len(tokens)}")
        return True
