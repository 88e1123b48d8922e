"""The options of one request: ``SamplingParams`` and the keywords that stand for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, Unpack

from mlx_engine.checks import (
    check_options,
    flag,
    integer,
    integer_or_none,
    number,
    number_or_none,
    option,
    shown,
    unknown_option,
)
from mlx_engine.constraints import Constraint, checked_constraint
from mlx_engine.errors import InvalidRequest

if TYPE_CHECKING:
    import mlx.core as mx

    LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
else:
    LogitsProcessor = Callable[..., object]  # this room does not load MLX

MAX_TOP_LOGPROBS = 100
_DIGITS = re.compile(r"[0-9]{1,20}")  # of a token id
_NAME = re.compile(r"[\w.]+:[\w.]+")  # of a function, with its module
_COLDEST = 1e-6  # below it logits overflow when they are divided by the temperature
_BIAS_LIMIT = 1e30  # logits are float32, or less


class SamplingOptions(TypedDict, total=False):
    """The fields of ``SamplingParams`` as keyword arguments."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    logits_processors: Sequence[LogitsProcessor | str] | None
    constraint: Constraint | None


def _temperature(name: str, value: object) -> float:
    given = number(name, value, low=0)
    if 0 < given < _COLDEST:
        raise InvalidRequest(name, f"must be 0 (greedy), or {_COLDEST:g} or more: not {given}")
    return given


