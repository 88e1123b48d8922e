"""Fixtures: hooks for faults, and the models that take longer to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_engine.generation import batch
from tests.properties.faults import Faults


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()
    faults.install(monkeypatch)
    monkeypatch.setattr(batch, "_CLEAR", 10**9)  # where it comes depends on all steps before
    return faults


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made when first asked for."""
    return {"": tmp_path_factory.mktemp("models")}
