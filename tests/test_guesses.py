"""Wrong guesses, and what is said to them: what to write instead."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest

import mlx_engine.testing
from mlx_engine import (
    AnyJSON,
    BatchedEngine,
    EngineBusy,
    EngineManager,
    GenerationError,
    GenerationResult,
    InvalidRequest,
    ProcessEngine,
    SimpleEngine,
    Timings,
    Usage,
)
from mlx_engine.testing import FakeAnswer, FakeEngine, Gate, ScriptError

pytestmark = pytest.mark.anyio

HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "read", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stream", "stream_generate() or stream_chat()"),
        ("tokenizer", "encode()"),
        ("model_name", "model"),
        ("is_running", "state"),
        ("close", "stop()"),
        ("completion", "generate()"),
        ("generate_stream", "stream_generate() or stream_chat()"),
        ("max_context", "context_length"),
    ],
)
@pytest.mark.parametrize("make", [SimpleEngine, BatchedEngine, ProcessEngine, FakeEngine])
def test_an_attribute_of_another_library_s_engine(make: Any, name: str, said: str) -> None:
    engine = make("demo")
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError) as caught:
        getattr(engine, name)
    assert said in str(caught.value)
    assert caught.value.name == name
    with pytest.raises(AttributeError, match=r"has no attribute 'xyz'$"):
        engine.xyz  # noqa: B018


async def test_attributes_of_results_and_statistics() -> None:
    async with FakeEngine("Hello there") as engine:
        result = await engine.chat(HI)
        stats = engine.stats()
        stream, outcomes = engine.stream_chat(HI), engine.map([HI])
        (outcome,) = [one async for one in outcomes]
    for thing, name, said in [
        (result, "content", "text"),
        (result, "model_dump", "to_dict()"),
        (result.usage, "output_tokens", "completion_tokens"),
        (result.timings, "ttft", "time_to_first_token"),
        (stats, "queue", "waiting"),
        (result, "completion_tokens", "usage"),
        (result, "ttft", "timings.time_to_first_token"),
        (result.timings, "duration", "total"),
        (stream, "close", "aclose(), or cancel()"),
        (stream, "usage", "result"),
        (outcome, "text", "unwrap(), or result"),
        (outcome, "exception", "error"),
        (outcomes, "results", "unread"),
        (engine, "calls", "requests"),
        (engine.requests[0], "text", "prompt, or messages"),
        (engine.requests[0], "status", "outcome"),
        (engine.requests[0], "temperature", "params"),
        (engine.sync(), "close_all", ""),
        (engine.sync(), "stream", "stream_generate() or stream_chat()"),
        (engine.sync().stream_chat(HI), "stop", "close(), or cancel()"),
    ]:
        with pytest.raises(AttributeError) as caught:
            getattr(thing, name)
        hint = f": see {said}" if said else ""
        assert str(caught.value).startswith(f"{type(thing).__name__!r} object has no attribute")
        assert f"{name!r}{hint}" in str(caught.value)
        assert said or str(caught.value).endswith(repr(name))
    with pytest.raises(AttributeError, match=r"'aclose'$"):  # no such thing in a result
        result.aclose  # type: ignore[attr-defined] # noqa: B018
    for each in (result.usage, result.timings, stats):
        told = each.to_dict()  # type: ignore[attr-defined]
        assert told["state" if each is stats else next(iter(told))] is not None
    assert stats.to_dict()["prompt_cache"]["entries"] == stats.prompt_cache.entries
    assert stats.to_dict()["state"] == "running"
    for same in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert same == result
        assert isinstance(same, GenerationResult)
        assert isinstance(same.timings, Timings)


def test_completion_offers_what_is_for_users() -> None:
    for engine in (SimpleEngine("demo"), ProcessEngine("demo"), FakeEngine()):
        names = {name for name in dir(engine) if not name.startswith("_")}
        assert {"generate", "chat", "map", "stats", "sync", "model"} <= names
        assert not names & {"submit", "answer", "check_running", "takes_priority"}
    assert dir(mlx_engine.testing) == sorted(mlx_engine.testing.__all__)


def test_an_engine_without_async() -> None:
    with (
        pytest.raises(TypeError, match=r"'async with'.*engine.sync\(\)"),
        FakeEngine(),  # type: ignore[attr-defined]
    ):
        pass


async def awaited(*_: object) -> None:
    """A callback that would have to be."""


class Awaited:
    async def __call__(self, _: object) -> None:
        """The same."""


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("as an array says, that is compared to a text")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("option", ["tool_choice", "prefill", "decode", "output", "constraint"])
@pytest.mark.parametrize("make", [FakeEngine, SimpleEngine])
def test_values_that_cannot_be_compared(make: Any, option: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{option}: "):
        make("demo").stream_chat(HI, **{option: Incomparable()})
    if option in ("prefill", "decode") and make is SimpleEngine:
        with pytest.raises(InvalidRequest, match=f"^{option}: "):
            SimpleEngine("demo", **{option: Incomparable()})  # type: ignore[arg-type]


async def test_arguments() -> None:
    async with FakeEngine("Hello") as engine:
        with pytest.raises(InvalidRequest, match=r"^prompt: these are messages: .*chat\(\)"):
            await engine.generate(HI)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"^request_id: .*engine.map"):
            await engine.generate("Hi", request_id="a")  # type: ignore[call-arg]
        for tell in (Awaited().__call__, functools.partial(awaited, 1), awaited, Awaited()):
            with pytest.raises(InvalidRequest, match=r"^on_progress: .*no coroutine function"):
                await engine.generate("Hi", on_progress=tell)  # type: ignore[arg-type]
        for items in ([{"id": "a", "prompt": "Hi"}], ["x", {"custom_id": "b", "messages": HI}]):
            with pytest.raises(InvalidRequest, match=r"^prompts: .*\(id, prompt\) pairs"):
                engine.map(items)  # type: ignore[call-overload]
    with pytest.raises(InvalidRequest, match=r"^chat_template: .*chat_template.jinja"):
        SimpleEngine("demo", chat_template="x")  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match=r"^delay: .*seconds_per_token"):
        FakeEngine("x", delay=1)  # type: ignore[call-arg]
    assert EngineBusy("full").retry_after > 0


@pytest.mark.parametrize(
    ("given", "size"),
    [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("512m", 512 * 10**6), (" 64MiB", 2**26)],
)
def test_memory_as_it_is_written(given: str, size: int) -> None:
    assert SimpleEngine("demo", memory=given)._config.model.memory == size


@pytest.mark.parametrize("given", ["4", "lots", "-4GB", "", "4 GBs", "1KB"])
def test_memory_as_it_is_not(given: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^memory: must be"):
        SimpleEngine("demo", memory=given)


async def test_scripts() -> None:
    assert FakeAnswer(tool_calls=[{"name": "read", "arguments": {}}]) == FakeAnswer(
        tool_calls=[("read", {})]
    )
    with pytest.raises(InvalidRequest, match=r"^tool_calls: each must be"):
        FakeAnswer(tool_calls=[{"name": "read"}])
    with pytest.raises(ScriptError, match=r"not its class: GenerationError\(\.\.\.\)"):
        async with FakeEngine(GenerationError) as engine:  # type: ignore[arg-type]
            await engine.generate("Hi")
    for several in ([FakeAnswer("one"), FakeAnswer("two")], [["one"], ["two"]]):
        with pytest.raises(InvalidRequest, match=r"answer to each request, see FakeEngine\.script"):
            FakeEngine(several)
    with pytest.raises(ScriptError, match="a list is the answer to one, in pieces"):
        async with FakeEngine.script(["one", "two"]) as engine:
            await engine.generate("Hi")
            await engine.generate("Hi")
    with pytest.raises(ScriptError, match="calls and no text"):
        async with FakeEngine("Looking") as engine:
            await engine.chat(HI, tools=[TOOL], tool_choice="required")


async def test_who_comes_to_a_gate() -> None:
    with pytest.raises(TypeError, match="by is the task"):
        await Gate().reached(by=8)  # type: ignore[arg-type]


async def test_how_a_request_has_ended() -> None:
    async with FakeEngine.script("Hello there", GenerationError("x")) as engine:
        await engine.generate("Hi", max_tokens=1)
        with pytest.raises(GenerationError):
            await engine.generate("Hi")
    assert [one.finish_reason for one in engine.requests] == ["length", None]


async def test_attributes_are_found_in_what_they_are_of() -> None:
    async with FakeEngine("Hello there") as engine:
        async with engine.stream_chat(HI) as stream:
            await stream.collect()
        (outcome,) = [each async for each in engine.map(["Hi"])]
        found = [
            (stream, "usage", "see result.usage"),
            (stream, "finish_reason", "see result.finish_reason"),
            (stream, "tps", "see result.timings.tokens_per_second"),
            (stream, "content", r"see text\(\)"),
            (stream, "close", r"see aclose\(\)"),
            (stream, "segments", "async for"),
            (stream.result, "completion_tokens", "see usage.completion_tokens"),
            (stream.result, "reasoning_content", "see reasoning"),
            (engine.stats().memory, "active", "see use"),
            (engine.stats().memory, "weights", "see use.weights"),
            (engine.requests[0], "temperature", "see params.temperature"),
            (engine.requests[0], "text", r"see prompt, or messages, or result\(\).text"),
            (engine, "cancel", "cancel the task"),
            (outcome, "usage", "see result.usage"),
        ]
        for thing, name, said in found:
            assert not hasattr(thing, name)
            with pytest.raises(AttributeError, match=rf"has no attribute '{name}': .*{said}"):
                getattr(thing, name)
            with pytest.raises(AttributeError, match=r"has no attribute 'xyz'$"):
                thing.xyz  # type: ignore[attr-defined] # noqa: B018


def test_usage_adds_up() -> None:
    each = [Usage(10, 2, 4), Usage(1, 1), Usage(5, 0, 5)]
    assert sum(each, Usage(0, 0)) == Usage(16, 3, 9)
    with pytest.raises(TypeError):
        each[0] + 1  # type: ignore[operator]


def test_a_process_that_is_to_come_back_by_itself() -> None:
    for name in ("restart", "auto_restart"):
        with pytest.raises(InvalidRequest, match=rf"^{name}: .*EngineManager\(.*restart\(\)"):
            ProcessEngine("demo", **{name: True})
    with pytest.raises(AttributeError, match="'pid': see replicas"):
        EngineManager("demo", replicas=1).pid  # type: ignore[attr-defined] # noqa: B018
    assert "limits: mlx_engine.limits.RequestLimits = RequestLimits()" in str(
        inspect.signature(SimpleEngine)
    )


def test_a_property_within_which_something_is_missing_says_what() -> None:
    class Broken(FakeEngine):
        @property
        def broken(self) -> object:
            return self.limits.nothing  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="'nothing'"):
        Broken().broken  # noqa: B018


async def test_streams_and_outcomes_without_async() -> None:
    async with FakeEngine("Hi.") as engine:
        for thing in (engine.stream_chat(HI), engine.map(["Hi"])):
            with pytest.raises(TypeError, match=r"is not awaited: write '.*async for"):
                list(thing)  # type: ignore[call-overload]
            with pytest.raises(TypeError, match=r"is not awaited: write '.*async for"), thing:  # type: ignore[union-attr]
                pass
            await thing.aclose()


async def test_a_call_and_a_value_are_not_asked_for_at_once() -> None:
    async with FakeEngine("Hi.") as engine:
        for option in ({"output": {"type": "object"}}, {"constraint": AnyJSON()}):
            (name,) = option
            with pytest.raises(InvalidRequest, match=rf"^{name}: .*a request of its own"):
                await engine.chat(HI, tools=[TOOL], tool_choice="required", **option)  # type: ignore[arg-type]


def test_what_is_not_awaited_is_an_attribute_of_the_engine_itself() -> None:
    with FakeEngine("Hi.").sync() as llm, pytest.raises(AttributeError, match=r"see engine$"):
        llm.check_health()  # type: ignore[attr-defined]


def test_a_stream_without_await_tells_where_things_are_as_the_other_does() -> None:
    with (
        FakeEngine("Hi.").sync() as llm,
        llm.stream_generate("Hi") as stream,
        pytest.raises(AttributeError, match=r"see result\.timings\.tokens_per_second$"),
    ):
        stream.tps  # type: ignore[attr-defined] # noqa: B018
