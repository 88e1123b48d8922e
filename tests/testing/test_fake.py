"""FakeEngine: what is scripted is what an application sees."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_engine.testing
from mlx_engine import (
    ContextLengthExceeded,
    EngineBusy,
    EngineDead,
    EngineHost,
    EngineNotStarted,
    EngineState,
    EngineStopped,
    GenerationChunk,
    GenerationError,
    GenerationResult,
    InvalidRequest,
    ModelLoadError,
    Progress,
    RemoteEngine,
    SpecPrefill,
    ToolCall,
)
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.testing import FakeAnswer, FakeEngine, FakeRequest, Gate, ScriptError
from mlx_engine.testing.fake_tokens import END, token_id
from tests.conftest import ROOT, settled
from tests.remote.hosting import client, hosted
from tests.waiting import turns

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "What is the weather?"}]
SESSION = """
import asyncio, sys
import mlx_engine.testing
from mlx_engine.testing import FakeAnswer, FakeEngine, Gate

async def main():
    for width in (None, 3):
        gate = Gate()
        async with FakeEngine(["a", gate, "b"], max_batch_size=width) as engine:
            task = asyncio.create_task(engine.generate("x"))
            await gate.reached()
            task.cancel()
            await asyncio.wait([task])
            gate.open()
            async with engine.stream_chat([{"role": "user", "content": "x"}]) as stream:
                print([chunk.text async for chunk in stream])
            await engine.generate_batch(["x", "y"])
            await engine.run_blocking(print)
            engine.stats()

