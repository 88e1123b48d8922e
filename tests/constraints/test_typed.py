"""Answers as values of a type: what ``output=`` takes, and what comes of it, in every engine."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import msgspec
import pydantic
import pydantic.dataclasses
import pytest

from mlx_engine import (
    AnyJSON,
    BaseEngine,
    Choice,
    EngineManager,
    GenerationError,
    GenerationResult,
    InvalidRequest,
    JSONSchema,
    OutputInvalid,
    RestartPolicy,
    SamplingParams,
)
from mlx_engine.engine.typed import OutputType
from mlx_engine.remote.replicas.waiting_room import waiting_limits
from mlx_engine.testing import FakeAnswer, FakeEngine, Gate
from tests.remote.hosting import client, hosted

pytestmark = pytest.mark.anyio

PRODUCT = {"name": "lamp", "price": 12.5, "tags": ["new", "led"]}
TEXT = json.dumps(PRODUCT)
USER = [{"role": "user", "content": "Describe it."}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


class Model(pydantic.BaseModel):
    name: str
    price: float
    tags: list[str] = []


@pydantic.dataclasses.dataclass
class ModelDataclass:
    name: str
    price: float
    tags: list[str]


@dataclass
class Plain:
    name: str
    price: float
    tags: list[str]


class Typed(TypedDict):
    name: str
    price: float
    tags: NotRequired[list[str]]


class Struct(msgspec.Struct):
    name: str
    price: float
    tags: list[str] = []


class Cheap(pydantic.BaseModel):
    name: str
    price: float
    tags: list[str]

    @pydantic.field_validator("price")
    @classmethod
    def is_low(cls, price: float) -> float:
        if price > 10:
            raise ValueError("too dear")
        return price


@dataclass
class Careful(Plain):
    def __post_init__(self) -> None:
        raise LookupError("not in stock")


class Node(msgspec.Struct):
    v: int
    next: Node | None = None


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    a: int


class Odd(pydantic.BaseModel):
    f: Callable[[], int]


class Tuple(NamedTuple):
    a: int


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "price": {"type": "number"}, "tags": {}},
    "required": ["name"],
}
TYPES: dict[str, tuple[Any, Any]] = {
    "pydantic model": (Model, Model(**PRODUCT)),  # type: ignore[arg-type]
    "pydantic dataclass": (ModelDataclass, ModelDataclass(**PRODUCT)),  # type: ignore[arg-type]
    "pydantic adapter": (pydantic.TypeAdapter(Plain), Plain(**PRODUCT)),  # type: ignore[arg-type]
    "dataclass": (Plain, Plain(**PRODUCT)),  # type: ignore[arg-type]
    "TypedDict": (Typed, PRODUCT),
    "msgspec.Struct": (Struct, Struct(**PRODUCT)),  # type: ignore[arg-type]
    "JSON schema": (SCHEMA, PRODUCT),
}


def answering(text: str, **more: Any) -> FakeEngine:
    return FakeEngine(FakeAnswer(text, **more))


@pytest.fixture(scope="module")
async def engines() -> AsyncIterator[dict[str, BaseEngine]]:
    """Every kind that needs no process and no model; they all say the same."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        simple = await enter(answering(TEXT))
        batched = await enter(FakeEngine(TEXT, max_batch_size=4))
        host = await enter(hosted(batched))
        remote = await enter(client(host))

        def make(name: str) -> Any:
            return type(remote)(host.path)

        limits = waiting_limits({})
        manager = await enter(EngineManager._of(make, 2, RestartPolicy(), limits))
        yield {"simple": simple, "batched": batched, "remote": remote, "manager": manager}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("kind", ["simple", "batched", "remote", "manager"])
@pytest.mark.parametrize("name", TYPES)
async def test_an_answer_is_of_the_type(
    engines: dict[str, BaseEngine], kind: str, name: str
) -> None:
    engine, (output, value) = engines[kind], TYPES[name]
    results = [
        await engine.generate("x", output=output),
        await engine.chat(USER, output=output),
        *(await engine.generate_batch(["x", "y"], output=output)),
    ]
    for stream in (
        engine.stream_generate("x", output=output),
        engine.stream_chat(USER, output=output),
    ):
        async with stream:
            partials = [stream.partial async for _ in stream]
        results.append(stream.result)
        assert partials[-1] == PRODUCT
        assert {"name": "lamp"} in partials
    for result in results:
        assert isinstance(result, GenerationResult)
        assert (result.parsed, result.text, result.notes) == (value, TEXT, ())
        assert pickle.loads(pickle.dumps(result)) == result


