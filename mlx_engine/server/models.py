"""Models by their names, each in memory from when it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from mlx_engine.engine.interface import Engine
from mlx_engine.errors import MLXEngineError, describe
from mlx_engine.outputs import EngineState, ShutdownReport
from mlx_engine.server.failures import Failure
from mlx_engine.server.model_stay import Stay
from mlx_engine.server.served import ServedModel
from mlx_engine.server.turns import Turns

_log = logging.getLogger("mlx_engine.server")

_AGAIN = 5.0  # seconds after a load that failed, before another one is tried


@dataclass(eq=False, slots=True)
class Model:
    """One model.

    Attributes:
        name: the first of its names.
        source: its engine, or what makes that.
        turns: whose request goes to its engine next.
        stay: its engine in memory, if ``source`` makes it; ``None`` takes no requests.
        failure: of its last load, if that failed.
        retry_at: when the next load may be tried, by the clock of the event loop.
        wanted: whether it is to be in memory, though nobody has asked for it.
    """

    name: str
    source: Engine | ServedModel
    turns: Turns = field(default_factory=Turns)
    stay: Stay | None = None
    failure: Exception | None = None
    retry_at: float = 0.0
    wanted: bool = False

    @property
    def engine(self) -> Engine | None:
        """Its engine, if that is there."""
        if not isinstance(self.source, ServedModel):
            return self.source
        return None if self.stay is None else self.stay.engine

    @property
    def state(self) -> str:
        """A word: an engine's state, or ``unloaded``, ``loading`` or ``failed``."""
        if not isinstance(self.source, ServedModel):
            return str(self.source.state)
        if self.stay is not None:
            return self.stay.state
        return "unloaded" if self.failure is None else "failed"

    @property
    def is_well(self) -> bool:
        """Whether it can answer, by and by."""
        return self.state == EngineState.RUNNING or (self.state == "unloaded" and not self.wanted)