def _items(name: str, value: object, what: str) -> tuple[object, ...]:
    """``value`` as a tuple; strings and single values are refused."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise InvalidRequest(name, f"must be a list of {what}, not {shown(value)}")
    return tuple(value)


def _stop_strings(name: str, stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _items(name, stop, "strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidRequest(
                name,
                f"must be a non-empty string or a list of them, not {shown(string)}; "
                "leave it out to stop at the end of the answer only",
            )
    return tuple(str(string) for string in strings)  # NumPy's strings have a type of their own


def _token_ids(name: str, tokens: object) -> tuple[int, ...]:
    return tuple(integer(name, token, low=0) for token in _items(name, tokens, "token ids"))


def _logit_bias(name: str, bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise InvalidRequest(name, f"must map token ids to numbers, not be {shown(bias)}")
    found: dict[int, float] = {}
    for key, value in bias.items():
        digits = isinstance(key, str) and _DIGITS.fullmatch(key)
        token = integer(name, int(key) if digits else key, low=0)
        if token in found:
            raise InvalidRequest(name, f"has token id {token} twice")
        found[token] = number(name, value, low=-_BIAS_LIMIT, high=_BIAS_LIMIT)
    return found


def _logits_processors(name: str, value: object) -> tuple[object, ...]:
    processors = _items(name, value, "functions")
    for processor in processors:
        named = isinstance(processor, str) and _NAME.fullmatch(processor)
        if not (callable(processor) or named):
            raise InvalidRequest(
                name,
                "each must be callable as processor(tokens, logits), or be named "
                f"'package.module:function', not {shown(processor)}",
            )
    return processors


def _constraint(name: str, value: object) -> Constraint | None:
    return None if value is None else checked_constraint(name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of the next token, and when to stop. Defaults are those of mlx-lm.

    Values are checked when the object is made; sequences are copied into tuples. ``None`` for
    any field is its default, as clients of OpenAI's API send it, but for ``max_tokens``.

    Attributes:
        max_tokens: most tokens to generate; ``None`` for as many as the context holds. 0 only
            puts the prompt into the prompt cache: the answer is empty, and ends by ``length``.
        temperature: 0 is greedy; else at least 1e-6.
        top_p: nucleus sampling, in [0, 1]; 1 switches it off, 0 is greedy.
        top_k: sample from the k most probable tokens; 0 switches it off.
        min_p: drop tokens less probable than ``min_p`` times the best one, in [0, 1].
        xtc_probability: chance that the top choices are excluded (XTC), in [0, 1].
        xtc_threshold: probability from which a token counts as a top choice, in [0, 0.5].
        repetition_penalty: factor on logits of the last 20 tokens, 0.001 to 1000; ``None`` or 1
            is off (https://arxiv.org/abs/1909.05858).
        presence_penalty: subtracted once from the logit of each of the last 20 tokens.
        frequency_penalty: subtracted for each occurrence among the last 20 tokens.
        logit_bias: token id -> value added to its logit; ids may be strings of digits, as JSON
            has them.
        seed: makes sampling repeat, whatever else runs; in [0, 2**64).
        stop: strings that end the answer; not part of it, and matched on text, so that it
            does not matter how the model tokenizes them.
        stop_token_ids: token ids that end the answer.
        ignore_eos: go on after the model's end-of-sequence tokens, which are text then.
        logprobs: report the log-probability of each token and of the ``logprobs`` best
            ones at its place, 0 to 100; ``None`` for none.
        logits_processors: called as ``processor(tokens, logits)`` on the MLX thread with
            tokens of shape (n,), prompt included, dtype uint32, and logits of shape
            (1, vocabulary); returns the logits to use. Or the name of such a function,
            ``"package.module:function"``, which is imported where the model is; a class is
            instantiated for each request. The next step is begun before the answer is known
            to end: it may be called once more, with the last token.
        constraint: what the answer must be: ``JSONSchema``, ``Regex``, ``Grammar``, ``Choice`` or
            ``AnyJSON``. Tokens that would break it are never chosen, whatever the other options
            are; processors are called before it acts. The answer ends where it is complete: there
            alone it may, and where nothing may follow it must, ``ignore_eos`` or not.

    Raises:
        InvalidRequest: a value is of the wrong type or out of range.
    """

    max_tokens: Annotated[int | None, option(integer_or_none, "tokens to generate", low=0)] = 256
    temperature: Annotated[float, option(_temperature)] = 0.0
    top_p: Annotated[float, option(number, "nucleus sampling, 1 is off", low=0, high=1)] = 1.0
    top_k: Annotated[
        int, option(integer, "choose from the N most probable tokens, 0 is off", low=0)
    ] = 0
    min_p: Annotated[
        float, option(number, "drop tokens below N times the best one", low=0, high=1)
    ] = 0.0
    xtc_probability: Annotated[
        float, option(number, "chance to exclude top choices", low=0, high=1)
    ] = 0.0
    xtc_threshold: Annotated[
        float, option(number, "probability that makes a top choice", low=0, high=0.5)
    ] = 0.1
    repetition_penalty: Annotated[
        float | None,
        option(number_or_none, "factor on recent tokens, 1 is off", low=1e-3, high=1e3),
    ] = None  # beyond these, logits in half precision overflow
    presence_penalty: Annotated[
        float | None, option(number_or_none, "subtracted once from recent tokens")
    ] = None
    frequency_penalty: Annotated[
        float | None, option(number_or_none, "subtracted per recent occurrence")
    ] = None
    logit_bias: Annotated[Mapping[int, float], option(_logit_bias)] = field(
        default_factory=dict[int, float]
    )
    seed: Annotated[
        int | None, option(integer_or_none, "makes sampling repeat", low=0, high=2**64 - 1)
    ] = None
    stop: Annotated[str | Sequence[str], option(_stop_strings)] = ()
    stop_token_ids: Annotated[Sequence[int], option(_token_ids)] = ()
    ignore_eos: Annotated[bool, option(flag, "go on after the end of the answer")] = False
    logprobs: Annotated[int | None, option(integer_or_none, low=0, high=MAX_TOP_LOGPROBS)] = None
    logits_processors: Annotated[Sequence[LogitsProcessor | str], option(_logits_processors)] = ()
    constraint: Annotated[Constraint | None, option(_constraint)] = None

    def __post_init__(self) -> None:
        for name, default in _DEFAULTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_options(self)

    @property
    def greedy(self) -> bool:
        """Whether each token is the most probable one."""
        return self.temperature == 0 or self.top_p == 0

    @classmethod
    def of(
        cls, params: SamplingParams | None = None, /, **options: Unpack[SamplingOptions]
    ) -> SamplingParams:
        """``params`` (or the defaults) with ``options`` on top.

        Raises:
            InvalidRequest: ``params`` is something else, or an option is unknown; the
                message names the closest one that exists.
        """
        if params is None:
            params = cls()
        elif not isinstance(params, SamplingParams):
            raise InvalidRequest("params", f"must be a SamplingParams, not {type(params).__name__}")
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise unknown_option(name, known)
        changes: dict[str, Any] = dict(options)
        return replace(params, **changes) if changes else params


# What None stands for, where it is not a value of its own.
_DEFAULTS: dict[str, object] = {
    field.name: {} if field.name == "logit_bias" else field.default
    for field in fields(SamplingParams)
    if field.default is not None and field.name != "max_tokens"
}
