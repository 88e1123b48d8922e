"""Whatever raises, wherever: one clear error at most, and the same tokens for all others.

Each case does a few requests once without a fault and counts the calls on the way, then again and
again with a fault at one of them. After each the same requests, the prompt cache left as it
is, must give the right tokens, the counters must add up, and nothing may be left.

``MLX_ENGINE_FAULTS=all`` raises at every single call, not only at some of each kind.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from tests.properties.campaign import Campaign
from tests.properties.cases import CASES, LEAST, folder_of, ordinary
from tests.properties.faults import Faults

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", CASES)
async def test_a_fault_at_any_call_costs_one_error_at_most_and_no_right_token(
    name: str, faults: Faults, models: dict[str, Path], tiny_path: Path
) -> None:
    case = CASES[name]
    model = await folder_of(case.model, models, tiny_path)
    async with case.engine(model, tiny_path) as engine:
        campaign = Campaign(engine, case.act, faults)
        await campaign.rehearse()
        turn = list(CASES).index(name)
        for (hook, n), error in zip(campaign.targets(turn), ordinary(), strict=False):
            await campaign.strike(hook, n, error)
    assert not campaign.problems, "\n".join(campaign.problems)
    assert len(campaign.struck) >= LEAST


# ── exits, and cancellations that are nobody's ──────────────────────────────────────────────

EXITS = [KeyboardInterrupt, SystemExit, asyncio.CancelledError]
EXIT_HOOKS = (
    "model",
    "async_eval",
    "processor",
    "sampler.__call__",
    "tokenizer.encode",
    "detokenizer.add",
    "PromptCache.fetch",
)


@pytest.mark.parametrize("kind", EXITS)
@pytest.mark.parametrize("name", ["simple, sampled", "batched, three", "simple, chat"])
async def test_an_exit_raised_on_the_mlx_thread_leaves_nobody_waiting(
    name: str, kind: type[BaseException], faults: Faults, tiny_path: Path
) -> None:
    case = CASES[name]
    async with case.engine(tiny_path, tiny_path) as engine:
        campaign = Campaign(engine, case.act, faults)
        await campaign.rehearse()
        for hook, n in itertools.product(EXIT_HOOKS, (1, 4)):
            await campaign.strike(hook, n, kind)
    assert not campaign.problems, "\n".join(campaign.problems)
    assert len(campaign.struck) >= 3
