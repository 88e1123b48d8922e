"""Proposing tokens with the model's own multi-token-prediction head."""

from __future__ import annotations

from collections import deque

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.cache.rollback import Rollback
from mlx_engine.generation.speculative.depth import DepthChooser
from mlx_engine.generation.speculative.drafter import Drafter, Sample
from mlx_engine.models.mtp_heads import MTPHead

_CHUNK = 512  # hidden states that the head takes in at once
_MOST = 2048  # hidden states that wait at most, while nothing is proposed


class MTPDrafter(Drafter):
    """A drafter that proposes what the head says.

    From the hidden state of one token and the token after it, the head tells the one after
    that; and so on from its own output.

    The head has its own KV history, without which it is right less often. While nothing is
    proposed, states wait outside of it, the latest ones.

    Args:
        head: of the model.
        chooser: tells whether anything is proposed at present.
        prompt_cache: of the head's histories.
    """

    def __init__(self, head: MTPHead, chooser: DepthChooser, prompt_cache: PromptCache) -> None:
        self._head = head
        self._chooser = chooser
        self._prompt_cache = prompt_cache
        self._waiting: deque[tuple[int, mx.array]] = deque()  # (first token, states (n, D))
        self._count = 0  # states that wait
        self._seen = 0  # tokens whose states have come
        self._whole = True  # whether the history lacks nothing from the first token on
        self._ahead = 0  # of its proposals that are in its history, too
        self._use(head.make_cache())

    def _use(self, history: Cache) -> None:
        self.cache: Cache = history
        self._rollback = Rollback(history)

    def begin(self, tokens: list[int], cached: int) -> None:
        """Take up the history of what the model's prompt cache has, if it is kept."""
        self._seen = cached
        hit = self._prompt_cache.fetch(tokens[: cached + 1])
        self._whole = hit.cached == cached
        if hit.cache is not None and self._whole:
            self._use(hit.cache)

    def observe(self, tokens: list[int], start: int, hidden: mx.array) -> None:
        """Keep states until they are needed; in a long prompt, take them in at once."""
        if start < self._seen:  # some had to go in again after a rejection
            hidden, start = hidden[self._seen - start :], self._seen
        if not hidden.shape[0]:
            return
        self._whole = self._whole and start == self._seen
        self._waiting.append((start, hidden))
        self._count += hidden.shape[0]
        self._seen = start + hidden.shape[0]
        if not self._chooser.parked:
            while self._seen < len(tokens) and self._count >= _CHUNK:
                mx.eval(self._take_in(tokens))
        while self._count >= _MOST + _CHUNK and len(self._waiting) > 1:
            self._count -= self._waiting.popleft()[1].shape[0]
            self._whole = False

    def catch_up(self, tokens: list[int]) -> bool:
        """Take in a chunk of the states that wait."""
        if self._count <= _CHUNK or self._seen >= len(tokens):
            return False
        mx.eval(self._take_in(tokens))
        return True

    def ready(self, tokens: list[int]) -> bool:
        """Whether it has the state of the last token but one."""
        return bool(self._waiting) and self._seen == len(tokens) - 1

    def propose(self, tokens: list[int], count: int, sample: Sample) -> mx.array:
        """Tokens that the head says, each from the one before."""
        proposals: list[mx.array] = []
        with mx.stream(generation_stream):
            states = self._take_in(tokens)
            self._rollback.mark()
            while True:
                states = states[:, -1:, :]
                token = sample(self._head.logits(states)[:, -1, :], proposals)
                proposals.append(token)
                if len(proposals) == count:
                    break
                states = self._head(token[None], states, self.cache)
            self._ahead = count - 1
            return mx.concatenate(proposals)

    def verified(self, accepted: int) -> None:
        """Forget them all, also those that were right: the model's own states go in instead."""
        if self._ahead:
            self._rollback.take_back(self._ahead, self._ahead)
        self._ahead = 0

    def finish(self, tokens: list[int]) -> None:
        """Keep the history, if it begins with the first token."""
        if not self._whole or self._ahead:
            return
        while self._waiting and not self._chooser.parked and self._seen < len(tokens):
            mx.eval(self._take_in(tokens))
        self._prompt_cache.store(tokens, self.cache)

    def _take_in(self, tokens: list[int]) -> mx.array:
        """Put a chunk of the states that wait into the history; the head's output for them."""
        taken: list[mx.array] = []
        following: list[int] = []
        while self._waiting and (room := _CHUNK - len(following)):
            start, states = self._waiting.popleft()
            if states.shape[0] > room:
                self._waiting.appendleft((start + room, states[room:]))
                states = states[:room]
            taken.append(states)
            following += tokens[start + 1 : start + 1 + states.shape[0]]
        self._count -= len(following)
        with mx.stream(generation_stream):
            inputs = mx.array(following, dtype=mx.uint32)
            return self._head(inputs[None], mx.concatenate(taken)[None], self.cache)
