"""How an engine is set up: checked once, never changed.

An option is a field here: its name, type, default and range, and a line for the command.
Whatever makes an engine, in this process or for another one, makes an ``EngineConfig`` of what
it is given. ``EngineOptions`` and ``BatchedOptions`` have the same names for type checkers, and
the constructors of ``SimpleEngine`` and ``BatchedEngine`` explain them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Integral
from typing import Annotated, Any, Literal, TypedDict, get_args

from mlx_engine.checks import (
    check_options,
    choice,
    flag,
    integer,
    integer_or_auto,
    integer_or_none,
    number,
    number_or_none,
    option,
    path_or_none,
    path_text,
    shown,
    size_of,
    text_or_none,
    unknown_option,
)
from mlx_engine.errors import InvalidRequest
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits, checked_limits
from mlx_engine.strategies import Decode, SpecPrefill, Strategies

DEMO_MODEL = "demo"
EngineKind = Literal["simple", "batched"]


class EngineOptions(TypedDict, total=False):
    """Keyword arguments of every engine that has a model; see ``SimpleEngine``."""

    revision: str | None
    adapter_path: str | os.PathLike[str] | None
    trust_remote_code: bool
    tool_format: str | Any | None
    reasoning_format: str | Any | None
    context_length: int | Literal["auto"] | None
    max_kv_size: int | None
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    prefill_step_size: int
    prompt_cache_bytes: int | None
    memory: int | float | str
    prefill: SpecPrefill | None
    decode: Decode
    queue_limit: int | None
    max_wait: float | None
    limits: RequestLimits


class BatchedOptions(EngineOptions, total=False):
    """Keyword arguments of a batched engine; see ``BatchedEngine``."""

    max_batch_size: int
    max_decode_pause_ms: float | None
    kv_cache_memory_bytes: int | None


def _model(name: str, value: object) -> str:
    text = path_text(value)
    if not isinstance(text, str) or not text.strip():
        raise InvalidRequest(
            name, f"must be a folder, a Hugging Face id or {DEMO_MODEL!r}, not {shown(value)}"
        )
    return text


def _format(name: str, value: object) -> object:
    own = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if value is not None and not own and not (isinstance(value, str) and value.strip()):
        raise InvalidRequest(
            name, f"must be the name of a format, 'none', or one of your own, not {shown(value)}"
        )
    return value


def _memory(name: str, value: object) -> int | float | str:
    if isinstance(value, str):
        if value == "auto":
            return "auto"
        value = value if (size := size_of(value)) is None else size
    if isinstance(value, Integral) and not isinstance(value, bool):
        return integer(name, value, low=_LEAST_MEMORY, what="bytes", also=_PART_OR_AUTO)
    also = f"bytes (an integer, {_LEAST_MEMORY} or more, or a text such as '8GB'), or 'auto'"
    return number(name, value, low=0, high=1, above=True, what=_PART, also=also)


_LEAST_MEMORY = 2**20
_PART = "a part of the machine's memory (a float)"
_PART_OR_AUTO = f"{_PART}, above 0, up to 1.0, or 'auto'"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model to load, and the KV cache that it gets; the options are ``SimpleEngine``'s.

    Raises:
        InvalidRequest: an option is out of its range or contradicts another one.
    """

    model: Annotated[str, option(_model)]
    revision: Annotated[
        str | None, option(text_or_none, "branch, tag or commit of the repository")
    ] = None
    adapter_path: Annotated[
        str | None, option(path_or_none, "folder of LoRA adapters to apply")
    ] = None
    trust_remote_code: Annotated[bool, option(flag, "run Python code of the models")] = False
    tool_format: Annotated[
        str | Any | None, option(_format, "how it writes calls of tools, by name, or 'none'")
    ] = None
    reasoning_format: Annotated[
        str | Any | None, option(_format, "how it marks its reasoning, by name, or 'none'")
    ] = None
    context_length: Annotated[
        int | Literal["auto"] | None,
        option(
            integer_or_auto,
            "tokens of prompt and answer together; 'auto': as many as fit into memory",
            low=2,
        ),
    ] = None
    max_kv_size: Annotated[
        int | None, option(integer_or_none, "tokens that the KV cache keeps", low=8)
    ] = None
    kv_bits: Annotated[
        int | None,
        option(
            choice, "quantise the KV cache: 2, 3, 4, 5, 6 or 8", choices=(None, 2, 3, 4, 5, 6, 8)
        ),
    ] = None
    kv_group_size: Annotated[
        int, option(choice, "values that share a scale in it", choices=(32, 64, 128))
    ] = 64
    quantized_kv_start: Annotated[
        int, option(integer, "tokens from which on it is quantised", low=0)
    ] = 0
    prefill_step_size: Annotated[int, option(integer, "tokens per prefill chunk", low=1)] = 512
    prompt_cache_bytes: Annotated[
        int | None,
        option(
            integer_or_none,
            "of earlier prompts to keep; by default a quarter of the memory that is left",
            low=0,
        ),
    ] = None
    memory: Annotated[
        int | float | str,
        option(_memory, "it may have in all: bytes, a part such as 0.5, or 'auto'"),
    ] = "auto"

    def __post_init__(self) -> None:
        check_options(self)
        if self.kv_bits is None:
            for name, default in (("kv_group_size", 64), ("quantized_kv_start", 0)):
                if getattr(self, name) != default:
                    raise InvalidRequest(name, "has no effect without kv_bits; give that as well")
        if self.max_kv_size is not None and self.kv_bits is not None:
            raise InvalidRequest(
                "kv_bits", "a bounded KV cache cannot be quantised; drop kv_bits or max_kv_size"
            )

    def for_draft(self, model: str) -> ModelConfig:
        """The config of another model that helps this one."""
        return ModelConfig(
            model=model,
            trust_remote_code=self.trust_remote_code,
            prefill_step_size=self.prefill_step_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """How many requests may wait, and how long; the options are ``SimpleEngine``'s.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    queue_limit: Annotated[
        int | None, option(integer_or_none, "requests that may wait; others are refused", low=0)
    ] = None
    max_wait: Annotated[
        float | None,
        option(
            number_or_none,
            "seconds for a request to wait at most",
            low=0,
            endless=True,
            what="seconds",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How the MLX thread and memory are shared; the options are ``BatchedEngine``'s.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    max_batch_size: Annotated[int, option(integer, "requests in work", low=1)] = 32
    max_decode_pause_ms: Annotated[
        float | None,
        option(
            number_or_none,
            "of prefill between two decode steps",
            low=0,
            endless=True,
            what="milliseconds",
        ),
    ] = 200.0
    kv_cache_memory_bytes: Annotated[
        int | None,
        option(
            integer_or_none,
            "of all requests in work and earlier prompts; by default 90 % of what is left",
            low=1,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """An engine to be made, here or elsewhere.

    Attributes:
        batch: of a batched engine; that of another one is not looked at.

    Raises:
        InvalidRequest: the engine cannot be of this kind.
    """

    kind: EngineKind
    model: ModelConfig
    strategies: Strategies
    queue: QueueConfig
    batch: BatchConfig
    limits: RequestLimits

    def __post_init__(self) -> None:
        for name in ("kv_bits", "max_kv_size") if self.kind == "batched" else ():
            if getattr(self.model, name) is not None:
                raise InvalidRequest(
                    name,
                    "mlx-lm cannot batch KV caches that are bounded or quantised: leave it out, "
                    "and bound memory with kv_cache_memory_bytes; or use SimpleEngine",
                )
        self._check_shares()

    def _check_shares(self) -> None:
        """See that no share of the memory is more than what it is a share of."""
        memory, stored = self.model.memory, self.model.prompt_cache_bytes
        caches = self.batch.kv_cache_memory_bytes if self.kind == "batched" else None
        whole: list[tuple[str, int]] = []
        if isinstance(memory, int):
            whole.append(("memory", memory))
        for name, share in (("kv_cache_memory_bytes", caches), ("prompt_cache_bytes", stored)):
            if share is None:
                continue
            for other, most in whole:
                if share > most:
                    raise InvalidRequest(
                        name,
                        f"is {share}, and a share of {other}, which is {most}: lower it, or raise "
                        f"{other}",
                    )
            whole.append((name, share))

    @classmethod
    def of(
        cls, kind: EngineKind, model: str | os.PathLike[str], options: Mapping[str, object]
    ) -> EngineConfig:
        """Check what a caller has given.

        Args:
            options: ``EngineOptions`` or ``BatchedOptions``.

        Raises:
            InvalidRequest: an option is unknown, of the wrong type, out of its range,
                contradicts another one, or is not for this kind.
        """
        choice("engine", kind, get_args(EngineKind))
        others = _OF_A_BATCH if kind == "simple" else ()
        for name in options:
            if name in others:
                raise InvalidRequest(
                    name,
                    "is for batched engines only: a BatchedEngine, or one elsewhere that is made "
                    "with engine='batched'",
                )
            if name not in DEFAULTS:
                known = [one for one in (*DEFAULTS, "on_progress") if one not in others]
                raise unknown_option(name, known, f" of a {kind} engine")
        given: dict[str, Any] = {**DEFAULTS, **options, "model": model}
        return cls(
            kind=kind,
            model=ModelConfig(**_those_of(ModelConfig, given)),
            strategies=Strategies.of(given["prefill"], given["decode"]),
            queue=QueueConfig(**_those_of(QueueConfig, given)),
            batch=BatchConfig(**_those_of(BatchConfig, given)),
            limits=checked_limits(given["limits"]),
        )

    def options(self) -> dict[str, Any]:
        """Keyword arguments that make the same engine of its model: those not at their defaults."""
        parts = (self, self.model, self.strategies, self.queue, self.batch)
        values = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
        return {name: values[name] for name, own in DEFAULTS.items() if values[name] != own}


def _those_of(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: options[field.name] for field in fields(kind)}


_OF_A_BATCH = {field.name for field in fields(BatchConfig)}
DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for kind in (ModelConfig, Strategies, QueueConfig, BatchConfig)
    for field in fields(kind)
    if field.default is not MISSING
} | {"limits": DEFAULT_LIMITS}
