"""Answers of models that describe them themselves: ``response_template`` in tokenizer_config.json.

transformers has a parser for such descriptions. Here its events become pieces, and what it raises
becomes a call with an error, with its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from mlx_engine.chat.answer_format import AnswerFormat, ReasoningFormat, ToolFormat
from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.argument_types import argument_types, cast
from mlx_engine.chat.calls import NOT_AN_OBJECT
from mlx_engine.chat.json_text import normalized
from mlx_engine.chat.source import Malformed, Steps

_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = "tool_calls"
_LOOK_BACK = 64  # characters that a pattern of the description may look back at


def format_of(spec: Mapping[str, Any]) -> AnswerFormat | None:
    """The format that a description is; ``None`` if transformers does not take it."""
    try:
        return _format_of(json.dumps(spec))
    except Exception:  # noqa: BLE001 - whatever a checkpoint has there
        return None


@lru_cache(maxsize=16)
def _format_of(described: str) -> AnswerFormat:
    from transformers.utils.chat_parsing.response_templates import (  # noqa: PLC0415
        load_response_template,
    )

    spec = json.loads(described)
    load_response_template(spec)
    fields = spec["fields"]
    thinks = next((fields[name] for name in _REASONING if name in fields), None)
    reasoning = None
    if thinks is not None:
        reasoning = ReasoningFormat(_literal(thinks, "open"), _literal(thinks, "close"))
    calls = (ToolFormat(_literal(fields[_CALLS], "open")),) if _CALLS in fields else ()
    name: Literal["response_template"] = "response_template"
    return AnswerFormat(name, name, reasoning, calls, structure=name, described=described)


def _literal(field: Mapping[str, Any], name: str) -> str:
    found = field.get(name, "")
    return str(found[0] if isinstance(found, list) and found else found)


def read(parts: AnswerParts, form: AnswerFormat, prefix: str) -> Steps[None]:
    """Read a whole answer."""
    source = parts.source
    parser = _parser()(json.loads(form.described), prefix, parts.has_tools)
    _take(parts, parser.initial_events, of_prompt=True)
    while True:
        text = source.text[source.at :]
        source.at = len(source.text)
        _take(parts, parser.events(text, ended=source.ended))
        if source.ended:
            return
        yield


def _take(parts: AnswerParts, events: list[dict[str, Any]], *, of_prompt: bool = False) -> None:
    for event in events:
        kind, field = event["type"], event["field"]
        parts.in_reasoning = field in _REASONING and kind not in ("region_close", "region_error")
        if of_prompt:
            continue
        if field == _CALLS and kind == "region_error":
            _call(parts, {}, event["text"], event["error"])
        elif field == _CALLS and kind == "region_close":
            value = event["value"]
            for each in value if isinstance(value, list) else [value]:
                _call(parts, each, event["text"], None)
        elif kind == "region_chunk" and field != _CALLS:
            (parts.reasoning if field in _REASONING else parts.content)(event["text"])


def _call(parts: AnswerParts, value: Any, raw: str, error: str | None) -> None:
    """One call, whole."""
    calls = parts.calls
    function = value.get("function", value) if isinstance(value, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    calls.open(raw)
    if isinstance(name, str) and name:
        given = value.get("id")
        calls.begin(name, given if isinstance(given, str) else None)
    if error is None:
        try:
            calls.add(_arguments(function.get("arguments", {}), calls.schema))
            calls.complete()
        except (Malformed, ValueError, TypeError, RecursionError) as malformed:
            error = str(malformed)
    calls.settle(error)


def _arguments(given: Any, schema: Mapping[str, Any]) -> str:
    if isinstance(given, str):
        return normalized(given)
    if not isinstance(given, Mapping):
        raise Malformed(NOT_AN_OBJECT)
    cast_ones = {name: _cast(value, argument_types(name, schema)) for name, value in given.items()}
    return normalized(json.dumps(cast_ones, ensure_ascii=False, allow_nan=False))


def _cast(value: Any, types: frozenset[str]) -> Any:
    """A value as the schema has it; transformers keeps a text that it cannot cast."""
    if isinstance(value, str) and types and "string" not in types:
        return json.loads(cast(value, types))
    if types == {"string"} and not isinstance(value, (str, list, Mapping)):
        return json.dumps(value)
    return value


@lru_cache(maxsize=1)
def _parser() -> Any:
    """transformers' parser, in which an error ends a region and not the answer."""
    from transformers.utils.chat_parsing import ResponseParser  # noqa: PLC0415

    class Parser(ResponseParser):
        """Its events, with what a region consists of, and none lost to an exception."""

        def __init__(self, spec: dict[str, Any], prefix: str, has_tools: bool) -> None:
            if not has_tools:
                spec["fields"].pop(_CALLS, None)
            self._texts: list[str] = []
            super().__init__(spec, prefix=prefix)

        def events(self, text: str, *, ended: bool) -> list[dict[str, Any]]:
            """The events of this text."""
            found: list[dict[str, Any]] = []
            self._buffer += text
            self._process(found, eos=ended)
            start = max(0, self._pos - _LOOK_BACK)
            self._buffer, self._pos = self._buffer[start:], self._pos - start
            return found

        def _accumulate(self, events: list[dict[str, Any]], text: str) -> None:
            super()._accumulate(events, text)
            if self._current == _CALLS:
                self._texts.append(text)
            self._body = ""  # else it would be copied for each token

        def _close_current(self, events: list[dict[str, Any]]) -> None:
            text, field, opened = "".join(self._texts), self._current, self._opened
            self._texts.clear()
            self._body = text
            try:
                super()._close_current(events)
            except Exception as error:  # noqa: BLE001 - the border: parsers raise anything
                problem = f"{type(error).__name__}: {error}"[:200]
                self._reset_to_implicit()
                events.append(
                    {"type": "region_error", "field": field, "text": text, "error": problem}
                )
                return
            if opened and events and events[-1]["type"] == "region_close":
                events[-1]["text"] = text

    return Parser
