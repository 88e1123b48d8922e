"""Reasoning that has used its tokens up is closed, exactly, whatever decodes it."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    DraftModel,
    GenerationError,
    GenerationResult,
    GenerationStream,
    SamplingParams,
    SimpleEngine,
)
from mlx_engine.generation import reasoning_budget
from mlx_engine.requests import ChatPrompt, GenerationRequest
from tests.conftest import cancel_inside, settled
from tests.engine.test_chat import saying
from tests.generation.rigged import made, rig
from tests.guard import Gate
from tests.models.mtp_checkpoints import GLM, MIMO, QWEN_NEXT, Kind
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.anyio

OPEN = {"enable_thinking": "open"}
EOS, END = 257, 259
NEWLINE = make_tokenizer().encode("\n")[0]
CLOSE = [NEWLINE, END, NEWLINE, NEWLINE]
FREE: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "seed": 4, "top_p": 0.9, "min_p": 0.01, "top_k": 50},
    {"temperature": 1.0, "seed": 5, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    {"logit_bias": {5: 3.0, END: -1e9, 7: -2.0}, "temperature": 0.5, "seed": 6},
    {"logprobs": 3},
]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def asked(text: str, budget: int | None, opened: bool = True, **options: Any) -> GenerationRequest:
    variables = OPEN if opened else None
    source = ChatPrompt.of(user(text), None, variables, max_reasoning_tokens=budget)
    return GenerationRequest(source, SamplingParams(**options))


async def chat(
    engine: BaseEngine, text: str, budget: int | None, **options: Any
) -> GenerationResult:
    return await engine.submit(asked(text, budget, **options)).run(None)


async def streamed(
    engine: BaseEngine, text: str, budget: int | None, **options: Any
) -> GenerationResult:
    """The same as a stream, whose chunks must make the whole."""
    async with GenerationStream(engine.submit(asked(text, budget, **options))) as stream:
        chunks = [chunk async for chunk in stream]
    result = stream.result
    assert tuple(token for chunk in chunks for token in chunk.tokens) == result.tokens
    for segment, whole in (("content", result.text), ("reasoning", result.reasoning)):
        assert "".join(chunk.text for chunk in chunks if chunk.segment == segment) == whole
    assert result.usage.completion_tokens == len(result.tokens)
    return result


async def prompt_of(engine: BaseEngine, text: str) -> list[int]:
    tokenizer = engine._holder.model().tokenizer  # type: ignore[attr-defined]
    return list(tokenizer.apply_chat_template(user(text), add_generation_prompt=True, **OPEN))


async def oracle(engine: BaseEngine, text: str, budget: int, count: int) -> list[int]:
    """Tokens of plain greedy decoding: before reasoning is closed, and behind that."""
    prompt = await prompt_of(engine, text)
    free = await engine.generate(prompt, max_tokens=count, ignore_eos=True, decode=None)
    begun = list(free.tokens[:budget])
    if END in begun:  # it closes reasoning by itself
        return list(free.tokens)
    begun += CLOSE[begun[-1:] == [NEWLINE] :]
    if len(begun) < count:
        rest = await engine.generate(
            [*prompt, *begun], max_tokens=count - len(begun), ignore_eos=True, decode=None
        )
        begun += rest.tokens
    return begun[:count]


def forcing(prompt: int, at: int, tokens: list[int]) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor of the caller's that does by hand what a budget does."""

    def processor(seen: mx.array, logits: mx.array) -> mx.array:
        place = seen.size - prompt - at
        if not 0 <= place < len(tokens):
            return logits
        return mx.where(mx.arange(logits.shape[-1]) == tokens[place], 0.0, -mx.inf)[None]

    return processor


@pytest.fixture(params=[None, "draft"])
async def any_engine(
    request: pytest.FixtureRequest, tiny_path: Path, engine_type: type[BaseEngine]
) -> AsyncIterator[BaseEngine]:
    options = {} if request.param is None else {"decode": DraftModel(tiny_path, 3)}
    async with engine_type(tiny_path, **options) as engine:
        yield engine


