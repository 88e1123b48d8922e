"""An engine on another machine of a Ray cluster."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Unpack

from mlx_engine.config import DEFAULTS, BatchedOptions, EngineKind
from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import ProgressCallback
from mlx_engine.remote.links.link import Link
from mlx_engine.remote.links.ray_link import RayLink
from mlx_engine.remote.node_part import NodePart
from mlx_engine.remote.part import Part
from mlx_engine.remote.process_engine import ProcessEngine
from mlx_engine.remote.wire.heartbeat import Watchdog
from mlx_engine.signatures import spelled_out


class RayEngine(ProcessEngine):
    """A ``ProcessEngine`` whose process an actor of a Ray cluster has started, on its node.

    The model is found there: a folder must exist on that node, a Hugging Face id is downloaded
    to it. The application must be a part of the cluster: ``ray.init()`` first.

    An actor is never restarted, and no request is ever done twice. Whatever is wrong with the
    actor, its node or the engine's process is told as ``EngineDead``; a node that is stopped or
    cut off is noticed by the watchdog. Where Ray is missing, has no cluster or refuses the
    options, ``start()`` raises ``MLXEngineError``.
    """

    @spelled_out(BatchedOptions, DEFAULTS)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        engine: EngineKind = "simple",
        num_cpus: float = 1,
        resources: Mapping[str, float] | None = None,
        scheduling_strategy: Any = None,
        env_vars: Mapping[str, str] | None = None,
        watchdog: Watchdog | None = Watchdog(),  # noqa: B008 - it never changes
        name: str | None = None,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[BatchedOptions],
    ) -> None:
        """Make an engine; no actor is placed before the engine is started.

        Args:
            model: a folder on the node, a Hugging Face repository id, or ``"demo"``.
            engine: ``"simple"`` serves one request at a time, ``"batched"`` many.
            num_cpus: what Ray sets aside on the node for it.
            resources: custom resources that the node must have, e.g. ``{"mac_studio": 1}``.
            scheduling_strategy: passed on to Ray.
            env_vars: environment variables for the engine's process.
            watchdog: its limit ``start`` is that for finding a node as well.
            name: for logs, and among the arguments of its process.
            on_progress: told of download and loading, in the event loop that starts it.
            options: those of ``SimpleEngine``, or of ``BatchedEngine``.

        Raises:
            InvalidRequest: an argument is of the wrong type, out of its range, contradicts
                another one, or is not for this kind of engine.
        """
        super().__init__(
            model, engine=engine, watchdog=watchdog, name=name, on_progress=on_progress, **options
        )
        for option, value in (("resources", resources), ("env_vars", env_vars)):
            if value is not None and not isinstance(value, Mapping):
                raise InvalidRequest(option, f"must map names to values, not {value!r}")
        self._place = functools.partial(
            RayLink,
            self.name,
            num_cpus=num_cpus,
            resources=resources,
            scheduling_strategy=scheduling_strategy,
            env_vars=env_vars,
        )

    def _make_link(self) -> Callable[[], Link]:
        return self._place

    def _new_part(self) -> Part | None:
        return NodePart(self.name, self._config)
