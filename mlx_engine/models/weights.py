"""Bytes of weights in memory; in files: ``core.weight_size``."""

from __future__ import annotations

import mlx.nn as nn
from mlx.utils import tree_flatten


def loaded_bytes(*modules: nn.Module) -> int:
    """Bytes of all arrays in them; those that several share count once."""
    arrays = {
        id(value): value.nbytes
        for module in modules
        for _, value in tree_flatten(module.parameters())
    }
    return sum(arrays.values())
