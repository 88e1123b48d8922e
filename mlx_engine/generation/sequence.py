"""A sequence: a request in its KV cache."""

from __future__ import annotations

import contextlib
import itertools
from typing import Literal

import mlx.core as mx
from mlx_lm.models.cache import TokenBuffer

from mlx_engine.generation.cache.kv_cache import Cache, kv_nbytes
from mlx_engine.generation.constraint import GrammarState
from mlx_engine.generation.request import Request
from mlx_engine.generation.sparse.chunk_choice import Range
from mlx_engine.generation.sparse.specprefill import SparsePrefill
from mlx_engine.generation.speculative.drafter import Drafter

_NEAR = 64  # tokens; prefilling fewer costs less than another copy
_ages = itertools.count()


class Sequence:
    """A request in its KV cache, alone or as a row of a batch.

    Attributes:
        request: prepared.
        age: smaller than that of any that began later.
        source: the tokens that it decodes from: all of them go into its cache but the last, which
            goes in with its first step. Its prompt; when it comes back after a preemption, all
            tokens that it has by then, the one too that is not told yet.
        started: whether its prefill has begun before.
        cache: its own KV cache; ``None`` when it is in one with those of others.
        held: tokens in its KV cache.
        cached: of which the prompt cache had these.
        places: numbers of tokens after which its cache is to be stored, on the way; ascending.
        alone: whether its prefill must not be shared with others.
        fault: what its logits processor, constraint or sampler raised, or that there was nothing
            to sample.
        sparse: what leaves out parts of its prompt, if anything does.
        dense: tokens of its prompt before any that are left out; ``None`` if none are.
        ranges: the parts of its prompt that are not left out, once they are chosen.
        drafter: what proposes tokens for it, if anything does.
        forces: whether what its constraint leaves no choice about is proposed.
        batched: tokens that it got in steps with others.
        leads: whom it waits for before it begins, if anybody: one that begins with the same
            tokens, and how many of them that is to have.
        logprobs: log-probabilities of its next token, if they are wanted.
        total: log-sum-exp of the logits of its next token.
        new: whether the token that goes in next is its prompt's last, or was told before.
        rescued: whether a fault of MLX has cost it a cache before.
    """

    def __init__(self, request: Request) -> None:
        assert request.sampling is not None
        self.request = request
        self.age = next(_ages)
        self.source = request.prompt
        self.started = self.rescued = False
        self.cache: Cache | None = None
        self.held = self.cached = 0
        self.places: tuple[int, ...] = ()
        self.alone = request.limit == 0  # so that it keeps a cache of its own
        self.fault: BaseException | None = None
        self.sparse: SparsePrefill | None = None
        self.dense: int | None = None
        self.ranges: list[Range] = []
        self.drafter: Drafter | None = None
        self.options = request.sampling.options
        self.processors = request.sampling.processors
        self.budget = request.sampling.budget
        self.grammar = request.sampling.grammar
        self.forces = False
        self.logprobs: mx.array | None = None
        self.total = 0.0
        self.new = True
        self.batched = 0
        self.leads: tuple[Sequence | None, int] = (None, 0)
        self._seen: TokenBuffer | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among others: by priority, then by age; the last one is preempted first."""
        return self.request.priority, self.age

    @property
    def returns(self) -> bool:
        """Whether it has decoded before, in another cache."""
        return self.source is not self.request.prompt

    @property
    def left(self) -> int:
        """Tokens of its source that are not in the cache, the last one not counted."""
        if self.sparse is not None:
            return self.sparse.left
        return len(self.source) - 1 - self.held

    @property
    def stop(self) -> int | None:
        """The next of ``places``; ``None`` if there are no more."""
        return next((place for place in self.places if place > self.held), None)

    @property
    def keeps_end(self) -> bool:
        """Whether its cache is to be stored where its prompt ends, too.

        The end of a chat's prompt is the beginning of an answer, and rarely comes again.
        """
        known = self.request.places
        return not known or len(self.request.prompt) - 1 - known[-1] >= _NEAR

    @property
    def nbytes(self) -> int:
        """Bytes of its own KV cache, and its drafter's."""
        own = 0 if self.cache is None else kv_nbytes(self.cache)
        return own + (0 if self.drafter is None else self.drafter.nbytes)

    @property
    def has_own(self) -> bool:
        """Whether the caller has given it logits processors."""
        return self.request.context is not None

    @property
    def speculates(self) -> bool:
        """Whether anything proposes tokens for it, while it decodes by itself."""
        return self.drafter is not None or self.forces

    @property
    def in_cache(self) -> list[int]:
        """The tokens that its KV cache holds."""
        return [*self.request.prompt, *self.request.tokens][: self.held]

    @property
    def kept(self) -> list[Range] | None:
        """The parts of its source that go into its cache, if some are left out; ``None`` if it is
        not known yet which.
        """
        if not self.ranges:
            return None
        end = len(self.source) - 1
        known = [(a, min(b, end)) for a, b in self.ranges if a < end]
        return [*known, (len(self.request.prompt), end)] if self.returns else known

    def leave_decoding(self, token: int | None, total: float) -> None:
        """Get ready to decode in another cache, from the tokens that it has.

        Args:
            token: its next one, which has been sampled, and is not told yet; if there is one.
            total: log-sum-exp of the logits that it is of.

        Raises:
            Exception: MLX failed.
        """
        self.source = [*self.request.prompt, *self.request.tokens]
        if token is not None:
            self.source.append(token)
        self.new, self.total = token is None, total
        if self.logprobs is not None:  # a row of those of the batch, which it must not hold
            self.logprobs = self.logprobs + 0
            mx.eval(self.logprobs)
        self.leave_cache()

    def leave_cache(self) -> None:
        """Give up its cache, and what belongs to it."""
        if self.sparse is not None and not self.sparse.scoring:
            self.ranges = self.sparse.ranges
        self.cache = self.sparse = self.drafter = None
        self.held = self.cached = 0
        self.moved()

    def progress(self, done: int, phase: Literal["score", "prefill"] = "prefill") -> None:
        """So many tokens of its source are gone through; its caller is told, the first time."""
        if not self.returns:
            self.request.progress(done, phase)

    def moved(self) -> None:
        """Note that tokens came in another way than by the steps that ``process`` has seen."""
        self._seen = None

    def finish_drafting(self) -> None:
        """Keep what its drafter knows; nobody's answer depends on it."""
        if self.drafter is not None:
            with contextlib.suppress(Exception):
                self.drafter.finish([*self.request.prompt, *self.request.tokens])

    def keep_scored(self) -> None:
        """Keep what the draft of its sparse prefill has read; nobody's answer depends on it."""
        if self.sparse is not None:
            with contextlib.suppress(Exception):
                self.sparse.keep_scored()

    def process(self, token: mx.array, logits: mx.array) -> mx.array:
        """Logits of shape (1, vocabulary) after its processors; a fault leaves them as they are.

        Args:
            token: of shape (1,), the one that goes into the model with this step.
        """
        if self._seen is None:
            self._seen = TokenBuffer(self.in_cache)
        tokens = self._seen.update_and_fetch(token).astype(mx.uint32)
        try:
            return self.request.process_now(tokens, logits)
        except BaseException as error:  # noqa: BLE001 - the border to the caller's code
            self.fault = error
            return logits

    def forced(self, token: mx.array, logits: mx.array) -> int | None:
        """The token that alone may come next, if one is forced; a fault forces none.

        Args:
            token: of shape (1,), the one that goes into the model with this step.
            logits: what comes of it.

        Raises:
            Exception: MLX failed.
        """
        if self.budget is None:
            return None
        place = self.held + 1 - len(self.request.prompt)
        try:
            return self.budget.forced(place, [token], logits)
        except BaseException as error:
            if self.budget.fault is None:
                raise
            self.fault = error
            return None

    def follow(self, token: int) -> GrammarState | None:
        """The state of its constraint where its next token is to be chosen; ``None`` if it has
        none. A fault is kept, there and here.

        Args:
            token: the one that goes into the model with this step.
        """
        if self.grammar is None:
            return None
        place = self.held + 1 - len(self.request.prompt)
        try:
            self.grammar.go(place, [token])
        except BaseException as error:  # noqa: BLE001 - the border to the matcher
            self.fault = error
        return self.grammar
