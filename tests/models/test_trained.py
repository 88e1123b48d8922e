"""The trained models: their heads are right often enough, and change no token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import MTP, BaseEngine, BatchedEngine, SimpleEngine
from mlx_engine.generation.trials.mtp_head import check_head
from mlx_engine.models.mtp_heads import load_head
from tests.conftest import ROOT

pytestmark = pytest.mark.anyio

KINDS = ("plain", "hybrid")
CODE = "    def __init__(self, name, default=None):\n        self.name = name\n"
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "seeded": {"temperature": 0.8, "seed": 5}}
OPTIONS: dict[str, Any] = {"max_tokens": 120, "ignore_eos": True}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of both models, unpacked once and in processes of their own."""
    parent = tmp_path_factory.mktemp("trained")
    for kind in KINDS:
        program = [sys.executable, "-m", "tests.unpack", kind, str(parent / kind)]
        subprocess.run(program, check=True, cwd=ROOT)
    return {kind: parent / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def trained_path(request: pytest.FixtureRequest, unpacked: dict[str, Path]) -> Path:
    """A trained model with its head."""
    return unpacked[request.param]


@pytest.fixture(scope="session")
def expected() -> dict[tuple[Path, str], tuple[int, ...]]:
    """What plain decoding gave, by folder and way."""
    return {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_files_are_small(kind: str) -> None:
    files = (ROOT / "tests" / "trained" / kind).iterdir()
    assert sum(file.stat().st_size for file in files) < 1_000_000


async def test_the_head_agrees_with_its_model(trained_path: Path) -> None:
    async with SimpleEngine(trained_path) as engine:

        def agreement() -> float:
            loaded = engine._holder.model()
            head = load_head(loaded)
            return check_head(loaded, head.trunk, head)

        assert await engine.run_blocking(agreement) > 0.3


@pytest.mark.parametrize(
    ("engine_type", "depth"),
    [
        *((SimpleEngine, depth) for depth in (1, 2, 3, "auto")),
        *((BatchedEngine, depth) for depth in (2, "auto")),
    ],
)
async def test_proposals_change_no_token(
    trained_path: Path,
    engine_type: type[BaseEngine],
    depth: Any,
    expected: dict[tuple[Path, str], tuple[int, ...]],
) -> None:
    async with engine_type(trained_path, decode=MTP(depth), prompt_cache_bytes=0) as engine:
        proposed = accepted = 0
        for way, options in WAYS.items():
            if (trained_path, way) not in expected:
                plain = await engine.generate(CODE, decode=None, **OPTIONS, **options)
                expected[trained_path, way] = plain.tokens
            result = await engine.generate(CODE, **OPTIONS, **options)
            assert result.tokens == expected[trained_path, way], way
            assert result.notes == ()
            proposed += result.timings.draft_tokens
            accepted += result.timings.accepted_tokens
    assert proposed > 0, "auto tries at least once"
    assert depth == "auto" or accepted > 0.2 * proposed
