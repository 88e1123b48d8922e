"""Trial of a model that is to verify proposals: several tokens a forward, some taken back.

For a few architectures of mlx_lm what comes out depends on how many tokens go in at once. So a
few tokens are tried when an engine starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from mlx_engine.config import ModelConfig
from mlx_engine.core.stop import Interrupted, checkpoint
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.kv_cache import Cache, check_unbounded, make_kv_cache
from mlx_engine.generation.cache.rollback import Rollback, cannot_roll_back
from mlx_engine.generation.trials.same_logits import TOLERANCE, difference

_PROMPT = (1, 2, 3, 4, 5)  # token ids that every model has
_RIGHT, _WRONG = (6, 7), (9, 10, 11)


def check_rollback(model: nn.Module, config: ModelConfig) -> None:
    """Try several tokens in one forward, some of them taken back. On the MLX thread.

    Raises:
        InvalidRequest: says what does not work.
        Interrupted: it should stop.
    """
    check_unbounded("decode", config)
    cache = make_kv_cache(model, config)
    if (reason := cannot_roll_back(cache)) is not None:
        raise InvalidRequest("decode", f"this model cannot verify proposals: {reason}")
    try:
        expected = _one_by_one(model, make_kv_cache(model, config))
        off = difference(expected, _verified(model, cache))
    except Interrupted:
        raise
    except Exception as error:
        raise InvalidRequest(
            "decode", f"this model cannot verify proposals ({type(error).__name__}: {error})"
        ) from error
    if not off <= TOLERANCE:
        raise InvalidRequest(
            "decode",
            f"this model's logits are others for several tokens at once (by {off:.0%} of their "
            "span); leave decode out",
        )


def _one_by_one(model: nn.Module, cache: Cache) -> mx.array:
    _put(model, cache, _PROMPT)
    return mx.concatenate([_put(model, cache, [token]) for token in _RIGHT])


def _verified(model: nn.Module, cache: Cache) -> mx.array:
    _put(model, cache, _PROMPT)
    rollback = Rollback(cache)
    rollback.mark()
    inputs = [_RIGHT[0], *_WRONG]
    first = _put(model, cache, inputs)[:1]
    held = rollback.take_back(len(_WRONG), len(inputs))
    return mx.concatenate([first, _put(model, cache, _RIGHT[held:])[-1:]])


def _put(model: nn.Module, cache: Cache, tokens: Sequence[int]) -> mx.array:
    """Logits of shape (tokens, vocabulary)."""
    checkpoint()
    with mx.stream(generation_stream):
        logits: mx.array = model(mx.array([tokens]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits, [entry.state for entry in cache])
    return logits
