"""An engine in the sweep, and the operations that only the sweep does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_engine import BaseEngine, EngineNotStarted, EngineState, GenerationResult
from mlx_engine.constraints import Regex
from mlx_engine.engine.local import LocalEngine
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.testing.safety.fault import Fault
from mlx_engine.testing.safety.operations import OPERATIONS, Fixture, Operation
from mlx_engine.testing.safety.ways import Work
from tests.sweep.elsewhere import HereLink
from tests.sweep.scene import Scene
from tests.sweep.simulation import Broken, Simulation, require

PROMPT = [*range(1, 14)]
OTHER = [*range(30, 43)]
PROBE = [50, 51]
BOUND = Regex("ab[ab]")

Make = Callable[[], BaseEngine]


EXTRA = (
    Operation("generate, constrained", "requests", "bound", beside="another"),
    Operation("generate, out of time", "requests", "out_of_time", beside="another"),
    Operation("map, left early", "requests", "leave_map", beside="another", order="before it"),
    Operation("warm", "files", "warm"),
    Operation("restart", "life", "revive"),
    Operation("stream_chat, left early", "requests", "leave_chat", beside="another"),
    Operation("start, twice", "life", "start", beside="start_too", starts=True),
    Operation(
        "shutdown, a while", "life", "drain_a_while", beside="another_or_stopped", order="before it"
    ),
)
# What these do, others do as well that are in the sweep.
NOT_SWEPT = ("generate", "stream_generate, left early", "logits processor")
SWEPT = [one for one in (*OPERATIONS, *EXTRA) if one.name not in NOT_SWEPT]


class SweptEngine(Fixture):
    """An engine of one kind, on which operations are played.

    Args:
        asked: the prompt.
        late: model calls that may begin after work has been told to stop: those of a cycle
            that has begun, and of a step of others in a batch.
    """

    def __init__(
        self, simulation: Simulation, make: Make, folder: Path, asked: list[int], late: int
    ) -> None:
        self.simulation = simulation
        self.engine = make()
        self.options = {"max_tokens": 2, "ignore_eos": True}
        self.on_progress = _ignore
        self.folder = folder
        self.to_save, self.to_load = folder / "cache", folder / "saved"
        self._make = make
        self._asked = asked
        self._late = late
        self._known: dict[Any, Any] = {}

    # What is asked, and told

    def prompt(self) -> list[int]:
        return self._asked

    def prompts(self) -> list[Any]:
        return [self._asked, "abc"]

    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "hi"}]

    def told(self, result: GenerationResult) -> Any:
        return result.text, result.tokens, result.finish_reason

    async def blocking(self, stop: threading.Event, on_cancel: Callable[[], None] | None) -> Any:
        return await self.engine.run_blocking(self._function, stop, on_cancel=on_cancel)

    def _function(self, stop: threading.Event) -> int:
        for _ in range(3):
            self.simulation.driver.pause("a function")
            if stop.is_set():
                break
        return 7

    async def another(self) -> Any:
        return await self._ask_again(OTHER, "I8: beside it")

    async def probe(self) -> None:
        """The engine goes on, with the right tokens."""
        await self._ask_again(PROBE, "the next one")

    async def _ask_again(self, prompt: list[int], who: str) -> Any:
        """A request that always gives the same."""
        told = self.told(await self.engine.generate(prompt, **self.options))
        known = self._known.setdefault(prompt[0], told)
        require(told == known, f"{who} was given {told}, not {known}")
        return told

    # Operations of the sweep

    async def leave_chat(self) -> Any:
        async with self.engine.stream_chat(self.messages(), **self.options) as stream:
            async for chunk in stream:
                return chunk.tokens
        raise Fault("there was no chunk")

    async def bound(self) -> Any:
        """An answer that is bound, of which a part is forced, beside one that is free."""
        told = self.told(await self.engine.generate(self._asked, constraint=BOUND))
        require(told[0] in ("aba", "abb"), f"I9: an answer is {told}")
        return told

    async def out_of_time(self) -> Any:
        """An answer whose time may be over at any moment, by a clock that goes on in jumps."""
        result = await self.engine.generate(self._asked, timeout=2e-4, **self.options)
        require(
            result.finish_reason in ("timeout", "length"), f"it ended by {result.finish_reason}"
        )
        known = self._known.setdefault("timely", None)
        if result.finish_reason == "length":
            require(known in (None, result.tokens), "its tokens are not always the same")
            self._known["timely"] = result.tokens
        return True

    async def leave_map(self) -> Any:
        async with self.engine.map(self.prompts(), **self.options) as outcomes:
            async for outcome in outcomes:
                return outcome.attempts
        raise Fault("there was no outcome")

    async def warm(self) -> Any:
        return (await self.engine.warm(self._asked)).prompt_tokens

    async def revive(self) -> Any:
        """Bring an engine back that has just failed."""
        engine = self.engine
        lifecycle = engine._client.lifecycle if isinstance(engine, LinkedEngine) else None
        if lifecycle is None:
            assert isinstance(engine, LocalEngine)
            lifecycle = engine._lifecycle
        lifecycle.fail("the sweep says so")
        await engine.restart()
        return self.must_be(EngineState.RUNNING)

    async def start_too(self) -> None:
        try:
            await self.engine.start()
        except EngineNotStarted:
            pass  # the other one did not succeed

    async def drain_a_while(self) -> Any:
        await self.engine.shutdown(0.001)
        return self.must_be(EngineState.STOPPED)

    # Scenes

    def scene(self, operation: Operation) -> Scene:
        """An operation as it is played: requests and functions always beside a request."""
        run, beside = self.works(operation)
        behind = operation.order == "before it"
        if operation.group == "files":
            return self._scene_of_files(run)
        if operation.group == "requests":
            return Scene(
                run, self.another, behind, rested=self.rested, probe=self.probe, late=self._late
            )
        states = {EngineState.STOPPED}
        if operation.starts or operation.method == "revive":
            states |= {EngineState.CREATED, EngineState.FAILED}
        if operation.name != "async with":
            states.add(EngineState.RUNNING)
        return Scene(
            run,
            beside,
            behind,
            reset=self._new_engine if operation.starts else self._new_running_engine,
            rested=lambda: self._rested_in(states),
            probe=self._life_probe,
            late=3 if operation.starts else 4,
            lives=True,
        )

    def _scene_of_files(self, run: Work[Any]) -> Scene:
        simulation = self.simulation

        async def fill() -> None:
            await self.generate()
            await self.another()

        simulation.in_a_loop(fill)
        in_file = simulation.in_a_loop(lambda: self.engine.save_prompt_cache(self.to_load))
        engine = engine_here(self.engine)

        def reset() -> None:
            simulation.on_mlx_thread(engine._holder.runner().prompt_cache.clear)
            simulation.in_a_loop(self.generate)
            self.to_save.unlink(missing_ok=True)

        def rested() -> None:
            self.rested()
            left = {file.name for file in self.folder.iterdir() if file.is_file()}
            assert left <= {self.to_load.name, self.to_save.name}, left
            # What was there, perhaps what is in the file, and perhaps what the probe has asked.
            entries = engine.stats().prompt_cache.entries
            assert 1 <= entries <= in_file + 1, (entries, in_file)

        return Scene(run, reset=reset, rested=rested, probe=self.probe)

    # Checks

    def rested(self) -> None:
        """I6: nothing of any request is left."""
        check_rest(self.engine)

    def _rested_in(self, states: set[EngineState]) -> None:
        self.must_be(*states)
        self.rested()

    async def _life_probe(self) -> None:
        """It can be started, used and stopped, whatever has become of it."""
        if self.engine.state in (EngineState.STARTING, EngineState.DRAINING):
            await self.engine.stop()
        await self.engine.start()
        await self.probe()
        await self.engine.stop()
        self.must_be(EngineState.STOPPED)

    def _new_engine(self) -> None:
        self.engine = self._make()

    def _new_running_engine(self) -> None:
        self._new_engine()
        self.simulation.in_a_loop(self.engine.start)


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


def _ignore(_: object) -> None:
    pass