@pytest.mark.parametrize("name", TYPES)
def test_a_type_is_its_schema(name: str) -> None:
    found = OutputType.of(TYPES[name][0])
    assert found.read(TEXT) == TYPES[name][1]
    assert OutputType.of(found) is found
    if name not in ("JSON schema", "pydantic adapter"):
        assert OutputType.of(TYPES[name][0]) is found, "made once"
    if name != "JSON schema":
        described = json.dumps(found.constraint.schema)
        assert '"additionalProperties": false' in described, "a model would go on and on"


def test_schemas_of_the_callers_own_are_as_they_are() -> None:
    found = OutputType.of(SCHEMA)
    assert found.constraint == JSONSchema(SCHEMA)
    assert OutputType.of(Open).constraint.schema["additionalProperties"] is True  # type: ignore[index]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (int, "<class 'int'> has no fields; give a class with fields .* or a JSON schema"),
        (list[int], "has no fields"),
        (Plain | None, "has no fields"),
        (Tuple, "has no fields"),
        (dict, "has no fields"),
        (dict[str, int], "has no fields"),
        ("Plain", "has no fields"),
        (5, "has no fields"),
        ([Plain], "has no fields"),
        (object(), "has no fields"),
        (Plain("a", 1, []), r"is an object of Plain; give the class, output=Plain"),
        (Model(name="a", price=1), r"is an object of Model; give the class, output=Model"),
        (Struct("a", 1), r"is an object of Struct; give the class, output=Struct"),
        (pydantic.TypeAdapter, r"is a class; give one of it, TypeAdapter\(\.\.\.\)"),
        (Odd, "no JSON schema can be made of .*Odd.*PydanticInvalidForJsonSchema"),
        ({"type": object()}, ""),
        (True, "has no fields"),
    ],
)
async def test_what_is_no_such_type_is_refused(
    engines: dict[str, BaseEngine], output: Any, words: str
) -> None:
    engine = engines["simple"]
    for ask in (
        lambda: engine.generate("x", output=output),
        lambda: engine.generate_batch(["x"], output=output),
    ):
        with pytest.raises(InvalidRequest, match=rf"^output: .*{words}"):
            await ask()
    with pytest.raises(InvalidRequest, match=r"^output: "):
        engine.stream_chat(USER, output=output)


async def test_an_answer_has_one_constraint(engines: dict[str, BaseEngine]) -> None:
    engine, bound = engines["batched"], SamplingParams(constraint=AnyJSON())
    with pytest.raises(InvalidRequest, match=r"^output: .*leave out either it or constraint"):
        await engine.generate("x", output=Plain, constraint=AnyJSON())
    with pytest.raises(InvalidRequest, match=r"^output: "):
        await engine.generate_batch(["x", "y"], [None, bound], output=Plain)
    same = SamplingParams(constraint=JSONSchema(SCHEMA))
    assert (await engine.generate("x", same, output=SCHEMA)).parsed == PRODUCT


@pytest.mark.parametrize("kind", ["simple", "remote"])
async def test_what_is_wrong_with_its_schema_is_told_of_output(
    engines: dict[str, BaseEngine], kind: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"^output: ") as caught:
        await engines[kind].generate("x", output={"type": "strin"})
    assert caught.value.option == "output"
    with pytest.raises(InvalidRequest, match=r"^constraint: "):
        await engines[kind].generate("x", constraint=JSONSchema({"type": "strin"}))


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"max_tokens": 2}, "cut by max_tokens"),
        ({"max_tokens": 0}, "cut by max_tokens"),
        ({"stop": ["price"]}, "cut before its end"),
    ],
)
async def test_of_an_answer_that_is_cut_nothing_is_made(options: Any, note: str) -> None:
    async with answering(TEXT) as engine:
        result = await engine.generate("x", output=Plain, **options)
        assert result.parsed is None
        assert result.notes[-1].startswith("there is no parsed output: the answer was ")
        assert note in result.notes[-1]
        async with engine.stream_generate("x", output=Plain, **options) as stream:
            assert "".join([chunk.text async for chunk in stream]) == result.text
        assert (stream.result.parsed, stream.result.notes) == (None, result.notes)
        whole = await engine.generate("x", output=Plain, stop=["nowhere"])
        assert whole.parsed == Plain(**PRODUCT)  # type: ignore[arg-type]


