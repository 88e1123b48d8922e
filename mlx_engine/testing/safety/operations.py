"""Operations of an engine, as its callers do them: the table that everything is tried from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Literal

from mlx_engine.core.lifecycle import EngineState
from mlx_engine.core.stream import GenerationStream
from mlx_engine.errors import EngineStopped, MLXEngineError
from mlx_engine.testing.safety.fault import Fault
from mlx_engine.testing.safety.fixture import Fixture

Run = Callable[[Fixture], Coroutine[Any, Any, Any]]
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
        run: does it; gives something that is not ``None``, and raises ``Fault`` if that is not
            what it should be.
        requests: that it makes, as the engine counts them.
        beside: what goes on at the same time, and makes one request.
        order: whether that begins before the operation or after it.
        need: what not every engine has.
        starts: whether it starts the engine, which is not running before.
    """

    name: str
    group: Group
    run: Run
    requests: int = 1
    beside: Run | None = None
    order: Order = "after it"
    need: Need | None = None
    starts: bool = False


# Requests


async def generate(at: Fixture) -> Any:
    """Continue a prompt."""
    return at.told(await at.engine.generate(at.prompt(), **at.options))


async def chat(at: Fixture) -> Any:
    """Answer a message."""
    chat = at.engine.chat(at.messages(), on_progress=at.on_progress, **at.options)
    return at.told(await chat)


async def batch(at: Fixture) -> Any:
    """Continue many prompts."""
    batch = at.engine.generate_batch(at.prompts(), on_progress=at.on_progress, **at.options)
    told = []
    for result in await batch:
        if isinstance(result, MLXEngineError):
            raise result
        told.append(at.told(result))
    return told


async def stream(at: Fixture) -> Any:
    """Read a stream in an ``async with``."""
    async with at.engine.stream_generate(at.prompt(), **at.options) as stream:
        tokens = [token async for chunk in stream for token in chunk.tokens]
    return _streamed(at, stream, tokens)


async def bare_stream(at: Fixture) -> Any:
    """Read a stream without one."""
    stream = at.engine.stream_generate(at.prompt(), **at.options)
    return _streamed(at, stream, [token async for chunk in stream for token in chunk.tokens])


def _streamed(at: Fixture, stream: GenerationStream, tokens: list[int]) -> Any:
    if stream.result.tokens != tuple(tokens):
        raise Fault("the result of the stream is not what was streamed")
    return at.told(stream.result)


async def left_stream(at: Fixture) -> Any:
    """Leave a stream after its first chunk."""
    async with at.engine.stream_generate(at.prompt(), **at.options) as stream:
        async for chunk in stream:
            return chunk.tokens
    raise Fault("the stream ended before its first chunk")


# Functions, and files


async def run_blocking(at: Fixture) -> Any:
    """Run a function that is told of its cancellation."""
    stop = threading.Event()
    return await at.blocking(stop, stop.set)


async def run_deaf(at: Fixture) -> Any:
    """Run a function that is not."""
    return await at.blocking(threading.Event(), None)


async def save(at: Fixture) -> Any:
    """Save the prompt cache."""
    return await at.engine.save_prompt_cache(at.to_save)


async def load(at: Fixture) -> Any:
    """Load what was saved."""
    return await at.engine.load_prompt_cache(at.to_load)


# The engine's life


async def start(at: Fixture) -> Any:
    """Load the model."""
    await at.engine.start()
    return True


async def whole_life(at: Fixture) -> Any:
    """Start an engine, use it, and stop it."""
    async with at.engine:
        return await generate(at)


async def stop(at: Fixture) -> Any:
    """Abort what is in flight, and let go of the model."""
    await at.engine.stop()
    return at.must_be(EngineState.STOPPED)


async def drain(at: Fixture) -> Any:
    """Shut down once all requests are done."""
    report = await at.engine.shutdown(None)
    if report.aborted:
        raise Fault(f"a shutdown without a limit has aborted {', '.join(report.aborted)}")
    return at.must_be(EngineState.STOPPED)


# What goes on beside them


def another(at: Fixture) -> Coroutine[Any, Any, Any]:
    """Do another request."""
    return at.another()


def watched(at: Fixture) -> Coroutine[Any, Any, Any]:
    """Do a request that can be seen inside MLX."""
    return at.watched()


def visit(at: Fixture) -> Coroutine[Any, Any, Any]:
    """Run a function inside MLX."""
    return at.visit()


async def another_or_stopped(at: Fixture) -> None:
    """Do a request that is in flight while the engine is stopped."""
    try:
        await at.another()
    except EngineStopped:
        pass


OPERATIONS: Final = (
    Operation("save_prompt_cache", "files", save),
    Operation("load_prompt_cache", "files", load, beside=another),
    Operation("generate, before another", "requests", generate, beside=another),
    Operation("stream_generate", "requests", stream, beside=another),
    Operation("run_blocking, deaf", "requests", run_deaf, beside=watched, need="functions"),
    Operation("logits processor", "requests", watched, beside=visit, need="logits processors"),
    Operation("generate, behind another", "requests", generate, beside=another, order="before it"),
    Operation("generate_batch", "requests", batch, requests=2, beside=another),
    Operation("chat", "requests", chat, need="chat template"),
    Operation("run_blocking", "requests", run_blocking, beside=visit, need="functions"),
    Operation(
        "stream_generate, left early", "requests", left_stream, beside=another, order="before it"
    ),
    Operation("stream_generate, bare", "requests", bare_stream),
    Operation("generate", "requests", generate),
    Operation("stop", "life", stop, beside=another_or_stopped, order="before it"),
    Operation("start", "life", start, starts=True),
    Operation("async with", "life", whole_life, starts=True),
    Operation("shutdown", "life", drain, beside=another_or_stopped, order="before it"),
)
