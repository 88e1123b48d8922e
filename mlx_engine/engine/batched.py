"""Many requests at once, by continuous batching."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import threading
import time
from typing import Unpack

from mlx_engine.config import BatchConfig, EngineOptions
from mlx_engine.engine.admission import RequestTicket
from mlx_engine.engine.base import BaseEngine
from mlx_engine.engine.seats import Seat, Seats
from mlx_engine.engine.slot import ModelSlot
from mlx_engine.errors import EngineDead, InvalidRequest, MLXEngineError
from mlx_engine.generation.batch import Batch
from mlx_engine.generation.kv_cache import check_batchable, measure_kv
from mlx_engine.generation.request import Request
from mlx_engine.generation.workspace import Workspace, memory_for_caches
from mlx_engine.lifecycle import Ticket
from mlx_engine.outputs import GenerationResult
from mlx_engine.turn import keep
from mlx_engine.worker import mlx_thread

_QUANTUM = 0.02  # seconds that a burst has at least while others wait for the MLX thread
_LOOK = 0.002  # seconds for prompts that are far back in the queue, between two steps


class BatchedEngine(BaseEngine):
    """Serves many requests at once: each decode step gives all of them a token.

    Requests join and leave at any step. The MLX thread works in bursts, each of which is one
    turn: it goes on until there is nothing to do, or others have waited for as long as they
    let the batch wait.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        max_batch_size: int = 32,
        max_decode_pause_ms: float | None = 200.0,
        kv_cache_memory_bytes: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Make an engine; nothing is loaded before it is started.

        Args:
            model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``.
            max_batch_size: requests in work at once; others wait in the queue.
            max_decode_pause_ms: milliseconds of prefill between two decode steps, roughly, so
                that a long prompt that joins does not freeze running streams; ``None`` lets
                each slice have ``prefill_step_size`` tokens.
            kv_cache_memory_bytes: bytes that the KV caches of the requests in work and the
                prompt cache may take together. A request that does not fit waits, one that
                never could is refused. ``None`` is 90 % of the device's memory that the model
                leaves, or no limit where that is not known (on CPUs).
            options: those of ``SimpleEngine``, but for ``kv_bits`` and ``max_kv_size``, which
                mlx-lm cannot batch.

        Raises:
            InvalidRequest: an argument is of the wrong type, out of its range, or cannot be
                honoured in a batch.
        """
        self.batch_config = BatchConfig(
            max_batch_size=max_batch_size,
            max_decode_pause_ms=max_decode_pause_ms,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
        )
        super().__init__(model, **options)
        for option in ("kv_bits", "max_kv_size"):
            if getattr(self.config, option) is not None:
                raise InvalidRequest(
                    option,
                    "mlx-lm cannot batch KV caches that are bounded or quantised: leave it out, "
                    "and bound memory with kv_cache_memory_bytes; or use SimpleEngine",
                )
        self._seats = Seats(max_batch_size)
        self._driving = threading.Lock()
        self._driver_loop: asyncio.AbstractEventLoop | None = None
        self._gave_way = 0.0  # when the last burst ended with work left; 0 if none was

    def _new_slot(self) -> ModelSlot:
        self._batch_slot = BatchSlot(self.batch_config)
        return self._batch_slot

    async def _serve(self, request: Request, ticket: RequestTicket) -> GenerationResult:
        seat = Seat(request, functools.partial(self._admission.over, ticket), self._drive)
        with self._admission.enter(ticket, seat, self._seats):
            return await self._seats.run(seat)  # type: ignore[no-any-return]

    @property
    def _width(self) -> int:
        return self.batch_config.max_batch_size

    # in event loops: somebody has to ask for the bursts

    def _drive(self) -> None:
        """See to it that a task of a living event loop asks for bursts; here, if there is none."""
        with self._driving:
            driver = self._driver_loop
            if not self._seats.pending or (driver is not None and not driver.is_closed()):
                return
            loop = self._driver_loop = asyncio.get_running_loop()
        # It serves everybody, so that it must not see the context variables of one caller.
        task = loop.create_task(
            self._bursts(loop), name="batch driver", context=contextvars.Context()
        )
        keep(task)

    async def _bursts(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._more_to_drive(loop):
                await self._one_burst()
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may be left waiting
            with self._driving:
                self._driver_loop = None
            if isinstance(error, MLXEngineError):  # the MLX thread, or the model, is gone
                self._seats.end_all(error)
            else:
                self._fail(error)

    async def _one_burst(self) -> None:
        stop = threading.Event()
        ticket = Ticket(self._lifecycle.new_id("burst"), abortable=False, on_done=self._rescue)
        try:
            await self._run_blocking_serialized(
                self._burst, stop, on_cancel=stop.set, _ticket=ticket
            )
        except asyncio.CancelledError:
            # At its end an event loop cancels all tasks: the requests, which then have to be
            # taken out of the batch, and this one, which nobody waits for but that loop.
            pass

    def _more_to_drive(self, loop: asyncio.AbstractEventLoop) -> bool:
        with self._driving:
            if self._driver_loop is loop and not self._seats.pending:
                self._driver_loop = None
            return self._driver_loop is loop

    def _rescue(self) -> None:
        """A burst is over: if the loop that asked for it is gone, let another one do so."""
        driver = self._driver_loop
        if driver is None or not driver.is_closed():
            return
        for seat in self._seats.all():
            try:
                seat.loop.call_soon_threadsafe(self._drive)
            except RuntimeError:
                continue  # closed as well
            return
        mlx_thread.post(self._forget_orphans)

    # on the MLX thread

    def _burst(self, stop: threading.Event) -> None:
        """Work until there is nothing to do, or others have waited for long enough."""
        batch, began = self._batch_slot.batch(), time.perf_counter()
        others = began - self._gave_way if self._gave_way else 0.0
        share = max(_QUANTUM, others)
        self._gave_way = 0.0
        self._seats.bursting = True
        try:
            while self._fill(batch) and not stop.is_set():
                for request, error in batch.step():
                    if batch.broken is None:  # else they are told, with all others, below
                        self._seats.end(request, error)
                if batch.broken is not None:
                    batch.clear()
                    self._fail(batch.broken)
                    return
                if mlx_thread.waiting and time.perf_counter() - began >= share:
                    self._gave_way = time.perf_counter()
                    return
        except BaseException as error:
            batch.clear()
            self._fail(error)
            raise
        finally:
            self._seats.bursting = False
            batch.rest()  # a step may be under way

    def _fill(self, batch: Batch) -> bool:
        """Look at new prompts, and give places to those whose turn it is; whether any is left."""
        end = time.perf_counter() + _LOOK
        while (seat := self._seats.unprepared()) is not None:
            self._prepare(seat, batch)
            if time.perf_counter() > end:
                break
        while self._seats.free and (seat := self._seats.first()) is not None:
            if seat.orphaned:
                self._seats.withdraw_orphans()
                continue
            if not batch.fits(seat.request):
                break
            if self._seats.take(seat):
                batch.add(seat.request)
        return self._seats.pending

    def _prepare(self, seat: Seat, batch: Batch) -> None:
        try:
            seat.request.prepare(self._slot.get())
            batch.check(seat.request)
            seat.ready = True
        except BaseException as error:  # noqa: BLE001 - the border: templates raise anything
            self._seats.end(seat.request, seat.request.failed(error))

    def _fail(self, error: BaseException) -> None:
        """MLX cannot be used any more: tell everybody, and refuse what comes."""
        reason = f"MLX does not work any more ({type(error).__name__}: {error})"
        self._lifecycle.fail(f"the engine has failed: {reason}; shut it down and start it again")
        self._seats.end_all(EngineDead(reason))

    def _forget_orphans(self) -> None:
        """Free what requests hold whose event loops are gone, with nobody else there."""
        self._seats.withdraw_orphans()
        if self._slot.filled:
            for request, error in self._batch_slot.batch().drop_cancelled():
                self._seats.end(request, error)


class BatchSlot(ModelSlot):
    """A model and the batch of its requests."""

    def __init__(self, config: BatchConfig) -> None:
        super().__init__()
        self._config = config
        self._batch: Batch | None = None

    def batch(self) -> Batch:
        """The batch. On the MLX thread."""
        if self._batch is None:
            raise EngineDead("the engine has no model any more")
        return self._batch

    def _equip(self, space: Workspace) -> None:
        model, pause = space.loaded.model, self._config.max_decode_pause_ms
        check_batchable(model, space.config)
        memory = self._config.kv_cache_memory_bytes
        self._batch = Batch(
            space,
            measure_kv(model, space.config),
            memory=memory_for_caches() if memory is None else memory,
            max_pause=None if pause is None else pause / 1000,
        )

    def empty(self) -> None:
        """Drop the model and all that belongs to it. On the MLX thread."""
        self._batch = None
        super().empty()
