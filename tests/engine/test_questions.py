"""Questions about prompts are answered beside requests: without a turn, and without MLX."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    ContextLengthExceeded,
    EngineNotStarted,
    EngineStopped,
    GenerationError,
    InvalidRequest,
    SimpleEngine,
)
from mlx_engine.core import preparer
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.testing import FakeEngine
from tests.conftest import settled
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

Ask = Callable[[BaseEngine], Awaitable[Any]]
QUESTIONS: dict[str, Ask] = {
    "count_tokens": lambda e: e.count_tokens("Once upon a time"),
    "count_tokens of a chat": lambda e: e.count_tokens(USER, tools=[TOOL]),
    "render_chat": lambda e: e.render_chat(USER),
    "encode": lambda e: e.encode("Hello"),
    "decode": lambda e: e.decode([1, 2]),
}
every_question = pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)


class Standing:
    """A step of the tokenizer that stands still until it is let go."""

    def __init__(self, engine: Any, only: str = "") -> None:
        self.inside = 0
        self._only = only  # text that others do not have
        self.texts: list[Any] = []  # in the order in which they came
        self.go = threading.Event()
        self._owner = engine._holder.vocabulary.tokenizer._tokenizer
        self._real = self._owner.encode
        self._owner.encode = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.texts.append(args[0])
        if self._only in args[0]:
            self.inside += 1
            assert self.go.wait(PATIENCE)
        return self._real(*args, **options)

    def restore(self) -> None:
        self.go.set()
        self._owner.encode = self._real


async def test_the_count_is_that_of_the_request(engine: BaseEngine) -> None:
    for prompt in ("Once upon a time", [1, 2, 3]):
        result = await engine.generate(prompt, max_tokens=1)
        assert await engine.count_tokens(prompt) == result.usage.prompt_tokens
    for options in (
        {},
        {"tools": [TOOL], "parallel_tool_calls": False},
        {"chat_template_kwargs": {"enable_thinking": "open"}, "max_reasoning_tokens": 9},
    ):
        result = await engine.chat(USER, max_tokens=1, **options)  # type: ignore[arg-type]
        assert await engine.count_tokens(USER, **options) == result.usage.prompt_tokens  # type: ignore[arg-type]
        chat = await engine.render_chat(USER, **options)  # type: ignore[arg-type]
        assert len(chat.tokens) == result.usage.prompt_tokens
        assert await engine.decode(chat.tokens) == chat.text
        assert USER[0]["content"] in chat.text
    again = [*USER, result, {"role": "user", "content": "And in Rome?"}]
    assert await engine.count_tokens(again) == len((await engine.render_chat(again)).tokens)


async def test_notes_tell_what_would_be_done_in_another_way(engine: BaseEngine) -> None:
    chat = await engine.render_chat(USER, chat_template_kwargs={"nonsense": 1})
    assert any("nonsense" in note for note in chat.notes)


async def test_encode_and_decode(engine: BaseEngine) -> None:
    tokens = await engine.encode("Grüße 🙂")
    assert (await engine.generate("Grüße 🙂", max_tokens=1)).usage.prompt_tokens == len(tokens)
    assert await engine.decode(tokens) == "Grüße 🙂"
    assert await engine.decode(tokens[:-1]) == "Grüße \ufffd", "a part of a character"
    assert (await engine.encode(""), await engine.decode([])) == ([], "")


async def test_what_is_cached_is_looked_at_and_not_touched(engine: BaseEngine) -> None:
    assert (await engine.render_chat(USER)).cached_tokens == 0
    result = await engine.chat(USER, max_tokens=4)
    await settled()  # a batch stores a moment later
    before = engine.stats()
    chat = await engine.render_chat(USER)
    assert chat.cached_tokens == result.usage.prompt_tokens - 1
    more = [*USER, result.message(), {"role": "user", "content": "And in Rome?"}]
    assert (await engine.render_chat(more)).cached_tokens > 16
    assert engine.stats() == before, "no lookup is counted"
    again = await engine.chat(more, max_tokens=1)
    assert again.usage.cached_tokens > 16


@every_question
async def test_no_turn_is_waited_for(engine: BaseEngine, ask: Ask) -> None:
    """While the MLX thread belongs to somebody else."""
    began, go = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert go.wait(PATIENCE)

    held = asyncio.create_task(engine.run_blocking(hold))
    await until(began.is_set)
    try:
        assert await ask(engine)
        assert mlx_thread.locked
    finally:
        go.set()
        await held


@pytest.mark.parametrize("kind", [SimpleEngine, BatchedEngine])
@every_question
async def test_the_state_is_looked_at(kind: Any, ask: Ask, tiny_path: Path) -> None:
    engine: BaseEngine = kind(tiny_path)
    with pytest.raises(EngineNotStarted):
        await ask(engine)
    async with engine:
        pass
    with pytest.raises(EngineStopped):
        await ask(engine)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_caller_is_told_when_the_helper_is_out(
    engine: BaseEngine, times: int
) -> None:
    standing = Standing(engine)
    try:
        task = asyncio.create_task(engine.count_tokens("Once"))
        await until(lambda: standing.inside == 1)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        standing.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        standing.restore()
    assert not engine._lifecycle.in_flight  # type: ignore[attr-defined]
    assert await engine.count_tokens("Once") == 4


async def test_one_that_waits_for_a_thread_leaves_at_once(engine: BaseEngine) -> None:
    standing = Standing(engine)
    try:
        tasks = [asyncio.create_task(engine.count_tokens("Once")) for _ in range(2)]
        await until(lambda: standing.inside == 1)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert standing.inside == 1
    finally:
        standing.restore()
    assert await tasks[0] == 4


async def test_long_questions_keep_no_request_from_a_thread(engine: BaseEngine) -> None:
    standing = Standing(engine, only="Once")
    try:
        tasks = [asyncio.create_task(engine.count_tokens("Once")) for _ in range(3)]
        await until(lambda: standing.inside == 1)
        for _ in range(10):  # more than every how many the oldest goes first
            assert len((await engine.generate("A request", max_tokens=1)).tokens) == 1
        assert standing.inside == 1, "one is answered at a time"
    finally:
        standing.restore()
    assert await asyncio.gather(*tasks) == [4, 4, 4]


async def test_requests_are_prepared_before_questions_are_answered(
    engine: BaseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or somebody's many questions would keep the requests of others from their turns."""
    monkeypatch.setattr(preparer, "_THREADS", 1)
    standing = Standing(engine)
    try:
        tasks = [asyncio.create_task(engine.count_tokens("Once"))]
        await until(lambda: standing.inside == 1)
        tasks.append(asyncio.create_task(engine.count_tokens("Again")))
        request = asyncio.create_task(engine.generate("A request", max_tokens=1))
        await until(lambda: engine.stats().waiting + engine.stats().running == 1)
        standing.go.set()
        await asyncio.gather(*tasks, request)
    finally:
        standing.restore()
    assert standing.texts == ["Once", "A request", "Again"]


