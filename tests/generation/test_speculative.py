"""Speculative decoding: the same tokens as plain decoding (I8), whatever is proposed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    DraftModel,
    GenerationError,
    InvalidRequest,
    ModelLoadError,
    SimpleEngine,
)
from tests.conftest import cancel_inside, make_tiny, settled
from tests.generation.rigged import Models, made, rig
from tests.models.mtp_checkpoints import DENSE_QWEN, GLM, MIMO, MLA, QWEN_NEXT, Kind

pytestmark = pytest.mark.anyio

HEADS = [QWEN_NEXT, DENSE_QWEN, GLM, MLA, MIMO]
PROMPT = [i * 37 % 250 + 1 for i in range(40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def raw(engine: BaseEngine, prompt: list[int], count: int) -> list[int]:
    """What mlx_lm itself generates, greedily. On the MLX thread."""
    steps = generate_step(mx.array(prompt), engine._holder.model().model, max_tokens=count)
    return [int(token) for token, _ in steps]


async def check_greedy(engine: BaseEngine, count: int, seed: int) -> None:
    expected = await engine.run_blocking(raw, engine, PROMPT, count)
    for wrong in (0.3, 1.0, 0.0):
        rig(engine, [*PROMPT, *expected], wrong, seed)
        result = await engine.generate(PROMPT, max_tokens=count, ignore_eos=True)
        assert list(result.tokens) == expected
        assert result.timings.draft_tokens > 0
        rate = result.timings.acceptance_rate
        assert rate == 1 - wrong if wrong in (0.0, 1.0) else 0.1 < rate < 0.9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", HEADS, ids=str)
async def test_greedy_tokens_with_an_mtp_head_are_those_of_mlx_lm(
    models: Models, kind: Kind, seed: int
) -> None:
    folder = await models.of(kind, seed + 1)
    async with SimpleEngine(folder, decode=MTP(seed % 4 + 1), prompt_cache_bytes=0) as engine:
        await check_greedy(engine, 120, seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
async def test_greedy_tokens_with_a_draft_model_are_those_of_mlx_lm(
    tmp_path: Path, family: str, seed: int
) -> None:
    other = json.dumps({"model_type": family})
    folder = make_tiny(tmp_path / "model", str(seed), "--other", other)
    draft = make_tiny(tmp_path / "draft", str(seed + 10), "--layers", "1", "--other", other)
    decode = DraftModel(draft, seed % 4 + 1)
    async with SimpleEngine(folder, decode=decode, prompt_cache_bytes=0) as engine:
        await check_greedy(engine, 120, seed)


@pytest.mark.parametrize("kind", [QWEN_NEXT, GLM, MLA, MIMO], ids=str)
async def test_a_draft_model_of_any_family_changes_no_token(models: Models, kind: Kind) -> None:
    folder, draft = await models.of(kind, 3), await models.of(kind, 4)
    async with SimpleEngine(folder, decode=DraftModel(draft, 3), prompt_cache_bytes=0) as engine:
        await check_greedy(engine, 60, 0)


@pytest.fixture(scope="module")
def draft_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that agrees with ``tiny_path`` on nothing."""
    return make_tiny(tmp_path_factory.mktemp("draft"), "7", "--layers", "1")


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "seed": 4, "top_p": 0.9, "min_p": 0.01, "top_k": 50},
    {"temperature": 1.0, "seed": 5, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    {"logit_bias": {5: 3.0, 7: -2.0}, "temperature": 0.5, "seed": 6},
    {"logprobs": 3},
]


@pytest.mark.parametrize("options", SAMPLING, ids=lambda options: " ".join(options))
async def test_sampling_and_processors_are_those_of_plain_decoding(
    tiny_path: Path, engine_type: type[BaseEngine], options: dict[str, Any]
) -> None:
    decode = DraftModel(tiny_path, 3)
    async with SimpleEngine(tiny_path) as plain, engine_type(tiny_path, decode=decode) as engine:
        expected = await plain.generate(PROMPT, max_tokens=60, ignore_eos=True, **options)
        unspoiled = await engine.generate(PROMPT, max_tokens=60, ignore_eos=True, **options)
        rig(engine, [*PROMPT, *expected.tokens], 0.4)
        result = await engine.generate(PROMPT, max_tokens=60, ignore_eos=True, **options)
    for each in (unspoiled, result):
        assert each.tokens == expected.tokens
        assert each.text == expected.text
        assert len(each.logprobs) == len(expected.logprobs)
        for got, wanted in zip(each.logprobs, expected.logprobs, strict=True):
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [t.token for t in got.top] == [t.token for t in wanted.top]
    assert unspoiled.timings.acceptance_rate == 1, "the draft has the same noise and processors"
    assert 0 < result.timings.acceptance_rate < 1


