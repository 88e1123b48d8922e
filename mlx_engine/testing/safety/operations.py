"""Operations of an engine, as its callers do them: the table that everything is tried from."""

from __future__ import annotations

import abc
import contextvars
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from mlx_engine.core.bridge import off_loop
from mlx_engine.core.stream import GenerationStream
from mlx_engine.engine.base import BaseEngine
from mlx_engine.engine.sync import SyncEngine, SyncStream
from mlx_engine.errors import EngineStopped, MLXEngineError
from mlx_engine.outputs import EngineState, GenerationResult, ProgressCallback
from mlx_engine.testing.safety.fault import Fault
from mlx_engine.testing.safety.ways import Work

Group = Literal["files", "requests", "life"]
Order = Literal["before it", "after it"]
Need = Literal["chat template", "logits processors", "functions"]


@dataclass(frozen=True)
class Operation:
    """An operation of an engine.

    Attributes:
        name: in reports and in the names of tests.
        group: operations of a group are tried together; one of the group ``life`` starts or
            ends the engine.
        method: of a ``Fixture``; gives something that is not ``None``, and raises ``Fault`` if
            that is not what it should be.
        requests: that it makes, as the engine counts them; 0 takes no turn.
        beside: the method that goes on at the same time, and makes one request.
        order: whether that begins before the operation or after it.
        need: what not every engine has.
        starts: whether it starts the engine, which is not running before.
    """

    name: str
    group: Group
    method: str
    requests: int = 1
    beside: str | None = None
    order: Order = "after it"
    need: Need | None = None
    starts: bool = False


OPERATIONS: Final = (
    Operation("save_prompt_cache", "files", "save"),
    Operation("load_prompt_cache", "files", "load", beside="another"),
    Operation("generate, before another", "requests", "generate", beside="another"),
    Operation("stream_generate", "requests", "stream", beside="another"),
    Operation("run_blocking, deaf", "requests", "run_deaf", beside="watched", need="functions"),
    Operation("logits processor", "requests", "watched", beside="visit", need="logits processors"),
    Operation(
        "generate, behind another", "requests", "generate", beside="another", order="before it"
    ),
    Operation("generate_batch", "requests", "batch", requests=2, beside="another"),
    Operation("map", "requests", "mapped", requests=2, beside="another"),
    Operation("chat", "requests", "chat", need="chat template"),
    Operation("count_tokens", "requests", "count", requests=0, beside="another"),
    Operation(
        "render_chat",
        "requests",
        "render",
        requests=0,
        beside="another",
        order="before it",
        need="chat template",
    ),
    Operation("run_blocking", "requests", "run_blocking", beside="visit", need="functions"),
    Operation(
        "stream_generate, left early", "requests", "leave", beside="another", order="before it"
    ),
    Operation("stream_generate, bare", "requests", "bare_stream"),
    Operation("sync: generate", "requests", "generate_in_script", beside="another"),
    Operation("sync: stream_generate", "requests", "stream_in_script"),
    Operation("generate", "requests", "generate"),
    Operation("stop", "life", "stop", beside="another_or_stopped", order="before it"),
    Operation("start", "life", "start", starts=True),
    Operation("async with", "life", "whole_life", starts=True),
    Operation("sync: with", "life", "whole_script", starts=True),
    Operation("shutdown", "life", "drain", beside="another_or_stopped", order="before it"),
)


class _CtrlC(threading.Event):
    """An event that, when it is set, cancels what a script blocks for."""

    def __init__(self, front: SyncEngine[BaseEngine]) -> None:
        super().__init__()
        self._front = front

    def set(self) -> None:
        """Be set."""
        super().set()
        self._front.cancel()


