"""Limits of a request's size, looked at before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from mlx_engine.checks import integer_or_none, shown
from mlx_engine.constraints import Choice, Constraint, characters_of
from mlx_engine.errors import InvalidRequest
from mlx_engine.params import SamplingParams
from mlx_engine.plain import short_repr

_DIGITS = 4_300  # of an integer among values; Python reads and writes no more
_BITS = math.ceil(_DIGITS * math.log2(10))
_NUMBERS = (int, float, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Limits of one request's size; what is larger is refused with ``InvalidRequest``.

    An engine looks at a request when it is made, by counting: nothing is built, copied or
    rendered from one that is too large, and counting ends where a limit is passed. ``None``
    for a limit switches it off. The defaults are far above what coding agents send (hundreds
    of tools, thousands of messages, a million tokens), and keep the work for any request, in
    the event loop that makes it and before its first step, to some tenths of a second.

    ======================  ========== =====================================================
    limit                   default    counts
    ======================  ========== =====================================================
    ``stop``                64         stop strings
    ``stop_characters``     8,192      characters of all stop strings together
    ``stop_token_ids``      1,024      token ids that end the answer
    ``logit_bias``          16,384     token ids with a bias
    ``logits_processors``   64         functions or names of functions
    ``constraint_characters`` 262,144  characters of a constraint: of a schema as JSON, a regular
                                       expression, a grammar, or all choices together
    ``choices``             1,024      texts of a ``Choice``
    ``prompt_tokens``       2,097,152  token ids of a prompt
    ``text_characters``     16,777,216 characters of a prompt, or of all messages together,
                                       past tool calls and names included
    ``messages``            10,000     messages of a chat
    ``tool_calls``          1,024      past tool calls of one message
    ``tools``               1,024      tools of a chat
    ``tool_characters``     4,194,304  characters of all tools together
    ``template_kwargs``     64         variables for the chat template
    ``template_characters`` 1,048,576  characters of all of them together
    ``name_characters``     256        characters of a role, of the name of a tool, of one of
                                       these variables, or of a logits processor
    ``values``              262,144    strings, numbers, lists and mappings, at any depth, in
                                       the messages, in the tools, and in these variables
    ``nesting``             100        lists and mappings within each other in these
    ======================  ========== =====================================================

    Raises:
        InvalidRequest: a limit is not an integer, 0 or more, or ``None``.
    """

    stop: int | None = 64
    stop_characters: int | None = 8_192
    stop_token_ids: int | None = 1_024
    logit_bias: int | None = 16_384
    logits_processors: int | None = 64
    constraint_characters: int | None = 2**18
    choices: int | None = 1_024
    prompt_tokens: int | None = 2**21
    text_characters: int | None = 2**24
    messages: int | None = 10_000
    tool_calls: int | None = 1_024
    tools: int | None = 1_024
    tool_characters: int | None = 4 * 2**20
    template_kwargs: int | None = 64
    template_characters: int | None = 2**20
    name_characters: int | None = 256
    values: int | None = 2**18
    nesting: int | None = 100

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = integer_or_none(field.name, getattr(self, field.name), low=0)
            object.__setattr__(self, field.name, limit)

    def params(self, params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
        """``SamplingParams.of``, of what is not too large.

        Raises:
            InvalidRequest: something is, or is not acceptable for another reason.
        """
        if options:
            self._check_options(options)
        made = SamplingParams.of(params, **options)
        self._check_options({name: getattr(made, name) for name in (*_COUNTED, "constraint")})
        return made

    def check_prompt(self, prompt: object) -> None:
        """Look at a prompt: text, or token ids.

        Raises:
            InvalidRequest: it is too long.
        """
        if isinstance(prompt, str):
            self.check("prompt", "text_characters", len(prompt), "characters")
        elif (count := _count(prompt)) is not None:
            self.check("prompt", "prompt_tokens", count, "token ids")

    def check(
        self, option: str, limit: str, count: int, what: str, *, of: str = "", least: bool = False
    ) -> None:
        """Look at a number of things.

        Args:
            option: what the error calls it.
            limit: the name of the limit.
            what: what was counted.
            of: where, in words.
            least: whether there may be more of them.

        Raises:
            InvalidRequest: there are too many.
        """
        most = getattr(self, limit)
        if most is not None and count > most:
            raise InvalidRequest(
                option,
                f"{of}{' ' if of else ''}has {'at least ' if least else ''}{count} {what}; "
                f"{most} are the most (RequestLimits.{limit})",
            )

    def check_name(self, option: str, name: str, *, of: str = "") -> None:
        """Look at a name.

        Raises:
            InvalidRequest: it is too long.
        """
        self.check(option, "name_characters", len(name), f"characters in {shown(name)}", of=of)

    def check_values(self, option: str, limit: str, value: object, *, of: str = "") -> None:
        """Look at what JSON has a form for, at any depth, and at its text.

        Args:
            limit: the name of that on its characters.

        Raises:
            InvalidRequest: it is too large, has an integer that Python would not write out,
                or text that no UTF-8 has.
        """
        most, longest = _or_endless(self.values), _or_endless(getattr(self, limit))
        deepest = _or_endless(self.nesting) + 1
        values = characters = 0
        opened: list[Iterator[Any]] = [iter((value,))]
        while opened:
            inner = None
            for item in opened[-1]:
                values += 1
                if isinstance(item, str):
                    characters += len(item)
                    if characters <= longest and not item.isascii():
                        _check_unicode(option, item, of)
                elif isinstance(item, _NUMBERS):
                    _check_digits(option, item, of)
                else:
                    inner = _items_of(item)
                if inner is not None or values > most or characters > longest:
                    break
            else:
                opened.pop()
                continue
            if inner is not None:
                opened.append(inner)
            if values > most or characters > longest or len(opened) > deepest:
                self.check(option, "values", values, "values", of=of, least=True)
                self.check(option, limit, characters, "characters", of=of, least=True)
                self.check(option, "nesting", len(opened) - 1, "levels", of=of, least=True)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name, what in _COUNTED.items():
            value = options.get(name)
            if isinstance(value, str):
                value = (value,)
            if (count := _count(value)) is not None:
                self.check(name, name, count, what)
        stop, processors = options.get("stop"), options.get("logits_processors")
        strings = [stop] if isinstance(stop, str) else _strings(stop)
        self.check("stop", "stop_characters", sum(map(len, strings)), "characters in all")
        for string in strings:
            _check_unicode("stop", string, "")
        for name in _strings(processors):
            self.check_name("logits_processors", name)
        constraint = options.get("constraint")
        if isinstance(constraint, Constraint):
            size = characters_of(constraint)
            self.check("constraint", "constraint_characters", size, "characters")
        if isinstance(constraint, Choice):
            self.check("constraint", "choices", len(constraint.options), "choices")


DEFAULT_LIMITS = RequestLimits()

_COUNTED = {
    "stop": "strings",
    "stop_token_ids": "token ids",
    "logit_bias": "entries",
    "logits_processors": "functions",
}


def checked_limits(limits: RequestLimits) -> RequestLimits:
    """``limits``, if they are that; raises ``InvalidRequest`` if not."""
    if not isinstance(limits, RequestLimits):
        raise InvalidRequest("limits", f"must be RequestLimits(...), not {shown(limits)}")
    return limits


def _or_endless(limit: int | None) -> float:
    return math.inf if limit is None else limit


def _items_of(value: object) -> Iterator[Any] | None:
    """Items of a list or mapping; ``None`` if it is neither."""
    if isinstance(value, list | tuple):
        return iter(value)
    return chain.from_iterable(value.items()) if isinstance(value, Mapping) else None


def _check_digits(option: str, value: object, of: str) -> None:
    if isinstance(value, int) and value.bit_length() > _BITS:
        said = f"has {shown(value)}; {_DIGITS} are the most"
        raise InvalidRequest(option, f"{of} {said}".lstrip())


def _check_unicode(option: str, text: str, of: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = f"{of} is not valid Unicode text ({error})".lstrip()
        raise InvalidRequest(option, said) from error


def _strings(value: object) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return []
    return [one for one in value if isinstance(one, str)]


def _count(value: object) -> int | None:
    try:
        return len(value)  # type: ignore[arg-type]
    except TypeError:
        return None
