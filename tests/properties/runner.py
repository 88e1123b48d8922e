"""Runs a random program on an engine, and checks everything that may be said of what comes."""

from __future__ import annotations

import asyncio
import warnings
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx

from mlx_engine import (
    BaseEngine,
    EngineNotStarted,
    EngineState,
    EngineStopped,
    GenerationError,
    GenerationResult,
    GenerationStream,
    InvalidRequest,
    StreamClosed,
)
from mlx_engine.core.mlx_thread import mlx_thread
from tests.conftest import other_tasks, settled
from tests.guard import GUARD
from tests.properties import programs as ops
from tests.properties.programs import CHATS, PARAMS, PROMPTS, Operation
from tests.waiting import PATIENCE

MOST_FAULTS = 2  # of the model's in a program: three steps in a row that fail end an engine
SCRIPTED = "scripted fault"


class References(dict[tuple[bool, int, int], GenerationResult]):
    """By whether it is a chat, the number of the prompt, and that of the parameters."""

    def __repr__(self) -> str:  # or each failure would show them all
        return "references"


async def make_references(engine: BaseEngine) -> References:
    """What each prompt gives with each of the parameters, alone and without a prompt cache."""
    found = References()
    for i, params in enumerate(PARAMS):
        for number, prompt in enumerate(PROMPTS):
            found[False, number, i] = await engine.generate(prompt, **params)
        for number, chat in enumerate(CHATS):
            found[True, number, i] = await engine.chat(chat, **params)
    return found


@dataclass(eq=False)
class Asked:
    """A request, and what may become of it.

    Attributes:
        expected: the references of its prompts.
        fault: the token at which its logits processor raises.
        may: what happened that may have cost it its answer: ``cancelled``, ``stopped``,
            ``refused``, ``broken``.
        must: whether it was cancelled in a way after which no answer may come.
        timed: whether it has a timeout.
    """

    expected: list[GenerationResult]
    fault: int | None
    task: asyncio.Task[Any] | None = None
    scope: anyio.CancelScope | None = None
    stream: GenerationStream | None = None
    started: bool = False
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    last: str | None = None  # finish reason of the last chunk
    may: set[str] = field(default_factory=set)
    must: bool = False
    timed: bool = False


