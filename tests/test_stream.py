"""Streams: single use, coalesced, never in anyone's way."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable

import pytest

from mlx_engine import (
    EngineNotStarted,
    GenerationChunk,
    GenerationStream,
    SimpleEngine,
    StreamClosed,
    StreamConsumed,
    StreamUnfinished,
)
from mlx_engine.core import channel as channel_module
from mlx_engine.core.mlx_thread import mlx_thread
from tests.conftest import cancel_inside, other_tasks, settled
from tests.guard import Gate
from tests.waiting import turns, until

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
PROMPT = [1, 2, 3]  # one chunk of prefill, so that the nth token is made in model call n + 1


def stream_of(engine: SimpleEngine, max_tokens: int = 20) -> GenerationStream:
    return engine.stream_generate(PROMPT, max_tokens=max_tokens, ignore_eos=True)


async def free() -> None:
    """Wait until nobody is inside MLX and the stream's task is gone."""
    await until(
        lambda: not mlx_thread.busy and not other_tasks(),
        "the engine is still busy, or a task is left",
    )


async def test_chunks_joined_are_the_result(engine: SimpleEngine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for seed in range(8):
        options = {"max_tokens": 60, "seed": seed, "temperature": 1.0}
        async with engine.stream_chat(messages, logprobs=1, **options) as stream:  # type: ignore[arg-type]
            chunks = [chunk async for chunk in stream]
        result = stream.result
        for segment, text in (("content", result.text), ("reasoning", result.reasoning)):
            assert "".join(c.text for c in chunks if c.segment == segment) == text
        assert tuple(token for c in chunks for token in c.tokens) == result.tokens
        assert tuple(entry for c in chunks for entry in c.logprobs) == result.logprobs
        assert [c.finish_reason for c in chunks if c.finish_reason] == [result.finish_reason]
        assert chunks[-1].finish_reason is not None
        assert result.usage.completion_tokens == len(result.tokens)


async def test_stream_and_generate_give_the_same(engine: SimpleEngine) -> None:
    result = await engine.generate(PROMPT, max_tokens=30)
    async with engine.stream_generate(PROMPT, max_tokens=30) as stream:
        async for _ in stream:
            pass
    assert stream.result.text == result.text
    assert stream.result.tokens == result.tokens


async def test_timings_and_usage(engine: SimpleEngine) -> None:
    async with stream_of(engine) as stream:
        async for _ in stream:
            pass
    timings = stream.result.timings
    assert stream.result.usage.prompt_tokens == 3
    assert stream.result.usage.completion_tokens == 20
    assert 0 < timings.queued < timings.time_to_first_token < timings.total
    assert 0 < timings.prefill < timings.time_to_first_token
    assert timings.decode > 0
    assert timings.tokens_per_second == pytest.approx(19 / timings.decode)
    assert timings.prompt_tokens_per_second == pytest.approx(3 / timings.prefill)


async def test_it_starts_when_first_read_and_never_before(tiny_engine: SimpleEngine) -> None:
    stream = tiny_engine.stream_generate(PROMPT)
    assert not other_tasks()
    with pytest.raises(EngineNotStarted):
        async for _ in stream:
            pass
    with pytest.raises(EngineNotStarted):
        _ = stream.result
    async with tiny_engine:
        later = stream_of(tiny_engine)
        await turns()
        await settled()
        async for chunk in later:
            assert isinstance(chunk, GenerationChunk)


async def test_entering_starts_it(engine: SimpleEngine) -> None:
    async with stream_of(engine) as stream:
        await until(lambda: engine.stats().finished)
        assert len([chunk async for chunk in stream]) == 20, "chunks wait for a late reader"


async def test_second_iteration_raises(engine: SimpleEngine) -> None:
    async with stream_of(engine) as stream:
        async for _ in stream:
            pass
        with pytest.raises(StreamConsumed):
            async for _ in stream:
                pass


async def test_two_readers_at_once_are_refused(engine: SimpleEngine, gate: MakeGate) -> None:
    stop = gate("model", 1)
    async with stream_of(engine) as stream:
        await stop.reached()
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(StreamConsumed, match="another task"):
            await anext(stream)
        stop.go()
        assert (await reader).tokens


async def test_result_before_the_end_and_without_a_start(
    engine: SimpleEngine, gate: MakeGate
) -> None:
    stop = gate("model", 5)
    async with stream_of(engine) as stream:
        with pytest.raises(StreamUnfinished, match="still being made: read the stream"):
            _ = stream.result
        stop.go()
    unstarted = stream_of(engine)
    await unstarted.aclose()
    await unstarted.aclose()
    with pytest.raises(StreamClosed):
        _ = unstarted.result
    with pytest.raises(StreamClosed):
        await anext(unstarted)


async def test_collecting_reads_what_is_left(engine: SimpleEngine) -> None:
    whole = await stream_of(engine).collect()
    assert len(whole.tokens) == 20
    stream = stream_of(engine)
    first = await anext(stream)
    result = await stream.collect()
    assert result is stream.result is await stream.collect()
    assert result.tokens == whole.tokens
    assert first.tokens == result.tokens[:1]
    with pytest.raises(StreamConsumed):
        aiter(stream)
    closed = stream_of(engine, 10_000)
    await anext(closed)
    await closed.aclose()
    assert (await closed.collect()).finish_reason == "cancelled"
    unstarted = stream_of(engine)
    await unstarted.aclose()
    with pytest.raises(StreamClosed):
        await unstarted.collect()


async def test_collecting_is_cancelled_as_reading_is(engine: SimpleEngine, gate: MakeGate) -> None:
    stop = gate("model", 5)
    stream = stream_of(engine, 500)
    await cancel_inside(stop, stream.collect())
    assert stream.result.finish_reason == "cancelled"


async def test_break_in_a_context_frees_the_engine_within_one_token(
    engine: SimpleEngine, gate: MakeGate, told_to_stop: threading.Event
) -> None:
    stop = gate("model", 6)
    async with stream_of(engine, 500) as stream:
        async for _ in stream:
            await stop.reached()
            stop.go_after(told_to_stop.is_set)
            break
    await settled()
    assert stop.calls <= 7
    assert stream.result.finish_reason == "cancelled"
    assert 0 < len(stream.result.tokens) <= 6
    with pytest.raises(StreamClosed):
        await anext(stream)


async def test_an_exception_in_the_consumer_frees_the_engine(engine: SimpleEngine) -> None:
    with pytest.raises(LookupError):
        async with stream_of(engine, 5000) as stream:
            async for _ in stream:
                raise LookupError
    await settled()
    assert len(stream.result.tokens) < 5000
    assert len((await engine.generate(PROMPT, max_tokens=2, ignore_eos=True)).tokens) == 2


async def test_break_without_a_context_frees_the_engine_and_warns(engine: SimpleEngine) -> None:
    async def careless() -> None:
        async for _ in stream_of(engine, 5000):
            break

    with pytest.warns(ResourceWarning, match="dropped before it was read to its end"):
        await careless()
        gc.collect()
    await free()
    assert engine.stats().cancelled == 1


async def test_dropping_a_stream_that_nobody_reads_frees_the_engine_and_warns(
    engine: SimpleEngine, gate: MakeGate
) -> None:
    stop = gate("model", 4)
    stream = stream_of(engine, 5000)
    await stream.__aenter__()
    await stop.reached()
    with pytest.warns(ResourceWarning, match="dropped"):
        del stream
        gc.collect()
    stop.go()
    await free()
    assert stop.calls <= 5


async def test_dropped_in_a_thread_without_a_loop(engine: SimpleEngine) -> None:
    stream = stream_of(engine, 5000)
    await anext(stream)
    held = [stream]
    del stream
    with pytest.warns(ResourceWarning, match="dropped"):
        await asyncio.to_thread(held.clear)
    await free()


@pytest.mark.parametrize("how", ["never started", "read to the end", "closed"])
async def test_no_warning_for_a_stream_that_is_done(engine: SimpleEngine, how: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = stream_of(engine, 5)
        alive = weakref.ref(stream)
        if how == "read to the end":
            async for _ in stream:
                pass
        elif how == "closed":
            await anext(stream)
            await stream.aclose()
        del stream
        gc.collect()
    assert alive() is None


async def test_a_slow_reader_does_not_hold_the_engine(engine: SimpleEngine) -> None:
    async with stream_of(engine, 30) as stream:
        assert (await anext(stream)).tokens
        other = await engine.generate(PROMPT, max_tokens=5, ignore_eos=True)
        assert len(other.tokens) == 5
        assert len([chunk async for chunk in stream]) == 29


async def backlog(engine: SimpleEngine) -> GenerationStream:
    """A stream whose chunks have all been made before any is read."""
    stream = stream_of(engine)
    await stream.__aenter__()
    await until(lambda: stream._task is not None and stream._task.done())
    return stream


@pytest.mark.parametrize(("chunks", "seconds", "most"), [(5, 0.0, 5), (64, 0.003, 2)])
async def test_a_reader_of_a_backlog_lets_others_in(
    engine: SimpleEngine,
    monkeypatch: pytest.MonkeyPatch,
    chunks: int,
    seconds: float,
    most: int,
) -> None:
    """Every so many chunks, or sooner if what is done with each takes that many seconds."""
    monkeypatch.setattr(channel_module, "_SOME", chunks)
    stream = await backlog(engine)
    in_a_row = [0]

    async def other() -> None:
        while True:
            in_a_row.append(0)
            await asyncio.sleep(0)

    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    task = asyncio.create_task(other())
    async for _ in stream:
        in_a_row[-1] += 1
        now += seconds
    monkeypatch.undo()
    task.cancel()
    assert sum(in_a_row) == 20
    assert max(in_a_row[1:]) <= most


async def test_a_reader_of_a_backlog_hears_that_it_was_cancelled_and_no_token_is_lost(
    engine: SimpleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_SOME", 5)
    stream = await backlog(engine)
    read = 0

    async def consume() -> None:
        nonlocal read
        async for _ in stream:
            read += 1
            if read == 3:
                task.cancel()

    task = asyncio.create_task(consume())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 3 <= read <= 8
    assert len(stream.result.tokens) == 20


async def test_a_shielded_read_of_a_backlog_loses_no_chunk(
    engine: SimpleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_SOME", 1)  # each read gives way
    stream = await backlog(engine)
    chunks = []
    for _ in range(10):
        read = asyncio.ensure_future(anext(stream))
        waiting = asyncio.ensure_future(asyncio.shield(read))
        await asyncio.sleep(0)
        waiting.cancel()
        chunks.append(await read)
    chunks += [chunk async for chunk in stream]
    assert tuple(token for chunk in chunks for token in chunk.tokens) == stream.result.tokens


async def test_cancel_ends_the_answer_and_keeps_what_there_is(
    engine: SimpleEngine, gate: MakeGate
) -> None:
    stop = gate("model", 6)
    chunks = []
    async with stream_of(engine, 500) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 1:
                await stop.reached()
                await asyncio.to_thread(stream.cancel)
                stream.cancel()
                stop.go()
    assert chunks[-1].finish_reason == "cancelled"
    assert tuple(token for chunk in chunks for token in chunk.tokens) == stream.result.tokens
    assert "".join(chunk.text for chunk in chunks) == stream.result.text
    assert stream.result.finish_reason == "cancelled"


async def test_cancel_in_the_queue(engine: SimpleEngine, gate: MakeGate) -> None:
    stop = gate("model", 3)
    holder = asyncio.create_task(engine.generate(PROMPT, max_tokens=5))
    await stop.reached()
    async with stream_of(engine) as stream:
        while not engine.stats().waiting:
            await asyncio.sleep(0)
        stream.cancel()
        chunks = [chunk async for chunk in stream]
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]
    assert stream.result.tokens == ()
    assert mlx_thread.locked
    stop.go()
    await holder


async def test_aclose_waits_until_the_work_is_out_however_often_cancelled(
    engine: SimpleEngine, gate: MakeGate
) -> None:
    stop = gate("model", 4)
    stream = stream_of(engine, 500)
    await anext(stream)
    await stop.reached()
    closing = asyncio.create_task(stream.aclose())
    await turns()
    for _ in range(3):
        closing.cancel()
        await turns()
        assert not closing.done()
        assert mlx_thread.locked
    stop.go()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await settled()
    await stream.aclose()


async def test_the_first_cancellation_is_told_through_an_async_with(
    engine: SimpleEngine, gate: MakeGate
) -> None:
    stop = gate("model", 4)

    async def consume() -> None:
        async with stream_of(engine, 500) as stream:
            async for _ in stream:
                pass

    task = asyncio.create_task(consume())
    await stop.reached()
    for message in ("first", "second", "third"):
        task.cancel(message)
        await turns()
    stop.go()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.args == ("first",)


async def test_timeout_around_one_read_raises_timeout_error(
    engine: SimpleEngine, gate: MakeGate, told_to_stop: threading.Event
) -> None:
    stop = gate("model", 1)
    stream = stream_of(engine)
    await stream.__aenter__()
    await stop.reached()
    stop.go_after(told_to_stop.is_set)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.01)
    await settled()
    assert stream.result.finish_reason == "cancelled"


async def test_a_shielded_read_survives_a_timeout(engine: SimpleEngine, gate: MakeGate) -> None:
    stop = gate("model", 1)
    async with stream_of(engine) as stream:
        read = asyncio.ensure_future(anext(stream))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(read), 0.01)
        stop.go()
        assert len((await read).tokens) == 1
        assert len([chunk async for chunk in stream]) == 19


async def test_a_failing_request_raises_at_the_reader_and_in_result(engine: SimpleEngine) -> None:
    def broken(tokens: object, logits: object) -> object:
        raise LookupError("boom")

    async with engine.stream_generate(PROMPT, logits_processors=[broken]) as stream:  # type: ignore[list-item]
        with pytest.raises(Exception, match="boom"):
            async for _ in stream:
                pass
    with pytest.raises(Exception, match="boom"):
        _ = stream.result


async def test_cancelled_before_its_task_has_begun(engine: SimpleEngine) -> None:
    async with stream_of(engine) as stream:
        for task in other_tasks():
            task.cancel()
        assert [chunk async for chunk in stream] == []
    assert stream.result.finish_reason == "cancelled"


def test_closed_from_another_loop(tiny_engine: SimpleEngine) -> None:
    first = asyncio.new_event_loop()

    async def begin() -> GenerationStream:
        await tiny_engine.start()
        stream = stream_of(tiny_engine, 5000)
        await anext(stream)
        return stream

    async def close_from_elsewhere() -> None:
        with pytest.raises(RuntimeError, match="in which it was started"):
            await stream.aclose()

    stream = first.run_until_complete(begin())
    asyncio.run(close_from_elsewhere())
    first.run_until_complete(stream.aclose())
    assert stream.result.finish_reason == "cancelled"
    first.run_until_complete(tiny_engine.stop())
    first.close()


def test_its_loop_was_closed(tiny_engine: SimpleEngine) -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> GenerationStream:
        await tiny_engine.start()
        stream = stream_of(tiny_engine, 10000)
        await anext(stream)
        return stream

    stream = loop.run_until_complete(begin())
    assert stream._task is not None
    stream._task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    asyncio.run(stream.aclose())
    asyncio.run(tiny_engine.stop())
    assert not mlx_thread.busy


async def test_wake_ups_are_coalesced(
    engine: SimpleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    wakes = 0
    original = loop.call_soon_threadsafe

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal wakes
        wakes += 1
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    async with stream_of(engine, 60) as stream:
        await anext(stream)
        while engine.stats().finished == 0:
            time.sleep(0.001)  # noqa: ASYNC251 - a reader that is busy with other things
            await asyncio.sleep(0)
        assert len([chunk async for chunk in stream]) == 59
    assert wakes < 10


async def test_a_stream_that_is_cancelled_before_it_is_read_has_its_end_only(
    engine: SimpleEngine,
) -> None:
    stream = engine.stream_generate(PROMPT, max_tokens=5000, ignore_eos=True)
    stream.cancel()
    async with stream:
        chunks = [chunk async for chunk in stream]
    assert [(chunk.tokens, chunk.finish_reason) for chunk in chunks] == [((), "cancelled")]
    assert stream.result.tokens == ()
    assert stream.result.finish_reason == "cancelled"
