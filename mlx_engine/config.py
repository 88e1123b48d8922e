"""How an engine is set up: checked once, never changed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal, TypedDict

from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import ProgressCallback

DEMO_MODEL = "demo"


@dataclass(frozen=True, slots=True)
class DraftModel:
    """Decode with a small model that proposes tokens, which the large one verifies together.

    Every token is the large model's own choice, so that the answer is the one it gives alone
    (speculative decoding: https://arxiv.org/abs/2211.17192; here a proposal is kept only
    where it is what was sampled).

    Attributes:
        model: folder or Hugging Face id of a model with the same tokenizer.
        num_draft_tokens: proposals for each verification, 1 to 16; ``"auto"`` chooses up to 4
            by measuring while decoding, 0 included, where it does not pay.
        fallback: where this cannot be done, decode plainly and say so in ``result.notes``,
            rather than refuse to start.

    Raises:
        InvalidRequest: a value is of the wrong type or out of its range.
    """

    model: str | os.PathLike[str]
    num_draft_tokens: int | Literal["auto"] = "auto"
    fallback: bool = False

    def __post_init__(self) -> None:
        _check_model("model", self.model)
        _check_depth("num_draft_tokens", self.num_draft_tokens, 16)
        _check_choice("fallback", self.fallback, (True, False), flag=True)


@dataclass(frozen=True, slots=True)
class MTP:
    """Decode with the model's own multi-token-prediction head, as ``DraftModel`` does with a
    model (https://arxiv.org/abs/2412.19437, section 2.2).

    Attributes:
        depth: tokens proposed for each verification, 1 to 4; ``"auto"`` chooses by measuring
            while decoding, 0 included, where it does not pay.
        head: file that ``mlx-engine extract-mtp`` wrote; ``None`` looks for ``mtp.safetensors``
            in the model's folder, then for the head in the model's own files.
        fallback: where this cannot be done, decode plainly and say so in ``result.notes``,
            rather than refuse to start.

    Raises:
        InvalidRequest: a value is of the wrong type or out of its range.
    """

    depth: int | Literal["auto"] = "auto"
    head: str | os.PathLike[str] | None = None
    fallback: bool = False

    def __post_init__(self) -> None:
        _check_depth("depth", self.depth, 4)
        if self.head is not None:
            _check_model("head", self.head)
        _check_choice("fallback", self.fallback, (True, False), flag=True)


@dataclass(frozen=True, slots=True)
class SpecPrefill:
    """Prefill only the chunks of a long prompt that a small model finds important
    (https://arxiv.org/abs/2502.02789).

    The answer is the one that the model gives to the prompt with the other chunks masked, at
    the positions that the tokens have: not the same as with a full prefill.

    Attributes:
        draft: folder or Hugging Face id of a model with the same tokenizer; ``None`` is the
            model itself. In a request, ``None`` is the engine's.
        keep: share of the prompt's chunks of 32 tokens to prefill, in (0, 1]. The first and
            the last one, and a few others, always are.
        threshold: tokens of the prompt that are not in the prompt cache, from which on it
            is used; shorter ones are prefilled in full, as ``result.notes`` says then.
        lookahead: tokens that the small model continues the prompt with, to see which parts
            of it they attend to.
        report_ranges: tell in ``result.usage.kept_ranges`` what was kept.
        fallback: where this cannot be done, prefill in full and say so in ``result.notes``,
            rather than refuse to start.

    Raises:
        InvalidRequest: a value is of the wrong type or out of its range.
    """

    draft: str | os.PathLike[str] | None = None
    keep: float = 0.2
    threshold: int = 8192
    lookahead: int = 8
    report_ranges: bool = False
    fallback: bool = False

    def __post_init__(self) -> None:
        if self.draft is not None:
            _check_model("draft", self.draft)
        if (
            isinstance(self.keep, bool)
            or not isinstance(self.keep, Real)
            or not 0 < float(self.keep) <= 1
        ):
            raise InvalidRequest("keep", f"must be a number above 0, up to 1, not {self.keep!r}")
        _check_int("threshold", self.threshold, low=0)
        _check_int("lookahead", self.lookahead, low=0)
        for name in ("report_ranges", "fallback"):
            _check_choice(name, getattr(self, name), (True, False), flag=True)


Decode = DraftModel | MTP | Literal["auto"] | None
AsEngine = Literal["as engine"]  # what a request says that leaves a strategy as it is


class ModelOptions(TypedDict, total=False):
    """What every engine takes beside the model; see ``SimpleEngine``."""

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
    prefill: SpecPrefill | None
    decode: Decode
    queue_limit: int | None
    max_wait: float | None


class EngineOptions(ModelOptions, total=False):
    """What every in-process engine takes beside the model; see ``SimpleEngine``."""

    on_progress: ProgressCallback | None


class BatchedOptions(ModelOptions, total=False):
    """What a ``BatchedEngine`` takes beside that; see there."""

    max_batch_size: int
    max_decode_pause_ms: float | None
    kv_cache_memory_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model to load, and the KV cache that it gets.

    Attributes:
        model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``.
        revision: branch, tag or commit of the repository.
        adapter_path: folder of LoRA adapters to apply.
        trust_remote_code: run Python code that the model brings along, and so do draft
            models, of which the newest revision is taken.
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

    def for_draft(self, model: str) -> ModelConfig:
        """Of another model that helps this one."""
        return ModelConfig(
            model=model,
            trust_remote_code=self.trust_remote_code,
            prefill_step_size=self.prefill_step_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategies:
    """How the prompts of an engine are prefilled, and how it decodes; any with any.

    Attributes:
        prefill: ``None`` prefills all of a prompt.
        decode: ``None`` decodes one token after another.
    """

    prefill: SpecPrefill | None = None
    decode: DraftModel | MTP | None = None

    @classmethod
    def of(cls, prefill: SpecPrefill | None, decode: Decode) -> Strategies:
        """What an engine was asked for; ``"auto"`` is ``MTP`` where the model has a head.

        Raises:
            InvalidRequest: a value is something else.
        """
        if prefill is not None and not isinstance(prefill, SpecPrefill):
            raise InvalidRequest("prefill", f"must be SpecPrefill(...) or None, not {prefill!r}")
        if decode == "auto":
            decode = MTP(fallback=True)
        if decode is not None and not isinstance(decode, DraftModel | MTP):
            raise InvalidRequest(
                "decode", f"must be DraftModel(...), MTP(), 'auto' or None, not {decode!r}"
            )
        return cls(prefill=prefill, decode=decode)

    @property
    def drafts(self) -> tuple[str, ...]:
        """The other models that are needed."""
        found: list[str] = []
        if self.prefill is not None and self.prefill.draft is not None:
            found.append(path_text(self.prefill.draft))
        if isinstance(self.decode, DraftModel):
            found.append(path_text(self.decode.model))
        return tuple(dict.fromkeys(found))

    def of_request(
        self, prefill: SpecPrefill | AsEngine | None, decode: AsEngine | None
    ) -> Strategies:
        """What a request gets that asks for these.

        Raises:
            InvalidRequest: it asks for what this engine was not made for.
        """
        if prefill != "as engine" and prefill is not None:
            if not isinstance(prefill, SpecPrefill):
                raise InvalidRequest(
                    "prefill", f"must be SpecPrefill(...) or None, not {prefill!r}"
                )
            if self.prefill is None:
                raise InvalidRequest(
                    "prefill", "this engine was made without prefill=SpecPrefill(...)"
                )
            if prefill.draft is None:
                prefill = replace(prefill, draft=self.prefill.draft)
            elif self.prefill.draft is None or path_text(prefill.draft) != path_text(
                self.prefill.draft
            ):
                raise InvalidRequest(
                    "prefill", "the draft is the engine's; leave it out in a request"
                )
        if decode is not None and decode != "as engine":
            raise InvalidRequest(
                "decode", f"a request may switch it off with None, not change it: {decode!r}"
            )
        return Strategies(
            prefill=self.prefill if prefill == "as engine" else prefill,
            decode=self.decode if decode == "as engine" else None,
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


def check_batchable_options(config: ModelConfig) -> None:
    """Raise ``InvalidRequest`` for KV caches that mlx-lm cannot batch."""
    for option in ("kv_bits", "max_kv_size"):
        if getattr(config, option) is not None:
            raise InvalidRequest(
                option,
                "mlx-lm cannot batch KV caches that are bounded or quantised: leave it out, "
                "and bound memory with kv_cache_memory_bytes; or use SimpleEngine",
            )


def path_text(model: str | os.PathLike[str]) -> str:
    """``model`` as a string; other types are left for ``ModelConfig`` to refuse."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def _check_model(name: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise InvalidRequest(name, f"must be a path or a Hugging Face id, not {value!r}")


def _check_depth(name: str, value: object, most: int) -> None:
    if value == "auto":
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) <= most:
        raise InvalidRequest(name, f"must be from 1 to {most}, or 'auto', not {value!r}")


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
