"""MLX language models behind ``await``: never two pieces of work inside MLX at once.

    async with SimpleEngine("demo") as engine:
        result = await engine.generate("The capital of France is")

Importing this package starts nothing and does not load MLX; the first use of an engine does.

Its files:

    cli/         arguments -> engine call -> print
    testing/     for the tests of applications
    remote/      engines in other processes, and those who watch over them
    engine/      where the event loop and the MLX thread meet
    generation/  requests: synchronous from here on, on the MLX thread
    models/      where models come from
    guide/       what users read, by ``mlx-engine help``
    __main__.py  ``python -m mlx_engine``
    config.py    how an engine is set up
    strategies.py  how prompts are prefilled, and answers decoded
    limits.py    how large a request may be
    params.py    the options of one request
    outputs.py   what engines give back
    checks.py    numbers and paths that callers give
    errors.py    every exception, as a tree
    core/        asyncio and threads, and no MLX
    requests.py  what a caller asks of an engine
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_engine.core.lifecycle import EngineState
    from mlx_engine.core.stream import GenerationStream
    from mlx_engine.engine.base import BaseEngine
    from mlx_engine.engine.batched import BatchedEngine
    from mlx_engine.engine.simple import SimpleEngine
    from mlx_engine.errors import (
        ContextLengthExceeded,
        EngineBusy,
        EngineDead,
        EngineNotRunning,
        EngineNotStarted,
        EngineStopped,
        GenerationError,
        InvalidRequest,
        MLXEngineError,
        ModelLoadError,
        StreamClosed,
        StreamConsumed,
    )
    from mlx_engine.limits import RequestLimits
    from mlx_engine.outputs import (
        EngineStats,
        FinishReason,
        GenerationChunk,
        GenerationResult,
        Progress,
        ProgressCallback,
        PromptCacheLookup,
        PromptCacheStats,
        Segment,
        ShutdownReport,
        Timings,
        TokenLogprob,
        ToolCall,
        Usage,
    )
    from mlx_engine.params import SamplingOptions, SamplingParams
    from mlx_engine.remote.exits import Exit
    from mlx_engine.remote.health import Health
    from mlx_engine.remote.process_engine import ProcessEngine
    from mlx_engine.remote.ray_engine import RayEngine
    from mlx_engine.remote.remote_engine import RemoteEngine
    from mlx_engine.remote.replicas.manager import EngineManager
    from mlx_engine.remote.replicas.replica import ReplicaInfo
    from mlx_engine.remote.replicas.restarts import RestartPolicy
    from mlx_engine.remote.serving.host import EngineHost
    from mlx_engine.remote.signals import install_signal_handlers
    from mlx_engine.remote.wire.heartbeat import Watchdog
    from mlx_engine.strategies import MTP, DraftModel, SpecPrefill

__version__ = "0.1.0"

__all__ = [
    "MTP",
    "BaseEngine",
    "BatchedEngine",
    "ContextLengthExceeded",
    "DraftModel",
    "EngineBusy",
    "EngineDead",
    "EngineHost",
    "EngineManager",
    "EngineNotRunning",
    "EngineNotStarted",
    "EngineState",
    "EngineStats",
    "EngineStopped",
    "Exit",
    "FinishReason",
    "GenerationChunk",
    "GenerationError",
    "GenerationResult",
    "GenerationStream",
    "Health",
    "InvalidRequest",
    "MLXEngineError",
    "ModelLoadError",
    "ProcessEngine",
    "Progress",
    "ProgressCallback",
    "PromptCacheLookup",
    "PromptCacheStats",
    "RayEngine",
    "RemoteEngine",
    "ReplicaInfo",
    "RequestLimits",
    "RestartPolicy",
    "SamplingOptions",
    "SamplingParams",
    "Segment",
    "ShutdownReport",
    "SimpleEngine",
    "SpecPrefill",
    "StreamClosed",
    "StreamConsumed",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "Watchdog",
    "install_signal_handlers",
]

# Imported when it is first asked for: some of it needs MLX, or msgspec, and all of it takes time.
_LATER = {
    "MTP": "mlx_engine.strategies",
    "BaseEngine": "mlx_engine.engine.base",
    "BatchedEngine": "mlx_engine.engine.batched",
    "ContextLengthExceeded": "mlx_engine.errors",
    "DraftModel": "mlx_engine.strategies",
    "EngineBusy": "mlx_engine.errors",
    "EngineDead": "mlx_engine.errors",
    "EngineHost": "mlx_engine.remote.serving.host",
    "EngineManager": "mlx_engine.remote.replicas.manager",
    "EngineNotRunning": "mlx_engine.errors",
    "EngineNotStarted": "mlx_engine.errors",
    "EngineState": "mlx_engine.core.lifecycle",
    "EngineStats": "mlx_engine.outputs",
    "EngineStopped": "mlx_engine.errors",
    "Exit": "mlx_engine.remote.exits",
    "FinishReason": "mlx_engine.outputs",
    "GenerationChunk": "mlx_engine.outputs",
    "GenerationError": "mlx_engine.errors",
    "GenerationResult": "mlx_engine.outputs",
    "GenerationStream": "mlx_engine.core.stream",
    "Health": "mlx_engine.remote.health",
    "InvalidRequest": "mlx_engine.errors",
    "MLXEngineError": "mlx_engine.errors",
    "ModelLoadError": "mlx_engine.errors",
    "ProcessEngine": "mlx_engine.remote.process_engine",
    "Progress": "mlx_engine.outputs",
    "ProgressCallback": "mlx_engine.outputs",
    "PromptCacheLookup": "mlx_engine.outputs",
    "PromptCacheStats": "mlx_engine.outputs",
    "RayEngine": "mlx_engine.remote.ray_engine",
    "RemoteEngine": "mlx_engine.remote.remote_engine",
    "ReplicaInfo": "mlx_engine.remote.replicas.replica",
    "RequestLimits": "mlx_engine.limits",
    "RestartPolicy": "mlx_engine.remote.replicas.restarts",
    "SamplingOptions": "mlx_engine.params",
    "SamplingParams": "mlx_engine.params",
    "Segment": "mlx_engine.outputs",
    "ShutdownReport": "mlx_engine.outputs",
    "SimpleEngine": "mlx_engine.engine.simple",
    "SpecPrefill": "mlx_engine.strategies",
    "StreamClosed": "mlx_engine.errors",
    "StreamConsumed": "mlx_engine.errors",
    "Timings": "mlx_engine.outputs",
    "TokenLogprob": "mlx_engine.outputs",
    "ToolCall": "mlx_engine.outputs",
    "Usage": "mlx_engine.outputs",
    "Watchdog": "mlx_engine.remote.wire.heartbeat",
    "install_signal_handlers": "mlx_engine.remote.signals",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        value = getattr(import_module(_LATER[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
