"""The files with a model's weights, and how large they are before they are read. No MLX here."""

from __future__ import annotations

from pathlib import Path


def stored_bytes(source: Path) -> int:
    """Bytes of the weights that a model's folder, or file, has; 0 if it has none.

    What is loaded of them may be less: mlx-lm leaves some behind, such as an MTP head.

    Raises:
        OSError: a file cannot be looked at.
    """
    files = [source] if source.is_file() else source.glob("model*.safetensors")
    return sum(file.stat().st_size for file in files)
