"""Other families of models in a batch: sliding windows, recurrent state, and both in one."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BatchedEngine, GenerationResult, InvalidRequest, SimpleEngine
from tests.conftest import all_ready, make_tiny, settled
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "sliding windows": {
        **SMALL,
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
    },
    "recurrent": {
        "model_type": "mamba",
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "hybrid": {
        **SMALL,
        "model_type": "falcon_h1",
        "mamba_d_ssm": 32,
        "mamba_d_head": 16,
        "mamba_n_heads": 2,
        "mamba_d_state": 8,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_tokens_in_a_batch_and_from_the_prompt_cache_are_those_alone(
    tmp_path: Path, family: str
) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(FAMILIES[family]))
    draw = random.Random(3)
    system = [draw.randrange(1, 250) for _ in range(60)]
    prompts = [
        (system if n % 2 else []) + [draw.randrange(1, 250) for _ in range(length)]
        for n, length in enumerate([1, 2, 5, 9, 17, 30, 30, 60, 90, 3])
    ]

    async def answers(engine: BatchedEngine, order: list[list[int]]) -> list[tuple[int, ...]]:
        results = await asyncio.gather(
            *(
                engine.generate(p, max_tokens=5 + 7 * (n % 5), ignore_eos=True)
                for n, p in enumerate(order)
            )
        )
        await settled()
        return [result.tokens for result in results]

    async with SimpleEngine(folder, prompt_cache_bytes=0) as simple:
        expected = [
            (await simple.generate(p, max_tokens=5 + 7 * (n % 5), ignore_eos=True)).tokens
            for n, p in enumerate(prompts)
        ]
    async with BatchedEngine(folder, max_batch_size=6, prefill_step_size=32) as engine:
        for _ in range(3):  # the second and third time, with what is stored by then
            assert await answers(engine, prompts) == expected
        assert engine.stats().cached_tokens > 0
        turn = [*prompts[7], *expected[7], 7, 8, 9]
        result = await engine.generate(turn, max_tokens=5, ignore_eos=True)
        assert result.usage.cached_tokens >= len(prompts[7]) - 1
        await settled()
        saved = await engine.save_prompt_cache(tmp_path / "cache")
        assert saved == engine.stats().prompt_cache.entries > 5
    async with SimpleEngine(folder, prompt_cache_bytes=0) as simple:
        again = await simple.generate(turn, max_tokens=5, ignore_eos=True)
    assert again.tokens == result.tokens
    async with BatchedEngine(folder) as engine:
        assert await engine.load_prompt_cache(tmp_path / "cache") == saved
        assert await answers(engine, prompts) == expected
        assert engine.stats().cached_tokens > 0


async def test_a_family_whose_cache_cannot_be_batched_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama
    from mlx_lm.models.cache import ChunkedKVCache

    folder = make_tiny(tmp_path / "model")
    monkeypatch.setattr(
        llama.Model, "make_cache", lambda self: [ChunkedKVCache(64) for _ in self.layers]
    )
    with pytest.raises(InvalidRequest, match="ChunkedKVCache; use SimpleEngine"):
        await BatchedEngine(folder).start()


async def test_a_prompt_that_is_prefilled_beside_others_stores_what_it_shares(
    tmp_path: Path,
) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(FAMILIES["sliding windows"]))
    draw = random.Random(4)
    system = [draw.randrange(1, 250) for _ in range(60)]
    go = threading.Event()
    async with BatchedEngine(folder) as engine:

        def ask(*prompt: int) -> asyncio.Task[GenerationResult]:
            return asyncio.create_task(engine.generate(prompt, max_tokens=3, ignore_eos=True))

        await ask(*system, *range(1, 31))
        await settled()
        turn = asyncio.create_task(engine.run_blocking(go.wait, PATIENCE))
        both = [ask(*system, *range(40, 60)), ask(1, 2, 3)]
        await until(lambda: all_ready(engine, 2))
        go.set()
        await asyncio.gather(turn, *both)
        await settled()
        assert (await ask(*system, *range(70, 90))).usage.cached_tokens == len(system)
