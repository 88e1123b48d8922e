"""An engine in a process of its own gives what the same engine gives here."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypedDict

import numpy as np
import pytest

from mlx_engine import (
    AnyJSON,
    BaseEngine,
    BatchedEngine,
    Choice,
    DraftModel,
    EngineStopped,
    GenerationChunk,
    GenerationError,
    GenerationResult,
    Grammar,
    MLXEngineError,
    ProcessEngine,
    Regex,
    SamplingParams,
    SimpleEngine,
    SpecPrefill,
    StreamClosed,
    StreamConsumed,
    Timings,
)
from tests.remote import processors
from tests.waiting import until

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
NAMED = "tests.remote.processors:"
_NO_TIME = Timings(0, 0, 0, 0, 0, 0, 0)

Outcome = Callable[[BaseEngine], Awaitable[Any]]


class Flag(TypedDict):
    is_set: bool
    side: Literal["left", "right"]


@pytest.fixture(scope="module", params=["simple", "batched"])
def pair(
    request: pytest.FixtureRequest, tiny_path: Path
) -> Iterator[tuple[BaseEngine, ProcessEngine]]:
    """The same engine here and elsewhere; started in a loop that is closed by now."""
    here: BaseEngine = (SimpleEngine if request.param == "simple" else BatchedEngine)(tiny_path)
    elsewhere = ProcessEngine(tiny_path, engine=request.param)

    async def start() -> None:
        await here.start()
        await elsewhere.start()

    async def stop() -> None:
        await here.stop()
        await elsewhere.stop()

    asyncio.run(start())
    yield here, elsewhere
    asyncio.run(stop())


async def streamed(engine: BaseEngine, chat: bool = False, **options: Any) -> object:
    """A stream, put together: chunks may be cut in other places elsewhere, but are not."""
    stream = engine.stream_chat(USER, **options) if chat else engine.stream_generate(**options)
    async with stream:
        chunks: list[GenerationChunk] = [chunk async for chunk in stream]
    return chunks, stream.result


async def mapped(engine: BaseEngine, items: Any, **options: Any) -> object:
    """What became of items, in order."""
    outcomes = [outcome async for outcome in engine.map(items, ordered=True, **options)]
    return [(o.id, o.index, o.attempts, o.result or repr(o.error)) for o in outcomes]


OUTCOMES: dict[str, Outcome] = {
    "text": lambda e: e.generate("Once upon", max_tokens=30),
    "token ids": lambda e: e.generate([1, 2, 3, 250], max_tokens=30, ignore_eos=True),
    "unicode": lambda e: e.generate("żółć 🙂 \x00", max_tokens=5),
    "sampled with a seed": lambda e: e.generate(
        "a", max_tokens=40, temperature=0.9, top_p=0.9, seed=2**64 - 1, ignore_eos=True
    ),
    "bias, penalties and bounds": lambda e: e.generate(
        "a",
        SamplingParams(logit_bias={7: 3.5}, repetition_penalty=1.2, min_p=0.05, top_k=9),
        max_tokens=20,
        stop_token_ids=[40],
    ),
    "log-probabilities": lambda e: e.generate("abc", max_tokens=5, logprobs=3),
    "stop strings": lambda e: e.generate(
        "x", logits_processors=[NAMED + "SayStop"], stop=["STOP"], max_tokens=50
    ),
    "a chat with reasoning and a call": lambda e: e.chat(
        USER, tools=[TOOL], logits_processors=[NAMED + "SayToolCall"]
    ),
    "a malformed call": lambda e: e.chat(USER, logits_processors=[NAMED + "SayBadToolCall"]),
    "template options": lambda e: e.chat(
        USER,
        chat_template_kwargs={"enable_thinking": "open", "odd": [1, {"a": None}]},
        max_tokens=9,
    ),
    "a stream": lambda e: streamed(e, prompt="Once", max_tokens=30, logprobs=1),
    "a streamed chat": lambda e: streamed(
        e, chat=True, tools=[TOOL], logits_processors=[NAMED + "SayToolCall"]
    ),
    "a batch with a fault": lambda e: e.generate_batch(
        ["a", [999_999], "c"], [None, None, SamplingParams(seed=1, temperature=1)], max_tokens=9
    ),
    "a map": lambda e: mapped(e, {"a": "a", "b": [999_999], "c": USER}, max_tokens=9),
    "conversations in a batch": lambda e: e.generate_batch([USER, "c"], max_tokens=9),
    "an answer of a type": lambda e: e.generate(
        "a", output=Flag, max_tokens=99, temperature=1, seed=4
    ),
    "a streamed answer of a type": lambda e: streamed(
        e, prompt="a", output=Flag, max_tokens=99, temperature=1, seed=5
    ),
    "a cut answer of a type": lambda e: e.chat(USER, output=Flag, max_tokens=3),
    "one of some texts": lambda e: e.generate("a", constraint=Choice(["yes", "no"])),
    "a text of a grammar": lambda e: e.generate("a", constraint=Grammar('start: "a" | "b"')),
    "what a pattern matches": lambda e: e.generate("a", constraint=Regex("[0-9]{3}")),
    "any JSON": lambda e: e.generate("a", constraint=AnyJSON(), max_tokens=20),
    "a schema that is none": lambda e: e.generate("a", output={"type": "strin"}),
    "a grammar that is none": lambda e: e.generate("a", constraint=Grammar("start: nothing")),
    "opting out": lambda e: e.generate("a", prefill=None, decode=None, max_tokens=3),
    # errors
    "a token that is none": lambda e: e.generate([999_999]),
    "an empty prompt": lambda e: e.generate(""),
    "a prompt of another type": lambda e: e.generate(3.5),  # type: ignore[arg-type]
    "too long": lambda e: e.generate([1] * 20_000),
    "far too long": lambda e: e.generate("x" * 4_000_000),
    "time that is none": lambda e: e.generate("a", timeout=0),
    "no such option": lambda e: e.generate("a", max_tokns=3),  # type: ignore[call-arg]
    "out of range": lambda e: e.generate("a", temperature=-1),
    "a processor that fails": lambda e: e.generate("a", logits_processors=[NAMED + "fail"]),
    "a streamed fault": lambda e: streamed(e, prompt="a", logits_processors=[NAMED + "fail"]),
    "a processor that is not there": lambda e: e.generate("a", logits_processors=["no.such:one"]),
    "a name that is none": lambda e: e.generate("a", logits_processors=["nonsense"]),
    "no strategy": lambda e: e.generate("a", prefill=SpecPrefill(keep=0.5)),
    "a bad message": lambda e: e.chat([{"role": "user"}]),
    "a bad priority": lambda e: e.generate("a", priority="high"),  # type: ignore[arg-type]
    "not text": lambda e: e.generate("\udcff"),
    "no progress callback": lambda e: e.generate("a", on_progress=3),  # type: ignore[arg-type]
    "no cache file": lambda e: e.load_prompt_cache("/no/such/file"),
}


def comparable(value: Any) -> Any:
    """Without times and names."""
    if isinstance(value, GenerationResult):
        usage = replace(value.usage, cached_tokens=0)
        calls = tuple(replace(call, id="") for call in value.tool_calls)
        return replace(value, timings=_NO_TIME, request_id="", usage=usage, tool_calls=calls)
    if isinstance(value, GenerationChunk) and value.tool_call is not None:
        return replace(value, tool_call=replace(value.tool_call, id=None))
    if isinstance(value, list | tuple):
        return type(value)(comparable(one) for one in value)
    if isinstance(value, MLXEngineError):
        return type(value), re.sub(r"req-\d+", "req", str(value)), vars(value)
    return value


async def told(outcome: Outcome, engine: BaseEngine) -> Any:
    try:
        return comparable(await outcome(engine))
    except MLXEngineError as error:
        return comparable(error)


@pytest.mark.parametrize("name", OUTCOMES)
async def test_the_outcome_is_the_same(pair: tuple[BaseEngine, ProcessEngine], name: str) -> None:
    here, elsewhere = pair
    expected = await told(OUTCOMES[name], here)
    assert await told(OUTCOMES[name], elsewhere) == expected
    assert elsewhere.has_chat_template == here.has_chat_template
    assert elsewhere.context_length == here.context_length


async def test_what_cannot_travel_is_refused(pair: tuple[BaseEngine, ProcessEngine]) -> None:
    _, engine = pair
    with pytest.raises(ValueError, match=r"logits_processors: .*cannot go to another process"):
        engine.stream_generate("a", logits_processors=[processors.slow])
    with pytest.raises(ValueError, match=r"func: a function cannot go"):
        await engine.run_blocking(print)
    with pytest.raises(ValueError, match=r"chat_template_kwargs: .*cannot go to another process"):
        await engine.chat(USER, chat_template_kwargs={"odd": object()})
    assert (await engine.generate("a", max_tokens=2)).finish_reason == "length"


async def test_an_error_names_the_request_as_its_caller_knows_it(
    pair: tuple[BaseEngine, ProcessEngine],
) -> None:
    for engine in pair:
        stream = engine.stream_generate("a", logits_processors=[NAMED + "fail"])
        with pytest.raises(GenerationError, match=f"^{stream.request_id} failed: LookupError"):
            async for _ in stream:
                pass


async def test_a_stream_is_read_once_and_closed(pair: tuple[BaseEngine, ProcessEngine]) -> None:
    _, engine = pair
    stream = engine.stream_generate("a", max_tokens=5000, ignore_eos=True)
    async for chunk in stream:
        assert chunk.tokens
        break
    with pytest.raises(StreamConsumed):
        aiter(stream)
    await stream.aclose()
    await stream.aclose()
    assert stream.result.finish_reason == "cancelled"
    assert 1 <= len(stream.result.tokens) < 5000
    assert stream.result.request_id == stream.request_id
    with pytest.raises(StreamClosed):
        await anext(stream)
    await until(lambda: not engine.stats().running)
    assert engine.stats().waiting == 0


async def test_cancel_keeps_what_there_is(pair: tuple[BaseEngine, ProcessEngine]) -> None:
    _, engine = pair
    seen: list[GenerationChunk] = []
    async with engine.stream_generate("a", max_tokens=5000, ignore_eos=True) as stream:
        async for chunk in stream:
            seen.append(chunk)
            if len(seen) == 3:
                stream.cancel()
    assert seen[-1].finish_reason == "cancelled"
    assert tuple(token for chunk in seen for token in chunk.tokens) == stream.result.tokens


async def test_progress_of_a_prefill_is_told(pair: tuple[BaseEngine, ProcessEngine]) -> None:
    _, engine = pair
    told: list[int] = []
    await engine.generate([5] * 3000, max_tokens=1, on_progress=lambda p: told.append(p.done))
    await asyncio.sleep(0)
    assert told == sorted(told)
    assert told[-1] >= 2048
    done: list[tuple[int, int | None]] = []
    await engine.generate_batch(
        ["a", "b", "c"], max_tokens=1, on_progress=lambda p: done.append((p.done, p.total))
    )
    assert done[-1] == (3, 3)


async def test_the_prompt_cache_is_kept_on_disk(
    pair: tuple[BaseEngine, ProcessEngine], tmp_path: Path
) -> None:
    here, elsewhere = pair
    prompt = [9] * 700
    await elsewhere.generate(prompt, max_tokens=2)
    assert await elsewhere.save_prompt_cache(tmp_path / "cache") >= 1
    assert await here.load_prompt_cache(tmp_path / "cache") >= 0
    again = await elsewhere.generate(prompt, max_tokens=2)
    assert again.usage.cached_tokens > 600
    assert elsewhere.stats().prompt_cache.hits >= 1


async def test_many_at_once(pair: tuple[BaseEngine, ProcessEngine]) -> None:
    here, elsewhere = pair
    prompts = [f"number {i}" for i in range(24)]
    expected = await here.generate_batch(prompts, max_tokens=12)
    got = await asyncio.gather(*(elsewhere.generate(p, max_tokens=12) for p in prompts))
    assert [r.tokens for r in got] == [r.tokens for r in expected if not isinstance(r, Exception)]


@pytest.mark.parametrize("kind", ["simple", "batched"])
async def test_options_are_checked_before_a_process_is_started(kind: Any, tiny_path: Path) -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("prefill_step_size", {"prefill_step_size": 0}),
        ("nonsense", {"nonsense": 1}),
        ("decode", {"decode": "fast"}),
        ("queue_limit", {"queue_limit": -1}),
        ("watchdog", {"watchdog": 3}),
        ("on_progress", {"on_progress": 3}),
    ]
    bad.append(("max_batch_size", {"max_batch_size": 0}))
    if kind == "batched":
        bad.append(("kv_bits", {"kv_bits": 4}))
    for option, options in bad:
        with pytest.raises(ValueError, match=f"^{option}: "):
            ProcessEngine(tiny_path, engine=kind, **options)
    with pytest.raises(ValueError, match=r"^engine: "):
        ProcessEngine(tiny_path, engine="fast")  # type: ignore[arg-type]


async def test_strategies_travel(tiny_path: Path) -> None:
    prompt = "abc" * 40
    async with SimpleEngine(tiny_path) as here:
        expected = (await here.generate(prompt, max_tokens=40, ignore_eos=True)).tokens
    async with ProcessEngine(
        tiny_path,
        decode=DraftModel(tiny_path, num_draft_tokens=3),
        prefill=SpecPrefill(tiny_path, threshold=16, keep=0.5),
    ) as engine:
        full = await engine.generate(prompt, max_tokens=40, ignore_eos=True, prefill=None)
        assert full.tokens == expected
        assert full.timings.draft_tokens > 0
        other = SpecPrefill(keep=0.3, threshold=16)
        sparse = await engine.generate("xyz" * 99, max_tokens=4, prefill=other)
        assert sparse.usage.kept_tokens is not None
        with pytest.raises(ValueError, match=r"^decode: "):
            await engine.generate("a", decode="fast")  # type: ignore[arg-type]
    with pytest.raises(EngineStopped):
        await engine.generate("a")


async def test_values_of_other_types_are_the_same_or_are_refused(
    pair: tuple[BaseEngine, ProcessEngine],
) -> None:
    class Word(str):
        pass

    same: list[Outcome] = [
        lambda e: e.generate(Word("hello"), max_tokens=np.int64(4), stop=[np.str_("zz")]),
        lambda e: e.generate(np.array([1, 2, 3]), max_tokens=3),  # type: ignore[arg-type]
        lambda e: e.chat([MappingProxyType({"role": "user", "content": Word("hi")})], max_tokens=3),
        lambda e: e.chat(USER, chat_template_kwargs={"odd": np.float32(0.5)}, max_tokens=3),
    ]
    for outcome in same:
        here, elsewhere = pair
        assert await told(outcome, elsewhere) == await told(outcome, here)
    for odd in (Decimal("1.5"), {1, 2}, datetime.now(UTC)):
        with pytest.raises(ValueError, match=r"^tools: .* cannot go to another process"):
            await pair[1].chat(USER, tools=[{**TOOL, "x": odd}])
    with pytest.raises(ValueError, match=r"^top_k: must be an integer, from 0 to"):
        await pair[1].generate("a", top_k=2**70)


async def test_options_of_numpy_and_relative_paths(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_path.parent)
    engine = ProcessEngine(tiny_path.name, context_length=np.int64(100), queue_limit=np.int32(3))
    monkeypatch.chdir("/")
    async with engine:
        assert engine.context_length == 100
        with pytest.raises(ValueError, match=r"^path: must not have a NUL"):
            await engine.save_prompt_cache("a\0b")
        with pytest.raises(ValueError, match=r"^path: .*no such file"):
            await engine.load_prompt_cache("x" * 300)
    assert engine.context_length is None
    assert not engine.has_chat_template
    with pytest.raises(ValueError, match=r"^prompt_cache_bytes: must be an integer, from 0 to"):
        ProcessEngine(tiny_path, prompt_cache_bytes=2**70)
