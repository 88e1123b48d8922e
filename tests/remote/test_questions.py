"""Questions about prompts, asked of engines elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_engine import (
    BatchedEngine,
    EngineBusy,
    EngineDead,
    EngineManager,
    EngineNotStarted,
    GenerationChunk,
    InvalidRequest,
    ProcessEngine,
    ReasoningFormat,
    SimpleEngine,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    ToolFormat,
)
from mlx_engine.limits import DEFAULT_LIMITS
from mlx_engine.params import SamplingParams
from mlx_engine.questions import PromptFacts, PromptQuestion
from mlx_engine.remote.client import Client
from mlx_engine.remote.remote_engine import RemoteEngine
from mlx_engine.remote.remote_request import NOTHING, RemoteRequest
from mlx_engine.remote.wire.messages import (
    Ask,
    Chunk,
    Facts,
    decode_from_client,
    decode_from_server,
    encode,
)
from mlx_engine.remote.wire.options import options_from_wire, options_to_wire
from mlx_engine.remote.wire.values import (
    chunk_to_wire,
    question_from_wire,
    question_to_wire,
    request_from_wire,
    request_to_wire,
    result_from_wire,
    result_to_wire,
)
from mlx_engine.requests import ChatPrompt, GenerationRequest, TextPrompt
from mlx_engine.testing import FakeAnswer, FakeEngine, Gate
from tests.remote.hosting import Stranger, client, hosted
from tests.remote.scripted import World
from tests.remote.test_manager import managed
from tests.waiting import until

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "What is the weather?"}]
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}


# The wire


def test_a_chat_travels_with_all_its_options() -> None:
    continued = [*USER, {"role": "assistant", "content": "It"}]
    chat = ChatPrompt.of(
        continued,
        [TOOL],
        {"a": 1},
        thinking=False,
        max_reasoning_tokens=7,
        continue_final_message=True,
        tool_choice="none",
        parallel_tool_calls=False,
    )
    for source in (chat, ChatPrompt.of(USER), TextPrompt([1, 2]), TextPrompt("x")):
        question = PromptQuestion("count_tokens", source)
        (asked,) = decode_from_client(question_to_wire(3, question))
        assert isinstance(asked, Ask)
        assert question_from_wire(asked, limits=DEFAULT_LIMITS) == question
        request = GenerationRequest(source, SamplingParams())
        payload = request_to_wire(1, request, name="", stream=True, progress=False)
        (told,) = decode_from_client(payload)
        assert request_from_wire(told, trusted=True, limits=DEFAULT_LIMITS) == request  # type: ignore[arg-type]


def test_an_option_of_a_chat_that_does_not_exist_is_refused() -> None:
    asked = Ask(1, None, (USER, None, {}, {"nonsense": 1}), "count_tokens")
    with pytest.raises(InvalidRequest, match="nonsense"):
        question_from_wire(asked, limits=DEFAULT_LIMITS)


def test_chunks_travel_whatever_a_model_writes() -> None:
    delta = ToolCallDelta(1, "id", "na\ud800me", '{"a": 1}', "bad \udfff")
    entry = TokenLogprob(7, -0.5, (TokenLogprob(8, -1.0, text="é"),), " a")
    for chunk in (
        GenerationChunk("x\ud800", (1,), "tool_call", (entry,), None, delta),
        GenerationChunk("", (), "reasoning", (), "tool_calls"),
    ):
        (told,) = decode_from_server(encode([chunk_to_wire(5, chunk)]))
        assert isinstance(told, Chunk)
        back = GenerationChunk(*msgspec.structs.astuple(told)[1:])
        clean = None if delta is not chunk.tool_call else replace(
            delta, name="na\\ud800me", error="bad \\udfff"
        )  # fmt: skip
        text = chunk.text.replace("\ud800", "\\ud800")
        assert back == replace(chunk, text=text, tool_call=clean)


def test_calls_travel_with_their_mistakes() -> None:
    calls = (
        ToolCall("f", {"a": 10**30}, "raw", id="1"),
        ToolCall("g\ud800", {}, "raw\ud800", error="cut off", id="2"),
        ToolCall(raw="oops", error="no name", id="3"),
    )
    (told,) = decode_from_server(encode([result_to_wire(1, replace(NOTHING, tool_calls=calls))]))
    back = result_from_wire(told).tool_calls  # type: ignore[arg-type]
    assert back[0] == calls[0]
    assert (back[1].name, back[1].raw, back[1].error) == ("g\\ud800", "raw\\ud800", "cut off")
    assert back[2] == calls[2]


def test_facts_travel() -> None:
    facts = PromptFacts(3, "text", (1, 2, 3), 2, ("a note",))
    (told,) = decode_from_server(encode([Facts(1, facts)]))
    assert isinstance(told, Facts)
    assert told.facts == facts


@dataclass(frozen=True)
class OwnFormat:
    start: str = "<call>"


def test_a_format_of_the_users_own_does_not_travel() -> None:
    thought = ReasoningFormat("<a>", "</a>")
    options = {"tool_format": ToolFormat("<call>", "</call>"), "reasoning_format": thought}
    process = ProcessEngine("demo", **options)
    assert options_from_wire(options_to_wire(process._config)) == options
    ProcessEngine("demo", tool_format="hermes", reasoning_format="none")
    with pytest.raises(InvalidRequest, match=r"^tool_format: .* cannot go to another process"):
        ProcessEngine("demo", tool_format=OwnFormat())
    with pytest.raises(InvalidRequest, match=r"^tool_format: .* cannot go to another process"):
        ProcessEngine("demo", tool_format=ToolFormat("<call>", body=()))
    with pytest.raises(InvalidRequest, match=r"^tool_format: must be the name of a format"):
        ProcessEngine("demo", tool_format=5)


@pytest.mark.parametrize("kind", [SimpleEngine, BatchedEngine, ProcessEngine])
def test_a_format_that_does_not_exist_is_refused_before_anything_is_loaded(kind: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^tool_format: .* did you mean hermes"):
        kind("demo", tool_format="hermess")
    with pytest.raises(InvalidRequest, match=r"^tool_format: a name or a format"):
        kind("demo", tool_format=ReasoningFormat("<a>", "</a>"))
    with pytest.raises(InvalidRequest, match=r"^reasoning_format: "):
        kind("demo", reasoning_format="hermes")


def test_calls_of_an_engine_that_is_gone_are_told_and_must_not_be_made() -> None:
    asked = GenerationRequest(ChatPrompt.of(USER, [TOOL]), SamplingParams())
    request = RemoteRequest(Client("x", None, 2**20), asked, None, "req-1")
    emit = request._emit_to(lambda chunk: None)
    emit(GenerationChunk("So.", (1,)))
    emit(GenerationChunk("time", (2,), "tool_call", tool_call=ToolCallDelta(0, "a", "time")))
    emit(GenerationChunk("{}", (3,), "tool_call", tool_call=ToolCallDelta(0, arguments="{}")))
    emit(GenerationChunk(";", (4,), "tool_call"))
    emit(GenerationChunk("x", (5,), "tool_call", tool_call=ToolCallDelta(1, "b", error="none")))
    result = request.partial_result()
    first, second = result.tool_calls
    assert (first.name, first.id, first.raw, first.ok) == ("time", "a", "time{};", False)
    assert (second.name, second.raw, second.error) == ("", "x", "none")
    assert (result.text, result.tokens) == ("So.", (1, 2, 3, 4, 5))


# A process


async def test_a_process_answers_what_the_engine_in_it_would(tiny_path: Path) -> None:
    async with (
        BatchedEngine(tiny_path) as here,
        ProcessEngine(tiny_path, engine="batched") as there,
    ):
        for engine in (here, there):
            await engine.chat(USER, max_tokens=3)
        assert await there.count_tokens("a b") == await here.count_tokens("a b")
        assert await there.render_chat(USER, tools=[TOOL]) == await here.render_chat(
            USER, tools=[TOOL]
        )
        assert (await there.render_chat(USER)).cached_tokens > 16
        assert await there.decode(await there.encode("Grüße")) == "Grüße"
        assert (there.supports_tools, there.supports_reasoning) == (True, True)
        assert there.model == here.model == str(tiny_path)
        for engine in (here, there):
            with pytest.raises(InvalidRequest) as caught:
                await engine.decode([999_999])
            assert caught.value.option == "tokens"
            with pytest.raises(InvalidRequest) as caught:
                await engine.encode("\ud800")
            assert caught.value.option == "text"
    with pytest.raises(EngineNotStarted):
        await ProcessEngine(tiny_path).count_tokens("a")
    assert (there.supports_tools, there.supports_reasoning) == (False, False)


# A host


@pytest.fixture
async def remote() -> AsyncIterator[RemoteEngine]:
    answer = FakeAnswer("I look.", reasoning="Hm.", tool_calls=[("time", {"zone": "CET"})])
    async with (
        FakeEngine(answer, model="its-model") as engine,
        hosted(engine) as host,
        client(host) as remote,
    ):
        yield remote


async def test_a_client_is_told_no_path_of_the_hosts_machine() -> None:
    async with (
        FakeEngine(model="/home/somebody/models/its-model") as engine,
        hosted(engine) as host,
        client(host) as remote,
    ):
        assert remote.model == "its-model"


async def test_a_client_of_a_host_sees_all_of_it(remote: RemoteEngine) -> None:
    assert remote.model == "its-model"
    assert (remote.supports_tools, remote.supports_reasoning) == (True, True)
    assert RemoteEngine("/tmp/nobody").model is None
    count = await remote.count_tokens(USER, tools=[TOOL])
    async with remote.stream_chat(USER, tools=[TOOL], logprobs=1) as stream:
        chunks = [chunk async for chunk in stream]
    result = stream.result
    assert result.usage.prompt_tokens == count
    assert result.finish_reason == chunks[-1].finish_reason == "tool_calls"
    (call,) = result.tool_calls
    deltas = [chunk.tool_call for chunk in chunks if chunk.tool_call is not None]
    assert (deltas[0].id, deltas[0].name) == (call.id, "time")
    assert "".join(delta.arguments for delta in deltas) == '{"zone": "CET"}'
    assert {entry.text for entry in result.logprobs} >= {"I", " look.", "Hm."}
    assert (await remote.render_chat(USER, tools=[TOOL])).cached_tokens == count - 1
    assert await remote.decode(result.tokens[:1]) == "Hm."


async def test_a_long_question_is_answered(remote: RemoteEngine) -> None:
    """One that is looked through in steps, by its host."""
    assert await remote.count_tokens([7] * 100_000) == 100_000
    assert await remote.count_tokens("word " * 50_000) == 50_001
    with pytest.raises(InvalidRequest, match=r"^prompt: "):
        await remote.count_tokens("x" * 9_000_000)


async def test_a_host_refuses_what_makes_no_sense() -> None:
    async with FakeEngine() as engine, hosted(engine) as host:
        async with Stranger.at(host, hello=True) as stranger:
            await stranger.say(Ask(1, None, None, "count_tokens"))
            await stranger.say(Ask(2, "x", None, "decode"))
            await stranger.say(Ask(3, None, ([], None, {}, {}), "render_chat"))
            await until(lambda: not host.pending)
            while len(stranger.heard) < 4:
                await stranger.hear()
        kinds = [getattr(one, "kind", None) for one in stranger.heard[1:]]
        assert kinds.count("InvalidRequest") >= 2
        async with client(host) as remote:
            assert await remote.count_tokens("a b") == 2


async def test_a_client_that_leaves_takes_its_questions_along() -> None:
    gate = Gate()
    async with FakeEngine(["a", gate]) as engine, hosted(engine) as host:
        async with client(host) as remote:
            task = asyncio.create_task(remote.generate("x"))
            await gate.reached()
            assert await remote.count_tokens("a b c") == 3, "a request is held at its gate"
            gate.open()
            await task
        await until(lambda: not host.pending)


# Replicas


async def test_any_replica_answers() -> None:
    world = World()
    async with managed(world) as manager:
        assert await manager.count_tokens("a") == 7
        assert manager.supports_tools
        assert not manager.supports_reasoning
        assert manager.model == "scripted"
        world[1].dies_of_questions = True
        assert (await manager.render_chat(USER)).text == "replica-2"
    assert not manager.supports_tools


async def test_a_busy_replica_is_passed_over_by_questions_too() -> None:
    world = World()
    async with managed(world) as manager:
        world[1].busy = True
        assert (await manager.render_chat(USER)).text == "replica-2"
        world[2].busy = True
        with pytest.raises(EngineBusy) as refused:
            await manager.count_tokens("a")
        assert refused.value.retry_after == 1.0  # the shorter one


async def test_a_question_that_kills_replicas_is_given_up() -> None:
    world = World()
    async with managed(world) as manager:
        world[1].dies_of_questions = world[2].dies_of_questions = True
        with pytest.raises(EngineDead):
            await manager.count_tokens("a")


async def test_a_manager_that_is_not_started_says_so() -> None:
    with pytest.raises(EngineNotStarted):
        await EngineManager("demo").count_tokens("a")
