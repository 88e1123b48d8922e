"""A model as trunk and head, for those who need its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_engine.errors import InvalidRequest

_TOLERANCE = 1e-2  # of the largest logit; the same work in half precision differs by less


@dataclass(frozen=True, slots=True)
class SplitModel:
    """A model as trunk and head, so that hidden states can be had.

    Attributes:
        model: the whole model.
    """

    model: nn.Module

    @property
    def text(self) -> nn.Module:
        """The language model proper, which has ``args``, ``model`` and ``lm_head``."""
        return getattr(self.model, "language_model", self.model)

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids of shape (B, n) as embeddings of shape (B, n, D)."""
        embeddings: mx.array = self.text.model.embed_tokens(tokens)
        return embeddings

    def hidden(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Token ids of shape (B, n) as hidden states of shape (B, n, D), after the last norm.

        ``cache`` is filled as ``model(tokens, cache=cache)`` fills it.
        """
        hidden: mx.array = self.text.model(tokens, cache=cache)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states of shape (B, n, D) as logits of shape (B, n, vocabulary)."""
        text = self.text
        head = text.lm_head if "lm_head" in text else text.model.embed_tokens.as_linear
        logits: mx.array = head(hidden)
        return logits


def split(model: nn.Module) -> SplitModel:
    """Split ``model``; nothing is computed or copied. See ``check_split``.

    Raises:
        InvalidRequest: it is not made of embeddings, layers and a head.
    """
    parts = SplitModel(model)
    trunk = getattr(parts.text, "model", None)
    if not isinstance(trunk, nn.Module) or "embed_tokens" not in trunk:
        raise _not_splittable(model)
    return parts


def check_split(parts: SplitModel, tokens: Sequence[int]) -> None:
    """See that trunk and head together do what the model does.

    Raises:
        InvalidRequest: they do not, for instance because the model scales its logits.
    """
    prompt = mx.array([list(tokens)])
    whole = parts.model(prompt, cache=make_prompt_cache(parts.model))
    halves = parts.logits(parts.hidden(prompt, make_prompt_cache(parts.model)))
    if whole.shape != halves.shape:
        raise _not_splittable(parts.model)
    if not (mx.abs(whole - halves).max() <= _TOLERANCE * mx.abs(whole).max()).item():
        raise _not_splittable(parts.model)


def _not_splittable(model: nn.Module) -> InvalidRequest:
    kind = getattr(model, "model_type", type(model).__name__)
    return InvalidRequest("decode", f"a model of type {kind!r} cannot be split for an MTP head")
