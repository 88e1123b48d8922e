"""What a model compiles is compiled when its engine starts, and nothing of that stays."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import BaseEngine, BatchedEngine, DraftModel, EngineState, SimpleEngine
from mlx_engine.chat.renderer import Renderer
from mlx_engine.generation.warm_up import warm_up
from tests.conftest import ROOT, cancel_inside
from tests.engine.first_request import KINDS
from tests.generation.rigged import made
from tests.guard import Gate
from tests.models.mtp_checkpoints import DENSE_QWEN

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with recurrent layers, which compiles other things for prompts than for tokens."""
    return await made(DENSE_QWEN, tmp_path_factory.mktemp("hybrid"), 3)


@pytest.mark.parametrize("kind", KINDS)
async def test_first_requests_compile_nothing(hybrid: Path, tmp_path: Path, kind: str) -> None:
    """On the CPU back end MLX keeps what it compiles in files, where it looks for it again."""
    command = [sys.executable, "-m", "tests.engine.first_request", str(hybrid), kind, str(tmp_path)]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after == before
    if mx.default_device() == mx.cpu:
        assert before > 3, "a model that compiles nothing proves nothing"


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": {}}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "look"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "Here."},
]

ENGINES: dict[str, Callable[[Path], BaseEngine]] = {
    "simple": SimpleEngine,
    "batched": BatchedEngine,
    "small chunks": lambda model: SimpleEngine(model, prefill_step_size=1, context_length=8),
    "quantised": lambda model: SimpleEngine(model, kv_bits=8, kv_group_size=32),
    "bounded": lambda model: SimpleEngine(model, max_kv_size=16),
    "draft": lambda model: BatchedEngine(model, decode=DraftModel(model, 2)),
}


async def test_a_first_chat_finds_out_nothing_about_its_template(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renders: list[object] = []
    render = Renderer.render

    def noted(self: Renderer, *args: Any, **named: Any) -> str:
        renders.append(args)
        return render(self, *args, **named)

    monkeypatch.setattr(Renderer, "render", noted)
    async with SimpleEngine(tiny_path) as engine:
        assert renders
        for messages, tools in ((TALK[:1], None), (TALK, [TOOL])):
            renders.clear()
            await engine.chat(messages, tools=tools, max_tokens=1)
            assert len(renders) == 1


@pytest.mark.parametrize("kind", ENGINES)
async def test_nothing_of_a_warm_up_stays(tiny_path: Path, kind: str) -> None:
    async with ENGINES[kind](tiny_path) as engine:
        fresh, prompts = engine.stats(), engine.stats().prompt_cache

        def again() -> tuple[bool, list[int]]:
            runner = engine._holder.runner()
            mx.random.seed(7)
            before = [mx.array(part) for part in mx.random.state]
            warm_up(runner, batched=engine._holder.batched)
            same = all(
                mx.array_equal(a, b).item() for a, b in zip(before, mx.random.state, strict=True)
            )
            stored = [len(cache.entries()) for cache, _ in runner.strategies.side_caches]
            free = mx.get_cache_memory() // 1024  # KiB; that of the comparison is less than one
            return same, [len(runner.prompt_cache.entries()), *stored, free]

        same, left = await engine.run_blocking(again)
        assert same, "the random numbers of the next request are others"
        assert not any(left)
        assert engine.stats().prompt_cache == prompts
        assert engine.stats().draft_tokens == 0
        assert engine.stats().prompt_tokens == fresh.prompt_tokens == 0
        assert engine.stats().completion_tokens == engine.stats().kv_bytes == 0


@pytest.mark.parametrize("at", [2, 3, 4])
async def test_a_warm_up_that_is_cancelled_ends_with_its_call_of_the_model(
    tiny_path: Path, gate: Callable[[str, int], Gate], at: int
) -> None:
    engine = SimpleEngine(tiny_path)
    stop = gate("model", at)
    await cancel_inside(stop, engine.start())
    assert stop.calls == at
    assert engine.state is EngineState.CREATED
    await engine.start()
    assert len((await engine.generate([1], max_tokens=3, ignore_eos=True)).tokens) == 3
    await engine.stop()
