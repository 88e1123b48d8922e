"""A replica that does what its test says, with the interface of ``LinkedEngine``."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

from mlx_engine import BaseEngine, EngineState
from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.core.stream import Emit
from mlx_engine.errors import (
    EngineBusy,
    EngineDead,
    EngineNotStarted,
    EngineStopped,
    InvalidRequest,
)
from mlx_engine.outputs import (
    EngineStats,
    GenerationChunk,
    GenerationResult,
    ProgressCallback,
    ShutdownReport,
    Timings,
    Usage,
)
from mlx_engine.questions import PromptFacts, PromptQuestion
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.health import Health, health_of
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.remote.wire.heartbeat import Watchdog
from mlx_engine.remote.wire.messages import Heartbeat
from mlx_engine.requests import GenerationRequest
from mlx_engine.strategies import Strategies

Script = BaseException | asyncio.Event | Callable[[], Awaitable[None]] | None

_TIMINGS = Timings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class World:
    """All replicas that a manager has made, and what their starts are to do.

    Attributes:
        lives: the engines of each name, the present one last.
        starts: for each start to come: ``None`` succeeds, an error is raised, an event is
            waited for, a function is awaited. Starts for which there is nothing succeed.
        answer_at_once: whether requests are answered without being told.
    """

    def __init__(self) -> None:
        self.lives: dict[str, list[Scripted]] = {}
        self.starts: deque[Script] = deque()
        self.answer_at_once = True

    def make(self, name: str) -> LinkedEngine:
        engine = Scripted(name, self)
        self.lives.setdefault(name, []).append(engine)
        return cast("LinkedEngine", engine)

    def __getitem__(self, number: int) -> Scripted:
        """The present engine of a replica."""
        return self.lives[f"replica-{number}"][-1]

    @property
    def requests(self) -> list[ScriptedRequest]:
        """All that are in flight, in order."""
        return [
            request
            for name, engines in self.lives.items()
            if name != "prototype"
            for engine in engines
            for request in engine.requests
            if not request.over.done()
        ]


class Scripted(BaseEngine):
    pid: int | None = None

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.requests: list[ScriptedRequest] = []
        self.served = 0
        self.busy = False
        self.stuck = False  # no answer to a cancellation or a stop; only a kill ends it
        self.exit: asyncio.Future[Exit] | None = None
        self.stops: list[tuple[float, float | None]] = []
        self.killed: float | None = None
        self.saved: list[Path] = []
        self.asked: list[PromptQuestion] = []
        self.dies_of_questions = False
        self.nbytes = 0
        self._state = EngineState.CREATED

    # What a test does -----------------------------------------------------------------------

    def crash(self, kind: Any = "crash") -> None:
        self.end(Exit(kind, f"{self.name} was ended by SIGKILL", -9, "SIGKILL", "decode"))

    def terminate(self) -> None:
        """Somebody sends SIGTERM to it."""
        self._state = EngineState.DRAINING
        for request in self.requests:
            request.fail(EngineStopped("the engine was stopped"))
        self.end(Exit("graceful", "it was asked to end by SIGTERM", 0))

    def end(self, ended: Exit) -> None:
        if self.exit is None or self.exit.done():
            return
        if self._state is not EngineState.DRAINING:
            self._state = EngineState.FAILED
        for request in list(self.requests):
            request.fail(ended.error())
        self.exit.set_result(ended)

    # What the manager does ------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def last_exit(self) -> Exit | None:
        return self.exit.result() if self.exit is not None and self.exit.done() else None

    @property
    def has_chat_template(self) -> bool:
        return self._state is EngineState.RUNNING

    @property
    def model(self) -> str:
        return "scripted"

    @property
    def supports_tools(self) -> bool:
        return self._state is EngineState.RUNNING

    @property
    def supports_reasoning(self) -> bool:
        return False

    def refuse_if_busy(self) -> None:
        if self.busy:
            raise EngineBusy("busy", retry_after=float(self.name[-1]))

    async def answer(self, question: PromptQuestion) -> PromptFacts:
        self.check_running()
        self.refuse_if_busy()
        self.asked.append(question)
        if self.dies_of_questions:
            self.crash()
            self.check_running()
        return PromptFacts(count=7, text=self.name)

    @property
    def context_length(self) -> int | None:
        return 1000 if self._state is EngineState.RUNNING else None

    def stats(self) -> EngineStats:
        cache = PromptCacheStats(entries=1, nbytes=self.nbytes, limit=1000, hits=1)
        running = len(self.requests)
        return EngineStats(
            self._state.value,
            running,
            0,
            self.served,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0.0,
            0.0,
            0,
            0,
            cache,
        )

    def check_health(self) -> Health:
        return health_of(self._state, 1.0, 1.0, Heartbeat(phase="idle"), Watchdog(), self.last_exit)

    async def start(self) -> None:
        script = self.world.starts.popleft() if self.world.starts else None
        self._state = EngineState.STARTING
        try:
            if isinstance(script, asyncio.Event):
                await script.wait()
            elif isinstance(script, BaseException):
                raise script
            elif script is not None:
                await script()
        except BaseException:
            self._state = EngineState.CREATED
            self.exit = asyncio.get_running_loop().create_future()
            self.exit.set_result(Exit("graceful", "it has told its error, and left", 0))
            raise
        self.exit = asyncio.get_running_loop().create_future()
        self._state = EngineState.RUNNING

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        self.stops.append((time.monotonic(), timeout))
        if self.exit is None or self._state in (EngineState.FAILED, EngineState.STOPPED):
            self._state = EngineState.STOPPED
            return ShutdownReport()
        self._state = EngineState.DRAINING
        if self.stuck:
            await asyncio.wait({self.exit})
        else:
            overs = [request.over for request in self.requests]
            if overs:
                await asyncio.wait(overs, timeout=timeout)
            for request in list(self.requests):
                request.fail(EngineStopped("the engine was stopped"))
            self.end(Exit("graceful", "it was shut down", 0))
        self._state = EngineState.STOPPED
        return ShutdownReport()

    async def wait_exit(self) -> Exit:
        assert self.exit is not None
        await asyncio.wait({self.exit})
        return self.exit.result()

    def kill(self) -> None:
        self.killed = time.monotonic()
        self.crash()

    async def run_blocking(self, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        raise InvalidRequest("func", "cannot go to another process")

    def submit(
        self,
        request: GenerationRequest,
        on_progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> ScriptedRequest:
        self.check_strategies(request.prefill, request.decode)
        return ScriptedRequest(self, request, request_id or "own")

    def check_strategies(self, prefill: Any, decode: Any) -> None:
        Strategies().of_request(prefill, decode)

    def check_running(self) -> None:
        match self._state:
            case EngineState.RUNNING:
                return
            case EngineState.FAILED:
                raise EngineDead("it is dead")
            case EngineState.DRAINING | EngineState.STOPPED:
                raise EngineStopped("it is stopped")
            case _:
                raise EngineNotStarted("it is not started")

    async def _save_prompt_cache(self, path: Path) -> int:
        self.check_running()
        self.saved.append(path)
        return self.nbytes

    async def _load_prompt_cache(self, path: Path) -> int:
        self.check_running()
        if path.name == "broken":
            raise InvalidRequest("path", "is broken")
        self.saved.append(path)
        return self.nbytes

    @property
    def width(self) -> int:
        return 2


class ScriptedRequest:
    def __init__(self, engine: Scripted, ask: GenerationRequest, request_id: str) -> None:
        self.engine = engine
        self.ask = ask
        self.request_id = request_id
        self.emit: Emit | None = None
        self.tokens: list[int] = []
        self.cancelled = False

    async def run(self, emit: Emit | None) -> GenerationResult:
        self.engine.check_running()
        self.engine.refuse_if_busy()
        self.emit = emit
        self.over: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()
        self.engine.requests.append(self)
        if self.engine.world.answer_at_once:
            self.finish()
        try:
            while True:
                try:
                    await asyncio.wait({self.over})
                except asyncio.CancelledError:
                    if self.engine.stuck:
                        continue
                    raise
                return self.over.result()
        finally:
            self.engine.requests.remove(self)

    def token(self, token: int = 1) -> None:
        self.tokens.append(token)
        if self.emit is not None:
            self.emit(GenerationChunk("x", (token,)))

    def finish(self) -> None:
        self.engine.served += 1
        self.token()
        self.over.set_result(self.result("stop"))

    def fail(self, error: BaseException) -> None:
        if not self.over.done():
            self.over.set_exception(error)
            self.over.exception()  # looked at, in case that nobody waits any more

    def cancel(self) -> None:
        self.cancelled = True

    def partial_result(self) -> GenerationResult:
        return self.result("cancelled")

    def result(self, reason: Any) -> GenerationResult:
        text = f"{self.engine.name}: " + "x" * len(self.tokens)
        usage = Usage(1, len(self.tokens))
        return GenerationResult(
            text, tuple(self.tokens), reason, usage, _TIMINGS, request_id=self.request_id
        )