async def test_greedy_tokens_are_those_of_plain_decoding_with_the_close_in_between(
    any_engine: BaseEngine,
) -> None:
    for budget, text in [*((n, "hi") for n in (0, 1, 5, 17)), (1, "Name a colour."), (9, "you")]:
        expected = await oracle(any_engine, text, budget, 24)
        result = await chat(any_engine, text, budget, **FREE)
        assert list(result.tokens) == expected
        assert END in result.tokens
        again = await streamed(any_engine, text, budget, **FREE)
        assert again.tokens == result.tokens
        assert (again.reasoning, again.text) == (result.reasoning, result.text)
        assert result.notes == ()


async def test_more_tokens_than_the_reasoning_uses_change_nothing(any_engine: BaseEngine) -> None:
    free = await chat(any_engine, "hi", None, **FREE)
    for budget in (24, 10**6):
        assert (await chat(any_engine, "hi", budget, **FREE)).tokens == free.tokens


async def test_proposals_change_no_token(tiny_path: Path, engine_type: type[BaseEngine]) -> None:
    async with engine_type(tiny_path, decode=DraftModel(tiny_path, 4)) as engine:
        for budget, wrong in itertools.product((0, 6), (0.0, 0.4, 0.3, 1.0)):
            expected = await oracle(engine, "hi", budget, 24)
            rig(engine, [*await prompt_of(engine, "hi"), *expected], wrong, budget)
            result = await streamed(engine, "hi", budget, **FREE)
            assert list(result.tokens) == expected
            assert result.timings.draft_tokens > 0


@pytest.mark.parametrize("kind", [QWEN_NEXT, GLM, MIMO], ids=str)
async def test_an_mtp_head_changes_no_token(
    tmp_path: Path, engine_type: type[BaseEngine], kind: Kind
) -> None:
    folder = await made(kind, tmp_path / "model", 3)
    async with engine_type(folder, decode=MTP(3)) as engine:
        for budget in (0, 5):
            expected = await oracle(engine, "hi", budget, 24)
            assert list((await chat(engine, "hi", budget, **FREE)).tokens) == expected
            rig(engine, [*await prompt_of(engine, "hi"), *expected], 0.4)
            assert list((await streamed(engine, "hi", budget, **FREE)).tokens) == expected


@pytest.mark.parametrize("budget", [0, 7])
async def test_sampling_and_processors_are_those_of_plain_decoding(
    tiny_path: Path, any_engine: BaseEngine, budget: int
) -> None:
    async with SimpleEngine(tiny_path) as plain:
        for options in SAMPLING:
            await check_sampled(plain, any_engine, budget, {**FREE, **options})


async def check_sampled(
    plain: BaseEngine, engine: BaseEngine, budget: int, options: dict[str, Any]
) -> None:
    prompt = await prompt_of(plain, "hi")
    free = await plain.generate(prompt, **options)
    assert END not in free.tokens[:budget]
    close = CLOSE[list(free.tokens[max(0, budget - 1) : budget]) == [NEWLINE] :]
    own = [forcing(len(prompt), budget, close)]
    by_hand = await plain.generate(prompt, logits_processors=own, **options)
    result = await chat(engine, "hi", budget, **options)
    assert result.tokens == by_hand.tokens
    assert result.tokens[: budget + len(close)] == (*free.tokens[:budget], *close)
    assert len(result.logprobs) == (24 if "logprobs" in options else 0)
    for n, (got, wanted) in enumerate(zip(result.logprobs, by_hand.logprobs, strict=True)):
        assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        if budget <= n < budget + len(close):
            assert got.logprob == 0.0


async def test_rows_of_a_batch_have_each_their_own(tiny_path: Path) -> None:
    budgets = [None, 0, 3, 8, None, 15, 3]
    async with BatchedEngine(tiny_path, max_batch_size=5) as engine:
        alone = [await chat(engine, f"{n}", each, **FREE) for n, each in enumerate(budgets)]
        together = await asyncio.gather(
            *(streamed(engine, f"{n}", each, **FREE) for n, each in enumerate(budgets))
        )
        assert [each.tokens for each in together] == [each.tokens for each in alone]
        for n, each in enumerate(budgets):
            if each is not None:
                assert list(alone[n].tokens) == await oracle(engine, f"{n}", each, 24)


