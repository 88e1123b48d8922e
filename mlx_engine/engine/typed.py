"""Answers as values of a type that the caller names: ``output=``, ``result.parsed``.

All on the caller's side. An engine gets the schema of the type, as a constraint, and gives text.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mlx_engine.chat.partial_json import PartialJSON
from mlx_engine.checks import shown
from mlx_engine.constraints import AnyJSON, Constraint, JSONSchema
from mlx_engine.core.stream import Emit, Producer
from mlx_engine.errors import InvalidRequest, OutputInvalid, describe, renamed
from mlx_engine.outputs import GenerationResult
from mlx_engine.params import SamplingParams

_INSTEAD = (
    "give a class with fields (a pydantic model, a dataclass, a TypedDict, a msgspec.Struct) or a "
    "JSON schema"
)
_RECORDS = (
    msgspec.inspect.StructType,
    msgspec.inspect.DataclassType,
    msgspec.inspect.TypedDictType,
)
_CLASSES = 64  # of which the schema is remembered
_LONGEST = 400  # characters of an error of theirs
# Keywords whose parts add up, so that none of them can say that there is nothing else.
_ADDING = ("allOf", "anyOf", "oneOf", "if", "$ref", "patternProperties", "unevaluatedProperties")


@dataclass(frozen=True, slots=True)
class OutputType:
    """A type of which answers are to be.

    Attributes:
        name: of the type.
        constraint: its schema.
        read: makes a value of it out of JSON text, or raises whatever it likes.
    """

    name: str
    constraint: JSONSchema
    read: Callable[[str], Any]

    @classmethod
    def of(cls, output: Any) -> OutputType:
        """The type that a caller has given as ``output``.

        Raises:
            InvalidRequest: there is no schema of it, or it is no type with fields.
        """
        if isinstance(output, OutputType):
            return output
        with as_output():
            if isinstance(output, Mapping):
                return cls("JSON", JSONSchema(output), json.loads)
            try:
                return _of_class(output)
            except TypeError:  # it cannot be hashed
                raise _no_type(output) from None

    def options(
        self, params: SamplingParams | None, sampling: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Sampling options, with its constraint among them.

        Raises:
            InvalidRequest: there is one already.
        """
        given = [sampling.get("constraint"), getattr(params, "constraint", None)]
        if any(one not in (None, self.constraint) for one in given):
            raise InvalidRequest(
                "output", "is a constraint already: leave out either it or constraint"
            )
        return {**sampling, "constraint": self.constraint}

    def parsed(self, result: GenerationResult) -> GenerationResult:
        """The result with what its text says, or with a note why there is nothing.

        Raises:
            OutputInvalid: the text is whole, and the type does not take it.
        """
        if (note := _without(result)) is not None:
            return _noted(result, note)
        try:
            return replace(result, parsed=self.read(result.text))
        except Exception as error:
            if not _is_whole(result.text):
                return _noted(result, "the answer was cut before its end")
            message = f"output: the answer is no {self.name}: {describe(error)}"
            raise OutputInvalid(message, result=result) from error


class TypedWork:
    """A request whose answer is made into a value; a ``Producer`` around that of the engine.

    Args:
        work: that of the engine.
        output: what the answer is made into.
        sampled: whether another attempt may give another answer.

    Attributes:
        request_id: the engine's name for it.
    """

    def __init__(self, work: Producer, output: OutputType, *, sampled: bool = False) -> None:
        self.request_id = work.request_id
        self._work = work
        self._output = output
        self._sampled = sampled

    def run(self, emit: Emit | None) -> Awaitable[GenerationResult]:
        """Do the work; ``OutputInvalid`` is raised when it is over."""
        return self._typed(self._work.run(emit))

    async def _typed(self, work: Awaitable[GenerationResult]) -> GenerationResult:
        with as_output():
            result = await work
        try:
            return self._output.parsed(result)
        except OutputInvalid as error:
            error.retryable = self._sampled
            raise

    def cancel(self) -> None:
        """Ask the work to stop."""
        self._work.cancel()

    def partial_result(self) -> GenerationResult:
        """The result so far; it was cancelled, and nothing is made of it."""
        return self._output.parsed(self._work.partial_result())