async def test_sampled_tokens_have_exactly_the_law_of_the_model(tiny_path: Path) -> None:
    def law(loaded: Any) -> dict[tuple[int, ...], float]:
        """Of three tokens, each of the two most probable."""
        chances = {(): 1.0}
        for _ in range(3):
            longer = {}
            for tokens, chance in chances.items():
                logits = loaded.model(mx.array([[*PROMPT, *tokens]]))[0, -1]
                best = mx.argsort(-logits)[:2]
                for token, p in zip(best.tolist(), mx.softmax(logits[best]).tolist(), strict=True):
                    longer[(*tokens, token)] = chance * p
            chances = longer
        return chances

    runs = 700
    async with SimpleEngine(tiny_path, decode=DraftModel(tiny_path, 2)) as engine:
        chances = await engine.run_blocking(law, engine._holder.model())
        rig(engine, [*PROMPT, *max(chances, key=chances.__getitem__)], 0.2)
        seen = dict.fromkeys(chances, 0)
        for seed in range(runs):
            options: dict[str, Any] = {"temperature": 1.0, "top_k": 2, "seed": seed}
            result = await engine.generate(PROMPT, max_tokens=3, ignore_eos=True, **options)
            seen[result.tokens] += 1
        stats = engine.stats()
    assert 0.2 < stats.acceptance_rate < 0.8
    squared = sum((seen[t] - runs * p) ** 2 / (runs * p) for t, p in chances.items())
    assert squared < 24.3, "chi-squared with 7 degrees of freedom, 0.1 %"


@pytest.mark.parametrize("place", [5, 7])
@pytest.mark.parametrize("end", ["token", "string", "length"])
@pytest.mark.parametrize("kind", [QWEN_NEXT, MIMO, None], ids=str)
async def test_nothing_is_emitted_after_an_end_inside_of_a_burst(
    models: Models,
    tiny_path: Path,
    engine_type: type[BaseEngine],
    kind: Kind | None,
    end: str,
    place: int,
) -> None:
    folder = tiny_path if kind is None else await models.of(kind, 3)
    decode = DraftModel(folder, 4) if kind is None else MTP(4)
    async with SimpleEngine(folder, prompt_cache_bytes=0) as plain:
        whole = await plain.generate(PROMPT, max_tokens=20, ignore_eos=True)
        options: dict[str, Any] = {
            "token": {"stop_token_ids": [whole.tokens[place]]},
            "string": {"stop": plain._holder.model().tokenizer.decode([whole.tokens[place]])},
            "length": {"max_tokens": place},
        }[end]
        options = {"max_tokens": 20, "ignore_eos": True, **options}
        expected = await plain.generate(PROMPT, **options)
        follow_up = [*PROMPT, *expected.tokens, 5, 6, 7]
        next_answer = (await plain.generate(follow_up, max_tokens=15, ignore_eos=True)).tokens
    async with engine_type(folder, decode=decode) as engine:
        rig(engine, [*PROMPT, *whole.tokens], 0.0)
        async with engine.stream_generate(PROMPT, **options) as stream:
            chunks = [chunk async for chunk in stream]
        assert tuple(t for chunk in chunks for t in chunk.tokens) == expected.tokens
        assert "".join(chunk.text for chunk in chunks) == expected.text
        assert stream.result.finish_reason == expected.finish_reason
        await settled()
        rig(engine, [*follow_up, *next_answer], 0.3)
        again = await engine.generate(follow_up, max_tokens=15, ignore_eos=True)
        assert again.tokens == next_answer
        assert again.usage.cached_tokens > 0