asyncio.run(main())
assert not {"mlx", "mlx_lm", "transformers"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.fixture(params=[None, 4], ids=["alone", "batch"])
def width(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_the_simplest_case() -> None:
    async with FakeEngine("Hello there!") as engine:
        result = await engine.generate("Greet me, please.")
    assert result.text == "Hello there!"
    assert result.finish_reason == "stop"
    assert result.usage.prompt_tokens == 3
    assert result.usage.completion_tokens == 3
    (request,) = engine.requests
    assert (request.prompt, request.messages, request.outcome) == (
        "Greet me, please.",
        None,
        "finished",
    )
    assert request.result() == result
    assert repr(request) == "<FakeRequest req-1 'Greet me, please.' finished>"


def test_neither_import_nor_session_needs_mlx() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SESSION], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_it_is_not_at_the_front_door() -> None:
    assert "FakeEngine" not in mlx_engine.__all__
    for name in mlx_engine.testing.__all__:
        thing = getattr(mlx_engine.testing, name)
        assert thing.__doc__ or not inspect.isclass(thing)  # the name of a type has none


# The script


async def test_each_piece_is_a_token_and_a_chunk(width: Any) -> None:
    async with (
        FakeEngine(["One", " two", "", " three"], max_batch_size=width) as engine,
        engine.stream_generate("count") as stream,
    ):
        chunks = [chunk async for chunk in stream]
    assert [chunk.text for chunk in chunks] == ["One", " two", "", " three", ""]
    assert [len(chunk.tokens) for chunk in chunks] == [1] * 5
    assert chunks[-1] == GenerationChunk("", (END,), finish_reason="stop")
    assert stream.result.text == "One two three"
    assert len(set(stream.result.tokens)) == 5


async def test_a_string_is_cut_into_words_and_nothing_is_lost() -> None:
    text = "  Zwei Wörter,\n\nund  mehr. "
    async with FakeEngine(text) as engine:
        result = await engine.generate("x")
    assert result.text == text
    assert result.usage.completion_tokens == 6


async def test_answers_by_prompt() -> None:
    answers = {"Hi": "Hello!", "Bye": FakeAnswer("See you"), (1, 2): "ids"}
    async with FakeEngine(answers) as engine:
        assert (await engine.generate("Bye")).text == "See you"
        assert (await engine.generate([1, 2])).text == "ids"
        chat = [*USER, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        assert (await engine.chat(chat)).text == "Hello!"
        with pytest.raises(
            ScriptError, match="no answer is scripted for 'Hm', but for 'Hi', 'Bye'"
        ):
            await engine.generate("Hm")
        with pytest.raises(ScriptError, match="no answer is scripted for 'Hm'"):
            engine.check_script()
        engine.check_script()


async def test_answers_in_turn() -> None:
    answers = iter(["first", FakeAnswer("second"), ["third"]])
    async with FakeEngine(answers) as engine:
        for text in ("first", "second", "third"):
            assert (await engine.generate("x")).text == text
        with pytest.raises(ScriptError, match="more requests than scripted answers"):
            await engine.generate("d")
        with pytest.raises(ScriptError, match="more requests"):
            engine.check_script()


async def test_answers_of_a_function(width: Any) -> None:
    def answer(request: FakeRequest) -> str:
        assert mlx_thread.is_current()
        assert request.messages is not None
        if request.tools is None:
            raise GenerationError("out of memory")
        return f"{request.messages[-1]['content']} {request.params.seed}"

    tools = [{"type": "function", "function": {"name": "f"}}]
    async with FakeEngine(answer, max_batch_size=width) as engine:
        assert (await engine.chat(USER, tools=tools, seed=7)).text == "What is the weather? 7"
        with pytest.raises(GenerationError, match=r"^out of memory$"):
            await engine.chat(USER)
        assert [r.outcome for r in engine.requests] == ["finished", "failed"]
        assert isinstance(engine.requests[1].error, GenerationError)


async def test_reasoning_and_tool_calls(width: Any) -> None:
    broken = ToolCall(raw="{oops", error="not JSON", id="broken001")
    tools = [{"type": "function", "function": {"name": "weather"}}]
    answer = FakeAnswer(
        "I look.", reasoning="Let me think.", tool_calls=[("weather", {"city": "Paris"}), broken]
    )
    async with FakeEngine(answer, max_batch_size=width) as engine:
        async with engine.stream_chat(USER, tools=tools) as stream:
            chunks = [chunk async for chunk in stream]
        with pytest.raises(ScriptError, match="are of chats"):
            await engine.generate("x")
        with pytest.raises(ScriptError, match="are of chats"):
            engine.check_script()
    result = stream.result
    assert (result.reasoning, result.text) == ("Let me think.", "I look.")
    call, other = result.tool_calls
    assert (call.name, call.arguments, call.error) == ("weather", {"city": "Paris"}, None)
    assert other == broken
    segments = [chunk.segment for chunk in chunks]
    assert segments == ["reasoning"] * 3 + ["content"] * 2 + ["tool_call"] * 4 + ["content"]


async def test_an_error_after_some_tokens(width: Any) -> None:
    async def read(engine: FakeEngine) -> list[str]:
        texts: list[str] = []
        with pytest.raises(GenerationError, match="boom"):
            async for chunk in engine.stream_generate("x"):
                texts += [chunk.text]
        return texts

    for error in (GenerationError("boom"), LookupError("boom")):
        async with FakeEngine(["a", "b", error], max_batch_size=width) as engine:
            assert await asyncio.gather(read(engine), read(engine)) == [["a", "b"]] * 2
            assert engine.stats().failed == 2
            assert [r.outcome for r in engine.requests] == ["failed"] * 2
            assert engine.requests[0].error is not engine.requests[1].error
            assert isinstance(engine.requests[0].error, GenerationError)
            assert engine.requests[0].error.__cause__ is (
                error if isinstance(error, LookupError) else None
            )


async def test_length_as_if_the_context_were_used_up() -> None:
    async with FakeEngine(FakeAnswer("a b", finish_reason="length")) as engine:
        result = await engine.generate("x")
    assert (result.finish_reason, len(result.tokens)) == ("length", 2)


@pytest.mark.parametrize(
    ("option", "make"),
    [
        ("text", lambda: FakeEngine(5)),  # type: ignore[arg-type]
        ("text", lambda: FakeEngine({"a": ["b", 5]})),  # type: ignore[dict-item]
        ("reasoning", lambda: FakeAnswer(reasoning=[b"x"])),  # type: ignore[list-item]
        ("tool_calls", lambda: FakeAnswer(tool_calls=["f"])),  # type: ignore[list-item]
        ("finish_reason", lambda: FakeAnswer(finish_reason="cancelled")),  # type: ignore[arg-type]
        ("seconds_per_token", lambda: FakeEngine(seconds_per_token=-1)),
        ("prefill_seconds", lambda: FakeEngine(prefill_seconds=float("nan"))),
        ("load_seconds", lambda: FakeEngine(load_seconds="1")),  # type: ignore[arg-type]
        ("load", lambda: FakeEngine(load="slow")),  # type: ignore[arg-type]
        ("max_batch_size", lambda: FakeEngine(max_batch_size=0)),
        ("context_length", lambda: FakeEngine(context_length=1)),
        ("queue_limit", lambda: FakeEngine(queue_limit=-1)),
        ("on_progress", lambda: FakeEngine(on_progress=3)),  # type: ignore[arg-type]
    ],
)
def test_bad_scripts_and_options_are_refused_by_name(
    option: str, make: Callable[[], object]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make()
    assert caught.value.option == option


def test_a_coroutine_function_cannot_answer() -> None:
    async def answer(request: FakeRequest) -> str:
        return ""

    with pytest.raises(InvalidRequest, match="no coroutine functions"):
        FakeEngine(answer)  # type: ignore[arg-type]


# Options of requests


async def test_max_tokens() -> None:
    async with FakeEngine(["a", "b", "c"]) as engine:
        for count, reason in ((1, "length"), (3, "length"), (4, "stop"), (None, "stop")):
            result = await engine.generate("x", max_tokens=count)
            assert result.finish_reason == reason
            assert len(result.tokens) == min(count or 4, 4)


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "found"),
    [
        (["one ", "two ", "STOP", " three"], ["STOP"], "one two ", "STOP"),
        (["one S", "TO", "P three"], ["STOP"], "one ", "STOP"),
        (["one S", "TO", " three"], ["STOP"], "one STO three", None),
        (["one ST"], ["STOP"], "one ST", None),
        (["abcd"], ["cd", "bcde", "bc"], "a", "bc"),
        (["\n", "\n", "\n"], ["\n\n"], "", "\n\n"),
    ],
)
async def test_stop_strings(
    pieces: list[str], stop: list[str], text: str, found: str | None, width: Any
) -> None:
    async with (
        FakeEngine(pieces, max_batch_size=width) as engine,
        engine.stream_generate("x", stop=stop) as stream,
    ):
        chunks = [chunk async for chunk in stream]
    assert stream.result.text == "".join(chunk.text for chunk in chunks) == text
    assert (stream.result.finish_reason, stream.result.stop_string) == ("stop", found)
    whole = "".join(pieces)
    assert (len(stream.result.tokens) <= len(pieces)) == any(string in whole for string in stop)


async def test_other_options() -> None:
    async with FakeEngine(["a", "b"], context_length=300) as engine:
        result = await engine.generate("x", stop_token_ids=[token_id("b")])
        assert (result.text, result.tokens) == ("a", (token_id("a"), token_id("b")))
        result = await engine.generate("x", ignore_eos=True, max_tokens=7)
        assert (result.text, len(result.tokens)) == ("ababa", 7)
        result = await engine.generate("x", ignore_eos=True, max_tokens=None)
        assert (len(result.tokens), result.finish_reason) == (299, "length")
        result = await engine.generate("x", logprobs=5)
        assert [entry.logprob for entry in result.logprobs] == [0.0] * 3
        assert (await engine.generate("x", temperature=1, seed=1, top_p=0.5)).text == "ab"
        with pytest.raises(ContextLengthExceeded) as caught:
            await engine.generate("x", max_tokens=300)
        assert (caught.value.prompt_tokens, caught.value.context_length) == (1, 300)
        with pytest.raises(InvalidRequest, match=r"^logits_processors: "):
            await engine.generate("x", logits_processors=[print])  # type: ignore[list-item]
        with pytest.raises(InvalidRequest, match=r"^prefill: "):
            await engine.generate("x", prefill=SpecPrefill())
        with pytest.raises(InvalidRequest, match=r"^priority: "):
            await engine.generate("x", priority=1)
        assert engine.context_length == 300
    assert engine.context_length is None


async def test_the_next_turn_of_a_conversation_is_cached(tmp_path: Path) -> None:
    messages = [*USER]
    async with FakeEngine("It is sunny.") as engine:
        first = await engine.chat(messages)
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "Thanks"},
        ]
        second = await engine.chat(messages)
        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens == first.usage.prompt_tokens + 3
        cache = engine.stats().prompt_cache
        assert (cache.hits, cache.misses, cache.entries) == (1, 1, 2)
        assert await engine.save_prompt_cache(tmp_path / "cache") == 2
    async with FakeEngine() as other:
        assert await other.load_prompt_cache(tmp_path / "cache") == 2
        assert await other.load_prompt_cache(tmp_path / "cache") == 0
        assert (await other.chat(messages)).usage.cached_tokens > second.usage.cached_tokens
        (tmp_path / "other").write_text("[]")
        for wrong in ("other", "nothing", "."):
            with pytest.raises(InvalidRequest, match=r"^path: "):
                await other.load_prompt_cache(tmp_path / wrong)
        with pytest.raises(InvalidRequest, match=r"^path: "):
            await other.save_prompt_cache(tmp_path / "no" / "folder")
    with pytest.raises(EngineStopped):
        await other.save_prompt_cache(tmp_path / "cache")


