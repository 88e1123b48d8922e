"""An engine in a process of its own."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from typing import Unpack

from mlx_engine.config import DEFAULTS, BatchedOptions, EngineConfig, EngineKind
from mlx_engine.engine.base import checked_formats
from mlx_engine.outputs import ProgressCallback
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.remote.links.link import Link
from mlx_engine.remote.links.process_link import ProcessLink
from mlx_engine.remote.part import Part
from mlx_engine.remote.wire.heartbeat import HEARTBEAT_INTERVAL, Watchdog
from mlx_engine.remote.wire.messages import Configure, Hello, encode_strictly
from mlx_engine.remote.wire.options import options_to_wire, settled
from mlx_engine.signatures import spelled_out
from mlx_engine.strategies import EngineDefault, SpecPrefill

_numbers = itertools.count(1)


class ProcessEngine(LinkedEngine):
    """A ``SimpleEngine`` or ``BatchedEngine`` in a process of its own, with the same interface.

    A crash or a hang in native code, which nothing in a process can survive, ends that process:
    requests get ``EngineDead``, with its exit code or signal and its last words, and the
    application goes on. Then ``restart()`` it, or let ``EngineManager`` do that.

    The process is started as a new interpreter, never forked, and ends when this one does,
    however it ends. It works from scripts without ``__main__`` guard, from notebooks, from any
    thread, and under any event loop.

    What cannot go to another process: ``run_blocking``, and logits processors other than by
    their names, ``"package.module:function"``.
    """

    @spelled_out(BatchedOptions, DEFAULTS)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        engine: EngineKind = "simple",
        watchdog: Watchdog | None = Watchdog(),  # noqa: B008 - it never changes
        name: str | None = None,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[BatchedOptions],
    ) -> None:
        """Make an engine; no process is started before the engine is.

        Args:
            model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``, a
                small model that is fetched once (93 MB; 4 to 10 tokens/s on a CPU).
            engine: ``"simple"`` serves one request at a time, ``"batched"`` many.
            watchdog: when its process counts as stuck and is killed; ``None``: never.
            name: for logs, and among the arguments of its process.
            on_progress: told of download and loading, in the event loop that starts it.
            options: those of ``SimpleEngine``, or of ``BatchedEngine``. Its process gets
                ``memory`` for itself; with ``"auto"`` what is free, of which it gives back what
                it has no use for when another engine of this process starts.

        Raises:
            InvalidRequest: an argument is of the wrong type, out of its range, contradicts
                another one, or is not for this kind of engine.
        """
        self._config = checked_formats(settled(EngineConfig.of(engine, model, options)))
        self.limits, self.queue_limits = self._config.limits, self._config.queue
        self.takes_priority = self._config.kind == "batched"
        super().__init__(name or f"engine-{next(_numbers)}", watchdog, on_progress)
        self._client.lifecycle.name = f"{type(self).__name__} {self.name} of {model!r}"

    @property
    def model(self) -> str:
        return self._config.model.model

    @property
    def pid(self) -> int | None:
        """Id of its process, as ``ps`` shows it; ``None`` while there is none."""
        connection = self._client.connection
        link = None if connection is None or connection.exit is not None else connection.link
        return link.pid if isinstance(link, ProcessLink) else None

    def _make_link(self) -> Callable[[], Link]:
        return functools.partial(ProcessLink, self.name)

    def _new_part(self) -> Part | None:
        return Part(self.name, self._config)

    def _greeting(self) -> Callable[[int | None], bytes]:
        return functools.partial(_greeting, self._config, self.name)

    def check_strategies(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> None:
        self._config.strategies.of_request(prefill, decode)


def _greeting(config: EngineConfig, name: str, memory: int | None) -> bytes:
    configure = Configure(
        kind=config.kind,
        model=config.model.model,
        options=options_to_wire(config),
        sys_path=[path for entry in sys.path if (path := _absolute(entry)) is not None],
        heartbeat_interval=HEARTBEAT_INTERVAL,
        memory=memory,
        name=name,
    )
    return encode_strictly([Hello(), configure])


def _absolute(entry: object) -> str | None:
    """An entry of ``sys.path``, if it can travel; applications put all kinds of things there."""
    try:
        path = os.path.abspath(os.fspath(entry))  # type: ignore[call-overload]
        return path if isinstance(path, str) and path.encode() else None
    except (TypeError, ValueError, OSError):  # or the current folder is gone
        return None
