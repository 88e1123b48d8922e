"""MLX language models behind ``await``: never two pieces of work inside MLX at once.

    async with SimpleEngine("demo") as engine:
        result = await engine.generate("The capital of France is")

Its names, of which classes and functions have a ``help`` of their own:

    engines          SimpleEngine BatchedEngine ProcessEngine EngineManager RayEngine RemoteEngine,
                     Engine (their interface, for annotations) BaseEngine (what they are made of),
                     SyncEngine SyncStream SyncOutcomes (the same without await)
    their options    EngineOptions BatchedOptions EngineKind RequestLimits, ToolFormat
                     ReasoningFormat, Decode DraftModel MTP SpecPrefill EngineDefault
    what is asked    Prompt Message, RequestOptions ChatOptions ChatRequestOptions ToolChoice,
                     SamplingParams SamplingOptions LogitsProcessor ProgressCallback Progress
    what the answer  Constraint JSONSchema AnyJSON Regex Choice Grammar
    must be
    answers          GenerationResult GenerationStream GenerationChunk Segment FinishReason Usage
                     Timings TokenLogprob ToolCall ToolCallDelta RenderedChat, Outcome Outcomes
                     (of ``map``)
    errors           MLXEngineError, of which all are: InvalidRequest ContextLengthExceeded
                     EngineBusy EngineNotRunning EngineNotStarted EngineStopped EngineDead
                     GenerationError OutputInvalid ModelLoadError NotEnoughMemory StreamClosed
                     StreamUnfinished StreamConsumed
    what is told     EngineState EngineStats PromptCacheStats PromptCacheLookup MemoryStats
                     MemoryUse MemoryOwner PressureStage ShutdownReport Health
    in operation     EngineHost Watchdog RestartPolicy ReplicaInfo ReplicaState Exit ExitKind
                     SignalHandlers install_signal_handlers

``mlx_engine.testing`` has an engine for tests, ``mlx_engine.server`` one that speaks HTTP.

Importing this package, and any name of it, starts nothing and does not load MLX: the start of an
engine in this process does.

Its files:

    cli/             arguments -> engine call -> print
    __main__.py      ``python -m mlx_engine``
    testing/         for the tests of applications
    server/          HTTP, for clients of other makers' APIs
    remote/          engines in other processes, and those who watch over them
    engine/          where the event loop and the MLX thread meet
    generation/      requests: synchronous from here on, on the MLX thread
    models/          where models come from
    chat/            conversations <-> text, and no MLX
    core/            asyncio and threads, and no MLX
    grammars/        what of a constraint can be enforced
    questions.py     what a caller asks about a prompt
    requests.py      what a caller asks of an engine
    conversation.py  the messages and tools in it
    config.py        how an engine is set up
    strategies.py    how prompts are prefilled, and answers decoded
    limits.py        how large a request may be
    params.py        the options of one request
    constraints.py   what an answer must be
    outputs.py       what engines give back
    usage.py         ... the tokens and times in it
    cache_stats.py   what they tell of a prompt cache
    memory_stats.py  and of memory
    plain.py         results as plain data
    checks.py        numbers and paths that callers give
    signatures.py    how functions with such options are shown
    agents.py        coding agents, and how they are pointed at a server
    other_names.py   what people type, and what to write here
    other_attributes.py  what they look for, and where it is
    extras.py        what only a part needs, and how it is installed
    errors.py        every exception, as a tree
    guide/           what users read, by ``mlx-engine help``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_engine.cache_stats import PromptCacheLookup, PromptCacheStats
    from mlx_engine.chat.answer_format import ReasoningFormat, ToolFormat
    from mlx_engine.config import BatchedOptions, EngineKind, EngineOptions
    from mlx_engine.constraints import (
        AnyJSON,
        Choice,
        Constraint,
        Grammar,
        JSONSchema,
        Regex,
    )
    from mlx_engine.core.stream import GenerationStream
    from mlx_engine.engine.base import BaseEngine
    from mlx_engine.engine.batched import BatchedEngine
    from mlx_engine.engine.interface import Engine
    from mlx_engine.engine.outcome import Outcome
    from mlx_engine.engine.outcomes import Outcomes
    from mlx_engine.engine.simple import SimpleEngine
    from mlx_engine.engine.sync import SyncEngine, SyncStream
    from mlx_engine.engine.sync_map import SyncOutcomes
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
        NotEnoughMemory,
        OutputInvalid,
        StreamClosed,
        StreamConsumed,
        StreamUnfinished,
    )
    from mlx_engine.limits import RequestLimits
    from mlx_engine.memory_stats import MemoryOwner, MemoryStats, MemoryUse, PressureStage
    from mlx_engine.outputs import (
        EngineState,
        EngineStats,
        FinishReason,
        GenerationChunk,
        GenerationResult,
        Progress,
        ProgressCallback,
        RenderedChat,
        Segment,
        ShutdownReport,
        TokenLogprob,
        ToolCall,
        ToolCallDelta,
    )
    from mlx_engine.params import LogitsProcessor, SamplingOptions, SamplingParams
    from mlx_engine.remote.exits import Exit, ExitKind
    from mlx_engine.remote.health import Health
    from mlx_engine.remote.process_engine import ProcessEngine
    from mlx_engine.remote.ray_engine import RayEngine
    from mlx_engine.remote.remote_engine import RemoteEngine
    from mlx_engine.remote.replicas.manager import EngineManager
    from mlx_engine.remote.replicas.replica import ReplicaInfo, ReplicaState
    from mlx_engine.remote.replicas.restarts import RestartPolicy
    from mlx_engine.remote.serving.host import EngineHost
    from mlx_engine.remote.signals import SignalHandlers, install_signal_handlers
    from mlx_engine.remote.wire.heartbeat import Watchdog
    from mlx_engine.requests import (
        ChatOptions,
        ChatRequestOptions,
        Message,
        Prompt,
        RequestOptions,
        ToolChoice,
    )
    from mlx_engine.strategies import MTP, Decode, DraftModel, EngineDefault, SpecPrefill
    from mlx_engine.usage import Timings, Usage

__version__ = "0.1.0"

__all__ = [
    "MTP",
    "AnyJSON",
    "BaseEngine",
    "BatchedEngine",
    "BatchedOptions",
    "ChatOptions",
    "ChatRequestOptions",
    "Choice",
    "Constraint",
    "ContextLengthExceeded",
    "Decode",
    "DraftModel",
    "Engine",
    "EngineBusy",
    "EngineDead",
    "EngineDefault",
    "EngineHost",
    "EngineKind",
    "EngineManager",
    "EngineNotRunning",
    "EngineNotStarted",
    "EngineOptions",
    "EngineState",
    "EngineStats",
    "EngineStopped",
    "Exit",
    "ExitKind",
    "FinishReason",
    "GenerationChunk",
    "GenerationError",
    "GenerationResult",
    "GenerationStream",
    "Grammar",
    "Health",
    "InvalidRequest",
    "JSONSchema",
    "LogitsProcessor",
    "MLXEngineError",
    "MemoryOwner",
    "MemoryStats",
    "MemoryUse",
    "Message",
    "ModelLoadError",
    "NotEnoughMemory",
    "Outcome",
    "Outcomes",
    "OutputInvalid",
    "PressureStage",
    "ProcessEngine",
    "Progress",
    "ProgressCallback",
    "Prompt",
    "PromptCacheLookup",
    "PromptCacheStats",
    "RayEngine",
    "ReasoningFormat",
    "Regex",
    "RemoteEngine",
    "RenderedChat",
    "ReplicaInfo",
    "ReplicaState",
    "RequestLimits",
    "RequestOptions",
    "RestartPolicy",
    "SamplingOptions",
    "SamplingParams",
    "Segment",
    "ShutdownReport",
    "SignalHandlers",
    "SimpleEngine",
    "SpecPrefill",
    "StreamClosed",
    "StreamConsumed",
    "StreamUnfinished",
    "SyncEngine",
    "SyncOutcomes",
    "SyncStream",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "ToolFormat",
    "Usage",
    "Watchdog",
    "install_signal_handlers",
]

# Imported when it is first asked for, since all of it takes time.
_HOMES = {
    "mlx_engine.cache_stats": (
        "PromptCacheLookup",
        "PromptCacheStats",
    ),
    "mlx_engine.chat.answer_format": (
        "ReasoningFormat",
        "ToolFormat",
    ),
    "mlx_engine.config": (
        "BatchedOptions",
        "EngineKind",
        "EngineOptions",
    ),
    "mlx_engine.constraints": (
        "AnyJSON",
        "Choice",
        "Constraint",
        "Grammar",
        "JSONSchema",
        "Regex",
    ),
    "mlx_engine.core.stream": ("GenerationStream",),
    "mlx_engine.engine.base": ("BaseEngine",),
    "mlx_engine.engine.batched": ("BatchedEngine",),
    "mlx_engine.engine.interface": ("Engine",),
    "mlx_engine.engine.outcome": ("Outcome",),
    "mlx_engine.engine.outcomes": ("Outcomes",),
    "mlx_engine.engine.simple": ("SimpleEngine",),
    "mlx_engine.engine.sync": (
        "SyncEngine",
        "SyncStream",
    ),
    "mlx_engine.engine.sync_map": ("SyncOutcomes",),
    "mlx_engine.errors": (
        "ContextLengthExceeded",
        "EngineBusy",
        "EngineDead",
        "EngineNotRunning",
        "EngineNotStarted",
        "EngineStopped",
        "GenerationError",
        "InvalidRequest",
        "MLXEngineError",
        "ModelLoadError",
        "NotEnoughMemory",
        "OutputInvalid",
        "StreamClosed",
        "StreamConsumed",
        "StreamUnfinished",
    ),
    "mlx_engine.limits": ("RequestLimits",),
    "mlx_engine.memory_stats": (
        "MemoryOwner",
        "MemoryStats",
        "MemoryUse",
        "PressureStage",
    ),
    "mlx_engine.outputs": (
        "EngineState",
        "EngineStats",
        "FinishReason",
        "GenerationChunk",
        "GenerationResult",
        "Progress",
        "ProgressCallback",
        "RenderedChat",
        "Segment",
        "ShutdownReport",
        "TokenLogprob",
        "ToolCall",
        "ToolCallDelta",
    ),
    "mlx_engine.params": (
        "LogitsProcessor",
        "SamplingOptions",
        "SamplingParams",
    ),
    "mlx_engine.remote.exits": (
        "Exit",
        "ExitKind",
    ),
    "mlx_engine.remote.health": ("Health",),
    "mlx_engine.remote.process_engine": ("ProcessEngine",),
    "mlx_engine.remote.ray_engine": ("RayEngine",),
    "mlx_engine.remote.remote_engine": ("RemoteEngine",),
    "mlx_engine.remote.replicas.manager": ("EngineManager",),
    "mlx_engine.remote.replicas.replica": (
        "ReplicaInfo",
        "ReplicaState",
    ),
    "mlx_engine.remote.replicas.restarts": ("RestartPolicy",),
    "mlx_engine.remote.serving.host": ("EngineHost",),
    "mlx_engine.remote.signals": (
        "SignalHandlers",
        "install_signal_handlers",
    ),
    "mlx_engine.remote.wire.heartbeat": ("Watchdog",),
    "mlx_engine.requests": (
        "ChatOptions",
        "ChatRequestOptions",
        "Message",
        "Prompt",
        "RequestOptions",
        "ToolChoice",
    ),
    "mlx_engine.strategies": (
        "MTP",
        "Decode",
        "DraftModel",
        "EngineDefault",
        "SpecPrefill",
    ),
    "mlx_engine.usage": (
        "Timings",
        "Usage",
    ),
}

if not TYPE_CHECKING:  # or a name with a mistake in it would be one of any type
    from importlib import import_module

    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        if name in _HOME_OF:
            value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return __all__
