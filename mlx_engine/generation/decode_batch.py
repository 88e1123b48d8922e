"""Rows that decode together: one forward of the model gives each of them its next token.

mlx_lm's caches do the batching; its ``GenerationBatch`` is not used because a logits processor
that raises in the middle of its step leaves the whole batch undone, and because it evaluates
the log-probabilities of all rows whether or not somebody asked for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.generation.cache.kv_cache import Cache, kv_nbytes, merge
from mlx_engine.generation.course import speculative_decoder
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sampler import Sampler
from mlx_engine.generation.sequence import Sequence
from mlx_engine.generation.speculative.decoder import SpeculativeDecoder

Step = tuple[Sequence, int, mx.array | None]  # a row, its token and its log-probabilities


class DecodeBatch:
    """Rows and their joint KV cache. On the MLX thread.

    A single row keeps the cache that it has, which is what decoding alone uses, and decodes
    with its drafter if it has one; two and more are merged into mlx_lm's batch caches.
    """

    def __init__(self, space: ModelRunner) -> None:
        self._space = space
        self._model = space.loaded.model
        self._alone: SpeculativeDecoder | None = None  # of the single row
        self._cache: Cache = []
        self._merged = False
        self._inputs: mx.array | None = None  # (rows,): the tokens that go in next
        # (rows, 1): log-sum-exp of their logits; not finite where there was nothing to choose from
        self._sums: mx.array | None = None
        self._sampler: Sampler | None = None  # of the rows as they are
        self.rows: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of KV cache."""
        return kv_nbytes(self._cache) + sum(row.nbytes for row in self.rows)

    def join(self, rows: list[Sequence], merged: Cache | None = None) -> None:
        """Take in rows that hold all of their prompts but the last token, after ``end_alone``.

        Args:
            merged: the batch caches of these rows; ``None`` if each has its own.

        Raises:
            Exception: MLX failed; nothing in the batch can be used any more.
        """
        lasts = mx.array([row.request.prompt[-1] for row in rows], dtype=mx.uint32)
        with mx.stream(generation_stream):
            if not self.rows:
                self._set_cache(rows, merged)
                self._inputs = lasts
            else:
                if not self._merged:
                    self._cache, self._merged = merge([self._cache]), True
                new = merged if merged is not None else merge([_own(row) for row in rows])
                for mine, others in zip(self._cache, new, strict=True):
                    mine.extend(others)
                assert self._inputs is not None
                self._inputs = mx.concatenate([self._inputs, lasts])
                if self._sums is not None:
                    self._sums = mx.concatenate([self._sums, mx.zeros((len(rows), 1))])
        for row in rows:
            row.cache = None
        self.rows += rows
        self._sampler = None

    def _set_cache(self, rows: list[Sequence], merged: Cache | None) -> None:
        if merged is not None:
            self._cache, self._merged = merged, True
        elif len(rows) == 1:
            self._cache, self._merged = _own(rows[0]), False
        else:
            self._cache, self._merged = merge([_own(row) for row in rows]), True

    def step(self) -> list[Step]:
        """Hand the next forward to MLX, then give each row's token of the one before.

        A row that has just joined has none yet, nor has one whose ``fault`` is set. A single
        row with a drafter may get several.

        Raises:
            Exception: MLX failed; nothing in the batch can be used any more.
        """
        if len(self.rows) == 1 and self.rows[0].drafter is not None:
            return self._step_alone(self.rows[0])
        inputs, sums = self._inputs, self._sums
        logprobs = [row.logprobs for row in self.rows]
        new = [row.new for row in self.rows]
        assert inputs is not None
        with mx.stream(generation_stream):
            if not all(_is_last(row) for row in self.rows):
                self._launch(inputs)
        tokens = cast("list[int]", inputs.tolist())
        known = [[0.0]] * len(new) if sums is None else cast("list[list[float]]", sums.tolist())
        for row, fresh, (total,) in zip(self.rows, new, known, strict=True):
            row.batched += not fresh
            if not (fresh or math.isfinite(total) or row.fault):
                row.fault = row.request.nothing_to_sample(by_model=True)
        return [
            (row, token, values)
            for row, token, values, fresh in zip(self.rows, tokens, logprobs, new, strict=True)
            if not fresh and row.fault is None
        ]

    def _step_alone(self, row: Sequence) -> list[Step]:
        if self._alone is None:
            assert self._inputs is not None
            sound = None if self._sums is None else mx.isfinite(self._sums)
            pending = None if row.new else (self._inputs, sound, row.logprobs)
            self._alone = speculative_decoder(self._space, row, self._cache, pending)
        try:
            burst = self._alone.step()
        except BaseException:
            if self._alone.fault is None:
                raise
            row.fault = self._alone.fault
            return []
        row.held = self._alone.held
        return [(row, token, logprobs) for token, logprobs in burst]

    def end_alone(self) -> None:
        """The single row will not be alone any more: go on from where its decoder is.

        Raises:
            Exception: MLX failed; its cache cannot be used any more.
        """
        decoder, self._alone = self._alone, None
        if decoder is None:
            return
        row = self.rows[0]
        pending = decoder.settle()
        row.held, row.new = decoder.held, pending is None
        if pending is None:
            self._inputs, self._sums = mx.array(decoder.tokens[-1:], dtype=mx.uint32), None
        else:
            self._inputs, sound, row.logprobs = pending
            self._sums = None if sound is None else mx.where(sound, 0.0, mx.nan).reshape(1, 1)
        row.moved()

    def _launch(self, inputs: mx.array) -> None:
        logits = self._model(inputs[:, None], cache=self._cache)[:, -1, :]
        if any(row.has_own for row in self.rows):
            mx.eval(logits)  # so that a fault of MLX is not taken for one of theirs
        if any(row.processors for row in self.rows):
            logits = mx.concatenate(
                [
                    row.process(inputs[i : i + 1], logits[i : i + 1])
                    if row.processors and not _is_last(row)
                    else logits[i : i + 1]
                    for i, row in enumerate(self.rows)
                ]
            )
        self._sums = mx.logsumexp(logits, axis=-1, keepdims=True)
        logprobs = logits - self._sums
        self._inputs = self._sample(logprobs)
        wanted: list[mx.array] = []
        for i, row in enumerate(self.rows):
            row.held += 1
            row.new = False
            if row.request.wants_logprobs:
                row.logprobs = logprobs[i]
                wanted.append(row.logprobs)
        mx.async_eval(self._inputs, self._sums, wanted)  # type: ignore[no-untyped-call]

    def _sample(self, logprobs: mx.array) -> mx.array:
        """Token ids of shape (rows,)."""
        positions = [row.held + 1 - len(row.request.prompt) for row in self.rows]
        try:
            if self._sampler is None:
                self._sampler = Sampler([row.options for row in self.rows])
            return self._sampler(logprobs, positions)
        except Exception:  # noqa: BLE001 - the border: MLX raises anything
            self._sampler = None
        return mx.concatenate(
            [self._sample_row(i, logprobs[i : i + 1], positions[i]) for i in range(len(self.rows))]
        )

    def _sample_row(self, i: int, logprobs: mx.array, position: int) -> mx.array:
        """Of one row by itself: what raises here costs that row only."""
        try:
            return Sampler([self.rows[i].options])(logprobs, [position])
        except Exception as error:  # noqa: BLE001 - the border: kept for the row's caller
            self.rows[i].fault = error
            return mx.zeros((1,), dtype=mx.uint32)

    def extract(self, row: Sequence) -> Cache:
        """A KV cache of its own for a row that is about to leave."""
        if not self._merged:
            return self._cache
        index = self.rows.index(row)
        with mx.stream(generation_stream):
            return [entry.extract(index) for entry in self._cache]

    def leave(self, rows: Iterable[Sequence]) -> None:
        """Let rows go."""
        gone = set(map(id, rows))
        keep = [i for i, row in enumerate(self.rows) if id(row) not in gone]
        if len(keep) == len(self.rows):
            return
        self.rows, self._sampler = [self.rows[i] for i in keep], None
        if not keep:
            self._cache, self._merged, self._inputs, self._alone = [], False, None, None
            self._sums = None
            return
        assert self._inputs is not None
        with mx.stream(generation_stream):
            kept = mx.array(keep)
            self._inputs = self._inputs[kept]
            self._sums = None if self._sums is None else self._sums[kept]
            if len(keep) == 1:
                self._cache = [entry.extract(keep[0]) for entry in self._cache]
                self._merged = False
            else:
                for entry in self._cache:
                    entry.filter(keep)


def _own(row: Sequence) -> Cache:
    assert row.cache is not None
    return row.cache


def _is_last(row: Sequence) -> bool:
    """Whether the token that it is about to get is known to be its last."""
    limit = row.request.limit
    return not row.new and limit is not None and len(row.request.tokens) + 1 >= limit
