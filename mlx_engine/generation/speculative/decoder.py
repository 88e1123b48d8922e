"""Speculative decoding: several tokens are proposed, and one forward of the model verifies them.

Every token that comes out is the model's own sample at its place; a proposal only decides
whether the next place is known already. So the answer is that of plain decoding, greedy or
not (https://arxiv.org/abs/2211.17192 instead accepts by a ratio of probabilities, which keeps
the distribution, but not the tokens of a seed).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.core.counters import EngineCounters
from mlx_engine.errors import describe, drop_frames
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.rollback import Rollback
from mlx_engine.generation.request import Request
from mlx_engine.generation.sampler import can_be_sampled
from mlx_engine.generation.speculative.depth import DepthChooser
from mlx_engine.generation.speculative.drafter import Drafter
from mlx_engine.generation.speculative.forward import Forward

Emitted = tuple[int, mx.array | None]  # a token and its log-probabilities, if asked for
# A token of shape (1,) that is not evaluated yet, whether there was anything to choose from
# (``None``: there was), and its log-probabilities, if asked for.
Pending = tuple[mx.array, mx.array | None, mx.array | None]

_FORCED = 32  # tokens that a constraint forces and that are verified together, at most
_LONGEST_REPLAY = 8  # tokens that go in again and again, where a cache cannot be trimmed


class SpeculativeDecoder:
    """Decodes one request, a cycle at a time. On the MLX thread.

    Between two cycles the cache holds ``held`` of ``tokens``, at least all but the last few;
    the rest goes in with the next forward.

    Args:
        request: prepared; its tokens are to be given to it as they come.
        forward: of the model.
        cache: of the model, with all of the prompt but its last token in it.
        drafter: proposes tokens; ``None`` if only the request's constraint does.
        chooser: says how many.
        counters: of proposals.
        pending: the next token, if it has been sampled already and not been read. All tokens
            before it are in the cache then.

    Attributes:
        held: tokens in the cache.
        tokens: the prompt and all that has come out.
        fault: what a logits processor or the constraint raised, or that there was nothing to
            sample, which ``step`` has raised.
    """

    def __init__(
        self,
        request: Request,
        forward: Forward,
        cache: Cache,
        drafter: Drafter | None,
        chooser: DepthChooser,
        counters: EngineCounters,
        pending: Pending | None = None,
    ) -> None:
        assert request.sampling is not None
        self.tokens = [*request.prompt, *request.tokens]
        self.held = len(self.tokens) - (pending is None)
        self.fault: BaseException | None = None
        self._request = request
        self._sampling = request.sampling
        self._forward = forward
        self._cache = cache
        self._drafter = drafter
        self._chooser = chooser
        self._counters = counters
        self._rollback = Rollback(cache)
        self._next = pending
        self._history: mx.array | None = None  # tokens, for processors
        self._most_forced = _FORCED
        self._began = 0.0  # when the latest cycle began
        self._cycle: tuple[int, int] | None = None  # its depth, and how many were accepted

    def step(self) -> list[Emitted]:
        """Do a cycle: the tokens that it gives, at least one.

        Raises:
            Exception: MLX failed; or what ``fault`` then is.
        """
        self._time()
        left = self._left()
        forced = self._forced(left - 1)
        if forced and self._next is None:
            return self._verify_forced(forced)
        depth = self._depth(left)
        first = len(self.tokens) == len(self._request.prompt)  # not to wait for the drafter
        if depth and self._next is None and not first:
            proposals = self._propose(depth)
            if proposals is not None:
                return self._verify_drafted(proposals, depth)
        self._cycle = None if depth else (0, 0)
        # What is forced behind the next token goes in together, once that is known.
        return [self._plain(more=left > 1 and not depth and len(forced) < 2)]

    def _time(self) -> None:
        """Time the cycle before, until now, what its tokens were used for included."""
        now = time.perf_counter()
        if self._cycle is not None:
            depth, accepted = self._cycle
            self._chooser.record(depth, now - self._began, accepted)
        self._began, self._cycle = now, None

    def _left(self) -> int:
        limit = self._request.limit
        done = len(self.tokens) - len(self._request.prompt)
        return 2**31 if limit is None else limit - done

    def _depth(self, left: int) -> int:
        if self._drafter is None or len(self.tokens) - self.held > _LONGEST_REPLAY:
            return 0  # a forward without proposals puts tokens in for good
        return self._chooser.choose(left - 1)

    def settle(self) -> Pending | None:
        """Get ready to go on in another way: all tokens but the last go into the cache.

        Returns:
            What is ``pending``. If anything is, the last of ``tokens`` is in the cache, too.
        """
        pending, self._next, self._cycle = self._next, None, None
        missing = self.tokens[self.held : -1]
        if missing:
            with mx.stream(generation_stream):
                hidden = self._forward.prefill(mx.array([missing]), self._cache)
            self._observe(self.held, hidden)
            self.held += len(missing)
        return pending

    # plain steps

    def _plain(self, *, more: bool) -> Emitted:
        """The next token; with ``more``, the forward for the one after it is begun before."""
        token, sound, logprobs = self._next or self._launch(
            mx.array(self.tokens[self.held :], dtype=mx.uint32)
        )
        self._next = self._launch(token) if more else None
        if sound is not None and not sound.item():
            raise self._nothing_to_sample()
        self.tokens += cast("list[int]", token.tolist())
        return self.tokens[-1], logprobs

    def _launch(self, inputs: mx.array) -> Pending:
        place = self.held + inputs.size - len(self._request.prompt)
        with mx.stream(generation_stream):
            logits, hidden = self._forward(inputs[None], self._cache, last=1)
            self._remember(inputs)
            logprobs = _logprobs(self._limited(self._processed(logits, []), place, [inputs]))
            token = self._sampling.sample_at(logprobs, place)
            sound = can_be_sampled(logprobs, token)
            wanted = logprobs[0] if self._request.wants_logprobs else None
            # The history with them, which would pile up where no processor looks at it.
            mx.async_eval(token, sound, wanted, self._history)  # type: ignore[no-untyped-call]
        self._observe(self.held, hidden)
        self.held += inputs.size
        return token, sound, wanted

    def _nothing_to_sample(self) -> BaseException:
        self.fault = self._request.nothing_to_sample(by_model=True)
        return self.fault

    # verifying proposals

    def _propose(self, depth: int) -> mx.array | None:
        """Proposals, ``depth`` of them, or fewer if the next one may not come; ``None`` if the
        drafter only came closer to any.
        """
        drafter = self._drafter
        assert drafter is not None
        if (reason := drafter.ended(self.tokens)) is not None:
            self._go_on_without(reason)
            return None
        place = len(self.tokens) - len(self._request.prompt)
        try:
            if drafter.catch_up(self.tokens) or not drafter.ready(self.tokens):
                return None
            with mx.stream(generation_stream):
                self._remember(mx.array(self.tokens[self.held :], dtype=mx.uint32))
                proposals = drafter.propose(self.tokens, depth, self._sample_draft)
                # Computed while the rest is built.
                mx.async_eval(proposals, self._history)  # type: ignore[no-untyped-call]
            if self._sampling.grammar is not None:
                known = cast("list[int]", proposals.tolist())
                proposals = proposals[: self._sampling.grammar.allowed(place, known)]
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._drafter_failed(error)
            return None
        return proposals

    def _drafter_failed(self, error: Exception) -> None:
        """Go on without a drafter that failed: no token depends on it."""
        self.fault = None
        self._go_on_without(f"the draft failed ({describe(error)})")
        drop_frames(error)

    def _go_on_without(self, reason: str) -> None:
        self._drafter = None
        self._request.note(f"decoded one token at a time in the end: {reason}")

    def _forced(self, most: int) -> list[int]:
        """Tokens that the constraint forces, as far as they are to be proposed, of ``most``."""
        grammar, most = self._sampling.grammar, min(most, self._most_forced)
        if grammar is None or most < 1 or len(self.tokens) - self.held > _LONGEST_REPLAY:
            return []
        try:
            return grammar.forced(len(self.tokens) - len(self._request.prompt))[:most]
        except BaseException as error:
            self.fault = error
            raise

    def _verify_forced(self, tokens: list[int]) -> list[Emitted]:
        """Verify them; fewer are proposed from now on if the model writes the text in others."""
        self._remember(mx.array(self.tokens[self.held :], dtype=mx.uint32))
        emitted = self._verify(mx.array(tokens, dtype=mx.uint32))
        accepted = len(emitted) - 1
        if accepted < len(tokens):
            self._most_forced = (self._most_forced + accepted) // 2
        return emitted

    def _verify_drafted(self, proposals: mx.array, asked: int) -> list[Emitted]:
        """Verify what a drafter that was asked for so many has proposed, and learn from it."""
        emitted = self._verify(proposals)
        accepted = len(emitted) - 1
        self._tell_drafter(accepted)
        self._request.drafted(asked, accepted)
        self._counters.draft_tokens += asked
        self._counters.accepted_tokens += accepted
        self._cycle = (asked, accepted)
        return emitted

    def _verify(self, proposals: mx.array) -> list[Emitted]:
        place, depth = len(self.tokens) - len(self._request.prompt), proposals.size
        start, inputs = self.held, mx.array(self.tokens[self.held :], dtype=mx.uint32)
        with mx.stream(generation_stream):
            self._rollback.mark()
            logits, hidden = self._forward(
                mx.concatenate([inputs, proposals])[None], self._cache, last=depth + 1
            )
            chosen, logprobs = self._choose(logits, proposals, place)
        if not chosen:
            raise self._nothing_to_sample()
        accepted = len(chosen) - 1
        went_in, rejected = inputs.size + depth, depth - accepted
        self.held += self._rollback.take_back(rejected, went_in) if rejected else went_in
        self.tokens += chosen
        if hidden is not None:
            self._observe(start, hidden[: went_in - rejected])
        wanted = self._request.wants_logprobs
        return [(token, logprobs[i] if wanted else None) for i, token in enumerate(chosen)]

    def _choose(
        self, logits: mx.array, proposals: mx.array, place: int
    ) -> tuple[list[int], mx.array]:
        """The model's own tokens as far as the proposals led there, and their log-probabilities;
        none if there was nothing to sample at the first place.

        A processor of the caller's is shown a proposal only once it is accepted, since it may
        remember what it was shown; so each token is waited for.
        """
        if not self._sampling.processors:
            logprobs = _logprobs(self._limited(logits, place, [proposals], proposals.size))
            return _matching(
                proposals, self._sampling.sample_at(logprobs, place), logprobs
            ), logprobs
        rows: list[mx.array] = []
        samples: list[mx.array] = []
        one_by_one = self._request.context is not None
        for i in range(logits.shape[0]):
            before = [proposals[:i]] if i else []
            row = self._processed(logits[i : i + 1], before)
            row = _logprobs(self._limited(row, place + i, before, i))
            rows.append(row)
            samples.append(self._sampling.sample_at(row, place + i))
            if one_by_one and i < proposals.size and (samples[i] != proposals[i]).item():
                break
        logprobs = mx.concatenate(rows)
        return _matching(proposals[: len(rows)], mx.concatenate(samples), logprobs), logprobs

    def _sample_draft(self, logits: mx.array, proposals: Sequence[mx.array]) -> mx.array:
        """A proposal as the model would choose it: the same processors, filters and noise."""
        if self._request.context is None:
            logits = self._processed(logits, proposals)
        place = len(self.tokens) - len(self._request.prompt) + len(proposals)
        logits = self._limited(logits, place, proposals, len(proposals), drafted=True)
        return self._sampling.sample_at(_logprobs(logits), place).astype(mx.uint32)

    # what processors are shown

    def _remember(self, inputs: mx.array) -> None:
        """Note that tokens go in behind the ``held`` that are in the cache, for processors."""
        if not self._sampling.processors:
            return
        known = mx.array([], dtype=mx.uint32) if self._history is None else self._history
        known = known[: self.held]
        between = mx.array(self.tokens[known.size : self.held], dtype=mx.uint32)
        self._history = mx.concatenate([known, between, inputs])

    def _processed(self, logits: mx.array, proposals: Sequence[mx.array]) -> mx.array:
        """Logits of shape (1, vocabulary) after all processors."""
        if not self._sampling.processors:
            return logits
        assert self._history is not None
        tokens = mx.concatenate([self._history, *proposals]) if proposals else self._history
        if self._request.context is not None:
            mx.eval(logits)  # so that a fault of MLX is not taken for one of theirs
        try:
            return self._request.process_now(tokens, logits)
        except BaseException as error:
            self.fault = error
            raise

    def _limited(
        self,
        logits: mx.array,
        place: int,
        ahead: Sequence[mx.array],
        proposed: int = 0,
        *,
        drafted: bool = False,
    ) -> mx.array:
        """Logits of shape (n, vocabulary) within the budget of the request's reasoning, and what
        its constraint allows.

        Args:
            place: of the first of them in the answer.
            ahead: tokens before the last of them, those at least that have not come out.
            proposed: how many at the end of ``ahead`` may turn out to be others.
            drafted: whether these are a draft's.
        """
        budget, grammar = self._sampling.budget, self._sampling.grammar
        try:
            if budget is not None:
                logits = budget.apply(logits, place, ahead)
            if grammar is not None and drafted:
                logits = grammar.apply_to_draft(logits, place - proposed, ahead)
            elif grammar is not None:
                logits = grammar.apply(logits, place, ahead, proposed)
        except BaseException:
            faults = [each.fault for each in (budget, grammar) if each is not None]
            self.fault = next((fault for fault in faults if fault is not None), None)
            raise
        return logits

    # what the drafter is told

    def _observe(self, start: int, hidden: mx.array | None) -> None:
        if hidden is None or self._drafter is None:
            return
        try:
            self._drafter.observe(self.tokens, start, hidden)
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._drafter_failed(error)

    def _tell_drafter(self, accepted: int) -> None:
        if self._drafter is None:
            return
        try:
            self._drafter.verified(accepted)
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._drafter_failed(error)


def _logprobs(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _matching(proposals: mx.array, samples: mx.array, logprobs: mx.array) -> list[int]:
    """Samples up to the first that is not what was proposed; the only wait of a cycle.

    They end before a place where there was nothing to sample.
    """
    sound = can_be_sampled(logprobs, samples).astype(samples.dtype)
    found = cast("list[int]", mx.concatenate([proposals, samples, sound]).tolist())
    proposed, chosen = found[: proposals.size], found[proposals.size : -sound.size]
    right = 0
    while right < len(proposed) and proposed[right] == chosen[right]:
        right += 1
    good = found[-sound.size :]
    return chosen[: min([right + 1, *(i for i, each in enumerate(good) if not each)])]
