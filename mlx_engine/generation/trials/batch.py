"""Trial of a batch: does each of a model's requests get then what it gets alone?

For some models of mlx_lm 0.32.2 they do not, without an error: afm7 takes the positions of its
queries from the padded width, longcat_flash_ngram spreads the state of a short prompt over
longer ones, recurrent_gemma takes an empty state for one of zeros. So a few tokens are tried
when an engine starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from mlx_engine.config import ModelConfig
from mlx_engine.core.stop import Interrupted, checkpoint
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.joint_cache import merge
from mlx_engine.generation.cache.kv_cache import Cache, cache_parts, make_kv_cache
from mlx_engine.generation.cache.snapshot import snapshot
from mlx_engine.generation.prefill import prefilled
from mlx_engine.generation.trials.same_logits import TOLERANCE, difference

# Token ids that every model has: a long row, a short one, and one with nothing in its cache.
_ROWS = (list(range(1, 18)), [2, 1], [7])
# How far afm7 is off depends on its weights; minimax_m3_vl is off in prompts longer than those.
_KNOWN = {
    "afm7": "its queries have no positions of their own in a batch",
    "minimax_m3_vl": "its sparse attention counts the padding of a batch as tokens",
}


def check_batchable(model: nn.Module, config: ModelConfig) -> None:
    """Try a model in a batch. On the MLX thread.

    Raises:
        InvalidRequest: names what does not work, and says what to do.
        Interrupted: it should stop.
    """
    known = _KNOWN.get(getattr(model, "model_type", ""))
    if known is not None:
        raise _refused(known)
    for part in cache_parts(make_kv_cache(model, config)):
        if not hasattr(part, "merge") or getattr(part, "keep", None):
            raise _refused(f"mlx-lm cannot batch its {type(part).__name__}")
    try:
        caches = [prefilled(model, config, row) for row in _ROWS]
        alone = [
            _last_logits(model, snapshot(cache), [row])[0]
            for cache, row in zip(caches, _ROWS, strict=True)
        ]
        joined, late = merge(caches[:2]), merge(caches[2:])
        for entry, other in zip(joined, late, strict=True):
            entry.extend(other)
        off = difference(mx.stack(alone), _last_logits(model, joined, _ROWS))
    except Interrupted:
        raise
    except Exception as error:
        raise _refused(f"in a batch it fails ({type(error).__name__}: {error})") from error
    if not off <= TOLERANCE:
        raise _refused(f"in a batch its logits are others than alone (by {off:.0%} of their span)")


def _last_logits(model: nn.Module, cache: Cache, rows: Sequence[list[int]]) -> mx.array:
    """Logits of shape (rows, vocabulary)."""
    checkpoint()
    with mx.stream(generation_stream):
        logits: mx.array = model(mx.array([row[-1:] for row in rows]), cache=cache)[:, -1, :]
    return logits


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest("model", f"{why}; use SimpleEngine")