class Models:
    """All models of an application.

    A model that is given as a ``ServedModel`` is loaded when the first request asks for it, and
    unloaded when it was idle for a while, or when another one needs its place: first those that
    nobody uses, then those used least recently, which take no more requests then, and leave when
    those that they have are over. Requests that come meanwhile wait until there is room again, in
    the order in which their models were asked for.

    Args:
        given: engines, which others start and stop, and what makes engines.
        idle_timeout: seconds after which an idle model is unloaded; ``None``: never.
        max_loaded: models in memory at once; ``None``: any number.
        memory_bytes: for all of them together; one alone may take more.

    Attributes:
        names: the models by all of their names.
    """

    def __init__(
        self,
        given: Mapping[str, Engine | ServedModel],
        *,
        idle_timeout: float | None = None,
        max_loaded: int | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        by_source: dict[int, Model] = {}
        self.names: dict[str, Model] = {
            name: by_source.setdefault(id(source), Model(name, source))
            for name, source in given.items()
        }
        self._all = list(by_source.values())
        for model in self._all:
            model.wanted = isinstance(model.source, ServedModel) and model.source.preload
        self._idle_timeout = idle_timeout
        self._max_loaded = max_loaded
        self._memory_bytes = memory_bytes
        self._stays: dict[Stay, Model] = {}
        self._here: dict[Stay, int] = {}  # those that take memory, and how much of it
        self._room = asyncio.Lock()
        self._closed = False

    def __iter__(self) -> Iterator[Model]:
        return iter(self._all)

    def find(self, asked: str) -> tuple[str, Model]:
        """The model that goes by this name, and which of its names that is.

        Names are compared as they are, without what stands before them (``provider/``), and by
        their last parts. Nothing is the only model.

        Raises:
            Failure: there is no such model here, or there are several.
        """
        if (model := self.names.get(asked)) is not None:
            return asked, model
        if not asked and len(self._all) == 1:
            return self._all[0].name, self._all[0]
        for name, model in self.names.items():
            if name and asked.endswith(f"/{name}"):
                return name, model
        alike = {name: m for name, m in self.names.items() if name.rpartition("/")[2] == asked}
        if len({id(model) for model in alike.values()}) == 1:
            return next(iter(alike.items()))
        known = ", ".join(map(repr, self.names))
        said = f"there is no model {asked[:200]!r} here; there are {known}"
        raise Failure("not_found", said, option="model")

    def choose(self, asked: str) -> tuple[str, Model]:
        """As ``find``; the only model goes by every name.

        Raises:
            Failure: there are several, and none of that name.
        """
        try:
            return self.find(asked)
        except Failure:
            if len(self._all) > 1:
                raise
            return self._all[0].name, self._all[0]

    @contextlib.asynccontextmanager
    async def use(self, model: Model) -> AsyncIterator[Engine]:
        """The engine of a model, which stays as long as it is used.

        Cancellation: waiting for a load, it leaves at once; the load goes on.

        Raises:
            Failure: it cannot be loaded.
        """
        if not isinstance(model.source, ServedModel):
            yield model.source
            return
        stay = self._stay(model)
        stay.join()
        try:
            await stay.up.wait()
            if stay.engine is None:
                raise self._cannot(model, stay.error)
            yield stay.engine
        finally:
            stay.release()

    async def preload(self) -> None:
        """Load those that are to be there from the beginning.

        Cancellation: the loads go on; see ``shutdown``.

        Raises:
            Exception: what a load has failed with.
        """
        self._closed = False
        for model in self._all:
            if isinstance(model.source, ServedModel) and model.source.preload:
                stay = self._stay(model)
                await stay.up.wait()
                if stay.error is not None:
                    raise stay.error

    async def shutdown(self, timeout: float | None) -> ShutdownReport:
        """Take no more requests, let those in flight finish, unload all. Any number of times.

        Args:
            timeout: seconds for requests in flight; ``None`` waits for all of them.

        Cancellation: requests in flight are aborted, and all is unloaded behind that.
        """
        self._closed = True
        stays = list(self._stays)
        for stay in stays:
            if stay.engine is None:
                stay.task.cancel()
        engines = [stay.engine for stay in stays if stay.engine is not None]
        try:
            reports = await asyncio.gather(*(engine.shutdown(timeout) for engine in engines))
        finally:
            for stay in stays:
                stay.leave()
        for stay in stays:
            await stay.gone.wait()
        return ShutdownReport(
            finished=tuple(one for report in reports for one in report.finished),
            aborted=tuple(one for report in reports for one in report.aborted),
        )

    def _stay(self, model: Model) -> Stay:
        """Its stay in memory, which begins now if there is none."""
        assert isinstance(model.source, ServedModel)
        if model.stay is not None and model.stay.spent:
            model.stay.leave()
            model.stay = None
        if model.stay is None:
            if self._closed:
                raise Failure("unavailable", "the server is shutting down", retry_after=2)
            if model.retry_at > asyncio.get_running_loop().time():
                raise self._cannot(model, model.failure)
            model.stay = stay = Stay(partial(self._live, model, model.source))
            self._stays[stay] = model
            stay.task.add_done_callback(lambda _: self._ended(stay))
        return model.stay

    async def _live(self, model: Model, source: ServedModel, stay: Stay) -> None:
        """Have the engine of a stay, from its start to its end."""
        loop = asyncio.get_running_loop()
        try:
            async with self._room:
                if not (stay.users or source.preload):  # nobody has to make room for nobody
                    self._forget(stay)
                    return
                await self._make_room(stay, model, source.weight_bytes() or 0)
            began = loop.time()
            async with source.make() as engine:
                model.failure, model.wanted = None, False
                stay.engine = engine
                stay.up.set()
                if not source.preload:
                    _log.info("%s: loaded, in %.1f s", model.name, loop.time() - began)
                self._here[stay] = source.weight_bytes() or 0
                self._shrink(stay)
                await stay.unused(self._idle_timeout)
                self._forget(stay)
            _log.info("%s: unloaded", model.name)
        except Exception as error:  # noqa: BLE001 - told to those who wait for it
            if not (source.preload and stay.engine is None):  # told to whoever starts that
                ours = isinstance(error, MLXEngineError)
                _log.warning("%s: %s", model.name, describe(error), exc_info=not ours)
            if stay.engine is None:
                stay.error = model.failure = error
                model.retry_at = loop.time() + _AGAIN

    def _ended(self, stay: Stay) -> None:
        """Nothing is left of it, or it has not even begun when it was cancelled."""
        self._forget(stay)
        self._here.pop(stay, None)
        self._stays.pop(stay, None)
        stay.up.set()
        stay.gone.set()

    def _forget(self, stay: Stay) -> None:
        """Give it to nobody any more."""
        stay.leaving = True
        if (model := self._stays.get(stay)) is not None and model.stay is stay:
            model.stay = None

    async def _make_room(self, stay: Stay, model: Model, size: int) -> None:
        """Wait until others have left, as many as must; they are told to."""
        while (other := self._in_the_way(model, size)) is not None:
            self._forget(other)
            other.leave()
            await other.gone.wait()
        self._here[stay] = size

    def _in_the_way(self, model: Model, size: int) -> Stay | None:
        for other in self._here:
            if self._stays[other] is model:  # which is on its way out
                return other
        full = self._max_loaded is not None and len(self._here) >= self._max_loaded
        if not full and self._fits(size):
            return None
        return min(self._here, key=lambda other: (other.users > 0, other.used), default=None)

    def _fits(self, size: int) -> bool:
        return self._memory_bytes is None or sum(self._here.values()) + size <= self._memory_bytes

    def _shrink(self, new: Stay) -> None:
        """Unload what is idle, if the new one takes more than was known before it was loaded."""
        idle = [other for other in self._here if not other.users and other is not new]
        for other in sorted(idle, key=lambda other: other.used):
            left = sum(size for o, size in self._here.items() if not o.leaving)
            if self._memory_bytes is None or left <= self._memory_bytes:
                return
            self._forget(other)
            other.leave()

    def _cannot(self, model: Model, error: Exception | None) -> Failure:
        if error is None:
            return Failure("unavailable", "the server is shutting down", retry_after=2)
        said = f"{model.name} cannot be loaded: {error}"
        left = model.retry_at - asyncio.get_running_loop().time()
        return Failure("unavailable", said, retry_after=max(1.0, left))
