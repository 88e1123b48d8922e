"""SpecPrefill: only the parts of a prompt that a small draft model attends to are prefilled.

The target decodes at the true positions all the same. From arXiv 2502.02789.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.generation.cache.kv_cache import Cache, make_kv_cache
from mlx_engine.generation.cache.row_fold import folded
from mlx_engine.generation.cache.snapshot import arrays
from mlx_engine.generation.cache.sparse_cache import skip_to, sparse
from mlx_engine.generation.sparse.chunk_choice import CHUNK, Range, choose_chunks, join, keeps_all
from mlx_engine.generation.sparse.importance import Importance
from mlx_engine.generation.sparse.setup import SparsePrefilling
from mlx_engine.strategies import SpecPrefill

# Puts tokens of shape (rows, tokens a row), whose rows begin at these positions, into a cache of
# the target: run(tokens, cache, starts). Nothing need be evaluated by it.
Run = Callable[[mx.array, Cache, list[int]], None]


class SparsePrefill:
    """A prompt on its way into the target's KV cache, one forward at a time.

    The draft scores the prompt first, from what its prompt cache has of it; then the chunks
    that are kept go into the target. All of the prompt but the last token, with which decoding
    starts, is gone through. On the MLX thread. After an error, neither cache can be used.

    Args:
        run: a forward of the target.
        engine: the draft, and whether chunks may be rows of a batch; otherwise each run of
            chunks is a forward.
        asked: how much is kept of what is not held, and how far the draft looks ahead.
        prompt: token ids.
        cache: the target's, which holds ``held`` tokens of the prompt. It must not be used
            any more; the attribute takes its place.
        chunk: tokens that are kept or dropped together.
        dense: the first tokens of the prompt, of which none are dropped, held or not.
        ranges: what is kept, if that was chosen before; nothing is scored then.

    Raises:
        ValueError: the target's cache cannot be sparse, or the draft's has all of the prompt
            in it and cannot be cut back.

    Attributes:
        cache: the target's, sparse; complete when nothing is ``left``.
        ranges: tokens that are, or will be, in it; known when the draft is not scoring.
        scored: tokens of the prompt in the draft's cache, which has no others after any step.
    """

    def __init__(
        self,
        run: Run,
        engine: SparsePrefilling,
        asked: SpecPrefill,
        prompt: list[int],
        cache: Cache,
        held: int,
        *,
        chunk: int = CHUNK,
        dense: int | None = None,
        ranges: Sequence[Range] | None = None,
    ) -> None:
        self.cache = sparse(cache)
        self.ranges: list[Range] = []
        self.scored = 0
        self._run = run
        self._draft = engine.draft
        self._draft_cache: Cache | None = None  # as long as there may be something to keep of it
        self._rows = engine.rows
        self._keep = asked.keep
        self._prompt = prompt
        self._held = held
        self._dense = held if dense is None else dense
        self._chunk = chunk
        self._left: list[Range] = []
        self._importance: Importance | None = None
        end = len(prompt) - 1
        if ranges is not None:
            self._take([(max(a, held), b) for a, b in ranges if b > held])
            return
        if keeps_all(end, asked.keep, chunk=chunk, start=self._dense):
            self._take([(held, end)])
            return
        draft = self._draft.loaded
        hit = self._draft.prompt_cache.fetch(prompt, counted=asked.draft is not None)
        self._draft_cache = hit.cache or make_kv_cache(draft.model, self._draft.config)
        self._importance = Importance(
            draft=draft.model,
            cache=self._draft_cache,
            held=hit.cached,
            prompt=[min(token, draft.vocab_size - 1) for token in prompt],
            lookahead=asked.lookahead,
        )
        self.scored = self._importance.held

    @property
    def scoring(self) -> bool:
        """Whether the draft is at work, and not the target."""
        return self._importance is not None

    @property
    def done(self) -> int:
        """Tokens of the prompt that the draft has read or, after that, that are gone through."""
        if self.scoring:
            return self.scored
        return self._left[0][0] if self._left else len(self._prompt) - 1

    @property
    def left(self) -> int:
        """Tokens that are still to be read, roughly while the draft is at work."""
        if self.scoring:
            return 2 * len(self._prompt) - self.scored
        return sum(b - a for a, b in self._left)

    def step(self, size: int) -> int:
        """Do one forward of at most ``size`` tokens, of the draft or of the target.

        The draft reads the last few tokens of the prompt (``TAIL``) in one forward, however
        small ``size`` is. A step when nothing is left does nothing.

        Returns:
            Tokens of the prompt that went through it.

        Raises:
            ValueError: ``size`` is not positive.
            Exception: MLX failed.
        """
        if size < 1:
            raise ValueError(f"a step of {size} tokens")
        if self._importance is not None:
            return self._score(self._importance, size)
        return self._prefill(size) if self._left else 0

    def keep_scored(self) -> None:
        """Put what the draft has read into its prompt cache, once."""
        cache, self._draft_cache = self._draft_cache, None
        if cache is not None and self.scored:
            self._draft.prompt_cache.store(self._prompt[: self.scored], cache)

    def _score(self, importance: Importance, size: int) -> int:
        importance.step(size)
        went, self.scored = importance.held - self.scored, importance.held
        if importance.scores is not None:
            self._importance = None
            scores = importance.scores[:-1]
            chosen = choose_chunks(scores, self._keep, chunk=self._chunk, start=self._dense)
            self._take([(self._held, self._dense), *chosen])
            self.keep_scored()
        return went

    def _take(self, ranges: list[Range]) -> None:
        self._left = join(ranges)
        self.ranges = join([(0, self._held), *ranges])

    def _prefill(self, size: int) -> int:
        starts = self._row_starts(size)
        first, end = self._left[0]
        length = self._chunk
        if len(starts) * self._chunk <= min(end - first, size):
            starts, length = [first], min(end - first, size)
        tokens = mx.array([self._prompt[at : at + length] for at in starts])
        with mx.stream(generation_stream):
            skip_to(self.cache, starts[0])
            cache = self.cache if len(starts) == 1 else folded(self.cache, starts)
            self._run(tokens, cache, starts)
            mx.eval(arrays(self.cache))
            mx.clear_cache()
        self._went_in(starts[-1] + length)
        return tokens.size

    def _row_starts(self, size: int) -> list[int]:
        """Positions of the whole chunks that come next, as many as fit."""
        starts: list[int] = []
        for a, b in self._left if self._rows else []:
            whole = (b - a) // self._chunk
            starts += [a + i * self._chunk for i in range(whole)]
            if a + whole * self._chunk < b:
                break
        return starts[: size // self._chunk]

    def _went_in(self, end: int) -> None:
        """Note that what comes before token ``end`` has been put in."""
        self._left = [(max(a, end), b) for a, b in self._left if b > end]