@contextmanager
def as_output() -> Iterator[None]:
    """A border: errors of ``constraint`` become those of ``output``, of which it is made."""
    try:
        yield
    except InvalidRequest as error:
        if error.option != "constraint":
            raise
        raise renamed(error, "output") from error


def partial_answer(constraint: Constraint) -> PartialJSON | None:
    """A reader of an answer that is still being made; ``None`` if it need not be JSON."""
    return PartialJSON() if isinstance(constraint, JSONSchema | AnyJSON) else None


@functools.lru_cache(_CLASSES)
def _of_class(output: Any) -> OutputType:
    name = str(getattr(output, "__name__", None) or type(output).__name__)
    is_class = isinstance(output, type)
    try:
        if _has(output, "model_json_schema", "model_validate_json") and is_class:
            schema, read = output.model_json_schema(), output.model_validate_json
        elif _has(output, "json_schema", "validate_json") and not is_class:
            schema, read = output.json_schema(), output.validate_json
        elif is_class and hasattr(output, "__pydantic_validator__"):  # a dataclass of pydantic's
            adapter = sys.modules["pydantic"].TypeAdapter(output)
            schema, read = adapter.json_schema(), adapter.validate_json
        elif _is_record(output):
            schema = msgspec.json.schema(output)
            read = msgspec.json.Decoder(output).decode
        else:
            raise _no_type(output)
        return OutputType(name, JSONSchema(_closed(schema)), read)
    except InvalidRequest:
        raise
    except Exception as error:  # code of the caller's class, or a type that has no schema
        why = " ".join(describe(error).split())
        raise InvalidRequest(
            "output",
            f"no JSON schema can be made of {shown(output)} ({why:.{_LONGEST}}); where types of "
            "one library are in those of another, pydantic.TypeAdapter(...) may make one",
        ) from error


def _has(output: Any, *methods: str) -> bool:
    return all(callable(getattr(output, method, None)) for method in methods)


def _is_record(output: Any) -> bool:
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return False
    try:
        return isinstance(msgspec.inspect.type_info(output), _RECORDS)
    except TypeError:
        return False


def _no_type(output: Any) -> InvalidRequest:
    kind = type(output)
    if _is_record(kind) or _has(kind, "model_json_schema"):
        return InvalidRequest(
            "output", f"is an object of {kind.__name__}; give the class, output={kind.__name__}"
        )
    if _has(output, "json_schema", "validate_json"):
        return InvalidRequest("output", f"is a class; give one of it, {output.__name__}(...)")
    return InvalidRequest("output", f"{shown(output)} has no fields; {_INSTEAD}")


def _without(result: GenerationResult) -> str | None:
    """Why nothing can be made of it; ``None`` if there is no reason."""
    if result.tool_calls:
        return "the answer has tool calls"
    if result.finish_reason == "length":
        return "the answer was cut by max_tokens, or by the end of the context"
    if result.finish_reason == "timeout":
        return "the answer was cut by its timeout"
    return "the request was cancelled" if result.finish_reason == "cancelled" else None


def _noted(result: GenerationResult, why: str) -> GenerationResult:
    return replace(result, notes=(*result.notes, f"there is no parsed output: {why}"))


def _is_whole(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # a number too long for Python, or lists too deep
        return True
    return True


def _closed(schema: Any) -> Any:
    """The schema of a class, whose objects have its fields and no others: a model would go on
    and on with others, and all of them would be dropped.
    """
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        name: {own: _closed(each) for own, each in value.items()}
        if name in ("properties", "$defs") and isinstance(value, dict)
        else value
        if name in ("default", "examples", "const", "enum", "allOf")
        else _closed(value)
        for name, value in schema.items()
    }
    if "properties" in made and not any(keyword in made for keyword in _ADDING):
        made.setdefault("additionalProperties", False)
    return made
