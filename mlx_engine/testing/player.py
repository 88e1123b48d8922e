"""The player of a ``FakeEngine``'s script: what it does on the MLX thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

from mlx_engine.core.batch_queue import BatchQueue
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.errors import EngineDead, describe
from mlx_engine.outputs import GenerationResult
from mlx_engine.testing.fake_model import LOOK, Fail, FakeModel
from mlx_engine.testing.scripted_request import ScriptedRequest

Queue = BatchQueue[ScriptedRequest]


class Player:
    """Plays requests, one by one or many at once. On the MLX thread.

    Args:
        model: has the script.
        fail: told what new requests are told once the model is dead.
    """

    def __init__(self, model: FakeModel, fail: Fail) -> None:
        self._model = model
        self._fail = fail
        self._playing: dict[ScriptedRequest, Iterator[float | None]] = {}

    def play(self, request: ScriptedRequest) -> GenerationResult:
        """Play a request by itself."""
        try:
            for seconds in self._model.play(request):
                time.sleep(LOOK if seconds is None else seconds)
        except EngineDead as error:
            self._model.die(error, self._fail)
            raise
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - told to its caller
            failed = request.broken(error)
            raise failed from failed.__cause__
        return request.result()

    def run_batch(self, queue: Queue, stop: threading.Event) -> None:
        """Play what is in the queue; see ``BatchScheduler``."""
        try:
            while self._fill(queue) and not stop.is_set():
                self._step(queue)
                if mlx_thread.wanted:
                    return
        except BaseException as error:  # noqa: BLE001 - nobody may be left waiting
            dead = error if isinstance(error, EngineDead) else EngineDead(describe(error))
            self._playing.clear()
            self._model.die(dead, self._fail)
            queue.end_all(dead)

    def _fill(self, queue: Queue) -> bool:
        """Give places to those whose turn it is; whether there is anything to do."""
        for queued in queue.turns():
            if queue.take(queued):
                self._playing[queued.request] = self._model.play(queued.request)
        return queue.pending

    def _step(self, queue: Queue) -> None:
        """A token for each request that is not held at a gate."""
        self._model.counters.batch_size = len(self._playing)
        waits = []
        for request, steps in list(self._playing.items()):
            error = None
            try:
                waits.append(next(steps))
                continue
            except StopIteration:
                pass
            except EngineDead:
                raise
            except (Exception, asyncio.CancelledError) as raised:  # noqa: BLE001 - told to its caller
                error = request.broken(raised)
            del self._playing[request]
            queue.end(request, error)
        self._model.counters.batch_size = len(self._playing)
        if waits:
            time.sleep(max((s for s in waits if s is not None), default=LOOK))
