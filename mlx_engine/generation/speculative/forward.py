"""Forwards of a model, with its hidden states where they are wanted."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_engine.generation.cache.kv_cache import Cache, grow
from mlx_engine.models.split import SplitModel


@dataclass(frozen=True, slots=True)
class Forward:
    """A model's forward.

    Attributes:
        model: token ids of shape (batch, n) -> logits of shape (batch, n, vocabulary).
        split: the same model in two parts, if its hidden states are wanted.
    """

    model: nn.Module
    split: SplitModel | None = None

    def __call__(
        self, tokens: mx.array, cache: Cache, last: int
    ) -> tuple[mx.array, mx.array | None]:
        """Logits of the last tokens, of shape (last, vocabulary), and the hidden states of all
        of them, of shape (n, dimension), for ``tokens`` of shape (1, n).
        """
        grow(cache, tokens.shape[1])
        if self.split is None:
            return self.model(tokens, cache=cache)[0, -last:], None
        hidden = self.split.hidden(tokens, cache)
        return self.split.logits(hidden[:, -last:])[0], hidden[0]

    def prefill(self, tokens: mx.array, cache: Cache) -> mx.array | None:
        """Put tokens of shape (batch, n) into the cache; their hidden states, of shape
        (batch, n, dimension), evaluated, if they are wanted.
        """
        grow(cache, tokens.shape[1])
        if self.split is None:
            self.model(tokens, cache=cache)
            return None
        hidden = self.split.hidden(tokens, cache)
        mx.eval(hidden)
        return hidden
