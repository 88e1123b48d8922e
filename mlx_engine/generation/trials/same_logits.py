"""Comparing logits of two ways to compute the same, for the trials at an engine's start."""

from __future__ import annotations

import mlx.core as mx

# Of the span of the logits: half precision changes less than 1 %, the smallest fault that is found
# by this 8 %. Positions of afm7 change 4 to 8 %, by its weights: trials know it by its name.
TOLERANCE = 0.05


def difference(expected: mx.array, got: mx.array) -> float:
    """The largest difference, as a part of each row's span, of logits of shape (n, vocabulary)."""
    expected, got = expected.astype(mx.float32), got.astype(mx.float32)
    span = expected.max(axis=-1) - expected.min(axis=-1)
    off = mx.abs(expected - got).max(axis=-1) / mx.maximum(span, 1e-6)
    return float(off.max().item())  # type: ignore[arg-type]
