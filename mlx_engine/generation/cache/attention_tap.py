"""A hook in mlx_lm's attention: a KV cache may have a tap, and is asked then.

The function that nearly all models call gets the real queries and keys, after norms and
rotary embeddings, and the cache that they belong to. So nothing here knows architectures.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

_NAME = "scaled_dot_product_attention"
plain_attention = base.scaled_dot_product_attention


class Tap(Protocol):
    """The attribute ``tap`` of a KV cache: computes the attention of its layer."""

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """The output of attention for (batch, heads, tokens, dimension)."""
        ...


@functools.wraps(plain_attention)
def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    tap: Tap | None = getattr(cache, "tap", None)
    if tap is None:
        out: mx.array = plain_attention(queries, keys, values, cache, scale, mask, sinks)
        return out
    return tap.attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def install(model: nn.Module) -> None:
    """Let the taps of a model's caches be asked. Never undone; costs a look where there is none."""
    for module in _defining(model):
        if getattr(module, _NAME, None) is plain_attention:
            setattr(module, _NAME, _attention)


def _defining(model: nn.Module) -> set[ModuleType]:
    """The Python modules in which a model's layers, and what they inherit from, are written."""
    classes = {kind for layer in model.modules() for kind in type(layer).__mro__}
    names = {kind.__module__ for kind in classes} - {base.__name__}
    return {sys.modules[name] for name in names if name in sys.modules}


@contextmanager
def tapped(entries: Sequence[Any], tap: Tap) -> Iterator[None]:
    """Context in which these caches have a tap."""
    for entry in entries:
        entry.tap = tap
    try:
        yield
    finally:
        for entry in entries:
            del entry.tap
