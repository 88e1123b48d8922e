"""MLX's side of engines in this process. Imported by ``late.py`` alone."""

import contextlib

import mlx.core as mx

from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.generation.batch import Batch
from mlx_engine.generation.memory import FixedPool, MemoryBudget, memory_for_caches
from mlx_engine.generation.prepare import prepare
from mlx_engine.generation.question import answer_question
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.single import generate_single
from mlx_engine.generation.trials.batch import check_batchable
from mlx_engine.generation.warm_up import warm_up
from mlx_engine.models.loading import find_model, load_model

__all__ = [
    "Batch",
    "FixedPool",
    "MemoryBudget",
    "ModelRunner",
    "answer_question",
    "check_batchable",
    "clear_cache",
    "find_model",
    "generate_single",
    "load_model",
    "memory_for_caches",
    "prepare",
    "warm_up",
]


def clear_cache() -> None:
    """Give back the memory of arrays that are gone. On the MLX thread."""
    with contextlib.suppress(Exception):  # they are gone, and that is what counts
        mx.clear_cache()


def _leave_mlx() -> None:
    """The MLX thread's last job. Without it mlx 0.32.4 aborts the process at its exit."""
    mx.synchronize()
    mx.clear_streams()


mlx_thread.at_exit(_leave_mlx)