async def test_stats_add_up(width: Any) -> None:
    async with FakeEngine("a b c", max_batch_size=width, seconds_per_token=0.001) as engine:
        results = await engine.generate_batch(["x y", "x y", "z"])
        stats = engine.stats()
        usages = [r.usage for r in results if isinstance(r, GenerationResult)]
        assert stats.prompt_tokens == sum(usage.prompt_tokens for usage in usages) == 5
        assert stats.completion_tokens == sum(usage.completion_tokens for usage in usages) == 12
        assert stats.cached_tokens == sum(usage.cached_tokens for usage in usages)
        assert (stats.finished, stats.failed, stats.cancelled) == (3, 0, 0)
        assert stats.decode_seconds > 0


async def test_progress_of_the_prompt_is_told() -> None:
    told: list[Progress] = []
    async with FakeEngine() as engine:
        await engine.generate("a b c", on_progress=told.append)
        await asyncio.sleep(0)
    assert told == [Progress("prefill", 0, 3), Progress("prefill", 3, 3)]


# Time


async def test_time_is_taken_for_tokens_and_prompts() -> None:
    async with FakeEngine("a b c", seconds_per_token=0.01, prefill_seconds=0.03) as engine:
        result = await engine.generate("x")
    timings = result.timings
    assert timings.prefill >= 0.03
    assert timings.decode >= 0.03
    assert timings.total >= timings.time_to_first_token + timings.decode
    assert engine.stats().prefill_seconds == pytest.approx(0.03)


