"""engine.restart(), and which errors may be retried."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    ContextLengthExceeded,
    EngineBusy,
    EngineDead,
    EngineNotStarted,
    EngineState,
    EngineStopped,
    GenerationError,
    InvalidRequest,
    MLXEngineError,
    ModelLoadError,
    OutputInvalid,
    ProcessEngine,
    RemoteEngine,
    StreamClosed,
    StreamConsumed,
)
from mlx_engine.engine.in_process import InProcessEngine
from mlx_engine.errors import another, rebuild
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.wire.values import error_from_wire, error_to_wire
from mlx_engine.testing import FakeEngine
from mlx_engine.testing import Gate as PlayGate
from tests.remote.hosting import short_folder
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def test_a_failed_engine_is_brought_back(engine: BaseEngine) -> None:
    assert isinstance(engine, InProcessEngine)
    before = await engine.generate([1, 2], max_tokens=3, ignore_eos=True)
    engine._lifecycle.fail("the test says so")
    with pytest.raises(EngineDead) as dead:
        await engine.generate([1, 2])
    assert dead.value.retryable
    await engine.restart()
    assert engine.state is EngineState.RUNNING
    after = await engine.generate([1, 2], max_tokens=3, ignore_eos=True)
    assert after.tokens == before.tokens
    assert after.usage.cached_tokens == 0


async def test_it_does_nothing_to_an_engine_that_runs(engine: BaseEngine) -> None:
    await engine.generate([1] * 100, max_tokens=1)
    await until(lambda: engine.stats().prompt_cache.entries)
    await engine.restart()
    assert engine.stats().prompt_cache.entries > 0


async def test_it_starts_what_was_never_started_and_not_what_was_stopped() -> None:
    engine = FakeEngine()
    await engine.restart()
    assert engine.state is EngineState.RUNNING
    await engine.stop()
    with pytest.raises(EngineStopped, match=r"start\(\) it again"):
        await engine.restart()
    assert engine.state is EngineState.STOPPED
    await engine.start()
    await engine.stop()


async def test_all_who_see_the_end_may_ask_for_it_at_once() -> None:
    loads = 0

    class Counting(FakeEngine):
        async def start(self) -> None:
            nonlocal loads
            before = self._holder.loaded
            await super().start()
            loads += not before

    async with Counting(iter(["a", "b"]), load_seconds=0.02) as engine:
        engine.die()
        await asyncio.gather(*(engine.restart() for _ in range(5)))
        assert engine.state is EngineState.RUNNING
        assert (await engine.generate("x")).text == "a"
        late = asyncio.create_task(engine.restart())
        await late
        assert (await engine.generate("x")).text == "b"


async def test_what_was_in_flight_hears_of_the_end_and_not_of_a_stop() -> None:
    gate = PlayGate()
    async with FakeEngine(["a", gate], max_batch_size=2) as engine:
        task = asyncio.create_task(engine.generate("x"))
        await gate.reached()
        waiting = [asyncio.create_task(engine.generate("y")) for _ in range(3)]
        await until(lambda: engine.stats().waiting + engine.stats().running == 4)
        engine.die(EngineDead("gone for the test"))
        await engine.restart()
        for one in (task, *waiting):
            with pytest.raises(EngineDead, match="gone for the test"):
                await one
        gate.open()
        assert (await engine.generate("x")).text == "a"


async def test_who_stops_it_meanwhile_has_his_way() -> None:
    gate = PlayGate()
    loads: list[Any] = [(), (gate,), ()]
    engine = FakeEngine(load=iter(loads))
    await engine.start()
    engine.die()
    restart = asyncio.create_task(engine.restart())
    await gate.reached()
    await engine.stop()
    with pytest.raises(EngineStopped):
        await restart
    assert engine.state is EngineState.STOPPED
    with pytest.raises(EngineStopped):
        await engine.restart()
    await engine.start()
    await engine.stop()


async def test_cancelled_or_failed_it_can_be_done_again() -> None:
    gate = PlayGate()
    engine = FakeEngine(load=iter([(), (gate,), ModelLoadError("no"), ()]))
    await engine.start()
    engine.die()
    restart = asyncio.create_task(engine.restart())
    await gate.reached()
    restart.cancel()
    with pytest.raises(asyncio.CancelledError):
        await restart
    assert engine.state is EngineState.CREATED
    with pytest.raises(ModelLoadError):
        await engine.restart()
    await engine.restart()
    assert engine.state is EngineState.RUNNING
    await engine.stop()


async def test_a_process_that_was_killed_comes_back(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as engine:
        first = await engine.generate([1, 2], max_tokens=3, ignore_eos=True)
        engine.kill()
        with pytest.raises(EngineDead, match=r"await engine.restart\(\)") as dead:
            while True:
                await engine.generate([1, 2], max_tokens=3)
        assert dead.value.retryable
        await asyncio.gather(engine.restart(), engine.restart())
        again = await engine.generate([1, 2], max_tokens=3, ignore_eos=True)
        assert again.tokens == first.tokens


async def test_a_client_comes_back_to_a_host_that_is_there_again(tiny_path: Path) -> None:
    with short_folder() as folder:
        path = folder / "socket"
        remote = RemoteEngine(path)
        async with BatchedEngine(tiny_path) as engine, EngineHost(engine, path):
            await remote.start()
            first = await remote.generate([1, 2], max_tokens=3, ignore_eos=True)
            remote.kill()  # the connection
            await until(lambda: remote.state is EngineState.FAILED, "the connection is lost")
            await asyncio.gather(remote.restart(), remote.restart())
            again = await remote.generate([1, 2], max_tokens=3, ignore_eos=True)
            assert again.tokens == first.tokens
            remote.kill()
            await until(lambda: remote.state is EngineState.FAILED, "and lost again")
        with pytest.raises(EngineDead, match="no engine is hosted"):
            await remote.restart()
        async with BatchedEngine(tiny_path) as engine, EngineHost(engine, path):
            await remote.restart()
            again = await remote.generate([1, 2], max_tokens=3, ignore_eos=True)
            assert again.tokens == first.tokens
            await remote.stop()


RETRYABLE: list[tuple[MLXEngineError, bool]] = [
    (ModelLoadError("x"), False),
    (InvalidRequest("a", "x"), False),
    (
        ContextLengthExceeded("x", prompt_tokens=1, max_tokens=1, context_length=1),
        False,
    ),
    (EngineBusy("x", retry_after=1), True),
    (EngineNotStarted("x"), False),
    (EngineStopped("x"), False),
    (EngineDead("x"), True),
    (GenerationError("x"), True),
    (OutputInvalid("x", result=None), False),
    (OutputInvalid("x", result=None, retryable=True), True),
    (StreamClosed("x"), False),
    (StreamConsumed("x"), False),
]


@pytest.mark.parametrize(("error", "retryable"), RETRYABLE, ids=lambda each: type(each).__name__)
def test_an_error_tells_whether_it_may_be_retried(error: MLXEngineError, retryable: bool) -> None:
    assert error.retryable is retryable
    assert another(error).retryable is retryable
    if not isinstance(error, OutputInvalid):
        assert error_from_wire(error_to_wire(1, error)).retryable is retryable
        error.retryable = False
        assert error_from_wire(error_to_wire(1, error)).retryable is False
    again = rebuild(type(error), str(error), dict(vars(error)))
    assert again.retryable is error.retryable


async def test_a_mistake_in_code_is_not_worth_a_retry(engine: BaseEngine) -> None:
    def broken(tokens: Any, logits: Any) -> Any:
        raise TypeError

    def unlucky(tokens: Any, logits: Any) -> Any:
        raise RuntimeError("[METAL] Command buffer execution failed")

    for processor, retryable in ((broken, False), (unlucky, True)):
        with pytest.raises(GenerationError) as failed:
            await engine.generate("a", logits_processors=[processor])
        assert failed.value.retryable is retryable


async def test_an_answer_that_is_refused_may_be_drawn_again() -> None:
    class Odd:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return {"type": "integer"}

        @classmethod
        def model_validate_json(cls, text: str) -> int:
            raise ValueError("it must be odd")

    async with FakeEngine("2") as engine:
        for options, retryable in (
            ({}, False),
            ({"temperature": 1.0}, True),
            ({"temperature": 1.0, "seed": 5}, False),
        ):
            with pytest.raises(OutputInvalid) as refused:
                await engine.generate("a", output=Odd, **options)  # type: ignore[arg-type]
            assert refused.value.retryable is retryable
