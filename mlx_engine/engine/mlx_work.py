"""MLX's side of engines in this process. Imported by ``late.py`` alone."""

import mlx.core as mx

from mlx_engine.core.ledger import ledger
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.generation.batch import Batch
from mlx_engine.generation.memory import MemoryBudget
from mlx_engine.generation.prepare import prepare
from mlx_engine.generation.question import answer_question
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.single import generate_single
from mlx_engine.generation.single_memory import check_prompt
from mlx_engine.generation.trials.batch import check_batchable
from mlx_engine.generation.warm_up import warm_up
from mlx_engine.models.device import RESIDENCY, clear_cache, measure_device
from mlx_engine.models.loading import find_model, load_model
from mlx_engine.models.weights import loaded_bytes

__all__ = [
    "RESIDENCY",
    "Batch",
    "MemoryBudget",
    "ModelRunner",
    "answer_question",
    "check_batchable",
    "check_prompt",
    "clear_cache",
    "find_model",
    "generate_single",
    "load_model",
    "loaded_bytes",
    "prepare",
    "warm_up",
]


def _leave_mlx() -> None:
    """The MLX thread's last job. Without it mlx 0.32.4 aborts the process at its exit."""
    mx.synchronize()
    mx.clear_streams()


mlx_thread.at_exit(_leave_mlx)
ledger().clear_cache = clear_cache
measure_device()