async def test_a_batch_takes_its_steps_together() -> None:
    gate = Gate()
    answer = [gate, "a", " b", " c", " d"]
    async with FakeEngine(answer, seconds_per_token=0.02, max_batch_size=8) as engine:
        batch = asyncio.create_task(engine.generate_batch(["x"] * 8))
        await gate.reached(8, by=batch)
        before = engine.stats().decode_seconds
        gate.open()
        await batch
        assert engine.stats().decode_seconds - before == pytest.approx(5 * 0.02)


async def test_a_long_prompt_is_left_when_cancelled() -> None:
    async with FakeEngine(prefill_seconds=600) as engine:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await engine.generate("x")
        assert engine.requests[0].outcome == "cancelled"


# Gates


async def test_cancelled_exactly_in_the_middle(width: Any) -> None:
    gate = Gate()
    async with FakeEngine(["Once", gate, " upon"], max_batch_size=width) as engine:
        task = asyncio.create_task(engine.generate("x"))
        await gate.reached()
        assert engine.requests[0].outcome == "running"
        assert engine.requests[0].result().text == "Once"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.requests[0].outcome == "cancelled"
        assert engine.requests[0].result().text == "Once"
        assert engine.stats().cancelled == 1
        assert not gate.is_open
        gate.open()
        assert (await engine.generate("x")).text == "Once upon"


async def test_a_stream_is_cancelled_at_a_gate(width: Any) -> None:
    gate = Gate()
    async with FakeEngine(["Once", gate, " upon"], max_batch_size=width) as engine:
        async with engine.stream_generate("x") as stream:
            await gate.reached()
            stream.cancel()
            chunks = [chunk async for chunk in stream]
        assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [
            ("Once", None),
            ("", "cancelled"),
        ]
        assert engine.requests[0].outcome == "cancelled"


async def test_a_firm_gate_holds_those_who_are_cancelled(width: Any) -> None:
    gate = Gate(firm=True)
    async with FakeEngine([gate, "a"], max_batch_size=width) as engine:
        task = asyncio.create_task(engine.generate("x"))
        await gate.reached()
        for _ in range(3):
            task.cancel()
            await turns()
            assert not task.done()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.requests[0].result().tokens == ()


async def test_others_in_the_batch_pass_those_at_a_gate() -> None:
    gate = Gate()
    answers = {"slow": ["a", gate, "b"], "fast": "c"}
    async with FakeEngine(answers, max_batch_size=2) as engine:
        slow = asyncio.create_task(engine.generate("slow"))
        await gate.reached()
        assert (await engine.generate("fast")).text == "c"
        assert await engine.run_blocking(lambda: 5) == 5
        assert not slow.done()
        gate.open()
        assert (await slow).text == "ab"
        await settled()


async def test_a_gate_counts_those_who_come_to_it() -> None:
    gate = Gate()
    async with FakeEngine(gate_first(gate), max_batch_size=3) as engine:
        tasks = [asyncio.create_task(engine.generate("x")) for _ in range(3)]
        await gate.reached(3)
        assert engine.stats().running == 3
        gate.open()
        await asyncio.gather(*tasks)
        waiting = asyncio.create_task(gate.reached(4))
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
        await engine.generate("x")
        await gate.reached(4)


