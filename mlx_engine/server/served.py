"""Models as an application is given them: engines, or what makes them when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from mlx_engine.checks import shown
from mlx_engine.engine.interface import Engine
from mlx_engine.errors import InvalidRequest

_UNNAMED = "default"


def _unknown() -> int | None:
    return None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model whose engine is made and started when a client asks for it, and may be stopped again.

    Attributes:
        make: makes the engine, which is not started yet; called anew after each stop.
        weight_bytes: tells the bytes that the model takes in memory, as far as that can be known
            before it is there; asked when it is to be loaded.
        preload: whether it is loaded with the start of the application, not at the first request.
    """

    make: Callable[[], Engine]
    weight_bytes: Callable[[], int | None] = _unknown
    preload: bool = False


Given = Engine | ServedModel | Callable[[], Engine]


def by_name(
    given: Given | Mapping[str, Given], *, owned: bool = False
) -> dict[str, Engine | ServedModel]:
    """Models by their names; a folder's name is the last part of its path.

    Args:
        owned: whether engines are started and stopped with the application.

    Raises:
        InvalidRequest: there is nothing, or something without a name.
    """
    if not isinstance(given, Mapping):
        _check(given)
        if isinstance(given, type):
            said = f"must be an engine, not a class: write {given.__name__}(model)"
            raise InvalidRequest("engine", said)
        if isinstance(given, ServedModel) or callable(given):
            said = "what makes an engine needs a name: give a mapping, {name: ...}"
            raise InvalidRequest("engine", said)
        return by_name({name_of(given.model or _UNNAMED): given}, owned=owned)
    if not given:
        raise InvalidRequest("engine", "must not be an empty mapping")
    for name in given:
        if not isinstance(name, str) or not name:
            raise InvalidRequest("engine", "must be a mapping whose keys are names")
    for each in given.values():
        _check(each)
    made: dict[int, Engine | ServedModel] = {}  # one for each, whatever its names
    return {n: made.setdefault(id(each), _served(each, owned)) for n, each in given.items()}


def _check(given: object) -> None:
    """Refuse what is no engine, and makes none."""
    if isinstance(given, ServedModel) or callable(given) or hasattr(given, "stream_chat"):
        return
    example = shown(given) if isinstance(given, str) else "model"
    raise InvalidRequest(
        "engine",
        f"must be an engine, such as BatchedEngine({example}), or a mapping of names to engines "
        f"or to functions that make them, not {shown(given)}",
    )


def _served(given: Given, owned: bool) -> Engine | ServedModel:
    if isinstance(given, ServedModel):
        return given
    if callable(given):
        return ServedModel(given)
    return ServedModel(lambda: given, preload=True) if owned else given


def name_of(model: str) -> str:
    """A model's name for clients: its id, or the last part of the path of its folder."""
    path = PurePath(model)
    return (path.name or _UNNAMED) if path.is_absolute() or model.startswith(".") else model
