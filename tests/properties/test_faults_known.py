"""What is known to be amiss when something fails: each of these is expected to fail."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_engine import (
    BatchedEngine,
    EngineState,
    GenerationError,
    MLXEngineError,
    SimpleEngine,
)
from mlx_engine.generation import batch
from tests.conftest import settled
from tests.properties.cases import CASES, GREEDY, SHORT, outcome
from tests.properties.faults import Faults

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
async def test_an_exit_in_a_logits_processor_is_an_error_of_its_request(
    kind: type[BaseException], tiny_path: Path
) -> None:
    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        raise kind

    async with SimpleEngine(tiny_path) as engine:
        error = await outcome(engine.generate(SHORT, **GREEDY, logits_processors=[processor]))
        assert isinstance(error, GenerationError)


@pytest.mark.parametrize("name", ["simple, sampled", "batched, three"])
async def test_a_start_that_mlx_fails_says_so_in_an_error_of_ours(
    name: str, faults: Faults, tiny_path: Path
) -> None:
    engine = CASES[name].engine(tiny_path, tiny_path)
    faults.arm("model", 1)
    with pytest.raises(MLXEngineError):
        await engine.start()


@pytest.mark.parametrize("way", ["save", "load"])
async def test_a_prompt_cache_that_mlx_cannot_save_or_load_is_an_error_of_ours(
    way: str, faults: Faults, tiny_path: Path, tmp_path: Path
) -> None:
    async with SimpleEngine(tiny_path) as engine:
        await engine.save_prompt_cache(tmp_path / "prompts")
        faults.arm("mx.concatenate", 1)
        with pytest.raises(MLXEngineError):
            await getattr(engine, f"{way}_prompt_cache")(tmp_path / "prompts")


async def test_after_a_failed_step_no_kv_cache_is_counted(faults: Faults, tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path) as engine:
        faults.arm("async_eval", 3)
        with pytest.raises(GenerationError):
            await engine.generate(SHORT, **GREEDY)
        await settled()
        stats = engine.stats()
        assert (stats.batch_size, stats.kv_bytes) == (0, 0)


async def test_giving_back_free_memory_does_not_end_the_engine(
    faults: Faults, monkeypatch: pytest.MonkeyPatch, tiny_path: Path
) -> None:
    monkeypatch.setattr(batch, "_CLEAR", 4)
    async with BatchedEngine(tiny_path) as engine:
        faults.arm("mx.clear_cache", 2)  # the first one is that of the prefill
        await outcome(engine.generate(SHORT, **GREEDY))
        assert faults.raised is not None
        assert engine.state is EngineState.RUNNING
