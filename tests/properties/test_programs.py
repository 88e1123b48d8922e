"""Random programs, any interleaving: the same tokens, one end for each request, nothing left.

The same programs each time; ``MLX_ENGINE_EXAMPLES=1000`` runs so many new ones on each engine.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from mlx_engine import BatchedEngine, SimpleEngine
from tests.properties.programs import Operation, programs
from tests.properties.runner import References, Runner, make_references

NEW = "MLX_ENGINE_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("MLX_ENGINE_EXAMPLES", "60"))
LIMIT = 150_000  # bytes of prompt cache: some prompts give way to others

pytestmark = pytest.mark.timeout(600 + 10 * EXAMPLES)
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not NEW,
    print_blob=True,
    database=None,
    # Each program is a few hundred milliseconds of a model's work.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def references(tiny_path: Path) -> References:
    async def make() -> References:
        async with SimpleEngine(tiny_path, prompt_cache_bytes=0) as engine:
            return await make_references(engine)

    return asyncio.run(make())


@bounded
@given(program=programs(priorities=False))
def test_any_program_on_a_simple_engine(
    program: list[Operation], tiny_path: Path, references: References
) -> None:
    async def run() -> None:
        engine = SimpleEngine(tiny_path, prefill_step_size=32, prompt_cache_bytes=LIMIT)
        with tempfile.TemporaryDirectory() as folder:
            await Runner(engine, references, Path(folder)).run(program)

    asyncio.run(run())


@bounded
@given(program=programs(priorities=True))
def test_any_program_on_a_batched_engine(
    program: list[Operation], tiny_path: Path, references: References
) -> None:
    async def run() -> None:
        engine = BatchedEngine(
            tiny_path, prefill_step_size=32, prompt_cache_bytes=LIMIT, max_batch_size=3
        )
        with tempfile.TemporaryDirectory() as folder:
            await Runner(engine, references, Path(folder)).run(program)

    asyncio.run(run())
