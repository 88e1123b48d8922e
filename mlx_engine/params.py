"""The options of one request: ``SamplingParams`` and the keywords that stand for it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from mlx_engine.checks import flag, integer, number, shown
from mlx_engine.errors import InvalidRequest

if TYPE_CHECKING:
    import mlx.core as mx

    LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
else:
    LogitsProcessor = Callable[..., object]  # this room does not load MLX

MAX_TOP_LOGPROBS = 100
_DIGITS = re.compile(r"[0-9]{1,20}")  # of a token id
_NAME = re.compile(r"[\w.]+:[\w.]+")  # of a function, with its module
_LONGEST = 64  # characters of an unknown option to look at
_SEED_LIMIT = 2**64
_COLDEST = 1e-6  # below it logits overflow when they are divided by the temperature
_LEAST_PENALTY, _PENALTY_LIMIT = 1e-3, 1e3  # beyond, logits in half precision overflow
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

    Raises:
        InvalidRequest: a value is of the wrong type or out of range.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor | str] = ()

    def __post_init__(self) -> None:
        for name, default in _DEFAULTS.items():
            if getattr(self, name) is None:
                self._set(name, default)
        if self.max_tokens is not None:
            self._set("max_tokens", integer("max_tokens", self.max_tokens, low=0))
        self._set("temperature", number("temperature", self.temperature, low=0.0))
        if 0 < self.temperature < _COLDEST:
            raise InvalidRequest(
                "temperature",
                f"must be 0 (greedy), or {_COLDEST:g} or more: not {self.temperature}",
            )
        self._set("top_p", number("top_p", self.top_p, low=0.0, high=1.0))
        self._set("top_k", integer("top_k", self.top_k, low=0))
        self._set("min_p", number("min_p", self.min_p, low=0.0, high=1.0))
        for name, high in (("xtc_probability", 1.0), ("xtc_threshold", 0.5)):
            self._set(name, number(name, getattr(self, name), low=0.0, high=high))
        if self.repetition_penalty is not None:
            penalty = number(
                "repetition_penalty",
                self.repetition_penalty,
                low=_LEAST_PENALTY,
                high=_PENALTY_LIMIT,
            )
            self._set("repetition_penalty", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            if (value := getattr(self, name)) is not None:
                self._set(name, number(name, value))
        self._set("logit_bias", _logit_bias(self.logit_bias))
        if self.seed is not None:
            self._set("seed", integer("seed", self.seed, low=0, high=_SEED_LIMIT - 1))
        self._set("stop", _stop_strings(self.stop))
        self._set(
            "stop_token_ids",
            tuple(
                integer("stop_token_ids", token, low=0)
                for token in _items("stop_token_ids", self.stop_token_ids, "token ids")
            ),
        )
        flag("ignore_eos", self.ignore_eos)
        if self.logprobs is not None:
            self._set("logprobs", integer("logprobs", self.logprobs, low=0, high=MAX_TOP_LOGPROBS))
        processors = _items("logits_processors", self.logits_processors, "functions")
        for processor in processors:
            named = isinstance(processor, str) and _NAME.fullmatch(processor)
            if not (callable(processor) or named):
                raise InvalidRequest(
                    "logits_processors",
                    "each must be callable as processor(tokens, logits), or be named "
                    f"'package.module:function', not {shown(processor)}",
                )
        self._set("logits_processors", processors)

    @property
    def greedy(self) -> bool:
        """Whether each token is the most probable one."""
        return self.temperature == 0 or self.top_p == 0

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

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
                close = difflib.get_close_matches(name[:_LONGEST], known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise InvalidRequest(name[:_LONGEST], f"there is no such option; {hint}")
        changes: dict[str, Any] = dict(options)
        return replace(params, **changes) if changes else params


def _items(name: str, value: object, what: str) -> tuple[object, ...]:
    """``value`` as a tuple; strings and single values are refused."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise InvalidRequest(name, f"must be a list of {what}, not {shown(value)}")
    return tuple(value)


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _items("stop", stop, "strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidRequest(
                "stop",
                f"must be a non-empty string or a list of them, not {shown(string)}; "
                "leave it out to stop at the end of the answer only",
            )
    return tuple(str(string) for string in strings)  # NumPy's strings have a type of their own


def _logit_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise InvalidRequest("logit_bias", f"must map token ids to numbers, not be {shown(bias)}")
    found: dict[int, float] = {}
    for key, value in bias.items():
        digits = isinstance(key, str) and _DIGITS.fullmatch(key)
        token = integer("logit_bias", int(key) if digits else key, low=0)
        if token in found:
            raise InvalidRequest("logit_bias", f"has token id {token} twice")
        found[token] = number("logit_bias", value, low=-_BIAS_LIMIT, high=_BIAS_LIMIT)
    return found


# What None stands for, where it is not a value of its own.
_DEFAULTS: dict[str, object] = {
    field.name: {} if field.name == "logit_bias" else field.default
    for field in fields(SamplingParams)
    if field.default is not None and field.name != "max_tokens"
}
