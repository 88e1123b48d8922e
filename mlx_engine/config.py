"""How an engine is set up: checked once, never changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import ProgressCallback

DEMO_MODEL = "demo"


class EngineOptions(TypedDict, total=False):
    """What every in-process engine takes beside the model; see ``SimpleEngine``."""

    revision: str | None
    adapter_path: str | os.PathLike[str] | None
    trust_remote_code: bool
    context_length: int | None
    max_kv_size: int | None
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    prefill_step_size: int
    prompt_cache_bytes: int | None
    queue_limit: int | None
    max_wait: float | None
    on_progress: ProgressCallback | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model to load, and the KV cache that it gets.

    Attributes:
        model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``.
        revision: branch, tag or commit of the repository.
        adapter_path: folder of LoRA adapters to apply.
        trust_remote_code: run Python code that the model brings along.
        context_length: tokens that prompt and answer may have together; ``None`` takes it
            from the model's configuration.
        max_kv_size: tokens that the KV cache keeps at most (the first 4 and the latest
            ones), and one prefill chunk more while a prompt goes in; ``None`` is unbounded.
            What a longer prompt gives then depends on ``prefill_step_size``.
        kv_bits: bits of the quantised KV cache (2, 3, 4, 5, 6 or 8); ``None`` keeps full
            precision.
        kv_group_size: values that share a scale in the quantised cache (32, 64 or 128);
            only with ``kv_bits``.
        quantized_kv_start: tokens in the cache from which on it is quantised; only with
            ``kv_bits``.
        prefill_step_size: tokens per prefill chunk; a cancelled request leaves MLX after
            the chunk it is in.
        prompt_cache_bytes: bytes that prompts and answers of earlier requests may take, so
            that they need no second prefill; 0 switches that off, ``None`` is a quarter of
            the device's memory that the model leaves, or 1 GiB where that is not known.

    Raises:
        InvalidRequest: an option is out of its range or contradicts another one.
    """

    model: str
    revision: str | None = None
    adapter_path: str | None = None
    trust_remote_code: bool = False
    context_length: int | None = None
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    prefill_step_size: int = 512
    prompt_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise InvalidRequest(
                "model",
                f"must be a folder, a Hugging Face id or {DEMO_MODEL!r}, not {self.model!r}",
            )
        for name in ("revision", "adapter_path"):
            if (text := getattr(self, name)) is not None and not isinstance(text, str):
                raise InvalidRequest(name, f"must be a string or None, not {text!r}")
        _check_choice("trust_remote_code", self.trust_remote_code, (True, False), flag=True)
        _check_int("context_length", self.context_length, low=2, optional=True)
        _check_int("max_kv_size", self.max_kv_size, low=8, optional=True)
        _check_choice("kv_bits", self.kv_bits, (None, 2, 3, 4, 5, 6, 8))
        _check_choice("kv_group_size", self.kv_group_size, (32, 64, 128))
        _check_int("quantized_kv_start", self.quantized_kv_start, low=0)
        _check_int("prefill_step_size", self.prefill_step_size, low=1)
        _check_int("prompt_cache_bytes", self.prompt_cache_bytes, low=0, optional=True)
        if self.kv_bits is None:
            for name, default in (("kv_group_size", 64), ("quantized_kv_start", 0)):
                if getattr(self, name) != default:
                    raise InvalidRequest(name, "has no effect without kv_bits; give that as well")
        if self.max_kv_size is not None and self.kv_bits is not None:
            raise InvalidRequest(
                "kv_bits", "a bounded KV cache cannot be quantised; drop kv_bits or max_kv_size"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """How many requests may wait, and how long.

    Attributes:
        queue_limit: requests that may wait for their turn; ``None`` is no limit.
        max_wait: seconds that a request may wait for its turn; ``None`` is no limit.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    queue_limit: int | None = None
    max_wait: float | None = None

    def __post_init__(self) -> None:
        _check_int("queue_limit", self.queue_limit, low=0, optional=True)
        _check_time("max_wait", self.max_wait, "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How a ``BatchedEngine`` shares the MLX thread and memory among its requests.

    Attributes:
        max_batch_size: requests in work at once; others wait.
        max_decode_pause_ms: milliseconds of prefill between two decode steps, roughly: the
            chunk is made as small as that takes, by the speed measured so far. ``None``
            lets each chunk have ``prefill_step_size`` tokens.
        kv_cache_memory_bytes: bytes that the KV caches of the requests in work and the
            prompt cache may take together; ``None`` is 90 % of the device's memory that the
            model leaves, or no limit where that is not known.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    max_batch_size: int = 32
    max_decode_pause_ms: float | None = 200.0
    kv_cache_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_batch_size", self.max_batch_size, low=1)
        _check_time("max_decode_pause_ms", self.max_decode_pause_ms, "milliseconds")
        _check_int("kv_cache_memory_bytes", self.kv_cache_memory_bytes, low=1, optional=True)


def path_text(model: str | os.PathLike[str]) -> str:
    """``model`` as a string; other types are left for ``ModelConfig`` to refuse."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def _check_int(name: str, value: object, *, low: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        also = " or None" if optional else ""
        raise InvalidRequest(name, f"must be an integer, {low} or more{also}, not {value!r}")


def _check_time(name: str, value: object, unit: str) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0
    ):
        raise InvalidRequest(name, f"must be {unit}, 0 or more, or None, not {value!r}")


def _check_choice(
    name: str, value: object, choices: tuple[object, ...], *, flag: bool = False
) -> None:
    if value not in choices or isinstance(value, bool) is not flag:
        raise InvalidRequest(name, f"must be one of {choices}, not {value!r}")