async def test_a_processor_is_shown_nothing_but_what_was_really_generated(
    tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    shown: list[list[int]] = []

    def watching(tokens: mx.array, logits: mx.array) -> mx.array:
        shown.append(tokens.tolist())  # type: ignore[arg-type]
        return logits

    async with SimpleEngine(tiny_path) as plain:
        expected = (await plain.generate(PROMPT, max_tokens=40, ignore_eos=True)).tokens
    async with engine_type(tiny_path, decode=DraftModel(tiny_path, 4)) as engine:
        rig(engine, [*PROMPT, *expected], 0.4)
        result = await engine.generate(
            PROMPT, max_tokens=40, ignore_eos=True, logits_processors=[watching]
        )
    assert result.tokens == expected
    sequence = [*PROMPT, *expected]
    assert shown == [sequence[:n] for n in range(len(PROMPT), len(sequence))]


async def test_a_failing_processor_fails_its_own_request_only(
    tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        if len(tokens) > len(PROMPT) + 5:
            raise ZeroDivisionError("broken")
        return logits

    async with engine_type(tiny_path, decode=DraftModel(tiny_path, 3)) as engine:
        expected = await engine.generate(PROMPT, max_tokens=30, ignore_eos=True, decode=None)
        with pytest.raises(GenerationError, match="broken"):
            await engine.generate(
                PROMPT, max_tokens=30, ignore_eos=True, logits_processors=[broken]
            )
        again = await engine.generate(PROMPT, max_tokens=30, ignore_eos=True)
        assert again.tokens == expected.tokens
        assert engine.stats().failed == 1


async def test_a_request_may_switch_it_off(tiny_path: Path, engine_type: type[BaseEngine]) -> None:
    async with engine_type(tiny_path, decode=DraftModel(tiny_path, 3)) as engine:
        with_draft = await engine.generate(PROMPT, max_tokens=30, ignore_eos=True)
        without = await engine.generate(PROMPT, max_tokens=30, ignore_eos=True, decode=None)
        assert without.tokens == with_draft.tokens
        assert with_draft.timings.draft_tokens == with_draft.timings.accepted_tokens > 0
        assert without.timings.draft_tokens == 0
        assert engine.stats().draft_tokens == with_draft.timings.draft_tokens
        with pytest.raises(InvalidRequest, match=r"^decode"):
            await engine.generate(PROMPT, decode=MTP())  # type: ignore[arg-type]


async def test_what_a_draft_model_has_read_is_kept_for_the_next_prompt(tiny_path: Path) -> None:
    async with SimpleEngine(tiny_path, decode=DraftModel(tiny_path, 3)) as engine:
        first = await engine.generate(PROMPT * 4, max_tokens=20, ignore_eos=True)
        follow_up = [*PROMPT * 4, *first.tokens, 1, 2, 3]
        await engine.generate(follow_up, max_tokens=20, ignore_eos=True)
        ((side, _),) = engine._holder.runner().strategies.side_caches
        assert side.stats().hit_tokens > 4 * len(PROMPT)
        assert side.limit > 0
        assert side.limit + engine.stats().prompt_cache.limit <= 2**30


async def test_what_a_head_has_read_is_kept_for_the_next_prompt(models: Models) -> None:
    folder = await models.of(MIMO)
    async with SimpleEngine(folder, decode=MTP(2)) as engine:
        first = await engine.generate(PROMPT * 4, max_tokens=20, ignore_eos=True)
        follow_up = [*PROMPT * 4, *first.tokens, 1, 2, 3]
        again = await engine.generate(follow_up, max_tokens=20, ignore_eos=True)
        ((side, _),) = engine._holder.runner().strategies.side_caches
        assert side.stats().hit_tokens == again.usage.cached_tokens > 4 * len(PROMPT)


# ── in a batch ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [QWEN_NEXT, MIMO, None], ids=str)
async def test_proposals_pause_while_others_decode_and_go_on_afterwards(
    models: Models, tiny_path: Path, kind: Kind | None
) -> None:
    folder = tiny_path if kind is None else await models.of(kind, 3)
    decode = DraftModel(folder, 3) if kind is None else MTP(3)
    other_prompt = PROMPT[::-1]
    for options in ({}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.2}):
        options = {"ignore_eos": True, **options}
        async with SimpleEngine(folder, prompt_cache_bytes=0) as plain:
            expected = await plain.generate(PROMPT, max_tokens=300, **options)
            other = await plain.generate(other_prompt, max_tokens=20, **options)
        async with BatchedEngine(folder, decode=decode) as engine:
            rig(engine, [*PROMPT, *expected.tokens], 0.4)
            async with engine.stream_generate(PROMPT, max_tokens=300, **options) as stream:
                got = [token for _ in range(5) for token in (await anext(stream)).tokens]
                before = engine.stats().draft_tokens
                for _ in range(2):
                    beside = await engine.generate(other_prompt, max_tokens=20, **options)
                    assert beside.tokens == other.tokens
                between = engine.stats().draft_tokens
                got += [token async for chunk in stream for token in chunk.tokens]
            assert tuple(got) == expected.tokens
            assert 0 < before < between < stream.result.timings.draft_tokens
            assert "decoded together with other requests" in " ".join(stream.result.notes)
            assert engine.stats().kv_bytes == 0


# ── cancelled ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", [1, 4, 8, 9, 10, 12, 19])
@pytest.mark.parametrize("kind", [QWEN_NEXT, MIMO, None], ids=str)
async def test_a_cancel_is_seen_at_every_chunk_and_cycle(
    models: Models,
    tiny_path: Path,
    engine_type: type[BaseEngine],
    gate: Any,
    kind: Kind | None,
    at: int,
) -> None:
    depth = 3
    folder = tiny_path if kind is None else await models.of(kind, 3)
    decode = DraftModel(folder, depth) if kind is None else MTP(depth)
    prompt = PROMPT * 3
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
    async with engine_type(folder, decode=decode, prefill_step_size=16) as engine:
        expected = await engine.generate(prompt, decode=None, **options)
        stop = gate("model", at)
        await cancel_inside(stop, engine.generate(prompt, **options))
        assert stop.calls - at <= depth + 1, "it went on after the cycle"
        await settled()
        assert engine.stats().running == engine.stats().kv_bytes == 0
        again = await engine.generate(prompt, **options)
        assert again.tokens == expected.tokens


# ── refused, or told ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [0, -1, 17, 1.5, True, "always", None])
def test_a_bad_number_of_draft_tokens_is_refused(depth: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^num_draft_tokens"):
        DraftModel("draft", depth)
    with pytest.raises(InvalidRequest, match=r"^depth"):
        MTP(depth)


@pytest.mark.parametrize("decode", ["mtp", 3, DraftModel, {"draft": "x"}])
def test_other_values_are_refused(tiny_path: Path, decode: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^decode"):
        SimpleEngine(tiny_path, decode=decode)


async def test_a_draft_with_another_tokenizer_is_refused(
    tmp_path: Path, tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    draft = shutil.copytree(tiny_path, tmp_path / "draft")
    file = draft / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    engine = engine_type(tiny_path, decode=DraftModel(draft))
    with pytest.raises(InvalidRequest, match=r"^decode: .*another tokenizer.*'[ab]'"):
        await engine.start()
    async with engine_type(tiny_path, decode=DraftModel(draft, fallback=True)) as engine:
        result = await engine.generate(PROMPT, max_tokens=5)
        assert engine._holder.runner().strategies.side_caches == (), (
            "what is not used gets no memory"
        )
    assert result.timings.draft_tokens == 0
    assert "another tokenizer" in " ".join(result.notes)


async def test_a_missing_draft_is_a_load_error(tmp_path: Path, tiny_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        await SimpleEngine(tiny_path, decode=DraftModel(tmp_path / "nowhere")).start()


async def test_a_missing_head_is_refused_or_told(
    tmp_path: Path, tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    folder = await made(MIMO, tmp_path / "model")
    (folder / "mtp.safetensors").unlink()
    for model in (folder, tiny_path):
        with pytest.raises(InvalidRequest, match=r"^decode"):
            await engine_type(model, decode=MTP()).start()
        async with engine_type(model, decode="auto") as engine:
            result = await engine.generate(PROMPT, max_tokens=5, ignore_eos=True)
            assert "one token at a time" in " ".join(result.notes)
            quiet = await engine.generate(PROMPT, max_tokens=5, ignore_eos=True, decode=None)
            assert quiet.notes == ()


async def test_a_head_that_says_nothing_like_its_model_is_told(models: Models) -> None:
    folder = await models.of(MIMO)
    async with SimpleEngine(folder, decode=MTP()) as engine:
        result = await engine.generate(PROMPT, max_tokens=5, ignore_eos=True)
    assert "agrees with the model on" in " ".join(result.notes)


@pytest.mark.parametrize("options", [{"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 64}])
async def test_kv_caches_that_cannot_give_tokens_back_are_refused(
    tiny_path: Path, options: dict[str, Any]
) -> None:
    engine = SimpleEngine(tiny_path, decode=DraftModel(tiny_path), **options)
    with pytest.raises(InvalidRequest, match=f"^decode: .*{next(iter(options))}"):
        await engine.start()


async def test_a_model_whose_tokens_depend_on_how_many_go_in_is_refused(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama

    original = llama.Model.__call__

    def odd(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        logits: mx.array = original(self, inputs, *args, **kwargs)
        return logits + (inputs.shape[1] > 1) * mx.arange(logits.shape[-1])

    monkeypatch.setattr(llama.Model, "__call__", odd)
    with pytest.raises(InvalidRequest, match="several tokens at once"):
        await SimpleEngine(tiny_path, decode=DraftModel(tiny_path)).start()
