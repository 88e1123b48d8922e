"""A random model with steps of 2 ms for one row and 40 ms for 32 on a CPU of two cores.

The tests' model takes 0.7 and 3 ms there, so that Python's share of a step is as big as MLX's.
This one has the same tokenizer and family of architecture, and is wide enough for MLX's share
to be what counts, as it is with a model that somebody uses.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from benchmarks.setting import random_model

LAYERS = 3
_WIDTH = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
}


def wide_folder(layers: int = LAYERS) -> AbstractContextManager[str]:
    """Such a model, which lives as long as the ``with`` block."""
    return random_model(layers, **_WIDTH)
