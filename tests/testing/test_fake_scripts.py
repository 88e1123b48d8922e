"""FakeEngine's scripts: answers in order, and mistakes that no application hides."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, get_type_hints

import pytest

from mlx_engine import (
    ChatRequestOptions,
    EngineBusy,
    EngineDead,
    GenerationError,
    InvalidRequest,
    MLXEngineError,
    RemoteEngine,
)
from mlx_engine.testing import FakeAnswer, FakeEngine, FakeOptions, FakeRequest, Gate, ScriptError
from mlx_engine.testing.fake_options import DEFAULTS
from tests.remote.hosting import client, hosted

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(params=[None, 4], ids=["alone", "batch"])
def width(request: pytest.FixtureRequest) -> Any:
    return request.param


async def stubborn(ask: Callable[[], Awaitable[Any]], times: int = 5) -> Any:
    """What many applications do."""
    for _ in range(times):
        try:
            return await ask()
        except MLXEngineError as error:
            last = error
    raise last


async def test_answers_come_in_order_and_errors_are_among_them(width: Any) -> None:
    busy, boom = EngineBusy("full", retry_after=0.0), GenerationError("boom")
    answer = FakeAnswer("two", reasoning="Hm.")
    async with FakeEngine.script(
        "one", answer, boom, busy, ["th", "ree"], max_batch_size=width
    ) as engine:
        assert (await engine.generate("x")).text == "one"
        assert (await engine.chat(USER)).reasoning == "Hm."
        for error in (boom, busy):
            with pytest.raises(type(error), match=str(error)):
                await engine.generate("x")
        async with engine.stream_generate("x") as stream:
            assert [chunk.text async for chunk in stream] == ["th", "ree", ""]
    ends = [request.outcome for request in engine.requests]
    assert ends == ["finished", "finished", "failed", "failed", "finished"]


async def test_a_retry_gets_the_next_answer() -> None:
    async with FakeEngine.script(GenerationError("boom"), "at last") as engine:
        assert (await stubborn(lambda: engine.generate("x"))).text == "at last"


async def test_more_requests_than_answers_are_no_error_that_is_retried(width: Any) -> None:
    tries = 0

    async def ask() -> Any:
        nonlocal tries
        tries += 1
        return await engine.generate("x")

    with pytest.raises(ScriptError, match="more than the 1 requests that are scripted"):
        async with FakeEngine.script("one", max_batch_size=width) as engine:
            await ask()
            with pytest.raises(ScriptError):
                await stubborn(ask)
    assert tries == 2
    assert not issubclass(ScriptError, MLXEngineError)
    assert engine.requests[-1].outcome == "failed"


async def test_a_mistake_that_the_application_has_swallowed_is_raised_at_the_end() -> None:
    async def lenient(engine: FakeEngine) -> str:
        try:
            return (await engine.generate("x")).text
        except Exception:
            logging.getLogger(__name__).info("never mind")
            return "sorry"

    with pytest.raises(ScriptError, match="no answer is scripted for 'x', but for 'Hi'"):
        async with FakeEngine({"Hi": "Hello"}) as engine:
            assert await lenient(engine) == "sorry"
    with pytest.raises(AssertionError, match="sorry") as caught:
        async with FakeEngine({"Hi": "Hello"}) as engine:
            assert await lenient(engine) == "Hello"
    assert "a mistake of the script: no answer is scripted" in caught.value.__notes__[0]
    with pytest.raises(ScriptError, match=r"no answer.*\(and 2 more mistakes\)"):
        async with FakeEngine({"Hi": "Hello"}) as engine:
            for _ in range(3):
                await lenient(engine)


async def test_answers_that_are_left_are_told() -> None:
    with pytest.raises(ScriptError, match=r"2 of 3 scripted answers .* the first of them is 'two'"):
        async with FakeEngine.script("one", "two", GenerationError("boom")) as engine:
            await engine.generate("x")
    engine = FakeEngine.script("one")
    await engine.start()
    await engine.stop()
    with pytest.raises(ScriptError, match="1 of 1"):
        engine.check_script()
    with pytest.raises(LookupError, match="mine") as caught:
        async with FakeEngine.script("one"):
            raise LookupError("mine")
    assert not hasattr(caught.value, "__notes__")


async def test_a_function_that_fails_is_a_mistake(width: Any) -> None:
    def answer(request: FakeRequest) -> Any:
        if request.prompt == "wrong":
            return 5
        if request.prompt == "bad":
            return FakeAnswer(tool_calls=["f"])  # type: ignore[list-item]
        assert request.prompt == "Hello", "that is not how to greet"
        return "ok"

    def broken() -> Any:
        yield "one"
        raise ZeroDivisionError

    async with FakeEngine(answer, max_batch_size=width) as engine:
        assert (await engine.generate("Hello")).text == "ok"
        for prompt, words in (
            ("Hi", "what makes the answers has failed: AssertionError: that is not how to greet"),
            ("wrong", "must be text, or a list of"),
            ("bad", "tool_calls: each must be"),
        ):
            with pytest.raises(ScriptError, match=words) as caught:
                await engine.generate(prompt)
            with pytest.raises(ScriptError, match=words):
                engine.check_script()
            in_test = "test_fake_scripts.py" in "".join(caught.value.__notes__)
            assert in_test or prompt == "wrong"
    with pytest.raises(ScriptError, match="ZeroDivisionError"):
        async with FakeEngine(broken()) as engine:
            await engine.generate("x")
            await engine.generate("x")


async def test_a_batch_has_no_place_for_mistakes() -> None:
    with pytest.raises(ScriptError, match="no answer is scripted for 'c'"):
        async with FakeEngine({"a": "1", "b": "2"}) as engine:
            with pytest.raises(ScriptError):
                await engine.generate_batch(["a", "c", "b"])


async def test_those_who_are_elsewhere_are_told_of_mistakes_too() -> None:
    engine = FakeEngine.script()
    await engine.start()
    async with hosted(engine) as host, client(host) as remote:  # type: ignore[arg-type]
        assert isinstance(remote, RemoteEngine)
        with pytest.raises(GenerationError, match="ScriptError: this is more than"):
            await remote.generate("x")
    await engine.stop()
    with pytest.raises(ScriptError, match="more than the 0 requests"):
        engine.check_script()


async def test_what_is_refused_is_recorded_with_what_was_given() -> None:
    async with FakeEngine() as engine:
        with pytest.raises(InvalidRequest, match=r"^temprature"):
            await engine.generate("x", temprature=1)  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest, match=r"^messages"):
            await engine.chat([{"role": "robot"}], tools=None, max_tokens=5)
        with pytest.raises(InvalidRequest, match=r"^prompt"):
            engine.stream_generate(b"x", priority=0)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"^priority"):
            await engine.generate("x", priority=1)
        with pytest.raises(InvalidRequest, match=r"^prompt: is not valid Unicode"):
            await engine.generate("\udcff")
        await engine.generate("x")
    with pytest.raises(MLXEngineError):
        await engine.generate("too late")
    outcomes = [request.outcome for request in engine.requests]
    assert outcomes == [*["refused"] * 5, "finished", "refused"]
    first, second, third, *_, last = engine.requests
    assert (first.prompt, first.options) == ("x", {"temprature": 1})
    assert isinstance(first.error, InvalidRequest)
    assert (second.messages, second.options["max_tokens"]) == ([{"role": "robot"}], 5)
    assert repr(second) == "<FakeRequest  \"[{'role': 'robot'}]\" refused>"
    assert third.prompt == b"x"
    assert first.result().text == ""
    assert last.error is not None


async def test_one_that_waits_when_the_engine_ends_was_refused() -> None:
    gate = Gate()
    async with FakeEngine(["a", gate]) as engine:
        tasks = [asyncio.create_task(engine.generate(name)) for name in "ab"]
        await gate.reached()
        await engine.stop()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert [request.outcome for request in engine.requests] == ["failed", "refused"]


def test_options_are_those_of_the_signature() -> None:
    shown = inspect.signature(FakeEngine.script).parameters
    assert list(shown) == ["answers", *FakeOptions.__annotations__]
    assert list(inspect.signature(FakeEngine).parameters)[1:] == list(DEFAULTS)
    with pytest.raises(InvalidRequest, match=r"^max_batchsize: .*max_batch_size"):
        FakeEngine(max_batchsize=2)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match=r"^text: must be text"):
        FakeEngine.script("one", 2)  # type: ignore[arg-type]


# Gates


async def test_a_gate_ends_with_the_task_that_was_to_come() -> None:
    gate = Gate()

    async def app(engine: FakeEngine) -> None:
        raise LookupError("no such setting")

    async with FakeEngine(["a", gate]) as engine:
        task = asyncio.create_task(app(engine))
        with pytest.raises(ScriptError, match=r"LookupError.*no such setting") as caught:
            await gate.reached(by=task)
        assert caught.value.__cause__ is task.exception()
        other = asyncio.create_task(engine.count_tokens("x"))
        with pytest.raises(ScriptError, match="the task that was to come to the gate is over"):
            await gate.reached(by=other)
        third = asyncio.create_task(engine.generate("x"))
        await gate.reached(by=third)
        gate.open()
        await gate.reached(by=third)
        await third


async def test_a_gate_ends_with_the_last_task_that_could_come() -> None:
    gate = Gate()

    async def failing(seconds: float) -> None:
        await asyncio.sleep(seconds)
        raise LookupError("no such setting")

    async with FakeEngine(["a", gate]) as engine:
        task = asyncio.create_task(failing(0))
        with pytest.raises(ScriptError, match="nobody is left who could come to the gate: Lookup"):
            await gate.reached()
        asking = asyncio.create_task(engine.generate("x"))
        await gate.reached()
        waiting = asyncio.create_task(gate.reached(2))
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done(), "a request is in flight"
        asyncio.get_running_loop().call_later(0.1, gate.open)
        with pytest.raises(ScriptError, match="nobody is left"):
            failed = asyncio.create_task(failing(0))
            await gate.reached(2)
        waiting.cancel()
        await asyncio.gather(task, asking, failed, waiting, return_exceptions=True)


async def test_a_gate_ends_with_the_engine() -> None:
    gate = Gate()
    engine = FakeEngine(["a", gate])
    await engine.start()
    waiting = asyncio.create_task(gate.reached())
    idle = asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)
    await engine.stop()
    await engine.start()
    await engine.stop()
    with pytest.raises(ScriptError, match="nobody comes to the gate: the engine is stopped"):
        await waiting
    idle.cancel()


async def test_a_gate_ends_with_a_mistake_of_the_script() -> None:
    gate = Gate()
    with pytest.raises(ScriptError, match="no answer is scripted for 'Hm'"):
        async with FakeEngine({"Hi": [gate]}) as engine:
            task = asyncio.create_task(engine.generate("Hm"))
            idle = asyncio.create_task(asyncio.sleep(60))
            with pytest.raises(ScriptError, match="nobody comes to the gate: no answer is"):
                await gate.reached()
            idle.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_is_started_again_may_come(width: Any) -> None:
    gate = Gate()
    answers = [EngineDead("gone"), ["a", gate, "b"]]

    async def app() -> str:
        try:
            return (await engine.generate("x")).text
        except EngineDead:
            await engine.stop()
            await asyncio.sleep(0.3)
            await engine.start()
            return (await engine.generate("x")).text

    async with FakeEngine.script(*answers, max_batch_size=width) as engine:
        task = asyncio.create_task(app())
        await gate.reached()
        gate.open()
        assert await task == "ab"


async def test_options_are_told_by_the_names_that_callers_give() -> None:
    async with FakeEngine("Hi.") as engine:
        await engine.generate("x", max_tokens=5, timeout=60)
        await engine.chat(USER, temperature=0.5, tool_choice="none", chat_template_kwargs={"a": 1})
    plain, chat = (request.options for request in engine.requests)
    assert (plain["max_tokens"], plain["timeout"], plain["temperature"]) == (5, 60, 0.0)
    assert "tools" not in plain
    assert (chat["temperature"], chat["tools"], chat["tool_choice"]) == (0.5, None, "none")
    assert chat["chat_template_kwargs"] == {"a": 1}
    names = {*get_type_hints(ChatRequestOptions)} - {"output", "on_progress"}
    assert names == chat.keys()


async def test_an_answer_that_runs_out_of_time_without_waiting_for_it() -> None:
    async with FakeEngine(FakeAnswer("As far as", finish_reason="timeout")) as engine:
        result = await engine.generate("x", timeout=60)
    assert (result.text, result.finish_reason) == ("As far as", "timeout")
    assert engine.requests[0].finish_reason == "timeout"


def test_nothing_comes_behind_an_exception_in_an_answer() -> None:
    with pytest.raises(InvalidRequest, match=r"one answer in pieces.*FakeEngine.script"):
        FakeEngine(["one", RuntimeError("boom"), "two"])
    FakeEngine(["one", RuntimeError("boom")])
