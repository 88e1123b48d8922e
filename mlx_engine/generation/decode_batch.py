"""Sequences that decode together: one forward of the model gives each its next token.

mlx_lm's caches do the batching; its ``GenerationBatch`` is not used because a logits processor
that raises in the middle of its step leaves the whole batch undone, and because it evaluates
the log-probabilities of all rows whether or not somebody asked for them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import cast

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.generation.cache.joint_cache import extend, keep_rows, merge
from mlx_engine.generation.cache.kv_cache import Cache, grow, kv_nbytes
from mlx_engine.generation.constraint import empty_masks, fill_all, masked
from mlx_engine.generation.reasoning_budget import only
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sampler import Sampler
from mlx_engine.generation.sequence import Sequence
from mlx_engine.generation.speculative.decoder import SpeculativeDecoder

Pending = tuple[int | None, float]  # what ``Sequence.leave_decoding`` takes
Step = tuple[Sequence, int, mx.array | None]  # a sequence, its token and its log-probabilities


class DecodeBatch:
    """Sequences and their joint KV cache. On the MLX thread.

    A single sequence keeps the cache that it has, which is what decoding alone uses, and decodes
    with proposals if anything makes some; two and more are merged into mlx_lm's batch caches.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._model = runner.loaded.model
        self._alone: SpeculativeDecoder | None = None  # of the single sequence
        self._cache: Cache = []
        self._merged = False
        self._inputs: mx.array | None = None  # (rows,): the tokens that go in next
        # (rows, 1): log-sum-exp of their logits; not finite where there was nothing to choose from
        self._sums: mx.array | None = None
        self._sampler: Sampler | None = None  # of the sequences as they are
        self.sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def nbytes(self) -> int:
        """Bytes of KV cache."""
        return kv_nbytes(self._cache) + sum(each.nbytes for each in self.sequences)

    def join(self, sequences: list[Sequence], merged: Cache | None = None) -> None:
        """Take in sequences whose sources are in their caches but for the last token.

        ``end_alone`` comes before.

        Args:
            merged: the batch caches of these sequences; ``None`` if each has its own.

        Raises:
            Exception: MLX failed; nothing in the batch can be used any more.
        """
        lasts = mx.array([each.source[-1] for each in sequences], dtype=mx.uint32)
        sums = mx.array([[each.total] for each in sequences])
        with mx.stream(generation_stream):
            if not self.sequences:
                self._set_cache(sequences, merged)
                self._inputs, self._sums = lasts, sums
            else:
                new = [_taken(each) for each in sequences] if merged is None else [merged]
                extend(self._cache, new, joint=merged is not None, batched=self._merged)
                self._merged = True
                assert self._inputs is not None
                self._inputs = mx.concatenate([self._inputs, lasts])
                if self._sums is None:
                    self._sums = mx.zeros((len(self.sequences), 1))
                self._sums = mx.concatenate([self._sums, sums])
        for sequence in sequences:
            sequence.cache = None
        self.sequences += sequences
        self._sampler = None

    def _set_cache(self, sequences: list[Sequence], merged: Cache | None) -> None:
        if merged is not None:
            self._cache, self._merged = merged, True
        elif len(sequences) == 1:
            self._cache, self._merged = _own(sequences[0]), False
        else:
            self._cache, self._merged = merge(list(map(_own, sequences))), True

    def step(self) -> list[Step]:
        """Hand the next forward to MLX, then give each sequence's token of the one before.

        A sequence that has just joined has none yet, nor has one whose ``fault`` is set. A single
        sequence for which tokens are proposed may get several.

        Raises:
            Exception: MLX failed; nothing in the batch can be used any more.
        """
        if len(self.sequences) == 1 and self.sequences[0].speculates:
            return self._step_alone(self.sequences[0])
        inputs, sums = self._inputs, self._sums
        logprobs = [each.logprobs for each in self.sequences]
        new = [each.new for each in self.sequences]
        assert inputs is not None
        with mx.stream(generation_stream):
            if not all(map(_is_last, self.sequences)):
                self._launch(inputs)
        tokens = cast("list[int]", inputs.tolist())
        known = [[0.0]] * len(new) if sums is None else cast("list[list[float]]", sums.tolist())
        for sequence, fresh, (total,) in zip(self.sequences, new, known, strict=True):
            sequence.batched += not fresh
            if not (fresh or math.isfinite(total) or sequence.fault):
                sequence.fault = sequence.request.nothing_to_sample(by_model=True)
        return [
            (each, token, values)
            for each, token, values, fresh in zip(
                self.sequences, tokens, logprobs, new, strict=True
            )
            if not fresh and each.fault is None
        ]

    def _step_alone(self, sequence: Sequence) -> list[Step]:
        if self._alone is None:
            assert self._inputs is not None
            sound = None if self._sums is None else mx.isfinite(self._sums)
            pending = None if sequence.new else (self._inputs, sound, sequence.logprobs)
            self._alone = self._runner.speculative_decoder(sequence, self._cache, pending)
        try:
            emitted = self._alone.step()
        except BaseException:
            if self._alone.fault is None:
                raise
            sequence.fault = self._alone.fault
            return []
        sequence.held = self._alone.held
        return [(sequence, token, logprobs) for token, logprobs in emitted]

    def end_alone(self) -> None:
        """Let the single sequence be alone no more: go on from where its decoder is.

        Raises:
            Exception: MLX failed; its cache cannot be used any more.
        """
        decoder, self._alone = self._alone, None
        if decoder is None:
            return
        sequence = self.sequences[0]
        pending = decoder.settle()
        sequence.held, sequence.new = decoder.held, pending is None
        if pending is None:
            self._inputs, self._sums = mx.array(decoder.tokens[-1:], dtype=mx.uint32), None
        else:
            self._inputs, sound, sequence.logprobs = pending
            self._sums = None if sound is None else mx.where(sound, 0.0, mx.nan).reshape(1, 1)
        sequence.moved()

    def pending(self) -> list[tuple[Sequence, Pending]]:
        """All sequences, each with what it needs to go on in another cache.

        ``end_alone`` comes before.

        Raises:
            Exception: MLX failed in the step that is under way.
        """
        count = len(self.sequences)
        if not count:
            return []
        assert self._inputs is not None
        with mx.stream(generation_stream):
            sums = mx.zeros((count, 1)) if self._sums is None else self._sums[:count]
            tokens = cast("list[int]", self._inputs[:count].tolist())
            totals = cast("list[list[float]]", sums.tolist())
        return [
            (each, (None if each.new else token, total))
            for each, token, (total,) in zip(self.sequences, tokens, totals, strict=True)
        ]

    def _launch(self, inputs: mx.array) -> None:
        grow(self._cache, 1)
        logits = self._model(inputs[:, None], cache=self._cache)[:, -1, :]
        if any(each.has_own for each in self.sequences):
            mx.eval(logits)  # so that a fault of MLX is not taken for one of theirs
        if any(each.processors for each in self.sequences):
            logits = mx.concatenate(
                [
                    each.process(inputs[i : i + 1], logits[i : i + 1])
                    if each.processors and not _is_last(each)
                    else logits[i : i + 1]
                    for i, each in enumerate(self.sequences)
                ]
            )
        if any(each.budget is not None for each in self.sequences):
            forced = [
                None if _is_last(each) else each.forced(inputs[i : i + 1], logits)
                for i, each in enumerate(self.sequences)
            ]
            logits = only(forced, logits)
        if any(each.grammar is not None for each in self.sequences):
            logits = self._constrained(inputs, logits)
        self._sums = mx.logsumexp(logits, axis=-1, keepdims=True)
        logprobs = logits - self._sums
        self._inputs = self._sample(logprobs)
        wanted: list[mx.array] = []
        for i, sequence in enumerate(self.sequences):
            sequence.held += 1
            sequence.new = False
            if sequence.request.wants_logprobs:
                sequence.logprobs = logprobs[i]
                wanted.append(sequence.logprobs)
        mx.async_eval(self._inputs, self._sums, wanted)  # type: ignore[no-untyped-call]

    def _constrained(self, inputs: mx.array, logits: mx.array) -> mx.array:
        """Logits without the tokens that the sequences' constraints do not allow.

        The model computes while the masks are made, for which only the step before is waited.
        """
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        tokens = cast("list[int]", inputs.tolist())
        states = [
            None if _is_last(each) else each.follow(token)
            for each, token in zip(self.sequences, tokens, strict=True)
        ]
        words = empty_masks(len(states), logits)
        fill_all(words, states)
        for sequence, state in zip(self.sequences, states, strict=True):
            if state is not None:
                sequence.fault = sequence.fault or state.fault
        return masked(logits, words)

    def _sample(self, logprobs: mx.array) -> mx.array:
        """Token ids of shape (rows,)."""
        positions = [each.held + 1 - len(each.request.prompt) for each in self.sequences]
        try:
            if self._sampler is None:
                self._sampler = Sampler([each.options for each in self.sequences])
            return self._sampler(logprobs, positions)
        except Exception:  # noqa: BLE001 - the border: MLX raises anything
            self._sampler = None
        return mx.concatenate(
            [self._sample_row(i, logprobs[i : i + 1], at) for i, at in enumerate(positions)]
        )

    def _sample_row(self, i: int, logprobs: mx.array, position: int) -> mx.array:
        """The token of one row by itself: what raises here costs that row only."""
        try:
            return Sampler([self.sequences[i].options])(logprobs, [position])
        except Exception as error:  # noqa: BLE001 - the border: kept for its caller
            self.sequences[i].fault = error
            return mx.zeros((1,), dtype=mx.uint32)

    def leave(
        self, sequences: Collection[Sequence], wanted: Collection[Sequence] = ()
    ) -> dict[Sequence, Cache]:
        """Let sequences go.

        Args:
            wanted: those of them whose KV caches are wanted.

        Returns:
            KV caches of their own for these.

        Raises:
            Exception: MLX failed; nothing in the batch can be used any more.
        """
        keep = [i for i, each in enumerate(self.sequences) if each not in sequences]
        taken = {each: i for i, each in enumerate(self.sequences) if each in wanted}
        cache, merged = self._cache, self._merged
        self._keep(keep)
        if not merged:
            return dict.fromkeys(taken, cache)
        with mx.stream(generation_stream):
            own = keep_rows(cache, keep, list(taken.values()))
        return dict(zip(taken, own, strict=True))

    def _keep(self, rows: list[int]) -> None:
        """Let all others go, but for what the joint cache has of them."""
        self.sequences, self._sampler = [self.sequences[i] for i in rows], None
        self._merged = self._merged and len(rows) > 1
        if not rows:
            self._cache, self._inputs, self._sums, self._alone = [], None, None, None
        elif self._inputs is not None:
            with mx.stream(generation_stream):
                kept = mx.array(rows)
                self._inputs = self._inputs[kept]
                self._sums = None if self._sums is None else self._sums[kept]


def _own(sequence: Sequence) -> Cache:
    assert sequence.cache is not None
    return sequence.cache


def _taken(sequence: Sequence) -> Cache:
    """Its own cache, which it does not have any more."""
    cache, sequence.cache = _own(sequence), None
    return cache


def _is_last(sequence: Sequence) -> bool:
    """Whether the token that a sequence is about to get is known to be its last."""
    limit = sequence.request.limit
    return not sequence.new and limit is not None and len(sequence.request.tokens) + 1 >= limit
