"""MLX language models behind ``await``: never two pieces of work inside MLX at once.

    async with SimpleEngine("demo") as engine:
        result = await engine.generate("The capital of France is")

Importing this package starts nothing and does not load MLX; the first use of an engine does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_engine.config import MTP, DraftModel, SpecPrefill
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
from mlx_engine.lifecycle import EngineState
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
from mlx_engine.stream import GenerationStream

if TYPE_CHECKING:
    from mlx_engine.engine.base import BaseEngine
    from mlx_engine.engine.batched import BatchedEngine
    from mlx_engine.engine.simple import SimpleEngine
    from mlx_engine.remote.beat import Watchdog
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

# What needs MLX, or msgspec, is imported when it is first asked for.
_LATER = {
    "BaseEngine": "mlx_engine.engine.base",
    "BatchedEngine": "mlx_engine.engine.batched",
    "EngineHost": "mlx_engine.remote.serving.host",
    "EngineManager": "mlx_engine.remote.replicas.manager",
    "Exit": "mlx_engine.remote.exits",
    "Health": "mlx_engine.remote.health",
    "ProcessEngine": "mlx_engine.remote.process_engine",
    "RayEngine": "mlx_engine.remote.ray_engine",
    "RemoteEngine": "mlx_engine.remote.remote_engine",
    "ReplicaInfo": "mlx_engine.remote.replicas.replica",
    "RestartPolicy": "mlx_engine.remote.replicas.restarts",
    "SimpleEngine": "mlx_engine.engine.simple",
    "Watchdog": "mlx_engine.remote.beat",
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
