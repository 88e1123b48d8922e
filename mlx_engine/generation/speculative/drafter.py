"""Drafters, which propose tokens: what each of them does, and the one with a draft model."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.generation.cache.cached_model import CachedModel
from mlx_engine.generation.cache.kv_cache import Cache, kv_nbytes, make_kv_cache
from mlx_engine.generation.cache.rollback import Rollback
from mlx_engine.generation.cache.snapshot import trimmable
from mlx_engine.generation.prefill import prefill_chunk

# A token id of shape (1,) from logits of shape (1, vocabulary), by the options of the request,
# for the place behind these proposals.
Sample = Callable[[mx.array, Sequence[mx.array]], mx.array]

_CLOSE = 16  # tokens that a draft model may be behind, and still take in with a proposal


class Drafter(abc.ABC):
    """A proposer of one request's next tokens, with a KV cache of its own. On the MLX thread.

    What it proposes decides how fast an answer comes, never what it is.
    """

    cache: Cache | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its KV cache."""
        return 0 if self.cache is None else kv_nbytes(self.cache)

    @abc.abstractmethod
    def begin(self, tokens: list[int], cached: int) -> None:
        """Get ready for a prompt's prefill, behind ``cached`` tokens that need none."""

    @abc.abstractmethod
    def observe(self, tokens: list[int], start: int, hidden: mx.array) -> None:
        """Take the model's hidden states, of shape (n, dimension), of tokens from ``start`` on."""

    def ended(self, tokens: list[int]) -> str | None:
        """The reason why it will propose nothing any more, for the caller; ``None`` if it may."""
        return None

    @abc.abstractmethod
    def catch_up(self, tokens: list[int]) -> bool:
        """Do a chunk of what is to be done before it can propose what follows ``tokens``;
        whether there was anything to do.
        """

    @abc.abstractmethod
    def ready(self, tokens: list[int]) -> bool:
        """Whether it can propose, once it has caught up."""

    @abc.abstractmethod
    def propose(self, tokens: list[int], count: int, sample: Sample) -> mx.array:
        """``count`` token ids that may follow ``tokens``, not evaluated yet."""

    @abc.abstractmethod
    def verified(self, accepted: int) -> None:
        """Learn that the first ``accepted`` of its latest proposals were right."""

    @abc.abstractmethod
    def finish(self, tokens: list[int]) -> None:
        """Keep what is known of ``tokens``, those of a request that is over."""


class ModelDrafter(Drafter):
    """A drafter that proposes what a small model would say.

    Args:
        draft: the small model, with its earlier prompts.
        vocab_size: tokens that the large model's logits cover.
    """

    def __init__(self, draft: CachedModel, vocab_size: int) -> None:
        self._draft = draft.loaded
        self._config = draft.config
        self._prompt_cache = draft.prompt_cache
        self._vocab_size = vocab_size
        self._held = 0  # tokens in its cache
        self._ahead = 0  # of its proposals that are in its cache, too
        self._rollback: Rollback | None = None

    def begin(self, tokens: list[int], cached: int) -> None:
        """Do nothing yet: a batch may never come to proposals."""

    def observe(self, tokens: list[int], start: int, hidden: mx.array) -> None:
        """Leave them: a draft model reads tokens."""

    def ended(self, tokens: list[int]) -> str | None:
        """Whether its context is full."""
        most = self._draft.context_length
        if most is None or len(tokens) + _CLOSE <= most:
            return None
        return f"the draft has a context of {most} tokens only"

    def catch_up(self, tokens: list[int]) -> bool:
        """Prefill a chunk of what it has not read."""
        if self.cache is None:
            hit = self._prompt_cache.fetch(tokens)
            self.cache = hit.cache or make_kv_cache(self._draft.model, self._config)
            self._held = hit.cached
            self._rollback = Rollback(self.cache)
        behind = len(tokens) - 1 - self._held
        if behind <= _CLOSE:
            return False
        end = self._held + min(behind, self._config.prefill_step_size)
        prefill_chunk(self._run, self.cache, tokens, self._held, end, self._config)
        self._held = end
        return True

    def ready(self, tokens: list[int]) -> bool:
        """Whether there are tokens that it has not read."""
        return self.cache is not None and self._held < len(tokens)

    def propose(self, tokens: list[int], count: int, sample: Sample) -> mx.array:
        """Tokens that the small model would say next."""
        assert self._rollback is not None
        proposals: list[mx.array] = []
        with mx.stream(generation_stream):
            inputs = mx.array(tokens[self._held :], dtype=mx.uint32)
            self._held = len(tokens)
            while True:
                logits = self._run(inputs[None], self.cache)[:, -1, :]
                if not proposals:
                    self._rollback.mark()
                inputs = sample(self._fitted(logits), proposals)
                proposals.append(inputs)
                if len(proposals) == count:
                    break
            self._ahead = count - 1
            return mx.concatenate(proposals)

    def verified(self, accepted: int) -> None:
        """Take the rest back out of its cache."""
        assert self._rollback is not None
        right = min(accepted, self._ahead)
        if right < self._ahead:
            right = self._rollback.take_back(self._ahead - right, self._ahead)
        self._held += right
        self._ahead = 0

    def finish(self, tokens: list[int]) -> None:
        """Keep what it has read in its prompt cache."""
        if self.cache is None or self._ahead:
            return
        if self._held <= len(tokens) or trimmable(self.cache):
            self._prompt_cache.store(tokens[: self._held], self.cache)

    def _run(self, tokens: mx.array, cache: Cache | None) -> mx.array:
        # The large model's matrix may be padded further: MLX would read beyond the small one's.
        readable = mx.minimum(tokens, self._draft.vocab_size - 1)
        logits: mx.array = self._draft.model(readable, cache=cache)
        return logits

    def _fitted(self, logits: mx.array) -> mx.array:
        """Logits as wide as the large model's: matrices may be padded to different widths."""
        missing = self._vocab_size - logits.shape[-1]
        if missing > 0:
            return mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)
        return logits[:, : self._vocab_size]
