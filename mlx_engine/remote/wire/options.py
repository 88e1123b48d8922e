"""The options of an engine that will be made in another process, on their way there."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from typing import Any

from mlx_engine.chat.answer_format import ToolFormat
from mlx_engine.checks import shown
from mlx_engine.config import EngineConfig
from mlx_engine.errors import InvalidRequest
from mlx_engine.remote.wire.messages import encode_strictly
from mlx_engine.remote.wire.values import option_from_wire, option_to_wire


def settled(config: EngineConfig) -> EngineConfig:
    """An engine that is the same wherever its process is started: paths are absolute.

    Raises:
        InvalidRequest: an option cannot go to another process.
    """
    model = config.model
    adapters = None if model.adapter_path is None else _absolute(model.adapter_path)
    config = replace(
        config,
        model=replace(model, model=_absolute(model.model), adapter_path=adapters),
        strategies=config.strategies.with_paths(_absolute),
    )
    for name, value in {"model": config.model.model, **options_to_wire(config)}.items():
        try:
            encode_strictly([value])
        except (TypeError, ValueError, OverflowError) as error:  # a path that is no text, say
            raise InvalidRequest(name, f"cannot go to another process: {error}") from error
    return config


def options_to_wire(config: EngineConfig) -> dict[str, Any]:
    """Keyword arguments of an engine, as they travel."""
    return {name: _to_wire(name, value) for name, value in config.options().items()}


def _to_wire(name: str, value: Any) -> Any:
    there = option_to_wire(value)
    own = isinstance(value, ToolFormat) and not isinstance(value.body, str)
    if own or dataclasses.is_dataclass(there):  # which msgpack would make a mapping of
        raise InvalidRequest(
            name, f"{shown(value)} cannot go to another process; one of this library's can"
        )
    return there


def options_from_wire(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an engine, as they arrive in its process."""
    return {name: option_from_wire(name, value) for name, value in options.items()}


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path) if os.path.exists(path) else path
    except (ValueError, OSError):
        return path  # no path, or the current folder is gone