@pytest.mark.parametrize("drafted", [True, False])
async def test_who_joins_at_any_place_changes_nothing(tiny_path: Path, drafted: bool) -> None:
    """The close is at 5: others come before it, within it and behind it."""
    decode = DraftModel(tiny_path, 2) if drafted else None
    async with BatchedEngine(tiny_path, decode=decode) as engine:
        expected = await oracle(engine, "hi", 5, 24)
        other = await chat(engine, "other", 2, **FREE)
        for join_at in (1, 4, 5, 6, 7, 9):
            joined: asyncio.Task[GenerationResult] | None = None
            async with GenerationStream(engine.submit(asked("hi", 5, **FREE))) as stream:
                seen = 0
                async for chunk in stream:
                    seen += len(chunk.tokens)
                    if seen >= join_at and joined is None:
                        joined = asyncio.create_task(chat(engine, "other", 2, **FREE))
            assert list(stream.result.tokens) == expected
            assert joined is not None
            assert (await joined).tokens == other.tokens


async def test_a_next_turn_finds_all_of_it_in_the_prompt_cache(
    any_engine: BaseEngine, tiny_path: Path
) -> None:
    result = await chat(any_engine, "hi", 6, **FREE)
    await settled()
    prompt = [*await prompt_of(any_engine, "hi"), *result.tokens, *range(1, 9)]
    again = await any_engine.generate(prompt, max_tokens=12, ignore_eos=True)
    assert again.usage.cached_tokens >= len(prompt) - 8 - 2
    async with SimpleEngine(tiny_path, prompt_cache_bytes=0) as cold:
        assert (await cold.generate(prompt, max_tokens=12, ignore_eos=True)).tokens == again.tokens


async def said(
    engine: BaseEngine, script: str, budget: int, opened: bool = True, **options: Any
) -> GenerationResult:
    """Of a model that says the script, where it may; whole and streamed."""
    results = [
        await way(
            engine, "hi", budget, opened=opened, logits_processors=[saying(script)], **options
        )
        for way in (chat, streamed)
    ]
    assert results[0].tokens == results[1].tokens
    assert results[0].finish_reason == results[1].finish_reason
    assert (results[0].reasoning, results[0].text) == (results[1].reasoning, results[1].text)
    return results[0]


async def test_the_answer_goes_on_behind_the_reasoning(engine: SimpleEngine) -> None:
    result = await said(engine, "I think so.    yes", 6)
    assert (result.reasoning.strip(), result.text.strip()) == ("I thin", ".    yes")
    assert result.finish_reason == "stop"
    assert list(result.tokens[6:10]) == CLOSE
    assert result.usage.completion_tokens == len("I think so.    yes") + 1


async def test_reasoning_that_ends_by_itself_is_left_alone(engine: SimpleEngine) -> None:
    for budget in (3, 4, 20):
        result = await said(engine, "hm</think>yes", budget)
        assert (result.reasoning, result.text) == ("hm", "yes")
    result = await said(engine, "hm</think>yes", 2)
    assert (result.reasoning, result.text.strip()) == ("hm\n", "")


async def test_an_answer_without_reasoning_is_left_alone(engine: SimpleEngine) -> None:
    for budget in (0, 2):
        result = await said(engine, "yes, I think so", budget, opened=False)
        assert (result.reasoning, result.text) == ("", "yes, I think so")
        assert result.notes == ()


async def test_reasoning_that_the_model_opens_is_closed(engine: SimpleEngine) -> None:
    result = await said(engine, "<think>abcdefghij", 3, opened=False)
    assert (result.reasoning.strip(), result.text.strip()) == ("abc", "hij")
    result = await said(engine, "<think>abcdefghij", 0, opened=False)
    assert (result.reasoning.strip(), result.text.strip()) == ("", "efghij")


async def test_a_line_break_before_the_close_is_not_doubled(engine: SimpleEngine) -> None:
    result = await said(engine, "hm.\nxxxyes", 4)
    assert (result.reasoning, result.text.strip()) == ("hm.\n", "yes")


async def test_the_end_of_the_answer_within_reasoning_is_its_end(engine: SimpleEngine) -> None:
    result = await said(engine, "hm<|im_end|>yes", 5)
    assert (result.reasoning, result.text, result.finish_reason) == ("hm", "", "stop")
    result = await said(engine, "hm<|im_end|>aaaayes", 3, ignore_eos=True, max_tokens=10)
    assert result.finish_reason == "length"
    assert result.text.strip() == "yes"


