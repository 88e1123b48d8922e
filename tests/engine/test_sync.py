"""Engines without await: the same answers, from any thread, and every call ends."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

import mlx_engine
from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    Engine,
    EngineManager,
    EngineState,
    EngineStopped,
    GenerationResult,
    InvalidRequest,
    ModelLoadError,
    ProcessEngine,
    Progress,
    RemoteEngine,
    SimpleEngine,
    StreamClosed,
    StreamConsumed,
    StreamUnfinished,
    SyncEngine,
    SyncStream,
)
from mlx_engine.core import loop_thread
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.engine.chat_interface import ChatEngine
from mlx_engine.engine.map_interface import MapEngine
from mlx_engine.engine.outcomes import Outcomes
from mlx_engine.engine.sync_map import SyncOutcomes
from mlx_engine.testing import FakeEngine, Gate
from tests.remote.hosting import hosted
from tests.tiny import main as make_model
from tests.waiting import PROMPTLY, until_now

USER = [{"role": "user", "content": "hi"}]
LONG: Any = {"max_tokens": 10_000, "ignore_eos": True}
THREAD = "mlx-engine sync"

Make = Callable[[Path], BaseEngine]

KINDS: dict[str, Make] = {
    "simple": SimpleEngine,
    "batched": BatchedEngine,
    "process": ProcessEngine,
    "manager": lambda path: EngineManager(path, replicas=1),
    "fake": lambda path: FakeEngine("one two three"),
}


def front_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    until_now(lambda: not front_threads(), "the thread of a front is left", PROMPTLY)


@pytest.fixture(params=KINDS)
def llm(request: pytest.FixtureRequest, tiny_path: Path) -> Iterator[SyncEngine[BaseEngine]]:
    with KINDS[request.param](tiny_path).sync() as llm:
        yield llm


@pytest.fixture
def simple(tiny_path: Path) -> Iterator[SyncEngine[SimpleEngine]]:
    with SimpleEngine(tiny_path).sync() as llm:
        yield llm


# What it offers

METHODS = [
    name for protocol in (Engine, ChatEngine) for name in vars(protocol) if not name.startswith("_")
]


@pytest.mark.parametrize("name", METHODS)
def test_it_has_all_that_an_engine_has(name: str) -> None:
    """Whoever adds a method to engines adds it here, in one line."""
    of_engine, own = inspect.getattr_static(Engine, name), inspect.getattr_static(SyncEngine, name)
    assert isinstance(own, property) is isinstance(of_engine, property)
    if isinstance(own, property):
        assert inspect.signature(own.fget) == inspect.signature(of_engine.fget)  # type: ignore[arg-type]
        return
    asked, given = inspect.signature(of_engine), inspect.signature(own)
    assert asked.parameters == given.parameters
    swapped = {"GenerationStream": "SyncStream", "Outcomes[Any]": "SyncOutcomes[Any]"}
    returned = str(asked.return_annotation)
    assert given.return_annotation == swapped.get(returned, returned)
    assert not inspect.iscoroutinefunction(own)
    assert inspect.getdoc(own)


def test_a_stream_has_all_that_a_stream_has() -> None:
    other = {"aclose": "close"}
    for name, value in vars(mlx_engine.GenerationStream).items():
        if not name.startswith("_"):
            own = inspect.getattr_static(SyncStream, other.get(name, name))
            assert isinstance(own, property) is isinstance(value, property)


def test_overloads_are_those_of_the_engine() -> None:
    def written(method: Any) -> list[str]:
        return [str(inspect.signature(one)) for one in typing.get_overloads(method)]

    engine = [text.replace("'Outcomes", "'SyncOutcomes") for text in written(MapEngine.map)]
    assert written(SyncEngine.map) == engine
    assert len(engine) == 3


def test_outcomes_have_all_that_outcomes_have() -> None:
    other = {"aclose": "close"}
    for name in vars(Outcomes):
        if not name.startswith("_"):
            assert hasattr(SyncOutcomes, other.get(name, name))


def test_it_answers_as_the_engine_does(llm: SyncEngine[BaseEngine], tmp_path: Path) -> None:
    engine = llm.engine
    answer = llm.generate("Once", max_tokens=6, ignore_eos=True)
    assert len(answer.tokens) == 6
    with llm.stream_generate("Once", max_tokens=6, ignore_eos=True) as stream:
        assert isinstance(stream, SyncStream)
        with pytest.raises(StreamUnfinished):
            _ = SyncStream(engine.stream_generate("x"), llm).result
        tokens = [token for chunk in stream for token in chunk.tokens]
    assert tuple(tokens) == stream.result.tokens == answer.tokens
    assert stream.request_id == stream.result.request_id
    chat = llm.stream_chat(USER, max_tokens=4)
    text = "".join(chat.text())
    assert text == chat.result.text == llm.chat(USER, max_tokens=4).text
    assert llm.stream_chat(USER, max_tokens=4).collect().text == text
    results = llm.generate_batch(["a", "b", ""], max_tokens=2)
    assert [type(one) for one in results] == [GenerationResult] * 2 + [InvalidRequest]
    asked: Any = {"a": "a", "b": USER, "c": ""}
    with llm.map(asked, max_tokens=2, ordered=True) as outcomes:
        told = [(one.id, one.ok) for one in outcomes]
    assert told == [("a", True), ("b", True), ("c", False)]
    assert sum(one.ok for one in llm.map(["a", "b"], max_tokens=2)) == 2
    assert llm.warm(USER).prompt_tokens == llm.count_tokens(USER)
    llm.restart()
    assert llm.count_tokens(USER) == len(llm.render_chat(USER).tokens)
    assert llm.decode(llm.encode("hello")) in ("hello", "<s>hello")
    assert llm.save_prompt_cache(tmp_path / "cache") >= 1
    assert llm.load_prompt_cache(tmp_path / "cache") >= 0
    assert (llm.state, llm.model, llm.context_length) == (
        EngineState.RUNNING,
        engine.model,
        engine.context_length,
    )
    assert llm.has_chat_template
    assert llm.supports_tools == engine.supports_tools
    assert llm.supports_reasoning == engine.supports_reasoning
    assert llm.stats().finished >= 6
    report = llm.shutdown(0)
    assert (report.aborted, engine.state) == ((), EngineState.STOPPED)
    with pytest.raises(EngineStopped):
        llm.generate("x")
    assert not front_threads()


def test_errors_and_arguments_are_those_of_the_engine(llm: SyncEngine[BaseEngine]) -> None:
    for ask in (llm.generate, llm.stream_generate):
        with pytest.raises(InvalidRequest, match=r"^max_token: .*max_tokens"):
            ask("x", max_token=5)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match=r"^prompt"):
        llm.count_tokens("")
    stream = llm.stream_generate("x", max_tokens=3)
    assert next(stream).tokens
    for _ in stream:
        pass
    with pytest.raises(StreamConsumed):
        iter(stream)
    stream.close()
    with pytest.raises(StreamClosed):
        next(stream)


def test_it_may_be_started_again_and_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    llm = SimpleEngine(tmp_path / "nothing").sync()
    for _ in range(2):
        with pytest.raises(ModelLoadError), llm:
            raise AssertionError("it has not started")
        assert not front_threads()
    make_tiny_here(tmp_path / "nothing")
    for _ in range(2):
        with llm:
            assert llm.generate("x", max_tokens=1).tokens
            assert len(front_threads()) == 1
        assert llm.state is EngineState.STOPPED
        assert not front_threads()


def make_tiny_here(folder: Path) -> None:
    async def make() -> None:
        from mlx_engine.core.work import ThreadJob

        await mlx_thread.run(ThreadJob(lambda: make_model([str(folder), "0"])))

    asyncio.run(make())


def test_functions_run_on_the_mlx_thread(simple: SyncEngine[SimpleEngine]) -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    who.set("me")
    assert simple.run_blocking(
        lambda a, *, b: (a, b, mlx_thread.is_current(), who.get()), 1, b=2
    ) == (
        1,
        2,
        True,
        "me",
    )
    with pytest.raises(RuntimeError, match="already runs inside a job on the MLX thread"):
        simple.run_blocking(lambda: simple.generate("x"))
    assert simple.run(asyncio.sleep, 0, 5) == 5


# Threads, loops


def test_many_threads_at_once(tiny_path: Path) -> None:
    with BatchedEngine(tiny_path).sync() as llm, ThreadPoolExecutor(8) as pool:
        alone = [llm.generate(f"number {n}", max_tokens=8, ignore_eos=True) for n in range(16)]

        def ask(n: int) -> tuple[int, ...]:
            stream = llm.stream_generate(f"number {n}", max_tokens=8, ignore_eos=True)
            return tuple(token for chunk in stream for token in chunk.tokens)

        assert list(pool.map(ask, range(16))) == [result.tokens for result in alone]


def test_in_an_event_loop_it_says_what_to_do(simple: SyncEngine[SimpleEngine]) -> None:
    async def wrong() -> None:
        simple.generate("x")

    async def right() -> GenerationResult:
        return await asyncio.to_thread(simple.generate, "x", max_tokens=1)

    with pytest.raises(RuntimeError, match="await the engine's own method there"):
        asyncio.run(wrong())
    assert asyncio.run(right()).tokens

    def told(progress: Progress) -> None:
        with pytest.raises(RuntimeError, match="this call blocks"):
            simple.generate("x")
        calls.append(progress)

    calls: list[Progress] = []
    simple.generate("x", max_tokens=1, on_progress=told)
    simple.run(asyncio.sleep, 0)
    assert calls


def test_an_engine_that_others_have_started(tiny_path: Path) -> None:
    async def main() -> None:
        async with SimpleEngine(tiny_path) as engine:
            llm = engine.sync()
            theirs = asyncio.to_thread(llm.generate, "abc", max_tokens=5, ignore_eos=True)
            own = engine.generate("abc", max_tokens=5, ignore_eos=True)
            one, other = await asyncio.gather(theirs, own)
            assert one.tokens == other.tokens
            assert len(front_threads()) == 1
            llm.close()
            assert not front_threads()
            assert (await engine.generate("x", max_tokens=1)).tokens

    asyncio.run(main())


def test_an_engine_that_a_host_serves(tiny_path: Path) -> None:
    def script(path: Path) -> list[int]:
        with RemoteEngine(path).sync() as llm:
            lengths = [len(llm.generate("x", max_tokens=3, ignore_eos=True).tokens)]
            with llm.stream_generate("x", max_tokens=4, ignore_eos=True) as stream:
                lengths.append(sum(len(chunk.tokens) for chunk in stream))
            return lengths + [one.attempts for one in llm.map(["a", "b"], max_tokens=1)]

    async def main() -> list[int]:
        async with SimpleEngine(tiny_path) as engine, hosted(engine) as host:
            return await asyncio.to_thread(script, host.path)

    assert asyncio.run(main()) == [3, 4, 1, 1]


def test_the_end_of_with_ends_what_other_threads_do(tiny_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        with SimpleEngine(tiny_path).sync() as llm:
            stream = llm.stream_generate("x", **LONG)
            assert next(stream).tokens
            waiting = pool.submit(llm.generate, "x", **LONG)
            reading = pool.submit(list, stream)
            until_now(lambda: llm.stats().waiting)
        for end in (waiting, reading):
            with pytest.raises(EngineStopped):
                end.result(PROMPTLY)
    assert llm.state is EngineState.STOPPED


def test_a_front_that_is_forgotten_ends_its_thread(tiny_path: Path) -> None:
    async def stop(engine: SimpleEngine) -> None:
        await engine.stop()

    engine = SimpleEngine(tiny_path)
    llm = engine.sync()
    llm.start()
    assert len(front_threads()) == 1
    del llm
    gc.collect()
    until_now(lambda: not front_threads())
    asyncio.run(stop(engine))


def test_a_stream_that_is_dropped_frees_the_engine(simple: SyncEngine[SimpleEngine]) -> None:
    with pytest.warns(ResourceWarning, match="dropped before it was read"):
        for chunk in simple.stream_generate("x", **LONG):
            assert chunk.tokens
            break
        gc.collect()
    assert simple.generate("y", max_tokens=1).tokens


# Cancellation; Ctrl-C is in test_sync_signals.py


def test_calls_of_other_threads_can_be_cancelled(llm: SyncEngine[BaseEngine]) -> None:
    gate = Gate()
    if isinstance(llm.engine, FakeEngine):
        pytest.skip("it comes to an end by itself")
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(llm.generate, "x", **LONG) for _ in range(2)]
        until_now(lambda: llm.stats().running + llm.stats().waiting == 2)
        llm.cancel()
        for call in calls:
            with pytest.raises(CancelledError):
                call.result(PROMPTLY)
    stats = llm.stats
    until_now(lambda: stats().cancelled == 2)
    assert llm.generate("y", max_tokens=1).tokens
    del gate


def test_a_call_stays_until_its_work_is_out_of_mlx() -> None:
    gate = Gate(firm=True)
    with FakeEngine(["a", gate, "b"]).sync() as llm, ThreadPoolExecutor(1) as pool:
        call = pool.submit(llm.generate, "x")
        asyncio.run(gate.reached())
        for _ in range(3):
            llm.cancel()
        time.sleep(0.05)
        assert not call.done()
        assert mlx_thread.locked
        gate.open()
        with pytest.raises(CancelledError):
            call.result(PROMPTLY)
        assert llm.engine.requests[0].outcome == "cancelled"


def test_one_that_was_cancelled_before_it_began_never_does() -> None:
    call = loop_thread.BlockingCall(lambda: asyncio.sleep(0))
    call.interrupt(KeyboardInterrupt())
    loop = asyncio.new_event_loop()
    call.enter(loop)
    call.enter(loop)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    call.wait()
    with pytest.raises(KeyboardInterrupt):
        call.outcome()


def test_a_thread_that_cannot_be_had_is_told(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: Any) -> Any:
        raise mlx_engine.EngineDead("a thread cannot be started")

    llm = SimpleEngine(tiny_path).sync()
    with monkeypatch.context() as patch:
        patch.setattr(loop_thread, "start_now", none)
        with pytest.raises(mlx_engine.EngineDead, match="cannot be started"):
            llm.start()
    with monkeypatch.context() as patch:
        patch.setattr(loop_thread, "new_loop", lambda: (_ for _ in ()).throw(OSError(24, "many")))
        with pytest.raises(mlx_engine.EngineDead, match="close some files"):
            llm.start()
    with llm:
        assert llm.generate("x", max_tokens=1).tokens
