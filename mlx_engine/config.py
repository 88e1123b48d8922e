"""How an engine is set up: checked once, never changed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from mlx_engine.checks import choice, flag, integer, integer_or_none, number, number_or_none, shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.limits import RequestLimits
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
        _set(self, num_draft_tokens=_depth("num_draft_tokens", self.num_draft_tokens, 16))
        flag("fallback", self.fallback)


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
        _set(self, depth=_depth("depth", self.depth, 4))
        if self.head is not None:
            _check_model("head", self.head)
        flag("fallback", self.fallback)


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
        _set(self, keep=number("keep", self.keep, low=0, high=1, above=True))
        for name in ("threshold", "lookahead"):
            _set(self, **{name: integer(name, getattr(self, name), low=0)})
        for name in ("report_ranges", "fallback"):
            flag(name, getattr(self, name))


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
    limits: RequestLimits


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
                f"must be a folder, a Hugging Face id or {DEMO_MODEL!r}, not {shown(self.model)}",
            )
        for name in ("revision", "adapter_path"):
            if (text := getattr(self, name)) is not None and not isinstance(text, str):
                raise InvalidRequest(name, f"must be a string or None, not {shown(text)}")
        flag("trust_remote_code", self.trust_remote_code)
        for name, low in (("context_length", 2), ("max_kv_size", 8), ("prompt_cache_bytes", 0)):
            _set(self, **{name: integer_or_none(name, getattr(self, name), low=low)})
        for name, low in (("quantized_kv_start", 0), ("prefill_step_size", 1)):
            _set(self, **{name: integer(name, getattr(self, name), low=low)})
        _set(self, kv_bits=choice("kv_bits", self.kv_bits, (None, 2, 3, 4, 5, 6, 8)))
        _set(self, kv_group_size=choice("kv_group_size", self.kv_group_size, (32, 64, 128)))
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
            raise InvalidRequest(
                "prefill", f"must be SpecPrefill(...) or None, not {shown(prefill)}"
            )
        if decode == "auto":
            decode = MTP(fallback=True)
        if decode is not None and not isinstance(decode, DraftModel | MTP):
            raise InvalidRequest(
                "decode", f"must be DraftModel(...), MTP(), 'auto' or None, not {shown(decode)}"
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
                    "prefill", f"must be SpecPrefill(...) or None, not {shown(prefill)}"
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
                "decode", f"a request may switch it off with None, not change it: {shown(decode)}"
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
        _set(
            self,
            queue_limit=integer_or_none("queue_limit", self.queue_limit, low=0),
            max_wait=number_or_none("max_wait", self.max_wait, low=0, endless=True, what="seconds"),
        )


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
        most, pause, limit = self.max_batch_size, self.max_decode_pause_ms, "max_decode_pause_ms"
        _set(
            self,
            max_batch_size=integer("max_batch_size", most, low=1),
            max_decode_pause_ms=number_or_none(
                limit, pause, low=0, endless=True, what="milliseconds"
            ),
            kv_cache_memory_bytes=integer_or_none(
                "kv_cache_memory_bytes", self.kv_cache_memory_bytes, low=1
            ),
        )


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
        raise InvalidRequest(name, f"must be a path or a Hugging Face id, not {shown(value)}")


def _depth(name: str, value: object, most: int) -> int | Literal["auto"]:
    if isinstance(value, str) and value == "auto":
        return "auto"
    return integer(name, value, low=1, high=most, also="'auto'")


def _set(config: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(config, name, value)
