"""SpecPrefill: only the parts of a prompt that a small draft model attends to are prefilled.

The target decodes at the true positions all the same. From arXiv 2502.02789.
"""

from __future__ import annotations

from typing import Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.snapshot import arrays
from mlx_engine.generation.sparse.chunk_choice import CHUNK, Range, choose_chunks, join, keeps_all
from mlx_engine.generation.sparse.importance import LOOKAHEAD, Importance
from mlx_engine.generation.sparse.row_fold import folded
from mlx_engine.generation.sparse.sparse_cache import skip_to, sparse

Phase = Literal["score", "prefill", "done"]


class Forward(Protocol):
    """Runs the target."""

    def __call__(self, tokens: mx.array, cache: Cache, starts: list[int]) -> None:
        """Put ``tokens``, of shape (rows, tokens a row), into ``cache``.

        Args:
            starts: position of each row's first token, in order.
        """
        ...


class SparsePrefill:
    """A prompt on its way into the target's KV cache, one forward at a time.

    All of it but the last token, with which decoding starts, is gone through. On the MLX
    thread. After an error, neither cache can be used.

    Args:
        forward: runs the target; nothing need be evaluated by it.
        draft: scores the prompt; of the same tokenizer. Its attention is tapped.
        draft_cache: its KV cache, which holds ``draft_held`` tokens of the prompt.
        cache: the target's, which holds ``held`` tokens of the prompt. It must not be used
            any more; the attribute takes its place.
        prompt: token ids.
        keep: the part of what is not held to be prefilled, from 0 to 1.
        chunk: tokens that are kept or dropped together.
        draft_vocab_size: tokens that the draft knows; others are read as the last of them.
        lookahead: tokens by which the draft goes on to see what it attends to.
        rows: whether chunks may be rows of a batch: only where ``check_sparse`` said so, which
            also sets the hook that this needs. Otherwise each run of chunks is a forward.

    Raises:
        ValueError: the target's cache cannot be sparse, or the draft's has all of the prompt
            in it and cannot be cut back.

    Attributes:
        cache: the target's, sparse; complete when the phase is "done".
        ranges: tokens that are, or will be, in it; known when the phase is not "score".
        done: tokens of them that are in it.
    """

    def __init__(
        self,
        *,
        forward: Forward,
        draft: nn.Module,
        draft_cache: Cache,
        draft_held: int,
        cache: Cache,
        prompt: list[int],
        held: int,
        keep: float,
        chunk: int = CHUNK,
        lookahead: int = LOOKAHEAD,
        draft_vocab_size: int | None = None,
        rows: bool,
    ) -> None:
        self.cache = sparse(cache)
        self.ranges: list[Range] = []
        self.done = held
        self._forward = forward
        self._prompt = prompt
        self._held = held
        self._keep = keep
        self._chunk = chunk
        self._rows = rows
        self._draft_held = draft_held
        self._left: list[Range] = []
        self._importance: Importance | None = None
        end = len(prompt) - 1
        if keeps_all(end, keep, chunk=chunk, start=held):
            self._take([(held, end)])
        else:
            top = max(prompt) if draft_vocab_size is None else draft_vocab_size - 1
            self._importance = Importance(
                draft=draft,
                cache=draft_cache,
                held=draft_held,
                prompt=[min(token, top) for token in prompt],
                lookahead=lookahead,
            )
            self._draft_held = self._importance.held

    @property
    def phase(self) -> Phase:
        """What the next step does."""
        if self._importance is not None:
            return "score"
        return "prefill" if self._left else "done"

    @property
    def draft_held(self) -> int:
        """Tokens of the prompt in the draft's cache, which has no others after any step."""
        return self._draft_held

    @property
    def scored(self) -> int:
        """Tokens of the prompt that the draft has read."""
        return self.draft_held

    @property
    def position(self) -> int:
        """Tokens of the prompt that have been put in or left out."""
        return self._left[0][0] if self._left else len(self._prompt) - 1

    @property
    def left(self) -> int:
        """Tokens that are still to be put in, once it is known which."""
        return sum(b - a for a, b in self._left)

    def step(self, size: int) -> None:
        """Do one forward of at most ``size`` tokens, of the draft or of the target.

        The draft reads the last few tokens of the prompt (``TAIL``) in one forward, however
        small ``size`` is. A step when all is done does nothing.

        Raises:
            ValueError: ``size`` is not positive.
        """
        if size < 1:
            raise ValueError(f"a step of {size} tokens")
        if self.phase == "score":
            self._score(size)
        elif self.phase == "prefill":
            self._prefill(size)

    def _score(self, size: int) -> None:
        assert self._importance is not None
        self._importance.step(size)
        self._draft_held, scores = self._importance.held, self._importance.scores
        if scores is not None:
            self._importance = None  # and with it the draft's cache
            self._take(choose_chunks(scores[:-1], self._keep, chunk=self._chunk, start=self._held))

    def _take(self, ranges: list[Range]) -> None:
        self._left = join(ranges)
        self.ranges = join([(0, self._held), *ranges])

    def _prefill(self, size: int) -> None:
        starts = self._row_starts(size)
        first, end = self._left[0]
        length = self._chunk
        if len(starts) * self._chunk <= min(end - first, size):
            starts, length = [first], min(end - first, size)
        tokens = mx.array([self._prompt[at : at + length] for at in starts])
        with mx.stream(generation_stream):
            skip_to(self.cache, starts[0])
            cache = self.cache if len(starts) == 1 else folded(self.cache, starts)
            self._forward(tokens, cache, starts)
            mx.eval(arrays(self.cache))
            mx.clear_cache()
        self._went_in(starts[-1] + length)
        self.done += tokens.size

    def _row_starts(self, size: int) -> list[int]:
        """Where the whole chunks begin that come next, as many as fit."""
        starts: list[int] = []
        for a, b in self._left if self._rows else []:
            whole = (b - a) // self._chunk
            starts += [a + i * self._chunk for i in range(whole)]
            if a + whole * self._chunk < b:
                break
        return starts[: size // self._chunk]

    def _went_in(self, end: int) -> None:
        """What comes before token ``end`` has been put in."""
        self._left = [(max(a, end), b) for a, b in self._left if b > end]
