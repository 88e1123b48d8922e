"""The importance of a prompt's tokens: how much attention a draft model pays to each."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_engine.core.stop import Interrupted, checkpoint
from mlx_engine.generation.cache.attention_tap import install, plain_attention, tapped
from mlx_engine.generation.cache.kv_cache import Cache, cache_parts
from mlx_engine.generation.cache.snapshot import arrays, snapshot, trimmable

TAIL = 8  # tokens at the end of the prompt whose queries are looked at
LOOKAHEAD = 8  # tokens that the draft goes on by itself


class Importance:
    """A prompt on its way into a draft's KV cache, and the scores of its tokens.

    The draft reads the prompt, the last few tokens of it apart, and goes on for a few tokens
    greedily. A token's score is the attention weight on it: the largest of all layers and
    heads, averaged over the queries of those few tokens (SpecPrefill, arXiv 2502.02789).
    On the MLX thread.

    Args:
        draft: reads the prompt; its layers' attention is tapped.
        cache: its KV cache, with ``held`` tokens of the prompt in it. It is never left with
            anything else than tokens of the prompt in it: what the draft goes on with is
            put into a copy.
        prompt: token ids, at least one.
        lookahead: tokens to go on by.

    Attributes:
        held: tokens of the prompt that are in the cache now.
        scores: of shape (tokens,), once it is done.
    """

    def __init__(
        self, *, draft: nn.Module, cache: Cache, held: int, prompt: list[int], lookahead: int
    ) -> None:
        install(draft)
        self._draft = draft
        self._cache = cache
        self._prompt = prompt
        self._ahead: Cache | None = None
        self._left = lookahead
        self._next: mx.array | None = None  # (1,): the token that goes in next
        self._total = mx.zeros((len(prompt),))
        self._queries = 0
        self.held = held
        self.scores: np.ndarray | None = None
        self._make_room()

    def _make_room(self) -> None:
        """Take so much back out of the cache that there are queries to look at."""
        most = max(len(self._prompt) - TAIL, 0)
        if self.held > most and trimmable(self._cache):
            for part in cache_parts(self._cache):
                part.trim(self.held - most)
            self.held = most
        if self.held >= len(self._prompt):
            raise ValueError("a draft that holds all of the prompt has no queries to score it")

    def step(self, size: int) -> None:
        """Do one forward of the draft, of at most ``size`` (or ``TAIL``) tokens."""
        body = len(self._prompt) - TAIL
        with mx.stream(generation_stream):
            if self.held < body:
                end = min(self.held + size, body)
                self._forward(self._cache, mx.array(self._prompt[self.held : end]))
                mx.eval(arrays(self._cache))
                mx.clear_cache()
                self.held = end
            elif self._next is None:
                self._score(self._cache, mx.array(self._prompt[self.held :]))
                self.held = len(self._prompt)
            else:
                if self._ahead is None:
                    self._ahead = snapshot(self._cache)
                self._score(self._ahead, self._next)
                self._left -= 1
        if self._next is not None and self._left == 0:
            self._finish()

    def _finish(self) -> None:
        self._ahead = self._next = None
        self.scores = np.array(self._total) / self._queries

    def _forward(self, cache: Cache, tokens: mx.array) -> mx.array:
        """Logits of shape (1, tokens, vocabulary)."""
        logits: mx.array = self._draft(tokens[None], cache=cache)
        return logits

    def _score(self, cache: Cache, tokens: mx.array) -> None:
        """A forward whose queries count."""
        parts = [part for part in cache_parts(cache) if type(part) is KVCache]
        recorder = Recorder()
        with tapped(parts, recorder):
            logits = self._forward(cache, tokens)
        self._total = self._total + recorder.weights(len(self._prompt)).sum(axis=0)
        self._queries += tokens.size
        self._next = mx.argmax(logits[0, -1:], axis=-1)
        mx.eval(self._next, self._total, arrays(cache))


class Recorder:
    """A tap that keeps the attention weights of one forward."""

    def __init__(self) -> None:
        self._layers: list[mx.array] = []

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
        """The output of attention, whose weights are kept."""
        weights = attention_weights(queries, keys, scale=scale, mask=mask, sinks=sinks)
        self._layers.append(weights[0].max(axis=0))
        out: mx.array = plain_attention(queries, keys, values, None, scale, mask, sinks)
        return out

    def weights(self, tokens: int) -> mx.array:
        """The largest of all layers and heads on the first keys, of shape (queries, tokens).

        Raises:
            ValueError: no layer was seen that has a key for each token.
        """
        most = max((layer.shape[1] for layer in self._layers), default=0)
        if most < tokens:
            raise ValueError("its attention is not mlx_lm's, or does not see every token")
        layers = [layer[:, :tokens] for layer in self._layers if layer.shape[1] == most]
        return mx.stack(layers).max(axis=0)


def attention_weights(
    queries: mx.array,
    keys: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """The softmax that attention computes, of shape (batch, heads, queries, keys), float32.

    Args:
        queries: (batch, heads, queries, dimension).
        keys: (batch, fewer heads, keys, dimension); each is for as many heads in turn.
        mask: as in attention; an array of numbers is added.
        sinks: (heads,): a logit more for each query, with no key to it.
    """
    batch, heads, count, size = queries.shape
    folded = (queries * scale).reshape(batch, keys.shape[1], -1, size)
    logits: Any = (folded @ keys.swapaxes(-1, -2)).astype(mx.float32)
    logits = logits.reshape(batch, heads, count, keys.shape[2])
    if isinstance(mask, str):
        last = keys.shape[2] - count
        mask = mx.arange(count)[:, None] + last >= mx.arange(keys.shape[2])
    if mask is not None and mask.dtype == mx.bool_:
        logits = mx.where(mask, logits, -mx.inf)
    elif mask is not None:
        logits = logits + mask.astype(mx.float32)
    if sinks is not None:
        column = mx.broadcast_to(sinks[:, None, None], (batch, heads, count, 1))
        logits = mx.concatenate([logits, column.astype(mx.float32)], axis=-1)
    return mx.softmax(logits, axis=-1)[..., : keys.shape[2]]


def cannot_score(draft: nn.Module) -> str | None:
    """The reason why a draft cannot tell the importance of tokens; ``None`` if it can.

    A few tokens are tried. On the MLX thread; raises ``Interrupted`` if it should stop.
    """
    cache = make_prompt_cache(draft)
    if not any(type(part) is KVCache for part in cache_parts(cache)):
        kinds = ", ".join(sorted({type(part).__name__ for part in cache_parts(cache)}))
        return f"its layers' caches ({kinds}) do not hold every token of the prompt"
    try:
        trial = Importance(
            draft=draft, cache=cache, held=0, prompt=list(range(1, TAIL + 5)), lookahead=1
        )
        while trial.scores is None:
            checkpoint()
            trial.step(4)
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001 - the border: a model raises anything
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return None if np.isfinite(trial.scores).all() else "the attention weights are not finite"
