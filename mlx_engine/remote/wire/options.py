"""The options of an engine that will be made in another process, checked before it is."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from mlx_engine.checks import shown
from mlx_engine.config import (
    BatchConfig,
    ModelConfig,
    QueueConfig,
    Strategies,
    check_batchable_options,
    path_text,
)
from mlx_engine.errors import InvalidRequest
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits, checked_limits
from mlx_engine.remote.wire.messages import encode_strictly
from mlx_engine.remote.wire.values import option_from_wire, option_to_wire

EngineKind = Literal["simple", "batched"]

_KINDS = ("simple", "batched")


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """An engine to be made elsewhere.

    Attributes:
        kind: ``simple`` or ``batched``.
        model: as for the engine itself.
        options: its keyword arguments, as they travel.
        strategies, limits, queue: its own; requests are checked against them.
    """

    kind: str
    model: str
    options: dict[str, Any]
    strategies: Strategies
    limits: RequestLimits
    queue: QueueConfig

    @classmethod
    def of(cls, kind: str, model: Any, options: dict[str, Any]) -> EnginePlan:
        """Check what a caller has given.

        Raises:
            InvalidRequest: an option is unknown, out of its range, or not for this kind.
        """
        if kind not in _KINDS:
            raise InvalidRequest("engine", f"must be one of {_KINDS}, not {shown(kind)}")
        model = _settled(model)
        if options.get("adapter_path") is not None:
            options = {**options, "adapter_path": _settled(options["adapter_path"])}
        left = dict(options)
        strategies = Strategies.of(left.pop("prefill", None), left.pop("decode", None))
        limits = checked_limits(left.pop("limits", DEFAULT_LIMITS))
        config = ModelConfig(model=model, **_taken(left, ModelConfig))
        queue = QueueConfig(**_taken(left, QueueConfig))
        if kind == "batched":
            BatchConfig(**_taken(left, BatchConfig))
            check_batchable_options(config)
        for name in left:
            raise InvalidRequest(name, _unknown(name, kind))
        wired = {name: option_to_wire(value) for name, value in options.items()}
        for name, value in {"model": config.model, **wired}.items():
            try:
                encode_strictly([value])
            except (TypeError, ValueError, OverflowError) as error:  # an integer too big, say
                raise InvalidRequest(name, f"cannot go to another process: {error}") from error
        return cls(kind, config.model, wired, strategies, limits, queue)


def options_from_wire(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an engine, as they arrive in its process."""
    return {name: option_from_wire(name, value) for name, value in options.items()}


def _settled(path: Any) -> Any:
    """The path of a folder that is there, wherever the process that needs it is started."""
    text = path_text(path)
    try:
        return os.path.abspath(text) if os.path.isdir(text) else text
    except (TypeError, ValueError, OSError):
        return text  # to be refused where it is checked, or the current folder is gone


def _taken(options: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}


def _unknown(name: str, kind: str) -> str:
    batch = [field.name for field in fields(BatchConfig)]
    if name in batch:
        return "is for engine='batched' only"
    known = [
        *(field.name for field in (*fields(ModelConfig), *fields(QueueConfig))),
        "limits",
        *batch,
    ]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"there is no such option of a {kind} engine{hint}"
