"""SpecPrefill behind both engines: what it reports, composes with, and does not disturb."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    DraftModel,
    GenerationResult,
    InvalidRequest,
    Progress,
    SimpleEngine,
    SpecPrefill,
)
from tests.conftest import cancel_inside, make_tiny, settled
from tests.engine.test_families import FAMILIES
from tests.generation.rigged import made, rig
from tests.models.mtp_checkpoints import MIMO, QWEN_NEXT

pytestmark = pytest.mark.anyio

DRAW = random.Random(5)
LONG = [DRAW.randrange(1, 250) for _ in range(700)]
OTHER = [DRAW.randrange(1, 250) for _ in range(500)]
SHORT = LONG[:60]
OPTIONS: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def draft_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("draft"), "7", "--layers", "1")


def strategy(draft: Path | None, **options: Any) -> SpecPrefill:
    return SpecPrefill(draft, **{"keep": 0.3, "threshold": 100, "report_ranges": True, **options})


async def test_only_a_part_of_a_long_prompt_is_prefilled(
    tiny_path: Path, draft_path: Path, engine_type: type[BaseEngine]
) -> None:
    told: list[Progress] = []
    async with engine_type(tiny_path, prefill=strategy(draft_path), prefill_step_size=64) as engine:
        result = await engine.generate(LONG, on_progress=told.append, **OPTIONS)
        in_full = await engine.generate(LONG, prefill=None, **OPTIONS)
        shape = await engine.run_blocking(lambda: len(engine._holder.runner().prompt_cache))
    kept, ranges = result.usage.kept_tokens, result.usage.kept_ranges
    assert kept is not None
    assert ranges is not None
    assert sum(b - a for a, b in ranges) == kept
    assert 0.25 * len(LONG) < kept < 0.4 * len(LONG)
    assert ranges[0][0] == 0, "attention rests on the first tokens"
    assert ranges[-1][1] == len(LONG)
    assert result.usage.prompt_tokens == len(LONG)
    assert result.notes == ()
    assert in_full.usage.kept_tokens is in_full.usage.kept_ranges is None
    assert in_full.tokens != result.tokens, "a random model notices"
    phases = [p.phase for p in told]
    assert phases[0] == "prefill"
    assert phases.index("score") < len(phases) - 1 - phases[::-1].index("score")
    for phase in ("score", "prefill"):
        done = [p.done for p in told[1:] if p.phase == phase]
        assert done == sorted(done)
        assert len(done) > 3
        assert done[-1] == len(LONG)
    assert shape == 1, "what lacks tokens is not kept for others; the full one is"


async def test_all_of_it_gives_the_tokens_of_a_full_prefill(
    tiny_path: Path, draft_path: Path, engine_type: type[BaseEngine]
) -> None:
    async with (
        SimpleEngine(tiny_path) as plain,
        engine_type(tiny_path, prefill=strategy(draft_path, keep=1)) as engine,
    ):
        expected = await plain.generate(LONG, **OPTIONS)
        result = await engine.generate(LONG, **OPTIONS)
    assert result.tokens == expected.tokens
    assert result.usage.kept_tokens is None
    assert "leaves out nothing" in " ".join(result.notes)


async def test_a_prompt_under_the_threshold_is_prefilled_in_full_and_says_so(
    tiny_path: Path, draft_path: Path, engine_type: type[BaseEngine]
) -> None:
    async with engine_type(tiny_path, prefill=SpecPrefill(draft_path)) as engine:
        expected = await engine.generate(LONG, prefill=None, **OPTIONS)
        result = await engine.generate(LONG, **OPTIONS)
    assert result.tokens == expected.tokens
    assert "threshold of 8192" in " ".join(result.notes)
    assert expected.notes == ()


async def test_a_request_may_keep_more_or_less(
    tiny_path: Path, draft_path: Path, engine_type: type[BaseEngine]
) -> None:
    async with engine_type(tiny_path, prefill=strategy(draft_path)) as engine:
        kept = []
        for keep in (0.2, 0.5, 0.8):
            own = SpecPrefill(keep=keep, threshold=0)
            result = await engine.generate(LONG, prefill=own, **OPTIONS)
            assert result.usage.kept_ranges is None, "it did not ask for them"
            kept.append(result.usage.kept_tokens)
        assert kept == sorted(set(kept))
        for bad in (SpecPrefill("another", keep=0.5), "full", 0.3):
            with pytest.raises(InvalidRequest, match=r"^prefill"):
                await engine.generate(LONG, prefill=bad)  # type: ignore[arg-type]
    async with engine_type(tiny_path) as engine:
        with pytest.raises(InvalidRequest, match=r"^prefill"):
            await engine.generate(LONG, prefill=SpecPrefill(keep=0.5))


async def test_the_draft_may_be_the_model_itself(
    tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    async with engine_type(tiny_path, prefill=strategy(None)) as engine:
        result = await engine.generate(LONG, **OPTIONS)
        assert result.usage.kept_tokens is not None
        again = await engine.generate([*LONG, 1, 2, 3], **OPTIONS)
        assert again.usage.cached_tokens > 600, "its scoring has read all of the prompt"


async def test_the_second_turn_is_scored_from_what_the_draft_has_read(
    tiny_path: Path, draft_path: Path
) -> None:
    async with SimpleEngine(tiny_path, prefill=strategy(draft_path)) as engine:
        await engine.generate(LONG, **OPTIONS)
        await engine.generate(LONG + OTHER, **OPTIONS)
        ((side, _),) = engine._holder.runner().strategies.side_caches
        assert side.stats().hit_tokens >= len(LONG) - 16


async def alone(
    folder: Path, prompts: list[list[int]], prefill: SpecPrefill
) -> list[GenerationResult]:
    async with SimpleEngine(folder, prefill=prefill, prompt_cache_bytes=0) as engine:
        return [await engine.generate(prompt, **OPTIONS) for prompt in prompts]


async def test_in_a_batch_each_gets_what_it_gets_alone(tiny_path: Path, draft_path: Path) -> None:
    prompts = [LONG, SHORT, OTHER, LONG[100:], OTHER[:30], OTHER + LONG]
    expected = await alone(tiny_path, prompts, strategy(draft_path))
    async with BatchedEngine(
        tiny_path,
        prefill=strategy(draft_path),
        prefill_step_size=64,
        max_batch_size=4,
        prompt_cache_bytes=0,
    ) as engine:
        results = await asyncio.gather(*(engine.generate(p, **OPTIONS) for p in prompts))
        assert [r.tokens for r in results] == [e.tokens for e in expected]
        assert [r.usage.kept_ranges for r in results] == [e.usage.kept_ranges for e in expected]
        await settled()
        assert engine.stats().kv_bytes == 0


async def test_what_the_prompt_cache_has_is_kept_whole(
    tiny_path: Path, draft_path: Path, engine_type: type[BaseEngine]
) -> None:
    async with engine_type(tiny_path, prefill=strategy(draft_path)) as engine:
        first = await engine.generate(SHORT, **OPTIONS)
        await settled()
        again = await engine.generate(SHORT + OTHER, **OPTIONS)
        assert "threshold" in " ".join(first.notes)
        assert again.usage.kept_ranges is not None
        assert again.usage.kept_ranges[0] >= (0, again.usage.cached_tokens) == (0, len(SHORT))
        await settled()
        # Of the first prompt the prompt cache has an entry, of the second one it has none.
        assert engine.stats().prompt_cache.entries == 1
        in_full = await engine.generate(SHORT, prefill=None, **OPTIONS)
        assert in_full.tokens == first.tokens


@pytest.mark.parametrize("kind", [QWEN_NEXT, MIMO], ids=str)
async def test_any_prefill_goes_with_any_decode(
    tmp_path: Path, engine_type: type[BaseEngine], kind: Any
) -> None:
    folder = await made(kind, tmp_path / "model", 3)
    draft = await made(MIMO, tmp_path / "draft", 4)
    (expected,) = await alone(folder, [LONG], strategy(draft))
    assert expected.usage.kept_tokens is not None
    for decode in (MTP(2), DraftModel(draft, 3)):
        async with engine_type(folder, prefill=strategy(draft), decode=decode) as engine:
            rig(engine, [*LONG, *expected.tokens], 0.3)
            result = await engine.generate(LONG, **OPTIONS)
            assert result.tokens == expected.tokens
            assert result.usage.kept_ranges == expected.usage.kept_ranges
            assert 0 < result.timings.acceptance_rate < 1


@pytest.mark.parametrize("at", [1, 5, 11, 12, 13, 17, 20, 21, 26])
async def test_a_cancel_is_seen_in_scoring_prefill_and_decode(
    tiny_path: Path, draft_path: Path, engine_type: type[BaseEngine], gate: Any, at: int
) -> None:
    async with engine_type(
        tiny_path, prefill=strategy(draft_path, keep=0.2, lookahead=3), prefill_step_size=64
    ) as engine:
        expected = await engine.generate(LONG, **OPTIONS)
        await settled()
        engine._holder.runner().strategies.side_caches[0][0].clear()
        stop = gate("model", at)
        await cancel_inside(stop, engine.generate(LONG, **OPTIONS))
        assert stop.calls - at <= 1
        await settled()
        assert engine.stats().kv_bytes == engine.stats().running == 0
        again = await engine.generate(LONG, **OPTIONS)
        assert again.tokens == expected.tokens


@pytest.mark.parametrize("family", ["sliding windows", "recurrent", "hybrid"])
async def test_a_model_that_cannot_leave_tokens_out_is_refused_or_told(
    tmp_path: Path, draft_path: Path, family: str
) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(FAMILIES[family]))
    with pytest.raises(InvalidRequest, match=r"^prefill: .*SpecPrefill"):
        await SimpleEngine(folder, prefill=strategy(draft_path)).start()
    async with SimpleEngine(folder, prefill=strategy(draft_path, fallback=True)) as engine:
        result = await engine.generate(LONG, **OPTIONS)
    assert "prefilled in full" in " ".join(result.notes)
    assert result.usage.kept_tokens is None


async def test_a_draft_that_cannot_score_is_refused(tmp_path: Path, tiny_path: Path) -> None:
    draft = make_tiny(tmp_path / "draft", "--other", json.dumps(FAMILIES["recurrent"]))
    with pytest.raises(InvalidRequest, match=r"^prefill: .*cannot score"):
        await SimpleEngine(tiny_path, prefill=strategy(draft)).start()


@pytest.mark.parametrize("options", [{"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 64}])
async def test_options_of_the_kv_cache_that_do_not_go_with_it_are_refused(
    tiny_path: Path, draft_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match=f"^prefill: .*{next(iter(options))}"):
        await SimpleEngine(tiny_path, prefill=strategy(draft_path), **options).start()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("keep", 0),
        ("keep", 1.01),
        ("keep", -0.2),
        ("keep", True),
        ("keep", float("nan")),
        ("keep", "0.2"),
        ("threshold", -1),
        ("threshold", 1.5),
        ("lookahead", -1),
        ("report_ranges", 1),
        ("fallback", None),
        ("draft", ""),
        ("draft", 3),
    ],
)
def test_bad_values_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{option}"):
        SpecPrefill(**{option: value})  # type: ignore[arg-type]