async def test_stop_strings_see_what_closes_reasoning(engine: SimpleEngine) -> None:
    result = await said(engine, "abcdefgh", 3, stop=["</think>"])
    assert result.finish_reason == "stop"
    assert result.tokens[-1] == END
    assert (result.reasoning.strip(), result.text) == ("abc", "")
    result = await said(engine, "abcdefgh", 3, stop=["\n\n"])
    assert result.finish_reason == "stop"
    assert list(result.tokens[3:]) == CLOSE
    result = await said(engine, "abcdefgh", 3, stop_token_ids=[END])
    assert (result.finish_reason, result.tokens[-1]) == ("stop", END)
    # A stop string that is held back for long hides nothing from the budget.
    result = await said(engine, "ab</think>yes, yes", 4, stop=["</think>yes, yes, never"])
    assert (result.reasoning, result.text) == ("ab", "yes, yes")


async def test_max_tokens_within_the_close_is_the_end(any_engine: BaseEngine) -> None:
    for more in (1, 2, 3, 4):
        result = await streamed(any_engine, "hi", 5, max_tokens=5 + more, ignore_eos=True)
        assert list(result.tokens) == await oracle(any_engine, "hi", 5, 5 + more)
        assert list(result.tokens[5:]) == CLOSE[:more]
        assert result.finish_reason == "length"


async def test_it_can_be_cancelled_anywhere(
    any_engine: BaseEngine, gate: Callable[[str, int], Gate]
) -> None:
    expected = await oracle(any_engine, "hi", 4, 24)
    for call in range(3, 11):
        await settled()
        await cancel_inside(gate("model", call), chat(any_engine, "hi", 4, **FREE))
        assert list((await chat(any_engine, "hi", 4, **FREE)).tokens) == expected


async def test_a_processor_that_excludes_the_close_excludes_it_in_vain(
    engine: SimpleEngine,
) -> None:
    def never(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == END, -mx.inf, logits)

    result = await chat(engine, "hi", 3, logits_processors=[never], **FREE)
    assert list(result.tokens[3:7]) == CLOSE
    assert result.tokens.count(END) == 1


async def test_a_fault_in_reading_costs_one_request(
    any_engine: BaseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("broken")

    neighbour = await chat(any_engine, "hi", None, **FREE)
    with monkeypatch.context() as patched:
        patched.setattr(reasoning_budget._Reading, "add", broken)
        results = await asyncio.gather(
            chat(any_engine, "hi", None, **FREE),
            chat(any_engine, "hi", 4, **FREE),
            return_exceptions=True,
        )
    assert isinstance(results[1], GenerationError)
    assert "broken" in str(results[1])
    assert isinstance(results[0], GenerationResult)
    assert results[0].tokens == neighbour.tokens
    assert (await chat(any_engine, "hi", None, **FREE)).tokens == neighbour.tokens


async def test_a_model_that_knows_no_reasoning_says_so(
    tmp_path: Path, tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    async with engine_type(folder) as engine:
        free = await chat(engine, "hi", None, opened=False, **FREE)
        result = await chat(engine, "hi", 2, opened=False, **FREE)
    assert result.tokens == free.tokens
    assert result.notes == ("max_reasoning_tokens: this model's template knows no reasoning",)


HARMONY = """{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>\
{% endfor %}{# to=functions. <|channel|>analysis<|message|> <|channel|>commentary json <|call|> #}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"


async def test_reasoning_in_several_messages_is_one_budget(
    tmp_path: Path, tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    """Markers of many tokens, and reasoning that begins again."""
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(HARMONY)
    begin, other = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
    skipped = "x" * len(FINAL)
    used = 4 + len("<|end|>")
    cases = {
        (f"{begin}abcd{skipped}yes", 4): "abcd",
        (f"{begin}ab<|en{skipped[4:]}yes", 6): "ab",  # what has begun is completed
        (f"{begin}abcd{other}{begin}ef{skipped}yes", used + 2): "abcdef",
        (f"{begin}abcd{other}{begin}{skipped}yes", used): "abcd",
    }
    async with engine_type(folder) as engine:
        for (script, budget), reasoning in cases.items():
            own = [saying(script)]
            result = await chat(engine, "hi", budget, opened=False, logits_processors=own)
            assert (result.reasoning, result.text) == (reasoning, "yes")
