"""The model of a batched engine, and the batch in which its requests are done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlx_engine.config import BatchConfig
from mlx_engine.core.batch_queue import BatchQueue
from mlx_engine.core.ledger import ledger
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.pressure import admits
from mlx_engine.engine.late import mlx_work
from mlx_engine.engine.model_holder import ModelHolder
from mlx_engine.errors import EngineDead, describe, drop_frames
from mlx_engine.generation.request import Request

if TYPE_CHECKING:
    from mlx_engine.generation.batch import Batch
    from mlx_engine.generation.memory import MemoryBudget, Pool
    from mlx_engine.generation.runner import ModelRunner

_GATHER = 0.002  # seconds in which those that came together may join the first of them
_LOOK_AGAIN = 0.01  # seconds until it is looked for memory again that others have
_QUANTUM = 0.02  # seconds that a batch run has at least while others wait for the MLX thread

Queue = BatchQueue[Request]


class BatchHolder(ModelHolder):
    """A model and the batch of its requests."""

    batched = True

    def __init__(self, config: BatchConfig) -> None:
        super().__init__()
        self._config = config
        # Others' time on the MLX thread when the last run made way for them, if it did.
        self._gave_way: float | None = None
        self._batch: Batch | None = None
        self._budget: MemoryBudget | None = None

    @property
    def budget(self) -> MemoryBudget:
        """Memory that the requests of the batch may take. From any thread.

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

    def _equip(self, runner: ModelRunner) -> None:
        model, pause = runner.loaded.model, self._config.max_decode_pause_ms
        mlx_work.check_batchable(model, runner.config)
        if (share := self._config.kv_cache_memory_bytes) is not None:
            self.memory.share_caches(share)
        pool, drafts = self._make_pool(), runner.strategies.footprints
        self._budget = mlx_work.MemoryBudget(runner.footprint, pool, drafts)
        self._batch = mlx_work.Batch(runner, self._budget, None if pause is None else pause / 1000)

    def _make_pool(self) -> Pool:
        """The memory of all its KV caches."""
        return self.memory.account

    def _kv_limit(self) -> int | None:
        limit, share = super()._kv_limit(), self._config.kv_cache_memory_bytes
        return limit if share is None else share if limit is None else min(share, limit)

    def _check(self, request: Request) -> None:
        self.budget.check(request)

    def _prompt_loaded(self) -> None:
        self.batch().make_room()

    def run_batch(self, fail: Callable[[str], None], queue: Queue, stop: threading.Event) -> None:
        """Work until there is nothing to do, or others have waited for long enough.

        On the MLX thread.

        Args:
            fail: told why the engine cannot serve any more, if it cannot.
        """
        try:
            batch = self.batch()
        except EngineDead as error:
            queue.end_all(error)
            return
        try:
            self._work(batch, queue, stop)
        except BaseException as error:  # noqa: BLE001 - nobody may be left waiting
            batch.broken = error
        finally:
            batch.rest()  # a step may be under way
        if batch.broken is not None:
            batch.clear()
            _tell_all(batch.broken, fail, queue)

    def _work(self, batch: Batch, queue: Queue, stop: threading.Event) -> None:
        began, others = time.perf_counter(), mlx_thread.attended_seconds
        # As long as those had the thread that somebody waited for; other batches are like this one.
        share = _QUANTUM if self._gave_way is None else max(_QUANTUM, others - self._gave_way)
        self._gave_way = None
        while _fill(batch, queue) and not stop.is_set():
            ledger().relieve()
            for request, error in batch.step():
                if batch.broken is None:  # else they are told, with all others
                    queue.end(request, error)
            if batch.broken is not None:
                return
            if batch.stalled:
                if mlx_thread.wanted:
                    return
                queue.rest(_LOOK_AGAIN)
            if mlx_thread.wanted and time.perf_counter() - began >= share:
                self._gave_way = others
                return

    def unload(self) -> None:
        """Drop the model and all that belongs to it. On the MLX thread."""
        self._batch = self._budget = None
        super().unload()


def _fill(batch: Batch, queue: Queue) -> bool:
    """Give places to those whose turn it is; whether there is anything to do."""
    if not len(batch):
        queue.gather(_GATHER)
    for queued in queue.turns():
        if not admits(ledger(), len(batch)) or not batch.fits(queued.request):
            break
        if queue.take(queued) and (over := batch.add(queued.request)) is not None:
            queue.end(*over)
    return queue.pending


def _tell_all(error: BaseException, fail: Callable[[str], None], queue: Queue) -> None:
    """MLX cannot be used any more: tell everybody, and refuse what comes."""
    reason = f"MLX does not work any more ({describe(error)})"
    fail(f"the engine has failed: {reason}; await engine.restart(), or use a new process")
    drop_frames(error)
    dead = EngineDead(reason)
    dead.__cause__ = error
    queue.end_all(dead)