class Fixture(abc.ABC):
    """An engine with the operations of the table; subclasses say what is asked and told.

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

    def works(self, operation: Operation) -> tuple[Work[Any], Work[Any] | None]:
        """The operation on this engine, and what goes on beside it."""
        beside = operation.beside
        return getattr(self, operation.method), None if beside is None else getattr(self, beside)

    # What is asked, and told

    @abc.abstractmethod
    def prompt(self) -> str | list[int]:
        """A prompt to be continued."""

    def prompts(self) -> list[str | Sequence[int]]:
        """Prompts of a batch: two."""
        return [self.prompt(), self.prompt()]

    @abc.abstractmethod
    def messages(self) -> list[dict[str, Any]]:
        """Messages of a chat."""

    @abc.abstractmethod
    def told(self, result: GenerationResult) -> Any:
        """An answer in the form in which it is compared; raises ``Fault`` if it is wrong."""

    # Requests

    async def generate(self) -> Any:
        """Continue a prompt."""
        return self.told(await self.engine.generate(self.prompt(), **self.options))

    async def chat(self) -> Any:
        """Answer a message."""
        told = {"on_progress": self.on_progress, **self.options}
        return self.told(await self.engine.chat(self.messages(), **told))

    async def count(self) -> Any:
        """Count the tokens of a prompt, without a turn."""
        if (count := await self.engine.count_tokens(self.prompt())) < 1:
            raise Fault(f"a prompt has {count} tokens")
        return count

    async def render(self) -> Any:
        """Put a message into the chat template, without a turn."""
        chat = await self.engine.render_chat(self.messages())
        if not (chat.text and 0 <= chat.cached_tokens < len(chat.tokens)):
            raise Fault(f"a chat was made into {chat}")
        return chat.tokens

    async def batch(self) -> Any:
        """Continue two prompts."""
        told = {"on_progress": self.on_progress, **self.options}
        results = await self.engine.generate_batch(self.prompts(), **told)
        for result in results:
            if isinstance(result, MLXEngineError):
                raise result
        return [self.told(result) for result in results if isinstance(result, GenerationResult)]

    async def mapped(self) -> Any:
        """Map two prompts, in order."""
        outcomes = self.engine.map(self.prompts(), ordered=True, **self.options)
        return [self.told(outcome.unwrap()) async for outcome in outcomes]

    async def stream(self) -> Any:
        """Read a stream in an ``async with``."""
        async with self.engine.stream_generate(self.prompt(), **self.options) as stream:
            tokens = [token async for chunk in stream for token in chunk.tokens]
        return self._streamed(stream, tokens)

    async def bare_stream(self) -> Any:
        """Read a stream without one."""
        stream = self.engine.stream_generate(self.prompt(), **self.options)
        return self._streamed(stream, [token async for chunk in stream for token in chunk.tokens])

    def _streamed(self, stream: GenerationStream | SyncStream, tokens: list[int]) -> Any:
        if stream.result.tokens != tuple(tokens):
            raise Fault("the result of the stream is not what was streamed")
        return self.told(stream.result)

    async def leave(self) -> Any:
        """Leave a stream after its first chunk."""
        async with self.engine.stream_generate(self.prompt(), **self.options) as stream:
            async for chunk in stream:
                return chunk.tokens
        raise Fault("the stream ended before its first chunk")

    # Without await: in a thread that blocks, and for which a cancellation is what Ctrl-C is

    async def generate_in_script(self) -> Any:
        """Continue a prompt there."""
        return await self._in_script(
            lambda llm: self.told(llm.generate(self.prompt(), **self.options))
        )

    async def stream_in_script(self) -> Any:
        """Read a stream there."""

        def read(llm: SyncEngine[BaseEngine]) -> Any:
            with llm.stream_generate(self.prompt(), **self.options) as stream:
                tokens = [token for chunk in stream for token in chunk.tokens]
            return self._streamed(stream, tokens)

        return await self._in_script(read)

    async def whole_script(self) -> Any:
        """Start an engine there, use it, and stop it."""

        def script(llm: SyncEngine[BaseEngine]) -> Any:
            with llm:
                return self.told(llm.generate(self.prompt(), **self.options))

        return await self._in_script(script)

    async def _in_script(self, script: Callable[[SyncEngine[BaseEngine]], Any]) -> Any:
        front = self.engine.sync()

        def run() -> Any:
            try:
                return script(front)
            finally:
                front.close()

        # Not in the context of that thread's job, which whatever is started there would keep.
        context = contextvars.copy_context()
        return await off_loop(lambda: context.run(run), _CtrlC(front))

    @abc.abstractmethod
    async def another(self) -> Any:
        """Do a request beside others, which is not cancelled."""

    async def another_or_stopped(self) -> None:
        """Do one that is in flight while the engine is stopped."""
        try:
            await self.another()
        except EngineStopped:
            pass

    # Inside MLX, and files

    async def run_blocking(self) -> Any:
        """Run a function that is told of its cancellation."""
        stop = threading.Event()
        return await self.blocking(stop, stop.set)

    async def run_deaf(self) -> Any:
        """Run a function that is not."""
        return await self.blocking(threading.Event(), None)

    @abc.abstractmethod
    async def blocking(self, stop: threading.Event, on_cancel: Callable[[], None] | None) -> Any:
        """Run a function inside MLX that takes a while, less if it is told to stop."""

    async def watched(self) -> Any:
        """Do a request that can be seen inside MLX, where that is possible."""
        return await self.another()

    async def visit(self) -> Any:
        """Run a function inside MLX that stays as long as it likes, where that is possible."""
        return await self.another()

    async def save(self) -> Any:
        """Save the prompt cache."""
        return await self.engine.save_prompt_cache(self.to_save)

    async def load(self) -> Any:
        """Load what was saved."""
        return await self.engine.load_prompt_cache(self.to_load)

    # The engine's life

    async def start(self) -> Any:
        """Load the model."""
        await self.engine.start()
        return True

    async def whole_life(self) -> Any:
        """Start an engine, use it, and stop it."""
        async with self.engine:
            return await self.generate()

    async def stop(self) -> Any:
        """Abort what is in flight, and let go of the model."""
        await self.engine.stop()
        return self.must_be(EngineState.STOPPED)

    async def drain(self) -> Any:
        """Shut down once all requests are done."""
        report = await self.engine.shutdown(None)
        if report.aborted:
            raise Fault(f"a shutdown without a limit has aborted {', '.join(report.aborted)}")
        return self.must_be(EngineState.STOPPED)

    def must_be(self, *states: EngineState) -> bool:
        """True if the engine is in one of these states; raises ``Fault`` if not."""
        if self.engine.state not in states:
            raise Fault(f"afterwards the engine is {self.engine.state}")
        return True