def gate_first(gate: Gate) -> list[str | Gate | Exception]:
    return [gate, "a"]


async def test_queue_limits(width: Any) -> None:
    gate = Gate()
    places = width or 1
    async with FakeEngine([gate, "a"], max_batch_size=width, queue_limit=1) as engine:
        tasks = [asyncio.create_task(engine.generate("x")) for _ in range(places)]
        await gate.reached(places)
        tasks.append(asyncio.create_task(engine.generate("y")))
        while not engine.stats().waiting:
            await asyncio.sleep(0)
        with pytest.raises(EngineBusy):
            await engine.generate("z")
        assert [r.outcome for r in engine.requests[-2:]] == ["waiting", "refused"]
        gate.open()
        await asyncio.gather(*tasks)
        assert engine.stats().rejected == 1


# The load


async def test_a_load_that_fails_and_then_does_not() -> None:
    engine = FakeEngine(load=iter([ModelLoadError("no such model"), ()]))
    with pytest.raises(ModelLoadError, match="no such model"):
        await engine.start()
    assert engine.state is EngineState.CREATED
    with pytest.raises(EngineNotStarted):
        await engine.generate("x")
    async with engine:
        assert (await engine.generate("x")).text == "Hello!"


@pytest.mark.parametrize("how", ["cancel", "stop"])
async def test_a_load_that_takes_long_is_given_up(how: str) -> None:
    gate = Gate()
    told: list[Progress] = []
    engine = FakeEngine(load=[gate], load_seconds=0.02, on_progress=told.append)
    starting = asyncio.create_task(engine.start())
    await gate.reached()
    assert engine.state is EngineState.STARTING
    if how == "cancel":
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert engine.state is EngineState.CREATED
    else:
        await engine.stop()
        with pytest.raises(EngineStopped):
            await starting
    gate.open()
    async with engine:
        await asyncio.sleep(0)
        assert told[-1].phase == "load"


async def test_a_forgotten_engine_warns() -> None:
    engine = FakeEngine()
    await engine.start()
    with pytest.warns(ResourceWarning, match="without being stopped"):
        del engine
        gc.collect()


# The end of an engine


async def test_it_dies_in_the_middle_of_an_answer(width: Any) -> None:
    gate = Gate()
    dead = EngineDead("killed", exit_code=-9, signal="SIGKILL")
    async with FakeEngine(["a", gate, dead], max_batch_size=width) as engine:
        tasks = [asyncio.create_task(engine.generate("x")) for _ in range(6)]
        await gate.reached()
        gate.open()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, EngineDead)
            assert outcome is not dead
            assert outcome.exit_code == -9
        assert engine.state is EngineState.FAILED
        with pytest.raises(EngineDead, match="killed"):
            await engine.generate("x")
        assert engine.stats().failed == 6
        await engine.stop()
        await engine.start()
        assert engine.state is EngineState.RUNNING


async def test_it_dies_while_it_is_idle_or_held(width: Any) -> None:
    gate = Gate(firm=True)
    async with FakeEngine([gate, "a"], max_batch_size=width) as engine:
        task = asyncio.create_task(engine.generate("x"))
        await gate.reached()
        await asyncio.to_thread(engine.die)
        with pytest.raises(EngineDead, match="told to die"):
            await task
        assert engine.state is EngineState.FAILED
        await engine.stop()
        gate.open()
        await engine.start()
        assert (await engine.generate("x")).text == "a"
        await settled()
        engine.die(EngineDead("out of power"))
        with pytest.raises(EngineDead, match="out of power"):
            await engine.generate("x")


# With the rest of the library


async def test_a_host_serves_it(tmp_path: Path) -> None:
    async with FakeEngine("Hello from afar!", max_batch_size=2) as engine:
        async with hosted(engine) as host, client(host) as remote:  # type: ignore[arg-type]
            assert isinstance(host, EngineHost)
            assert isinstance(remote, RemoteEngine)
            async with remote.stream_generate("x") as stream:
                assert [chunk.text async for chunk in stream][:2] == ["Hello", " from"]
        assert engine.requests[0].outcome == "finished"


def test_engines_and_loops_come_and_go() -> None:
    def answers() -> Iterator[str]:
        yield "first"
        yield "second"

    engine = FakeEngine(answers())

    async def once() -> str:
        async with engine:
            return (await engine.generate("x")).text

    assert [asyncio.run(once()) for _ in range(2)] == ["first", "second"]