async def test_nothing_is_made_of_a_cancelled_answer() -> None:
    gate = Gate()
    async with FakeEngine(['{"name": "la', gate, 'mp", "price": 1, "tags": []}']) as engine:
        stream = engine.stream_generate("x", output=Plain)
        async for _ in stream:
            assert stream.partial == {"name": "la"}
            break
        await gate.reached()
        await stream.aclose()
        assert (stream.result.parsed, stream.result.finish_reason) == (None, "cancelled")
        assert stream.result.notes == ("there is no parsed output: the request was cancelled",)
        task = asyncio.create_task(engine.generate("x", output=Plain))
        await gate.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_of_calls_nothing_is_made() -> None:
    """None are made where an answer is bound; an engine of an application's own may do it."""
    async with answering("", tool_calls=[("look", {})]) as engine:
        result = await engine.chat(USER, tools=TOOLS)
    plain = OutputType.of(Plain)
    result = plain.parsed(result)
    assert (result.parsed, result.finish_reason) == (None, "tool_calls")
    assert result.notes == ("there is no parsed output: the answer has tool calls",)


async def test_reasoning_is_not_part_of_it() -> None:
    async with answering(TEXT, reasoning='{"name": "so') as engine:
        stream = engine.stream_chat(USER, output=Typed)
        async for chunk in stream:
            assert chunk.segment != "reasoning" or stream.partial is None
        assert stream.result.parsed == PRODUCT


@pytest.mark.parametrize(("output", "why"), [(Cheap, "too dear"), (Careful, "not in stock")])
async def test_a_validator_that_refuses_an_answer_is_told_with_the_answer(
    output: Any, why: str
) -> None:
    async with answering(TEXT) as engine:
        with pytest.raises(OutputInvalid, match=f"(?s)output: the answer is no .*{why}") as caught:
            await engine.generate("x", output=output)
        assert isinstance(caught.value, GenerationError)
        assert (caught.value.result.text, caught.value.result.parsed) == (TEXT, None)
        assert caught.value.__cause__ is not None
        for twin in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
            assert (str(twin), twin.result) == (str(caught.value), caught.value.result)
        (failed,) = await engine.generate_batch(["x"], output=output)
        assert isinstance(failed, OutputInvalid)
        stream = engine.stream_generate("x", output=output)
        with pytest.raises(OutputInvalid):
            async for _ in stream:
                pass
        assert stream.partial == PRODUCT, "the end alone is an error"
        with pytest.raises(OutputInvalid):
            _ = stream.result


def test_what_json_cannot_tell_is_not_taken_for_a_cut() -> None:
    """A number too large for the type is a whole answer all the same."""
    plain = OutputType.of(Plain)
    result = replace(_result(), text='{"name": "a", "price": 1e999, "tags": []}')
    with pytest.raises(OutputInvalid):
        plain.parsed(result)
    deep = OutputType.of({"type": "array"})
    with pytest.raises(OutputInvalid, match="RecursionError"):
        deep.parsed(replace(result, text="[" * 100_000 + "]" * 100_000))
    node = OutputType.of(Node)
    assert node.parsed(replace(result, text='{"v": 1, "next": {"v": 2}}')).parsed == Node(
        1, Node(2)
    )


@dataclass
class Parcel:
    size: Literal["S", "M", "L"]
    count: Annotated[int, msgspec.Meta(ge=1, le=99)]
    paid: bool = False


async def test_a_model_that_knows_nothing_fills_it_in(engine: BaseEngine) -> None:
    """A random one, at temperature 1."""
    prompts = [f"parcel {n}" for n in range(4)]
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 200}
    for result in await engine.generate_batch(prompts, output=Parcel, seed=1, **options):
        assert isinstance(result, GenerationResult)
        assert result.finish_reason == "stop"
        assert isinstance(parcel := result.parsed, Parcel)
        assert parcel.size in "SML"
        assert 1 <= parcel.count <= 99
    options |= {"seed": 1, "max_reasoning_tokens": 4}
    async with engine.stream_chat(USER, output=Parcel, **options) as stream:
        partials = [stream.partial async for _ in stream]
    assert isinstance(stream.result.parsed, Parcel)
    assert partials[-1] == json.loads(stream.result.text)


def _result() -> GenerationResult:
    async def answer() -> GenerationResult:
        async with answering("x") as engine:
            return await engine.generate("x")

    return asyncio.run(answer())


async def test_partial_answers_are_of_json(engines: dict[str, BaseEngine]) -> None:
    engine = engines["simple"]
    for bound in (AnyJSON(), JSONSchema(SCHEMA)):
        stream = engine.stream_generate("x", constraint=bound)
        assert stream.partial is None
        async for _ in stream.text():
            pass
        assert stream.partial == PRODUCT
        assert stream.result.parsed is None, "only output= asks for it"
    for options in ({}, {"constraint": Choice([TEXT])}):
        stream = engine.stream_generate("x", **options)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"^output: stream.partial is of answers that are"):
            _ = stream.partial
