"""Chats on models whose caches cannot be cut back: what a next turn has of the one before."""

from __future__ import annotations

import asyncio
import copy
import itertools
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.models.cache import ArraysCache, LRUPromptCache
from mlx_lm.server import ResponseGenerator
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_engine import BaseEngine, BatchedEngine, GenerationResult, SimpleEngine
from tests.chat_models import ARCHITECTURES
from tests.conftest import ROOT, settled

pytestmark = pytest.mark.anyio

Messages = list[dict[str, Any]]
SYSTEM = {"role": "system", "content": "You answer in one word, and never about the weather. " * 2}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": about, "parameters": {"type": "object"}},
    }
    for name, about in (("read", "Reads a file of the project."), ("run", "Runs a program."))
]
THINKING: list[dict[str, Any]] = [{}, {"enable_thinking": False}]
EngineType = type[SimpleEngine] | type[BatchedEngine]
PYTHON = [sys.executable, "-m", "tests.chat_models"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, reasoning: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | (
        {} if reasoning is None else {"reasoning_content": reasoning}
    )


def call(name: str, reasoning: str | None = None) -> list[dict[str, Any]]:
    """An assistant's call of a tool, and its result."""
    made = {"type": "function", "id": "1", "function": {"name": name, "arguments": {"a": 1}}}
    result = f"{name} has written these lines, which are many. " * 2
    return [
        answer("", reasoning) | {"tool_calls": [made]},
        {"role": "tool", "content": result, "tool_call_id": "1"},
    ]


def talk(reasons: bool) -> list[Messages]:
    """The messages of each turn of a conversation."""
    turns: list[Messages] = [[SYSTEM]]
    for n, subject in enumerate(("a river", "a city of that country", "its mayor", "a bird")):
        reasoning = f"They ask for {subject}, and I know several." if reasons else None
        turns[-1].append(user(f"Tell me the name of {subject}, please."))
        turns.append([*turns[-1], answer(f"Number {n}.", reasoning)])
    return turns[:-1]


def loop(reasons: bool) -> list[Messages]:
    """An agent's: two calls and an answer, another question, and a call."""
    reasoning = "I have to look at the file before I say anything." if reasons else None
    first = [SYSTEM, user("Why do the tests of this project fail?")]
    second = [*first, *call("read", reasoning)]
    third = [*second, *call("run", reasoning)]
    fourth = [*third, answer("A typing error.", reasoning), user("Mend it, then.")]
    return [first, second, third, fourth, [*fourth, *call("run", reasoning)]]


CHATS: dict[str, tuple[list[Messages], Any]] = {
    "talk": (talk(reasons=True), None),
    "talk without reasoning": (talk(reasons=False), None),
    "calls of tools": (loop(reasons=True), TOOLS),
    "calls, reasoning not given back": (loop(reasons=False), TOOLS),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([*PYTHON, str(folder)], check=True, cwd=ROOT)
    return folder


class Template:
    """What a model's own template and tokenizer make of messages."""

    def __init__(self, folder: Path, tools: Any, options: dict[str, Any]) -> None:
        self.tokenizer = load_tokenizer(folder)
        self._given = {"tools": tools, **options}

    def tokens(self, messages: Messages, *, generation: bool = False) -> list[int]:
        tokens: list[int] = self.tokenizer.apply_chat_template(
            copy.deepcopy(messages), add_generation_prompt=generation, **self._given
        )
        return tokens

    def promised(self, earlier: Messages, prompt: list[int]) -> int:
        """Up to the last message's end of an earlier prompt before the two differ."""
        ends = (self.tokens(earlier[:n]) for n in range(len(earlier), 1, -1))
        return next((len(end) for end in ends if prompt[: len(end)] == end), 0)


class Server:
    """mlx_lm's own server: where it stores caches, and what it finds of a prompt."""

    def __init__(self, template: Template, tools: Any, options: dict[str, Any]) -> None:
        self._template, self._tools = template, tools
        self._args = SimpleNamespace(chat_template_kwargs=options)
        self._generator = SimpleNamespace(
            model_provider=SimpleNamespace(
                processor=None, cli_args=Namespace(chat_template_args={})
            )
        )
        self._stored = LRUPromptCache()

    def answer(self, messages: Messages, answer: tuple[int, ...]) -> int:
        """How many tokens of the prompt it would have had cached."""
        request = SimpleNamespace(
            request_type="chat",
            messages=copy.deepcopy(messages),
            tools=self._tools,
            role_mapping=None,
        )
        tokenize: Any = ResponseGenerator._tokenize
        prompt, segments, types, *_ = tokenize(
            self._generator, self._template.tokenizer, request, self._args
        )
        _, rest = self._stored.fetch_nearest_cache("model", prompt)
        cached, end = len(prompt) - len(rest), 0
        for segment, kind in zip(segments, types, strict=True):
            end += len(segment)
            if cached < end < len(prompt):
                self._stored.insert_cache("model", prompt[:end], [ArraysCache(1)], cache_type=kind)
        self._stored.insert_cache("model", [*prompt, *answer], [ArraysCache(1)])
        return cached


async def ask(
    engine: BaseEngine, messages: Messages, tools: Any = None, **options: Any
) -> GenerationResult:
    given = {"max_tokens": 4, "ignore_eos": True, **options}
    result = await engine.chat(messages, tools=tools, **given)
    await settled()  # the answer is stored a moment after it is given
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_a_turn_has_all_of_the_one_before_that_is_still_in_it(
    models: Path, engine_type: EngineType, architecture: str
) -> None:
    folder = models / architecture
    async with engine_type(folder) as engine, SimpleEngine(folder, prompt_cache_bytes=0) as cold:
        for name, kwargs in itertools.product(CHATS, THINKING):
            if kwargs and "reasoning" in name:
                continue  # whether it is given back makes no other prompt then
            turns, tools = CHATS[name]
            options = {"chat_template_kwargs": kwargs}
            template = Template(folder, tools, kwargs)
            server = Server(template, tools, kwargs)
            system = {"role": "system", "content": f"{name} {kwargs} {SYSTEM['content']}"}
            earlier: Messages = []
            for messages in ([system, *turn[1:]] for turn in turns):
                result = await ask(engine, messages, tools, **options)
                assert result.tokens == (await ask(cold, messages, tools, **options)).tokens
                cached = result.usage.cached_tokens
                prompt = template.tokens(messages, generation=True)
                promised = template.promised(earlier, prompt)
                assert promised > 100 or not earlier, "the conversation is one"
                assert cached >= promised
                assert cached >= server.answer(messages, result.tokens)
                earlier = messages
            # Somebody else with the same system message, who has not been here before.
            other = [system, user("What else can you do?")]
            result = await ask(engine, other, tools, **options)
            assert result.usage.cached_tokens >= len(template.tokens([system]))
            assert result.tokens == (await ask(cold, other, tools, **options)).tokens


@pytest.fixture
def hybrid(models: Path) -> Path:
    return models / "qwen3_5"


async def test_the_example_of_a_model_that_reasons(hybrid: Path, engine_type: EngineType) -> None:
    """Its prompts end with an opened reasoning, which its past answers do not have."""
    template = Template(hybrid, None, {})
    messages = [{"role": "system", "content": "You are a careful assistant. " * 18}]
    found = []
    async with engine_type(hybrid) as engine:
        for turn in range(3):
            messages.append(user(f"Question {turn}: what is it?"))
            opened = len(template.tokens(messages, generation=True)) - len(["<think>", "\n"])
            found.append(((await ask(engine, messages)).usage.cached_tokens, opened))
            messages.append(answer("It is so."))
    (first, one), (second, two), (third, _) = found
    assert (first, second, third) == (0, one, two)


async def test_a_turn_that_was_cancelled_and_taken_further_by_its_user(
    hybrid: Path, engine_type: EngineType
) -> None:
    """The next prompt has no answer between the two messages, and so no beginning of one."""
    template = Template(hybrid, None, {})
    first = [SYSTEM, user("Tell me all about the rivers of this country, please.")]
    async with engine_type(hybrid) as engine:
        async with engine.stream_chat(first, max_tokens=500, ignore_eos=True) as stream:
            async for _ in stream:
                break
        await settled()
        result = await ask(engine, [*first, user("No, about its towns.")])
    assert result.usage.cached_tokens >= len(template.tokens(first))


async def test_a_conversation_that_comes_in_the_middle_of_its_calls(
    hybrid: Path, engine_type: EngineType
) -> None:
    """Another engine has seen its beginning; the next question drops the reasoning of them all."""
    template = Template(hybrid, TOOLS, {})
    *_, calls, question, _ = loop(reasons=True)
    async with engine_type(hybrid) as engine:
        assert (await ask(engine, calls, TOOLS)).usage.cached_tokens == 0
        result = await ask(engine, question, TOOLS)
    assert result.usage.cached_tokens >= len(template.tokens(calls[:2]))


async def test_many_chats_at_once_have_their_next_turns_cached(hybrid: Path) -> None:
    template = Template(hybrid, None, {})
    chats = [[SYSTEM, user(f"{n}. Name a river of the {n}th country.")] for n in range(5)]
    async with BatchedEngine(hybrid) as engine:
        for turn in range(3):
            results = await asyncio.gather(*(ask(engine, chat) for chat in chats))
            for chat, result in zip(chats, results, strict=True):
                if turn:
                    assert result.usage.cached_tokens >= len(template.tokens(chat[:-2]))
                chat += [answer("The Rhine."), user(f"And a longer one? Not number {turn}.")]
        assert engine.stats().prompt_cache.misses <= len(chats)


@pytest.mark.parametrize("architecture", ["qwen3_5", "gemma3_text", "mamba2"])
async def test_a_long_conversation_within_few_bytes_keeps_its_beginning_and_its_end(
    models: Path, engine_type: EngineType, architecture: str
) -> None:
    folder = models / architecture
    template = Template(folder, TOOLS, {})
    async with engine_type(folder) as engine:
        for messages in loop(reasons=True):
            await ask(engine, messages, TOOLS)
        whole = engine.stats().prompt_cache.nbytes
    limit = whole * 2 // 3
    async with engine_type(folder, prompt_cache_bytes=limit) as engine:
        messages = [SYSTEM, user("Why do the tests of this project fail?")]
        earlier = 0
        for _ in range(6):
            result = await ask(engine, messages, TOOLS)
            assert engine.stats().prompt_cache.nbytes <= limit
            assert result.usage.cached_tokens >= earlier
            earlier = len(template.tokens(messages))
            messages = [*messages, *call("read", "Let me look once more.")]
        stored = engine.stats().prompt_cache
        assert stored.evicted > 0
        assert stored.refused == 0
        result = await ask(engine, [SYSTEM, user("Something else.")], TOOLS)
        assert result.usage.cached_tokens >= len(template.tokens([SYSTEM]))


async def test_a_conversation_larger_than_the_limit_leaves_what_was_stored(
    hybrid: Path, engine_type: EngineType
) -> None:
    first = [SYSTEM, user("Why do the tests of this project fail?")]
    async with engine_type(hybrid) as engine:
        await ask(engine, first, TOOLS)
        limit = engine.stats().prompt_cache.nbytes
    async with engine_type(hybrid, prompt_cache_bytes=limit) as engine:
        await ask(engine, first, TOOLS)
        await ask(engine, [*first, *call("read" * 20), *call("run" * 20), *call("run")], TOOLS)
        assert engine.stats().prompt_cache.refused > 0
        result = await ask(engine, [*first, *call("run")], TOOLS)
        assert result.usage.cached_tokens >= len(Template(hybrid, TOOLS, {}).tokens(first))


async def test_places_are_kept_in_a_file(hybrid: Path, tmp_path: Path) -> None:
    template = Template(hybrid, TOOLS, {})
    *_, calls, question, _ = loop(reasons=True)
    other = [SYSTEM, user("Something else.")]
    async with SimpleEngine(hybrid) as engine:
        await ask(engine, calls, TOOLS)
        assert await engine.save_prompt_cache(tmp_path / "cache") == 1
    async with SimpleEngine(hybrid) as engine:
        assert await engine.load_prompt_cache(tmp_path / "cache") == 1
        results = [await ask(engine, messages, TOOLS) for messages in (question, other)]
    async with SimpleEngine(hybrid, prompt_cache_bytes=0) as cold:
        expected = [await ask(cold, messages, TOOLS) for messages in (question, other)]
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    ends = [len(template.tokens(calls[:2])), len(template.tokens([SYSTEM]))]
    assert all(r.usage.cached_tokens >= end for r, end in zip(results, ends, strict=True))


@pytest.mark.parametrize("options", [{"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 2048}])
async def test_where_prefill_chunks_matter_places_are_whole_chunks(
    hybrid: Path, options: dict[str, Any]
) -> None:
    async with (
        SimpleEngine(hybrid, prefill_step_size=32, **options) as engine,
        SimpleEngine(hybrid, prefill_step_size=32, prompt_cache_bytes=0, **options) as cold,
    ):
        earlier = 0
        for messages in talk(reasons=True):
            result = await ask(engine, messages)
            assert result.tokens == (await ask(cold, messages)).tokens
            assert result.usage.cached_tokens >= earlier // 32 * 32
            assert result.usage.cached_tokens % 32 == 0
            earlier = len(Template(hybrid, None, {}).tokens(messages))


async def test_chats_of_a_model_that_can_be_cut_back_stop_nowhere(
    tiny_path: Path, engine_type: EngineType
) -> None:
    async with engine_type(tiny_path) as engine:
        for messages in talk(reasons=True):
            await ask(engine, messages)
        assert engine.stats().prompt_cache.entries <= len(talk(reasons=True))
        assert engine.stats().prompt_cache.misses == 1
