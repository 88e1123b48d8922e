"""Many requests at once, by continuous batching."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Unpack

from mlx_engine.config import BatchConfig, EngineOptions, check_batchable_options
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.preparer import Preparer
from mlx_engine.core.scheduler import BatchScheduler
from mlx_engine.engine.bursts import BurstLife
from mlx_engine.engine.local import LocalEngine
from mlx_engine.engine.model_holder import ModelHolder
from mlx_engine.errors import EngineDead, MLXEngineError, describe, drop_frames
from mlx_engine.generation.batch import Batch
from mlx_engine.generation.memory import MemoryBudget, memory_for_caches
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.trials.batch import check_batchable

_GATHER = 0.002  # seconds in which those that came together may join the first of them
_QUANTUM = 0.02  # seconds that a burst has at least while others wait for the MLX thread


class BatchedEngine(BurstLife[Request], LocalEngine):
    """Serves many requests at once: each decode step gives all of them a token.

    Requests join and leave at any step. The MLX thread works in bursts, each of which is one
    turn: it goes on until there is nothing to do, or others have waited for as long as they
    let the batch wait.
    """

    _takes_priority = True

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
        check_batchable_options(self.config)
        self._seats = BatchScheduler(max_batch_size)
        self._preparer = Preparer(self._seats)
        # Others' time on the MLX thread when the last burst made way for them, if it did.
        self._gave_way: float | None = None

    def _new_slot(self) -> ModelHolder:
        self._batch_slot = BatchHolder(self.batch_config)
        return self._batch_slot

    @property
    def _width(self) -> int:
        return self.batch_config.max_batch_size

    def _load(self, path: Path) -> int:
        loaded = super()._load(path)
        self._batch_slot.batch().make_room()
        return loaded

    def _prepare(self, request: Request) -> MLXEngineError | None:
        error = super()._prepare(request)
        if error is not None or not request.prompt:
            return error
        try:
            self._batch_slot.budget.check(request)
        except MLXEngineError as refused:
            return request.failed(refused)
        return None

    # on the MLX thread

    def _burst(self, stop: threading.Event) -> None:
        """Work until there is nothing to do, or others have waited for long enough."""
        try:
            batch = self._batch_slot.batch()
        except EngineDead as error:
            self._seats.end_all(error)
            return
        try:
            self._work(batch, stop)
        except BaseException as error:  # noqa: BLE001 - nobody may be left waiting
            batch.broken = error
        finally:
            batch.rest()  # a step may be under way
        if batch.broken is not None:
            batch.clear()
            self._fail(batch.broken)

    def _work(self, batch: Batch, stop: threading.Event) -> None:
        began, others = time.perf_counter(), mlx_thread.attended_seconds
        # As long as those had the thread that somebody waited for; other bursts are like this one.
        share = _QUANTUM if self._gave_way is None else max(_QUANTUM, others - self._gave_way)
        self._gave_way = None
        while self._fill(batch) and not stop.is_set():
            for request, error in batch.step():
                if batch.broken is None:  # else they are told, with all others
                    self._seats.end(request, error)
            if batch.broken is not None:
                return
            if mlx_thread.wanted and time.perf_counter() - began >= share:
                self._gave_way = others
                return

    def _fill(self, batch: Batch) -> bool:
        """Give places to those whose turn it is; whether there is anything to do."""
        if not len(batch):
            self._seats.gather(_GATHER)
        while (seat := self._seats.first()) is not None:
            if seat.orphaned:
                self._seats.withdraw_orphans()
                continue
            if not batch.fits(seat.request):
                break
            if self._seats.take(seat) and (over := batch.add(seat.request)) is not None:
                self._seats.end(*over)
        return self._seats.pending

    def _fail(self, error: BaseException) -> None:
        """MLX cannot be used any more: tell everybody, and refuse what comes."""
        reason = f"MLX does not work any more ({describe(error)})"
        self._lifecycle.fail(f"the engine has failed: {reason}; shut it down and start it again")
        drop_frames(error)
        dead = EngineDead(reason)
        dead.__cause__ = error
        self._seats.end_all(dead)


class BatchHolder(ModelHolder):
    """A model and the batch of its requests."""

    batched = True

    def __init__(self, config: BatchConfig) -> None:
        super().__init__()
        self._config = config
        self._batch: Batch | None = None
        self._budget: MemoryBudget | None = None

    @property
    def budget(self) -> MemoryBudget:
        """What the requests of the batch may take. From any thread.

        Raises:
            EngineDead: there is no model.
        """
        if self._budget is None:
            raise EngineDead("the engine has no model any more")
        return self._budget

    def batch(self) -> Batch:
        """The batch. On the MLX thread."""
        if self._batch is None:
            raise EngineDead("the engine has no model any more")
        return self._batch

    def _equip(self, space: ModelRunner) -> None:
        model, pause = space.loaded.model, self._config.max_decode_pause_ms
        check_batchable(model, space.config)
        memory = self._config.kv_cache_memory_bytes
        limit = memory_for_caches() if memory is None else memory
        self._budget = MemoryBudget(space.footprint, limit, space.strategies.footprints)
        self._batch = Batch(space, self._budget, None if pause is None else pause / 1000)

    def empty(self) -> None:
        """Drop the model and all that belongs to it. On the MLX thread."""
        self._batch = self._budget = None
        super().empty()