async def test_a_shutdown_ends_them(engine: BaseEngine) -> None:
    standing = Standing(engine)
    try:
        task = asyncio.create_task(engine.count_tokens("Once"))
        await until(lambda: standing.inside == 1)
        stop = asyncio.create_task(engine.shutdown(0))
        await asyncio.sleep(0)
        standing.go.set()
        report = await stop
        with pytest.raises(EngineStopped):
            await task
    finally:
        standing.restore()
    assert report.aborted == report.finished == ()


async def test_a_shutdown_with_time_lets_them_finish(engine: BaseEngine) -> None:
    standing = Standing(engine)
    try:
        task = asyncio.create_task(engine.count_tokens("Once"))
        await until(lambda: standing.inside == 1)
        stop = asyncio.create_task(engine.shutdown(None))
        await asyncio.sleep(0)
        standing.go.set()
        await stop
    finally:
        standing.restore()
    assert await task == 4


async def test_what_a_tokenizer_raises_is_an_error_of_ours(engine: BaseEngine) -> None:
    tokenizer = engine._holder.vocabulary.tokenizer._tokenizer  # type: ignore[attr-defined]
    real = tokenizer.encode

    def fail(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("odd text")

    tokenizer.encode = fail
    try:
        with pytest.raises(GenerationError, match="ZeroDivisionError: odd text"):
            await engine.count_tokens("Once")
    finally:
        tokenizer.encode = real


REFUSED: dict[str, tuple[str, Ask]] = {
    "text and tools": ("tools", lambda e: e.count_tokens("a", tools=[TOOL])),
    "text and a choice": ("tool_choice", lambda e: e.count_tokens("a", tool_choice="none")),
    "text and thinking": ("thinking", lambda e: e.count_tokens("a", thinking=False)),
    "text and one call": (
        "parallel_tool_calls",
        lambda e: e.count_tokens("a", parallel_tool_calls=False),
    ),
    "text and a budget": (
        "max_reasoning_tokens",
        lambda e: e.count_tokens("a", max_reasoning_tokens=5),
    ),
    "text to continue": (
        "continue_final_message",
        lambda e: e.count_tokens("a", continue_final_message=True),
    ),
    "one message": ("messages", lambda e: e.count_tokens(USER[0])),  # type: ignore[arg-type]
    "an empty prompt": ("prompt", lambda e: e.count_tokens("")),
    "no prompt": ("prompt", lambda e: e.count_tokens(5)),  # type: ignore[arg-type]
    "a token that is none": ("prompt", lambda e: e.count_tokens([999_999])),
    "no messages": ("messages", lambda e: e.render_chat([])),
    "text as messages": ("messages", lambda e: e.render_chat("hi")),  # type: ignore[arg-type]
    "a bad role": ("messages", lambda e: e.count_tokens([{"role": "x", "content": "y"}])),
    "bad tools": ("tools", lambda e: e.render_chat(USER, tools=[{"oops": 1}])),
    "no text": ("text", lambda e: e.encode(5)),  # type: ignore[arg-type]
    "half a character": ("text", lambda e: e.encode("\ud800")),
    "tokens as text": ("tokens", lambda e: e.decode("ab")),  # type: ignore[arg-type]
    "one token": ("tokens", lambda e: e.decode(5)),  # type: ignore[arg-type]
    "negative": ("tokens", lambda e: e.decode([-1])),
    "too large": ("tokens", lambda e: e.decode([999_999])),
}


@pytest.mark.parametrize(("option", "ask"), REFUSED.values(), ids=REFUSED)
async def test_what_is_wrong_is_refused_by_name(engine: BaseEngine, option: str, ask: Ask) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await ask(engine)
    assert caught.value.option == option


async def test_a_prompt_that_is_too_long_is_counted_all_the_same(engine: BaseEngine) -> None:
    assert engine.context_length == 16384
    assert await engine.count_tokens("ab" * 10_000) == 20_000
    assert await engine.count_tokens([1] * 20_000) == 20_000
    with pytest.raises(ContextLengthExceeded, match="more than 4 times as long"):
        await engine.count_tokens("ab" * 200_000)


async def test_what_a_model_can_do_is_told(tiny_path: Path, engine_type: Any) -> None:
    engine = engine_type(tiny_path)
    assert engine.model == str(tiny_path)
    assert (engine.supports_tools, engine.supports_reasoning) == (False, False)
    async with engine:
        assert (engine.supports_tools, engine.supports_reasoning) == (True, True)
    assert (engine.supports_tools, engine.supports_reasoning) == (False, False)
    async with engine_type(tiny_path, tool_format="none", reasoning_format="none") as engine:
        assert (engine.supports_tools, engine.supports_reasoning) == (False, False)


async def test_a_model_that_is_not_shown_tools_supports_none(
    tiny_path: Path, tmp_path: Path, engine_type: Any
) -> None:
    """Whatever the format in which it might call them."""
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    async with engine_type(folder, tool_format="hermes") as engine:
        assert not engine.supports_tools
        with pytest.raises(InvalidRequest, match=r"does not show tools.*engine\.supports_tools"):
            await engine.chat(USER, tools=[TOOL], max_tokens=1)
        assert (await engine.chat(USER, max_tokens=1)).tokens
        assert not engine.supports_tools


async def test_log_probabilities_have_the_text_of_their_tokens(engine: BaseEngine) -> None:
    result = await engine.generate("Once upon", max_tokens=8, logprobs=2, ignore_eos=True)
    for entry in result.logprobs:
        assert entry.text == await engine.decode([entry.token])
        assert [one.text for one in entry.top] == [
            await engine.decode([one.token]) for one in entry.top
        ]


async def test_a_fake_engine_answers_as_it_counts() -> None:
    async with FakeEngine("It is sunny.") as engine:
        result = await engine.chat(USER, tools=[TOOL])
        chat = await engine.render_chat(USER, tools=[TOOL])
        assert len(chat.tokens) == result.usage.prompt_tokens
        assert chat.cached_tokens == len(chat.tokens) - 1
        assert await engine.count_tokens(USER, tools=[TOOL]) == len(chat.tokens)
        assert await engine.decode(await engine.encode("two words")) == "two words"
        assert await engine.decode(result.tokens) == "It is sunny."
        assert (engine.model, engine.supports_tools, engine.supports_reasoning) == (
            "fake",
            True,
            True,
        )
        with pytest.raises(InvalidRequest):
            await engine.count_tokens(USER, tools=[{"oops": 1}])


async def test_an_empty_answer_to_a_plain_prompt_says_why(engine: BaseEngine) -> None:
    """Models that know chats often end at once where a question is not put as one."""
    ends: dict[str, Any] = {"logit_bias": {257: 1000.0}, "max_tokens": 5}
    asked = await engine.generate("What is the capital of France?", **ends)
    assert (asked.text, asked.finish_reason) == ("", "stop")
    assert [note for note in asked.notes if '{"role": "user"' in note]
    tokens = await engine.generate([1, 2, 3], **ends)
    chat = await engine.chat([{"role": "user", "content": "Hi"}], **ends)
    stopped = await engine.generate("Hi", max_tokens=0)
    assert tokens.notes == chat.notes == stopped.notes == ()
