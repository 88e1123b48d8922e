"""A FakeEngine in the place of an engine on the tiny model, whose steps gates can stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_engine.testing import FakeEngine
from mlx_engine.testing import fake_model as model
from mlx_engine.testing.scripted_request import ScriptedRequest
from tests.guard import GUARD

WORDS = [f"word {number} " for number in range(40)]


class RiggedFake(FakeEngine):
    """Takes the options of SimpleEngine. Its chunks and tokens count as calls of a model."""

    def __init__(
        self,
        folder: object,
        *,
        prefill_step_size: int = 512,
        prompt_cache_bytes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(WORDS, context_length=16384, **options)
        self._step_size = prefill_step_size
        self._holder.play = self._play  # type: ignore[method-assign]

    def _play(self, request: ScriptedRequest) -> Iterator[float | None]:
        size = max(len(request.prompt), len(request.shown.question))
        chunks = max(1, math.ceil((size - 1) / self._step_size))
        self._holder._prefill_seconds = chunks * model._SLICE
        for _ in model.FakeModel.play(self._holder, request):
            if GUARD.hook is not None:
                GUARD.hook("model")
            yield 0.0


class RiggedBatch(RiggedFake):
    """Many at once."""

    def __init__(self, folder: object, *, max_batch_size: int = 32, **options: Any) -> None:
        super().__init__(folder, max_batch_size=max_batch_size, **options)


@pytest.fixture
def tiny_path(tmp_path: Path) -> Path:
    """Nobody needs a model here."""
    return tmp_path


@pytest.fixture(params=[RiggedFake, RiggedBatch], ids=["fake", "fake batch"])
def engine_type(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def simple_type() -> Any:
    return RiggedFake


@pytest.fixture
def batched_type() -> Any:
    return RiggedBatch


# For a module that runs the tests of the real engines with fakes in their place.
FAKES = {f.__name__: f for f in (tiny_path, engine_type, simple_type, batched_type)}


def borrowed(module: ModuleType, *but: str) -> dict[str, Any]:
    """The tests of a module, to be run with the fixtures of another one as well."""
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    for name in but:
        del tests[name]
    return tests
