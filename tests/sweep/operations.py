"""The public operations of an engine, as scenes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_engine import BaseEngine, EngineNotStarted, EngineState, EngineStopped, GenerationResult
from mlx_engine.engine.local import LocalEngine
from mlx_engine.remote.linked import LinkedEngine
from tests.sweep.elsewhere import HereLink
from tests.sweep.scene import Scene
from tests.sweep.simulation import Broken, Simulation, require

PROMPT = [*range(1, 14)]
OTHER = [*range(30, 43)]
PROBE = [50, 51]
USER = [{"role": "user", "content": "hi"}]
OPTIONS: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True}

Make = Callable[[], BaseEngine]


@dataclass
class Stage:
    """An engine of one kind, on which operations are played.

    Attributes:
        prompt: what is asked.
        late: model calls that may begin after work has been told to stop: those of a cycle
            that has begun, and of a step of others in a batch.
    """

    simulation: Simulation
    make: Make
    folder: Path
    prompt: list[int] = field(default_factory=lambda: PROMPT)
    late: int = 1

    def __post_init__(self) -> None:
        self.engine = self.make()

    # Operations of an engine that runs

    async def generate(self) -> Any:
        return _told(await self.engine.generate(self.prompt, **OPTIONS))

    async def chat(self) -> Any:
        return _told(await self.engine.chat(USER, on_progress=_ignore, **OPTIONS))

    async def stream(self) -> Any:
        async with self.engine.stream_generate(self.prompt, **OPTIONS) as stream:
            tokens = [token async for chunk in stream for token in chunk.tokens]
        require(stream.result.tokens == tuple(tokens), "the result is not what was streamed")
        return _told(stream.result)

    async def bare_stream(self) -> Any:
        return [
            token
            async for chunk in self.engine.stream_generate(self.prompt, **OPTIONS)
            for token in chunk.tokens
        ]

    async def stream_chat_left_early(self) -> Any:
        async with self.engine.stream_chat(USER, **OPTIONS) as stream:
            async for chunk in stream:
                return chunk.tokens
        raise AssertionError("there was no chunk")

    async def batch(self) -> Any:
        prompts = [self.prompt, "abc"]
        results = await self.engine.generate_batch(prompts, on_progress=_ignore, **OPTIONS)
        return [_told(result) for result in results if isinstance(result, GenerationResult)]

    async def run_blocking(self) -> Any:
        stop = threading.Event()
        return await self.engine.run_blocking(self._function, stop, on_cancel=stop.set)

    async def run_deaf(self) -> Any:
        return await self.engine.run_blocking(self._function, threading.Event())

    def _function(self, stop: threading.Event) -> int:
        for _ in range(3):
            self.simulation.driver.pause("a function")
            if stop.is_set():
                break
        return 7

    async def save(self) -> Any:
        return await self.engine.save_prompt_cache(self.folder / "cache")

    async def load(self) -> Any:
        return await self.engine.load_prompt_cache(self.folder / "saved")

    # What goes on beside them

    async def other(self) -> Any:
        return _told(await self.engine.generate(OTHER, **OPTIONS))

    # Its life

    async def start(self) -> None:
        await self.engine.start()

    async def start_too(self) -> None:
        try:
            await self.engine.start()
        except EngineNotStarted:
            pass  # the other one did not succeed

    async def whole_life(self) -> Any:
        async with self.engine as engine:
            return _told(await engine.generate(self.prompt, **OPTIONS))

    async def stop(self) -> None:
        await self.engine.stop()

    async def drain(self) -> None:
        await self.engine.shutdown(None)

    async def drain_a_while(self) -> None:
        await self.engine.shutdown(0.001)

    async def other_or_stopped(self) -> None:
        try:
            result = await self.engine.generate(OTHER, **OPTIONS)
        except EngineStopped:
            return
        self._check_others(_told(result))

    def _check_others(self, told: Any) -> None:
        if self._others is None:
            self._others = told
        require(told == self._others, f"I8: {told} instead of {self._others}")

    _others: Any = None
    _probed: Any = None

    # Checks

    def rested(self) -> None:
        """I6: nothing of any request is left."""
        check_rest(self.engine)

    async def probe(self) -> None:
        """The engine goes on, with the right tokens."""
        told = _told(await self.engine.generate(PROBE, **OPTIONS))
        if self._probed is None:
            self._probed = told
        require(told == self._probed, f"the next one was given {told}, not {self._probed}")

    async def life_probe(self) -> None:
        """It can be started, used and stopped, whatever has become of it."""
        if self.engine.state in (EngineState.STARTING, EngineState.DRAINING):
            await self.engine.stop()
        await self.engine.start()
        await self.probe()
        await self.engine.stop()
        require(self.engine.state is EngineState.STOPPED, f"it is {self.engine.state}")

    def new_engine(self) -> None:
        self.engine = self.make()

    def new_running_engine(self) -> None:
        self.new_engine()
        self.simulation.in_a_loop(self.engine.start)

    def in_state(self, *states: EngineState) -> Callable[[], None]:
        def check() -> None:
            require(self.engine.state in states, f"it is {self.engine.state}")
            if self.engine.state not in (EngineState.STARTING, EngineState.DRAINING):
                check_rest(self.engine)

        return check


def requests(stage: Stage, *names: str) -> dict[str, Scene]:
    """Operations of an engine that runs, with another request beside them."""
    scenes = {}
    for name in names:
        method, _, behind = name.partition(", ")
        scenes[name] = Scene(
            name,
            getattr(stage, method.replace(" ", "_")),
            beside=stage.other,
            behind=bool(behind),
            rested=stage.rested,
            probe=stage.probe,
            late=stage.late,
        )
    return scenes


def check_rest(engine: BaseEngine) -> None:
    """I6: no request is in flight, waits or has memory."""
    assert isinstance(engine, LocalEngine | LinkedEngine)
    elsewhere = isinstance(engine, LinkedEngine)
    lifecycle = engine._client.lifecycle if elsewhere else engine._lifecycle
    stats = engine.stats()
    # Here and below, no text is made of what is in order: that costs more than to look at it.
    if lifecycle.in_flight:
        raise Broken(f"I6: in flight: {list(lifecycle.in_flight)}")
    require(not lifecycle.in_flight.changed, "I6: somebody waits for a change of state")
    if isinstance(engine, LocalEngine):
        if stats.running or stats.waiting or stats.kv_bytes or stats.batch_size:
            raise Broken(f"I6: {stats}")
        return
    connection = engine._client.connection
    if connection is None:
        return
    require(not connection.calls._calls, "I6: calls are left")
    link = connection.link
    if connection.exit is None and isinstance(link, HereLink) and link._other is not None:
        requests, there = link._other._requests, link._other._engine
        require(requests is None or not requests.pending, "I6: requests are left there")
        if there is not None:
            check_rest(there)


def engine_here(engine: BaseEngine) -> LocalEngine:
    """The engine that does the work: itself, or the one behind a link that is in this process."""
    if isinstance(engine, LinkedEngine):
        assert engine._client.connection is not None
        link = engine._client.connection.link
        assert isinstance(link, HereLink)
        assert link._other is not None
        assert link._other._engine is not None
        return link._other._engine
    assert isinstance(engine, LocalEngine)
    return engine


def _told(result: GenerationResult) -> Any:
    return result.text, result.tokens, result.finish_reason


def _ignore(_: object) -> None:
    pass