class Runner:
    """One program on one engine, in one event loop."""

    def __init__(self, engine: BaseEngine, references: References, folder: Path) -> None:
        self._engine: Any = engine
        self._references = references
        self._file = folder / "prompts"
        self._open: list[Asked] = []
        self._state = EngineState.CREATED
        self._leaving: asyncio.Task[Any] | None = None
        self._faults = 0
        self._calls_left: int | None = None  # of the model, until one fails
        self._counts = {"finished": 0, "failed": 0, "perhaps": 0}

    async def run(self, program: list[Operation]) -> None:
        """All of it, then the end of everything."""
        GUARD.hook = self._model_is_called
        try:
            await self._start(None)
            for operation in program:
                await self._do(operation)
                self._check_state()
            await self._end()
        finally:
            GUARD.hook = None
            await _in_time(self._engine.stop())  # when something was wrong

    async def _do(self, operation: Operation) -> None:
        match operation:
            case ops.Submit():
                self._submit(operation)
            case ops.Read(which, count):
                if (asked := self._one(which, streams=True)) is not None:
                    await self._read(asked, count)
            case ops.Cancel(which, way):
                if (asked := self._one(which)) is not None:
                    await self._cancel(asked, way)
            case ops.Drop(which):
                if (asked := self._one(which, streams=True)) is not None:
                    await self._drop(asked)
            case ops.Finish(which):
                if (asked := self._one(which)) is not None:
                    await self._finish(asked)
            case ops.Pause(0):
                await _in_time(settled())
            case ops.Pause(turns):
                for _ in range(turns):
                    await asyncio.sleep(0)
            case ops.Call(raises):
                await self._turn(lambda: self._engine.run_blocking(_function, raises), raises)
            case ops.Ask(chat, cancelled_after):
                await self._ask(chat, cancelled_after)
            case ops.File(save):
                await self._use_file(save)
            case ops.Break(after):
                self._break(after)
            case ops.Shutdown(timeout, wait):
                await self._shut_down(timeout, wait)
            case ops.Start(cancelled_after):
                await self._start(cancelled_after)

    def _one(self, which: int, *, streams: bool = False) -> Asked | None:
        found = [asked for asked in self._open if asked.stream is not None or not streams]
        return found[which % len(found)] if found else None

    # requests

    def _submit(self, submit: ops.Submit) -> None:
        chat = submit.kind in ("chat", "stream_chat")
        pool = len(CHATS) if chat else len(PROMPTS)
        numbers = [submit.prompt % pool]
        if submit.kind == "batch":
            numbers += [(submit.prompt + n) % pool for n in (1, 2)]
        asked = Asked([self._references[chat, n, submit.params] for n in numbers], submit.fault)
        asked.timed = submit.timeout is not None
        options = {**PARAMS[submit.params], "priority": submit.priority, "timeout": submit.timeout}
        if submit.fault is not None:
            options["logits_processors"] = [
                _Processor(submit.fault, asked.expected[0].usage.prompt_tokens)
            ]
            asked.expected = asked.expected[:1]
            numbers = numbers[:1]
        prompts: list[Any] = [CHATS[n] if chat else PROMPTS[n] for n in numbers]
        match submit.kind:
            case "stream":
                asked.stream = self._engine.stream_generate(prompts[0], **options)
            case "stream_chat":
                asked.stream = self._engine.stream_chat(prompts[0], **options)
            case "batch":
                self._begin(asked, lambda: self._engine.generate_batch(prompts, **options))
            case "generate":
                self._begin(asked, lambda: self._engine.generate(prompts[0], **options))
            case "chat":
                self._begin(asked, lambda: self._engine.chat(prompts[0], **options))
        if submit.entered and asked.stream is not None:
            self._starts(asked)
            asked.stream._start()  # what ``async with`` does
        self._open.append(asked)

    def _begin(self, asked: Asked, work: Callable[[], Awaitable[Any]]) -> None:
        scope = asked.scope = anyio.CancelScope()

        async def within() -> Any:
            with scope:
                return await work()
            return asyncio.CancelledError()

        asked.task = asyncio.create_task(within())
        self._starts(asked)

    def _starts(self, asked: Asked) -> None:
        """It meets the engine as it is now."""
        if not asked.started:
            asked.started = True
            asked.may |= self._troubles()

    def _troubles(self) -> set[str]:
        found = set() if self._engine.state is EngineState.RUNNING else {"refused"}
        return found | ({"broken"} if self._calls_left is not None else set())

    def _everybody(self, trouble: str) -> None:
        for asked in self._open:
            if asked.started:
                asked.may.add(trouble)

    async def _read(self, asked: Asked, count: int) -> bool:
        """Read chunks; ``False`` if it is over, and has been looked at."""
        assert asked.stream is not None
        self._starts(asked)
        try:
            for _ in range(count):
                chunk = await _in_time(anext(asked.stream))
                assert asked.last is None, "a chunk after the last one"
                asked.tokens += chunk.tokens
                asked.text += chunk.text if chunk.segment == "content" else ""
                asked.last = chunk.finish_reason
        except StopAsyncIteration:
            self._over(asked, asked.stream.result)
        except BaseException as error:
            self._over(asked, error)
        else:
            return True
        return False

    async def _finish(self, asked: Asked) -> None:
        if asked.stream is not None:
            while await self._read(asked, 10):
                pass
            await _in_time(asked.stream.aclose())
            return
        assert asked.task is not None
        await _in_time(asyncio.wait({asked.task}))
        if asked.task.cancelled():
            self._over(asked, asyncio.CancelledError())
        else:
            self._over(asked, asked.task.exception() or asked.task.result())

    async def _cancel(self, asked: Asked, way: str) -> None:
        if asked.task is None or not asked.task.done():
            asked.may.add("cancelled")
        if asked.task is not None:
            if asked.task.done():
                pass
            elif way == "scope":
                assert asked.scope is not None
                asked.scope.cancel()
            else:
                asked.must = True
                for _ in range(2 if way == "twice" else 1):
                    asked.task.cancel()
                    await asyncio.sleep(0)
            if way == "close":
                await self._finish(asked)
            return
        assert asked.stream is not None
        if way == "cancel":
            asked.stream.cancel()
        elif way == "close":
            await _in_time(asked.stream.aclose())
            await _in_time(asked.stream.aclose())
            self._closed(asked)
        else:
            await self._cancel_reader(asked, way)

    async def _cancel_reader(self, asked: Asked, way: str) -> None:
        """A task reads a stream to its end, and is cancelled meanwhile."""
        assert asked.stream is not None
        stream, scope = asked.stream, anyio.CancelScope()
        self._starts(asked)

        async def read() -> bool:
            with scope:
                async for chunk in stream:
                    asked.tokens += chunk.tokens
                return True
            return False

        reader = asyncio.create_task(read())
        for _ in range(5):
            await asyncio.sleep(0)
        if way == "scope":
            scope.cancel()
        else:
            reader.cancel()
            await asyncio.sleep(0)
            reader.cancel()
        await _in_time(asyncio.wait({reader}))
        if reader.cancelled() or (reader.exception() is None and not reader.result()):
            await _in_time(stream.aclose())
            self._closed(asked)
        else:
            self._over(asked, reader.exception() or stream.result)

    def _closed(self, asked: Asked) -> None:
        """A stream has been closed, perhaps in the middle."""
        assert asked.stream is not None
        try:
            result = asked.stream.result
        except StreamClosed:
            assert not asked.started
            self._open.remove(asked)
        except BaseException as error:
            self._over(asked, error)
        else:
            self._over(asked, result)

    async def _drop(self, asked: Asked) -> None:
        """It warns if there is something to be cancelled, and is freed in any case."""
        assert asked.stream is not None
        self._open.remove(asked)
        task = asked.stream._task
        unfinished = task is not None and not task.done() and not asked.stream._closed
        gone, producer = weakref.ref(asked.stream), asked.stream._producer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            asked.stream = None
        told = [str(each.message) for each in caught if each.category is ResourceWarning]
        del caught  # the warnings know their stream
        assert gone() is None, "something holds a stream that was dropped"
        assert len(told) == unfinished, told
        assert not unfinished or producer.should_stop
        if asked.started:
            self._counts["perhaps"] += 1

    def _over(self, asked: Asked, outcome: Any) -> None:
        """Whatever it came to must be allowed, and right."""
        self._open.remove(asked)
        if isinstance(outcome, list):
            for each, expected in zip(outcome, asked.expected, strict=True):
                self._check(asked, each, expected)
        else:
            self._check(asked, outcome, asked.expected[0], len(asked.expected))

    def _check(
        self, asked: Asked, outcome: Any, expected: GenerationResult, requests: int = 1
    ) -> None:
        reference = list(expected.tokens)
        assert asked.tokens == reference[: len(asked.tokens)], "not a prefix of the answer"
        match outcome:
            case GenerationResult(finish_reason="cancelled"):
                assert "cancelled" in asked.may
                assert asked.stream is not None, "a cancelled caller got a result"
                assert list(outcome.tokens) == reference[: len(outcome.tokens)]
                self._counts["perhaps"] += 1
            case GenerationResult(finish_reason="timeout"):
                assert asked.timed
                assert not asked.must, "a cancelled caller got a result"
                assert list(outcome.tokens) == reference[: len(outcome.tokens)]
                assert asked.last in (None, "timeout")
                # A cancel may come when it is over, and its caller has not been told yet.
                self._counts["perhaps" if "cancelled" in asked.may else "finished"] += 1
            case GenerationResult():
                assert not asked.must, "a cancelled caller got a result"
                assert list(outcome.tokens) == reference
                assert outcome.text == expected.text
                assert outcome.finish_reason == expected.finish_reason
                if asked.stream is not None and asked.last is not None:
                    assert asked.last == expected.finish_reason
                    assert asked.tokens == reference
                    assert asked.text == expected.text
                assert asked.fault is None or asked.fault >= len(reference)
                self._counts["finished"] += 1
            case asyncio.CancelledError():
                assert "cancelled" in asked.may
                self._counts["perhaps"] += requests
            case GenerationError() if SCRIPTED in str(outcome):
                assert asked.fault is not None
                assert asked.fault <= len(reference)
                assert not asked.must
                self._counts["failed"] += 1
            case GenerationError():
                assert "broken" in asked.may, outcome
                assert "injected" in str(outcome)
                assert not asked.must
                self._counts["failed"] += 1
            case EngineStopped() | EngineNotStarted():
                assert asked.may & {"stopped", "refused"}, outcome
                self._counts["perhaps"] += requests
            case _:
                raise AssertionError(f"{outcome!r} is nothing that may come") from outcome

    # the engine itself

    async def _turn(self, call: Callable[[], Awaitable[Any]], raises: bool) -> None:
        """A turn of the user's own; it is counted like a request."""
        troubles = self._troubles()
        try:
            await _in_time(call())
        except (EngineStopped, EngineNotStarted):
            assert "refused" in troubles or self._leaving is not None
            self._counts["perhaps"] += 1
        except (ZeroDivisionError, InvalidRequest):
            assert raises
            self._counts["failed"] += 1
        except GenerationError:
            assert "broken" in troubles
            self._counts["failed"] += 1
        else:
            assert not raises
            self._counts["finished"] += 1

    async def _ask(self, chat: bool, cancelled_after: int | None) -> None:
        """A question about a prompt, which is not counted and waits for nobody."""
        message = {"role": "user", "content": "hi"}
        work = self._engine.render_chat([message]) if chat else self._engine.count_tokens("abc")
        troubles, asking = self._troubles(), asyncio.ensure_future(work)
        for _ in range(cancelled_after or 0):
            await asyncio.sleep(0)
        if cancelled_after is not None:
            asking.cancel()
        await _in_time(asyncio.wait({asking}))
        if asking.cancelled():
            assert cancelled_after is not None
            return
        try:
            told: Any = asking.result()
        except (EngineStopped, EngineNotStarted):
            assert "refused" in troubles or self._leaving is not None
        else:
            assert (told.text.count("hi") if chat else told) == (1 if chat else 3)

    async def _use_file(self, save: bool) -> None:
        if save:
            await self._turn(lambda: self._engine.save_prompt_cache(self._file), False)
        else:
            missing = not self._file.exists()
            await self._turn(lambda: self._engine.load_prompt_cache(self._file), missing)

    def _break(self, after: int) -> None:
        if self._calls_left is None and self._faults < MOST_FAULTS:
            self._faults += 1
            self._everybody("broken")
            self._calls_left = after

    def _model_is_called(self, name: str) -> None:
        if name != "model" or self._calls_left is None:
            return
        if self._calls_left == 0:
            self._calls_left = None
            raise RuntimeError("injected")
        self._calls_left -= 1

    async def _shut_down(self, timeout: float | None, wait: bool) -> None:
        self._everybody("stopped")
        leaving = asyncio.create_task(self._engine.shutdown(timeout))
        await asyncio.sleep(0)
        await self._left(another=True)
        self._leaving = leaving
        if wait:
            await self._left()

    async def _left(self, another: bool = False) -> None:
        """The shutdown that is under way, if any, is waited for; ``another`` may have begun."""
        leaving, self._leaving = self._leaving, None
        if leaving is None:
            return
        report = await _in_time(leaving)
        assert not set(report.finished) & set(report.aborted)
        # A start may have been begun, and cancelled, just after the engine had stopped.
        states = [EngineState.STOPPED, EngineState.CREATED]
        assert self._engine.state in ([*states, EngineState.DRAINING] if another else states)
        self._state = self._engine.state

    async def _start(self, cancelled_after: int | None) -> None:
        broken, leaving, before = self._calls_left is not None, self._leaving, self._state
        starting = asyncio.create_task(self._engine.start())
        if cancelled_after is not None:
            for _ in range(cancelled_after):
                await asyncio.sleep(0)
            starting.cancel()
        await _in_time(asyncio.wait({starting}))
        state = self._engine.state
        if starting.cancelled():
            assert cancelled_after is not None
            if leaving is None:
                loaded = before is EngineState.RUNNING
                assert state in ({before} if loaded else {before, EngineState.CREATED})
                self._state = state
            return
        error = starting.exception()
        if error is None:
            assert state is EngineState.RUNNING
            if leaving is not None:  # it had just come to its end
                await _in_time(leaving)
            self._leaving, self._state = None, state
        elif isinstance(error, EngineStopped):
            assert leaving is not None
        else:
            assert broken, error
            assert "injected" in str(error)
            if leaving is None:
                assert state is EngineState.CREATED
                self._state = state

    def _check_state(self) -> None:
        if self._leaving is None:
            assert self._engine.state is self._state
        else:
            assert self._engine.state is not EngineState.RUNNING

    # the end

    async def _end(self) -> None:
        """Everything comes to an end; the engine serves on, and leaves nothing behind."""
        while self._open:
            await self._finish(self._open[0])
        await self._left()
        self._calls_left = None
        engine = self._engine
        await _in_time(engine.start())
        expected = self._references[False, 0, 1]
        result = await _in_time(engine.generate(PROMPTS[0], **PARAMS[1]))
        self._counts["finished"] += 1
        assert result.tokens == expected.tokens
        await _in_time(settled())
        self._check_counts()
        await _in_time(engine.stop())
        assert engine.state is EngineState.STOPPED
        assert not engine._holder.loaded
        assert not mlx_thread.busy
        assert not other_tasks()
        assert not GUARD.violations

    def _check_counts(self) -> None:
        stats, counts = self._engine.stats(), self._counts
        assert (stats.running, stats.waiting, stats.rejected) == (0, 0, 0)
        assert (stats.batch_size, stats.kv_bytes) == (0, 0)
        assert counts["finished"] <= stats.finished
        assert counts["failed"] <= stats.failed
        certain = counts["finished"] + counts["failed"]
        total = stats.finished + stats.failed + stats.cancelled
        assert certain <= total <= certain + counts["perhaps"], (stats, counts)
        cache = self._engine._holder.runner().prompt_cache
        assert cache.nbytes == sum(entry.nbytes for entry in cache.entries()) <= cache.limit


class _Processor:
    """A logits processor that changes nothing, and raises at one token."""

    def __init__(self, at: int, prompt_tokens: int) -> None:
        self._at = at + prompt_tokens

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size >= self._at:
            raise ValueError(SCRIPTED)
        return logits


def _function(raises: bool) -> int:
    if raises:
        raise ZeroDivisionError
    return int(mx.arange(3).sum().item())


async def _in_time(work: Awaitable[Any]) -> Any:
    """Nothing in this library may hang."""
    done, _ = await asyncio.wait({asyncio.ensure_future(work)}, timeout=PATIENCE)
    assert done, "it hangs"
    return done.pop().result()
