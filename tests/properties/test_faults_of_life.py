"""Faults while an engine starts, stops, or keeps its prompts in a file: told, and harmless."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mlx_engine import (
    EngineState,
    MLXEngineError,
)
from tests.conftest import settled
from tests.properties.campaign import tells_of
from tests.properties.cases import (
    ALL,
    CASES,
    GREEDY,
    LONG,
    SHORT,
    folder_of,
    ordinary,
    outcome,
)
from tests.properties.faults import Faults
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


STARTS = ["simple, sampled", "batched, three", "batched, both", "batched, MTP"]


@pytest.mark.parametrize("name", STARTS)
async def test_a_fault_at_any_call_of_a_start_is_told_and_it_can_be_tried_again(
    name: str, faults: Faults, models: dict[str, Path], tiny_path: Path
) -> None:
    case = CASES[name]
    engine = case.engine(await folder_of(case.model, models, tiny_path), tiny_path)
    faults.arm()
    await engine.start()
    faults.disarm()
    calls = dict(faults.calls)
    expected = (await engine.generate(SHORT, **GREEDY)).tokens
    await engine.stop()
    problems: list[str] = []
    struck = 0
    targets = _calls(calls if name in STARTS[:2] else dict.fromkeys(calls, 1))
    for (hook, n), error in zip(targets, ordinary(), strict=False):
        faults.arm(hook, n, error)
        async with asyncio.timeout(PATIENCE):
            said = await outcome(engine.start())
        faults.disarm()
        struck += faults.raised is not None
        what = f"{hook} #{n} {faults.raised!r}"
        if isinstance(said, BaseException):
            if not tells_of(faults.raised, said):
                problems.append(f"{what}: {said!r} {sorted(faults.where)}")
            if engine.state not in (EngineState.CREATED, EngineState.STOPPED):
                problems.append(f"{what}: {engine.state}")
            if engine._holder.loaded:
                problems.append(f"{what}: it has a model")
            del said
            await engine.start()
        if (await engine.generate(SHORT, **GREEDY)).tokens != expected:
            problems.append(f"{what}: other tokens afterwards {sorted(faults.where)}")
        await engine.stop()
    assert not problems, "\n".join(problems)
    assert struck >= 15


@pytest.mark.parametrize("name", ["simple, sampled", "batched, both"])
async def test_a_fault_at_any_call_of_a_stop_leaves_a_stopped_engine(
    name: str, faults: Faults, tiny_path: Path
) -> None:
    engine = CASES[name].engine(tiny_path, tiny_path)
    await engine.start()
    expected = (await engine.generate(SHORT, **GREEDY)).tokens
    faults.arm()
    await engine.stop()
    faults.disarm()
    calls = dict(faults.calls)
    assert calls
    problems: list[str] = []
    for hook, n in _calls(calls):
        await engine.start()
        faults.arm(hook, n)
        async with asyncio.timeout(PATIENCE):
            said = await outcome(engine.stop())
        faults.disarm()
        if isinstance(said, BaseException) and not isinstance(said, MLXEngineError):
            problems.append(f"{hook} #{n}: {said!r} is no error of ours {sorted(faults.where)}")
        if engine.state is not EngineState.STOPPED or engine._holder.loaded:
            problems.append(f"{hook} #{n}: {engine.state}, {engine._holder.loaded}")
        await engine.start()
        assert (await engine.generate(SHORT, **GREEDY)).tokens == expected
        await engine.stop()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("way", ["save", "load"])
@pytest.mark.parametrize("name", ["simple, sampled", "batched, three"])
async def test_a_fault_at_any_call_of_saving_or_loading_leaves_file_and_cache_whole(
    name: str, way: str, faults: Faults, tiny_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts"
    async with CASES[name].engine(tiny_path, tiny_path) as engine:

        async def act() -> int:
            if way == "save":
                return await engine.save_prompt_cache(file)
            return await engine.load_prompt_cache(file)

        expected = [(await engine.generate(p, **GREEDY)).tokens for p in (SHORT, LONG)]
        await settled()
        assert await engine.save_prompt_cache(file) == 2
        faults.arm()
        await act()
        faults.disarm()
        calls = dict(faults.calls)
        problems: list[str] = []
        struck = 0
        for (hook, n), error in zip(_calls(calls), ordinary(), strict=False):
            faults.arm(hook, n, error)
            async with asyncio.timeout(PATIENCE):
                said = await outcome(act())
            faults.disarm()
            struck += faults.raised is not None
            what = f"{hook} #{n} {faults.raised!r}"
            if isinstance(said, BaseException) and not tells_of(faults.raised, said):
                problems.append(f"{what}: {said!r} {sorted(faults.where)}")
            if [path.name for path in tmp_path.iterdir()] != ["prompts"]:
                problems.append(f"{what}: leaves {list(tmp_path.iterdir())}")
            if await engine.load_prompt_cache(file) != 2:
                problems.append(f"{what}: the file is not whole")
            for prompt, tokens in zip((SHORT, LONG), expected, strict=True):
                result = await engine.generate(prompt, **GREEDY)
                if result.tokens != tokens or result.usage.cached_tokens < len(prompt) - 1:
                    problems.append(f"{what}: {result}")
            await settled()
    assert not problems, "\n".join(problems)
    assert struck >= 8


def _calls(calls: dict[str, int]) -> list[tuple[str, int]]:
    """Of each hook the first call and the last, or all of them."""
    return [
        (hook, n)
        for hook, count in sorted(calls.items())
        for n in (range(1, count + 1) if ALL else sorted({1, count}))
    ]
