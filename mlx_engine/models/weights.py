"""Bytes of weights: in a model's files, before they are read, and in memory."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten


def stored_bytes(source: Path) -> int:
    """Bytes of the weights that a model's folder, or file, has; 0 if it has none.

    What is loaded of them may be less: mlx-lm leaves some behind, such as an MTP head.
    """
    files = [source] if source.is_file() else source.glob("model*.safetensors")
    return sum(file.stat().st_size for file in files)


def loaded_bytes(*modules: nn.Module) -> int:
    """Bytes of all arrays in them; those that several share count once."""
    arrays = {
        id(value): value.nbytes
        for module in modules
        for _, value in tree_flatten(module.parameters())
    }
    return sum(arrays.values())
