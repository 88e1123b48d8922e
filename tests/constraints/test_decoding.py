"""Constrained answers: those of plain decoding that is masked by hand, whatever decodes them."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
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
    SpecPrefill,
)
from mlx_engine.constraints import AnyJSON, Choice, Constraint, Grammar, JSONSchema, Regex
from mlx_engine.requests import GenerationRequest, TextPrompt
from tests.conftest import cancel_inside, make_tiny, settled
from tests.constraints.by_hand import by_hand, trie, vocabulary_of
from tests.constraints.schemas import EDIT, INVOICE, TREE
from tests.generation.rigged import made, rig
from tests.guard import Gate
from tests.models.mtp_checkpoints import GLM, MIMO, QWEN_NEXT, Kind

pytestmark = pytest.mark.anyio

TRAINED = Path(__file__).parent.parent / "trained"
PROMPT = [i * 37 % 250 + 1 for i in range(40)]
LONG_KEYS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer_identifier": {"type": "integer"},
        "delivery_requested": {"type": "boolean"},
    },
    "required": ["customer_identifier", "delivery_requested"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, Constraint] = {
    "edit": JSONSchema(EDIT),
    "tree": JSONSchema(TREE),
    "long keys": JSONSchema(LONG_KEYS),
    "any": AnyJSON(),
    "date": Regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "word": Regex("[a-z]+"),
    "choice": Choice(["yes", "yesterday", "no, not at all", "née 日本"]),
    "grammar": Grammar('start: "(" start ")" | "x"'),
}
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3, "ignore_eos": True},
    {"temperature": 1.0, "seed": 4, "top_p": 0.9, "min_p": 0.01, "top_k": 50},
    {"temperature": 1.5, "seed": 5, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    {"logit_bias": {5: 3.0, 7: -2.0, 90: -5.0}, "temperature": 0.5, "seed": 6},
    {"logprobs": 3, "temperature": 1.0, "seed": 7},
]
MOST: dict[str, Any] = {"max_tokens": 32}


async def streamed(engine: BaseEngine, prompt: list[int], **options: Any) -> GenerationResult:
    """The answer as a stream, whose chunks must make the whole."""
    async with engine.stream_generate(prompt, **options) as stream:
        chunks = [chunk async for chunk in stream]
    assert tuple(t for chunk in chunks for t in chunk.tokens) == stream.result.tokens
    assert "".join(chunk.text for chunk in chunks) == stream.result.text
    return stream.result


def check_same(got: GenerationResult, wanted: GenerationResult) -> None:
    assert got.tokens == wanted.tokens
    assert (got.text, got.finish_reason) == (wanted.text, wanted.finish_reason)
    assert len(got.logprobs) == len(wanted.logprobs)
    for mine, other in zip(got.logprobs, wanted.logprobs, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        pairs = zip(mine.top, other.top, strict=True)
        assert all(a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in pairs)


def unlike_model(tiny: Path, other: Path) -> dict[str, dict[str, Any]]:
    return {
        "plain": {},
        "draft of its own": {"decode": DraftModel(tiny, 3)},
        "strange draft": {"decode": DraftModel(other, 4)},
        "sparse": {"prefill": SpecPrefill(tiny, keep=1.0, threshold=16), "prefill_step_size": 16},
        "nothing stored": {"prompt_cache_bytes": 0, "prefill_step_size": 8},
    }


@pytest.fixture(scope="module")
def wordy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokens are parts of words, with rows that are nobody's token."""
    other = json.dumps({"vocab_size": 1024 + 36, "eos_token_id": 0})
    folder = make_tiny(tmp_path_factory.mktemp("wordy"), "3", "--no-chat", "--other", other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TRAINED / "plain" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def known() -> dict[int, GenerationResult]:
    """Answers of plain decoding that have been looked for already."""
    return {}


WAYS = [*unlike_model(Path(), Path())]


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that agrees with ``tiny_path`` on nothing."""
    return make_tiny(tmp_path_factory.mktemp("other"), "7", "--layers", "1")


@pytest.mark.parametrize("way", WAYS)
async def test_tokens_are_those_of_plain_decoding_that_is_masked_by_hand(
    tiny_path: Path,
    other_path: Path,
    engine_type: type[BaseEngine],
    way: str,
    known: dict[int, GenerationResult],
) -> None:
    options = unlike_model(tiny_path, other_path)[way]
    async with SimpleEngine(tiny_path) as plain, engine_type(tiny_path, **options) as engine:
        for n, (constraint, sampling) in enumerate(
            itertools.product(CONSTRAINTS.values(), SAMPLING)
        ):
            if n % 5 != WAYS.index(way):
                continue  # all are seen in some way
            asked = {**MOST, **sampling}
            if n not in known:
                known[n] = await by_hand(plain, PROMPT, constraint, **asked)
            wanted = known[n]
            get = streamed if n % 2 else type(engine).generate
            check_same(await get(engine, PROMPT, constraint=constraint, **asked), wanted)


async def test_greedy_tokens_are_the_best_allowed_ones_of_the_model(engine: BaseEngine) -> None:
    """Nothing of this library's is in it: the model, a matcher and argmax."""

    def best(loaded: Any, constraint: Constraint) -> list[int]:
        from llguidance import LLMatcher

        lark = LLMatcher.grammar_from_lark(f"start: {constraint.rule}")
        matcher, answer = LLMatcher(trie(loaded.vocabulary), lark, log_level=0), []
        while len(answer) < MOST["max_tokens"] and not (
            answer and answer[-1] in loaded.vocabulary.eos
        ):
            logits = np.array(loaded.model(mx.array([[*PROMPT, *answer]]))[0, -1])
            bits = np.unpackbits(
                np.frombuffer(matcher.compute_bitmask(), np.uint8),
                bitorder="little",
                count=len(logits),
            )
            answer.append(int(np.where(bits, logits, -np.inf).argmax()))
            matcher.consume_token(answer[-1])
        return answer

    for constraint in CONSTRAINTS.values():
        wanted = await engine.run_blocking(best, engine._holder.model(), constraint)
        got = await engine.generate(PROMPT, constraint=constraint, **MOST)
        assert list(got.tokens) == wanted


@pytest.mark.parametrize("kind", [MIMO, GLM, QWEN_NEXT], ids=str)
async def test_an_mtp_head_and_any_proposals_change_no_token(
    tmp_path: Path, engine_type: type[BaseEngine], kind: Kind
) -> None:
    folder = await made(kind, tmp_path / "model", 3)
    async with (
        SimpleEngine(folder, prompt_cache_bytes=0) as plain,
        engine_type(folder, decode=MTP(3)) as engine,
    ):
        for n, name in enumerate(("edit", "date", "any", "choice")):
            asked = {"max_tokens": 24, **SAMPLING[n]}
            wanted = await by_hand(plain, PROMPT, CONSTRAINTS[name], **asked)
            asked["constraint"] = CONSTRAINTS[name]
            check_same(await engine.generate(PROMPT, **asked), wanted)
            rig(engine, [*PROMPT, *wanted.tokens], (0.4, 0.0, 1.0, 0.3)[n], n)
            check_same(await streamed(engine, PROMPT, **asked), wanted)


async def test_proposals_that_are_not_allowed_are_cut_before_they_are_verified(
    tiny_path: Path, engine_type: type[BaseEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_engine.generation.speculative.decoder import SpeculativeDecoder

    lengths: list[int] = []
    verify = SpeculativeDecoder._verify

    def noted(decoder: SpeculativeDecoder, proposals: mx.array) -> Any:
        lengths.append(proposals.size)
        return verify(decoder, proposals)

    monkeypatch.setattr(SpeculativeDecoder, "_verify", noted)
    constraint = Regex("[a-z]{30}")
    async with engine_type(tiny_path, decode=DraftModel(tiny_path, 4)) as engine:
        wanted = await by_hand(engine, PROMPT, constraint, **MOST)
        sequence = [*PROMPT, *wanted.tokens]
        sequence[len(PROMPT) + 2 :: 5] = [0] * len(sequence[len(PROMPT) + 2 :: 5])
        rig(engine, sequence, 0.0)
        lengths.clear()  # of its warm-up
        result = await engine.generate(PROMPT, constraint=constraint, **MOST)
        assert result.tokens == wanted.tokens
        assert set(lengths) <= {0, 1, 2, 3, 4}
        assert 0 in lengths
        assert engine.stats().draft_tokens > sum(lengths), lengths


async def test_what_is_forced_may_be_written_in_other_tokens(
    wordy_path: Path, engine_type: type[BaseEngine]
) -> None:
    """The model's are parts of words, so that it often does not say what is proposed."""
    async with engine_type(wordy_path, decode=DraftModel(wordy_path, 2)) as engine:
        for n, constraint in enumerate(CONSTRAINTS.values()):
            asked = {**MOST, **SAMPLING[n % len(SAMPLING)]}
            wanted = await by_hand(engine, PROMPT, constraint, **asked)
            asked["constraint"] = constraint
            check_same(await engine.generate(PROMPT, **asked), wanted)
            check_same(await streamed(engine, PROMPT, decode=None, **asked), wanted)


@pytest.mark.parametrize(
    "options", [{"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 64}], ids=str
)
async def test_where_proposals_cannot_be_taken_back_none_are_made(
    tiny_path: Path, options: dict[str, Any]
) -> None:
    async with SimpleEngine(tiny_path, **options) as engine:
        for n, constraint in enumerate(CONSTRAINTS.values()):
            asked = {**MOST, **SAMPLING[n % len(SAMPLING)]}
            wanted = await by_hand(engine, PROMPT, constraint, **asked)
            check_same(await engine.generate(PROMPT, constraint=constraint, **asked), wanted)


async def test_forced_tokens_are_verified_together(
    tiny_path: Path, engine_type: type[BaseEngine], gate: Callable[[str, int], Gate]
) -> None:
    async with engine_type(tiny_path) as engine:
        await engine.generate(PROMPT, constraint=Regex("a"))  # what is tried first is tried
        for constraint in (JSONSchema(LONG_KEYS), Choice(["a very long answer, to the letter"])):
            counting = gate("model", 10**6)
            result = await engine.generate(PROMPT, constraint=constraint, max_tokens=200)
            assert counting.calls < 0.7 * len(result.tokens)
            assert result.timings.draft_tokens == engine.stats().draft_tokens == 0


# ── beside others ───────────────────────────────────────────────────────────────────────────


async def test_rows_of_a_batch_have_each_their_own_and_mates_none(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path, max_batch_size=9, prompt_cache_bytes=0) as engine:
        rows: list[dict[str, Any]] = []
        for n, constraint in enumerate([*CONSTRAINTS.values(), None, None, None]):
            rows.append({**MOST, **SAMPLING[n % len(SAMPLING)], "constraint": constraint})
        prompts = [[n + 1, *PROMPT[: 3 * n + 1]] for n in range(len(rows))]
        alone = [
            await engine.generate(prompt, **row) for prompt, row in zip(prompts, rows, strict=True)
        ]
        together = await asyncio.gather(
            *(engine.generate(prompt, **row) for prompt, row in zip(prompts, rows, strict=True))
        )
        for got, wanted in zip(together, alone, strict=True):
            check_same(got, wanted)


@pytest.mark.parametrize("drafted", [True, False])
async def test_who_joins_at_any_place_changes_nothing(tiny_path: Path, drafted: bool) -> None:
    """It decodes alone, in a batch and alone again, from any place on."""
    decode = DraftModel(tiny_path, 2) if drafted else None
    constraint, beside = JSONSchema(INVOICE), {"max_tokens": 4, "ignore_eos": True}
    asked = {"constraint": constraint, "temperature": 1.0, "seed": 1, "max_tokens": 60}
    async with BatchedEngine(tiny_path, decode=decode) as engine:
        wanted = await engine.generate(PROMPT, **asked)
        other = await engine.generate([5, 6], **beside)
        third = await engine.generate([7], constraint=Regex("[ab]+"), **beside)
        for join_at in (1, 2, 3, 5, 9, 14, 25):
            joined: asyncio.Task[Any] | None = None
            request = GenerationRequest(TextPrompt(PROMPT), SamplingParams(**asked))
            async with GenerationStream(engine.submit(request)) as stream:
                seen = 0
                async for chunk in stream:
                    seen += len(chunk.tokens)
                    if seen >= join_at and joined is None:
                        works = (
                            engine.generate([5, 6], **beside),
                            engine.generate([7], constraint=Regex("[ab]+"), **beside),
                        )
                        joined = asyncio.ensure_future(asyncio.gather(*works))  # type: ignore[assignment]
            check_same(stream.result, wanted)
            assert joined is not None
            assert [each.tokens for each in await joined] == [other.tokens, third.tokens]


async def test_a_next_turn_finds_all_of_it_in_the_prompt_cache(
    tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    asked: dict[str, Any] = {"constraint": JSONSchema(LONG_KEYS), "max_tokens": 70}
    async with (
        engine_type(tiny_path) as engine,
        SimpleEngine(tiny_path, prompt_cache_bytes=0) as cold,
    ):
        first = await engine.generate(PROMPT * 2, **asked)
        await settled()
        follow_up = [*PROMPT * 2, *first.tokens, *PROMPT[:6]]
        again = await engine.generate(follow_up, **asked)
        assert again.usage.cached_tokens >= len(follow_up) - 6 - 2
        assert again.tokens == (await cold.generate(follow_up, **asked)).tokens
        assert (
            again.tokens
            == (await by_hand(cold, follow_up, asked["constraint"], max_tokens=70)).tokens
        )


@pytest.mark.parametrize("drafted", [True, False])
async def test_it_can_be_cancelled_anywhere_and_tried_again(
    tiny_path: Path,
    engine_type: type[BaseEngine],
    gate: Callable[[str, int], Gate],
    drafted: bool,
) -> None:
    decode = DraftModel(tiny_path, 2) if drafted else None
    asked: dict[str, Any] = {"constraint": Regex('[{]"a key": "[a-z]{24}"}'), "max_tokens": 40}
    async with engine_type(tiny_path, decode=decode) as engine:
        wanted = await engine.generate(PROMPT, **asked)
        for call in range(1, 14):
            await settled()
            await cancel_inside(gate("model", call), engine.generate(PROMPT, **asked))
            assert (await engine.generate(PROMPT, **asked)).tokens == wanted.tokens


# ── with other options ──────────────────────────────────────────────────────────────────────


async def test_an_answer_ends_where_it_is_complete_and_nowhere_else(engine: BaseEngine) -> None:
    eos = vocabulary_of(engine).eos
    result = await engine.generate(PROMPT, constraint=Choice(["yes"]))
    assert (result.text, result.finish_reason) == ("yes", "stop")
    assert result.tokens[-1] in eos
    eager = dict.fromkeys(eos, 1000000.0)
    result = await engine.generate(PROMPT, constraint=Regex("a{3,5}"), logit_bias=eager)
    assert (result.text, result.finish_reason) == ("aaa", "stop")
    result = await engine.generate(
        PROMPT, constraint=Regex("a{3,5}"), logit_bias=eager, ignore_eos=True
    )
    assert (result.text, result.finish_reason) == ("aaaaa", "stop")
    result = await engine.generate(PROMPT, constraint=Regex("a{3,5}"), max_tokens=2)
    assert (result.text, result.finish_reason) == ("aa", "length")
    result = await engine.generate(PROMPT, constraint=Regex("a{3}ba"), stop="ab")
    assert (result.text, result.finish_reason) == ("aa", "stop")
    b = vocabulary_of(engine).tokenizer.encode("b", add_special_tokens=False)
    result = await engine.generate(PROMPT, constraint=Regex("a{3}ba"), stop_token_ids=b)
    assert (result.text, result.finish_reason) == ("aaa", "stop")
    result = await engine.generate(PROMPT, constraint=Regex("a{3}a"), stop_token_ids=b)
    assert (result.text, result.finish_reason) == ("aaaa", "stop")


async def test_a_processor_of_the_callers_is_shown_what_was_really_generated(
    tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    shown: list[list[int]] = []

    def watching(tokens: mx.array, logits: mx.array) -> mx.array:
        shown.append(tokens.tolist())  # type: ignore[arg-type]
        return logits + mx.sin(mx.arange(logits.shape[-1]) * len(tokens))

    constraint = JSONSchema(LONG_KEYS)
    for decode in (None, DraftModel(tiny_path, 3)):
        async with engine_type(tiny_path, decode=decode) as engine:
            wanted = await by_hand(engine, PROMPT, constraint, logits_processors=[watching], **MOST)
            shown.clear()
            result = await engine.generate(
                PROMPT, constraint=constraint, logits_processors=[watching], **MOST
            )
            check_same(result, wanted)
            sequence = [*PROMPT, *result.tokens]
            assert shown[: len(sequence) - len(PROMPT)] == [
                sequence[:n] for n in range(len(PROMPT), len(sequence))
            ]


@pytest.mark.parametrize("drafted", [True, False])
async def test_processors_that_exclude_all_that_is_allowed_fail_their_own_request(
    tiny_path: Path, engine_type: type[BaseEngine], drafted: bool
) -> None:
    def digits_only(tokens: mx.array, logits: mx.array) -> mx.array:
        kept = (mx.arange(logits.shape[-1]) >= 16) & (mx.arange(logits.shape[-1]) < 26)
        return mx.where(kept, logits, -mx.inf)

    decode = DraftModel(tiny_path, 2) if drafted else None
    async with engine_type(tiny_path, decode=decode) as engine:
        wanted = await engine.generate(PROMPT, max_tokens=9, ignore_eos=True)
        bad = engine.generate(
            PROMPT, constraint=Regex("[0-9]{3}[a-z]"), logits_processors=[digits_only]
        )
        mate = engine.generate(PROMPT, max_tokens=9, ignore_eos=True)
        error, other = await asyncio.gather(bad, mate, return_exceptions=True)
        assert isinstance(error, GenerationError)
        assert "does allow" in str(error)
        assert isinstance(other, GenerationResult)
        assert other.tokens == wanted.tokens
