"""Every finished answer validates: random models at high temperatures, over all schemas.

``python -m tests.constraints.validity FOLDER 17`` draws thousands more.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import MTP, BaseEngine, BatchedEngine, DraftModel, SimpleEngine
from tests.constraints.schemas import SCHEMAS
from tests.constraints.validity import draw
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO

pytestmark = pytest.mark.anyio

NAMES = list(SCHEMAS)


@pytest.mark.parametrize("first", [0, 15])
async def test_answers_of_a_batch_validate(tiny_path: Path, first: int) -> None:
    async with BatchedEngine(tiny_path, max_batch_size=16) as engine:
        drawn = await draw(engine, NAMES, range(first, first + 15))
    assert drawn.answers["stop"] > 0.9 * drawn.answers.total() > 800
    assert len(drawn.schemas) > 0.9 * len(NAMES)


@pytest.mark.parametrize("drafted", [False, True])
async def test_answers_one_by_one_validate(tiny_path: Path, drafted: bool) -> None:
    decode = DraftModel(tiny_path, 2) if drafted else None
    async with SimpleEngine(tiny_path, decode=decode) as engine:
        drawn = await draw(engine, NAMES, range(100, 101))
    assert drawn.answers["stop"] > 0.9 * drawn.answers.total() > 50


async def test_answers_with_an_mtp_head_validate(
    tmp_path: Path, engine_type: type[BaseEngine]
) -> None:
    options: dict[str, Any] = {"decode": MTP(2)}
    async with engine_type(await made(MIMO, tmp_path / "model", 3), **options) as engine:
        drawn = await draw(engine, list(itertools.islice(NAMES, 0, None, 3)), range(200, 202))
    assert drawn.answers["stop"] > 10
