"""Decode: one token after another, by mlx_lm's own step."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import closing

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_engine.config import ModelConfig
from mlx_engine.core.stop import Interrupted
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.request import Request
from mlx_engine.generation.sampler import can_be_sampled


def decode(
    model: nn.Module, cache: Cache, request: Request, config: ModelConfig
) -> Generator[tuple[int, mx.array], None, None]:
    """Yield (token, log-probabilities of shape (vocabulary,)) until closed or the limit.

    Args:
        cache: holds all of the prompt but its last token.

    Raises:
        Interrupted: the request was cancelled; asked before each step is handed to MLX.
        GenerationError: a token's logits are not numbers.
    """
    prompt, hooks = request.prompt, _Hooks(request)
    steps = generate_step(
        mx.array(prompt[-1:], dtype=mx.uint32),
        model,
        max_tokens=-1 if request.limit is None else request.limit,
        sampler=hooks.sample,
        logits_processors=[hooks.process] if hooks.processes else None,
        prompt_cache=cache,
        kv_bits=config.kv_bits,
        kv_group_size=config.kv_group_size,
        quantized_kv_start=config.quantized_kv_start,
    )
    with closing(steps):
        for token, logprobs in steps:
            sound, model_was = hooks.checks.popleft()
            if not sound.item():
                raise request.nothing_to_sample(by_model=model_was is None or not model_was.item())
            yield token, logprobs


class _Hooks:
    """Hooks of mlx_lm's step for one answer, called in the order of its tokens.

    Attributes:
        checks: of tokens that have not been given out yet: whether there was anything to choose
            from, and whether the model's own logits were sound, if that is known.
    """

    def __init__(self, request: Request) -> None:
        assert request.sampling is not None
        self._request = request
        self._sampling = request.sampling
        self._history = mx.array(request.prompt[:-1], dtype=mx.uint32)
        self._before: mx.array | None = None  # whether the model's own logits were sound
        self._seen: list[mx.array] = []  # what mlx_lm remembers for processors
        self._latest: list[mx.array] = []  # the token that goes in next
        self._place = 0  # of the next token in the answer
        self.checks: deque[tuple[mx.array, mx.array | None]] = deque()

    @property
    def processes(self) -> bool:
        """Whether logits are changed."""
        return bool(self._sampling.processors) or self._sampling.budget is not None

    def process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits of shape (1, vocabulary) as the request wants them."""
        self._seen = [tokens]
        if self._request.context is not None:
            self._before = mx.isfinite(mx.logsumexp(logits, axis=-1))
        if self._sampling.processors:
            # ``generate_step`` knows only the last token of the prompt.
            logits = self._request.process(mx.concatenate([self._history, tokens]), logits)
        if self._sampling.budget is not None:
            logits = self._sampling.budget.apply(logits, self._place, self._latest)
        return logits

    def sample(self, logprobs: mx.array) -> mx.array:
        """A token id of shape (1,)."""
        # mlx_lm prepares a step before it gives out the token of the one before; this is the
        # last moment at which it can be left undone.
        if self._request.should_stop:
            raise Interrupted
        tokens = self._sampling.sample(logprobs, self._place)
        self._place += 1
        sound = can_be_sampled(logprobs, tokens)
        self.checks.append((sound, self._before))
        # Computed with the token: what is asked for later waits for the next step, and what
        # nobody looks at piles up.
        known = [sound, *self._seen]
        if self._before is not None:
            known.append(self._before)
        self._latest = mx.depends([tokens], known)
        return self._latest[0]
