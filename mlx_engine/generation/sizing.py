"""How many bytes a model and its KV caches take, and what of that fits into this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache

from mlx_engine.config import ModelConfig
from mlx_engine.core.ledger import room_for_caches
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.kv_cache import (
    KVFootprint,
    footprint_of,
    joined,
    make_kv_cache,
    unusual_of,
)
from mlx_engine.memory_stats import MemoryUse
from mlx_engine.models.loading import LoadedModel, unread_model

BATCHES = (1, 4, 16, 32)  # requests at once, in the table
KV_BITS = (None, 8, 4)  # of the KV cache, there too; None is full precision

_ENDLESS = 131_072  # tokens at which the table ends for a model that names no limit
_SHORTEST = 4_096  # tokens with which it begins
_ROWS = 6


def room_beside(weights: int, memory: int | None) -> int | None:
    """Bytes for KV caches beside so many of weights; ``None`` if there is no known bound."""
    return None if memory is None else max(0, room_for_caches(memory, MemoryUse(weights=weights)))


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Bytes that a model takes.

    Attributes:
        weights: bytes of its parameters.
        footprints: of the KV cache of a request, by the bits of a quantised one; ``None`` is full
            precision. Bits with which it cannot be quantised are not in it.
        context_length: tokens, by its configuration; ``None`` if that names no limit.
    """

    weights: int
    footprints: Mapping[int | None, KVFootprint]
    context_length: int | None

    def longest(self, kv_bits: int | None, memory: int | None) -> int | None:
        """Tokens of one request that fit beside the weights; ``None`` is any number of them."""
        room = room_beside(self.weights, memory)
        most = None if room is None else self.footprints[kv_bits].tokens(room)
        known = [one for one in (most, self.context_length) if one is not None]
        return min(known, default=None)

    def contexts(self) -> list[int]:
        """Numbers of tokens for a table, up to the model's own limit."""
        most = self.context_length or _ENDLESS
        doubled = [_SHORTEST << power for power in range(64) if _SHORTEST << power < most]
        return [*doubled[-(_ROWS - 1) :], most]


def size_of(model: nn.Module, config: ModelConfig, context_length: int | None) -> ModelSize:
    """The size of a model whose weights need not be read. On the MLX thread.

    A token goes through it, and nothing that comes of that is evaluated: arrays have their shapes
    and types before. So it is right for every architecture.

    Args:
        context_length: of the model's configuration.
    """
    weights = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    found: dict[int | None, KVFootprint] = {}
    unusual = unusual_of(model, config)
    for bits in KV_BITS:
        cache = make_kv_cache(model, config)
        try:
            model(mx.array([[0]]), cache=cache)
            if bits is not None:
                maybe_quantize_kv_cache(cache, 0, config.kv_group_size, bits)
                if not any(hasattr(entry, "bits") for entry in cache):
                    continue
        except Exception:
            if bits is None:
                raise
            continue  # its caches, or their dimensions, are none that can be quantised
        found[bits] = joined([footprint_of(cache), unusual])
    return ModelSize(weights, found, context_length)


def size_unread(config: ModelConfig, folder: Path, context_length: int | None) -> ModelSize:
    """The size of a model of which only the files are there. On the MLX thread.

    Raises:
        ModelLoadError: a file is missing or damaged.
    """
    return size_of(unread_model(config, folder), config, context_length)


def table(size: ModelSize, memory: int | None) -> list[dict[str, Any]]:
    """A row for each context, each number of requests at once and each kind of KV cache.

    A quantised KV cache is that of one request: mlx-lm cannot batch those.

    Returns:
        Rows with ``context`` and ``batch``, ``kv_bits``, ``kv_bytes``, ``bytes`` with the weights,
        and ``fits``, which is ``None`` where the machine's memory is not known, and counts the
        copies that models with few layers need, too.
    """
    room = room_beside(size.weights, memory)
    rows: list[dict[str, Any]] = []
    for bits, footprint in size.footprints.items():
        for context in size.contexts():
            for batch in BATCHES if bits is None else BATCHES[:1]:
                need = batch * footprint.nbytes(context)
                rows.append(
                    {
                        "context": context,
                        "batch": batch,
                        "kv_bits": bits,
                        "kv_bytes": need,
                        "bytes": size.weights + need,
                        "fits": None if room is None else footprint.claim(context, batch) <= room,
                    }
                )
    return rows


def fit_context(
    loaded: LoadedModel, footprints: Sequence[KVFootprint], room: int | None
) -> LoadedModel:
    """A loaded model with the longest context that fits, if that is shorter than its own.

    Args:
        footprints: of the KV caches of one request: its own, and those of its drafts.
        room: bytes that they may take together; ``None`` is no known bound.

    Raises:
        InvalidRequest: nothing fits.
    """
    if room is None:
        return loaded
    together = joined(footprints)
    most, own = together.tokens(room), loaded.context_length
    if most is None or (own is not None and own <= most):
        return loaded
    if most < 2:
        raise InvalidRequest(
            "context_length",
            f"'auto' finds no room: {room} bytes are left beside the model, and the KV cache of "
            f"the shortest request takes {together.claim(2)}; take a smaller model, or one with "
            "fewer bits",
        )
    return replace(loaded, vocabulary=replace(loaded.vocabulary, context_length=most))
