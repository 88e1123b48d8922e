"""Continuous batching: requests join and leave at any step, and long prompts join in slices.

    add ─► prefill, slice by slice ─► decode, all rows together ─► over
             │                          │
             └── from the prompt cache  └── into the prompt cache

A step decodes one token for every row, then prefills one slice, so that neither holds the
other up for longer than that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.core.wakeup import waking_together
from mlx_engine.errors import MLXEngineError
from mlx_engine.generation.budget import MemoryBudget
from mlx_engine.generation.cache.kv_cache import Cache, sample_kv_cache
from mlx_engine.generation.cache.snapshot import trimmable
from mlx_engine.generation.course import finish_drafting, keep_scored
from mlx_engine.generation.decode_batch import DecodeBatch
from mlx_engine.generation.prefill_queue import PrefillQueue
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sequence import Sequence

_WORTH_KEEPING = 64  # tokens newly prefilled that are stored while their request goes on
_CLEAR = 512  # decode steps after which MLX's free buffers are given back, as in mlx_lm
_MEASURE = 64  # decode steps after which the size of the KV cache is looked at again
_GIVE_UP = 3  # decode steps in a row that MLX may fail

Over = tuple[Request, MLXEngineError | None]  # a request, and the error if it failed


class Batch:
    """The requests that are in work. On the MLX thread.

    Args:
        space: the model, and what belongs to it.
        budget: memory for the KV caches of the requests and the prompt cache.
        max_pause: seconds of prefill between two decode steps, roughly; ``None`` is no bound.

    Attributes:
        broken: why MLX cannot be used any more; ``None`` if it can.
    """

    def __init__(self, space: ModelRunner, budget: MemoryBudget, max_pause: float | None) -> None:
        self._space = space
        self._budget = budget
        self._decoding = DecodeBatch(space)
        self._prefilling = PrefillQueue(space, max_pause)
        self._steps = self._failures = 0
        self.broken: BaseException | None = None

    def __len__(self) -> int:
        return len(self._decoding) + len(self._prefilling.rows)

    @property
    def _requests(self) -> list[Request]:
        return [row.request for row in (*self._decoding.rows, *self._prefilling.rows)]

    def fits(self, request: Request) -> bool:
        """Whether there is memory for it now; stored prompts give way to it."""
        left = self._budget.left([*self._requests, request])
        if left is not None and left >= 0:
            self._space.shrink_stored(left)
        return left is None or left >= 0

    def make_room(self) -> None:
        """Drop stored prompts that have no place beside the requests."""
        left = self._budget.left(self._requests)
        if left is not None:
            self._space.shrink_stored(max(0, left))

    def add(self, request: Request) -> Over | None:
        """Take up a prepared request; it may be over at once."""
        try:
            if not request.begin():
                return request, None
        except BaseException as error:  # noqa: BLE001 - the border: a caller's module is imported
            return request, request.failed(error)
        self._prefilling.add(Sequence(request))
        return None

    def step(self) -> Iterator[Over]:
        """Drop what was cancelled, decode a token for every row, and prefill a slice.

        Yields each request as soon as it is over and its place is free.
        """
        yield from self.drop_cancelled()
        if self._decoding.rows:
            yield from self._decode()
        if self._prefilling.rows:
            yield from self._prefill()

    def rest(self) -> None:
        """Wait until nothing of it is in MLX any more."""
        with contextlib.suppress(Exception):  # a step that fails is told of where it is used
            mx.synchronize(generation_stream)

    def clear(self) -> None:
        """Drop all requests, without a word to anybody."""
        self._decoding = DecodeBatch(self._space)
        self._prefilling.rows.clear()
        self._measure()

    def drop_cancelled(self) -> Iterator[Over]:
        """Let go of those that were cancelled, or whose event loop is closed."""
        yield from self._leave([row for row in self._decoding.rows if row.request.should_stop])
        for row in [row for row in self._prefilling.rows if row.request.should_stop]:
            self._prefilling.rows.remove(row)
            self._measure()
            yield _cancelled(row.request)
            if row.cache is not None:
                keep_scored(row)
                self._store(row, row.cache)

    def _decode(self) -> Iterator[Over]:
        self._space.meter.step("decode")
        began = time.perf_counter()
        try:
            steps = self._decoding.step()
            self._steps += 1
            if self._steps % _CLEAR == 0:
                mx.clear_cache()
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._failures += 1
            yield from self._lose_all(error)
            return
        self._failures = 0
        meter = self._space.meter
        gone: list[Sequence] = []
        with waking_together():
            for row, token, logprobs in steps:
                if row in gone or row.fault is not None:
                    continue  # it came to its end within a burst
                try:
                    meter.completion_tokens += 1
                    if row.request.take(token, logprobs):
                        gone.append(row)
                except BaseException as error:  # noqa: BLE001 - the border: a tokenizer's fault
                    row.fault = error
        gone += [row for row in self._decoding.rows if row.fault is not None]
        meter.decode_seconds += time.perf_counter() - began
        if self._steps % _MEASURE == 0:
            self._measure()
        yield from self._leave(gone)

    def _leave(self, rows: list[Sequence]) -> Iterator[Over]:
        """Let rows of the decode batch go, and keep what they computed."""
        if not rows:
            return
        caches = [self._extract(row) for row in rows]
        for row in rows:
            finish_drafting(row)
            if row.drafter is not None and row.batched:
                row.request.note(
                    f"{row.batched} of its tokens were decoded together with other requests, "
                    "where nothing is proposed"
                )
        lost: Exception | None = None
        try:
            self._decoding.leave(rows)
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            lost = error
        self._measure()
        if not self:
            self.rest()  # the last one is told when nothing of it is in MLX
        for row in rows:
            if row.fault is not None:
                yield row.request, row.request.failed(row.fault)
            elif row.request.over:
                yield row.request, None
            else:
                yield _cancelled(row.request)
        if lost is not None:
            yield from self._lose_all(lost)
        for row, cache in zip(rows, caches, strict=True):
            if cache is not None:
                self._store(row, cache)

    def _extract(self, row: Sequence) -> Cache | None:
        """What it computed, to be stored."""
        if row.fault is not None or not self._space.prompt_cache.limit:
            return None
        try:
            cache = self._decoding.extract(row)
            # A burst whose last tokens were not used cannot be taken out of every cache.
            return cache if row.held <= len(row.in_cache) or trimmable(cache) else None
        except Exception:  # noqa: BLE001 - nobody's answer depends on it
            self._recover()
            return None

    def _prefill(self) -> Iterator[Over]:
        row = self._prefilling.choose()
        try:
            done, merged = self._prefilling.slice(row, beside_others=bool(self._decoding.rows))
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._prefilling.rows.remove(row)
            self._recover()
            yield row.request, row.request.failed(error)
            return
        if row.cache is not None and merged is None:
            self._store_prompt(row, row.cache)
        for each in done:
            each.request.prefilled()
            self._prefilling.rows.remove(each)
        if done and row.request.limit == 0:
            yield from self._end_prefilled(row)
        elif done:
            try:
                self._decoding.end_alone()
            except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
                yield from self._lose_all(error)
            try:
                self._decoding.join(done, merged)
            except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
                for each in done:
                    yield each.request, each.request.failed(error)
                yield from self._lose_all(error)
        self._measure()

    def _end_prefilled(self, row: Sequence) -> Iterator[Over]:
        """Let a row go that wants no tokens, and keep its prompt."""
        assert row.cache is not None
        finish_drafting(row)
        if not self:
            self.rest()  # as in _leave
        yield _over(row.request, row.request.ended_without_tokens)
        self._store(row, row.cache)

    def _lose_all(self, error: Exception) -> Iterator[Over]:
        """MLX failed, and nobody knows what the joint cache holds."""
        rows = self._decoding.rows
        self._decoding = DecodeBatch(self._space)
        self._measure()
        self._recover()
        if self._failures >= _GIVE_UP:
            self.broken = self.broken or error
        for row in rows:
            yield row.request, row.request.failed(error)

    def _recover(self) -> None:
        """After an error of MLX: see whether it still works."""
        try:
            mx.clear_cache()
            sample_kv_cache(self._space.loaded.model, self._space.config)
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self.broken = error
            return
        try:
            mx.eval(mx.random.state)
        except Exception:  # noqa: BLE001 - it hung on what has failed
            mx.random.seed(time.time_ns())

    def _store_prompt(self, row: Sequence, cache: Cache) -> None:
        """Keep what is prefilled by now, where others are likely to begin with the same."""
        new = row.held - row.cached
        if row.held in row.places or (
            not row.left and row.keeps_end and (new >= _WORTH_KEEPING or not trimmable(cache))
        ):
            self._store(row, cache)

    def _store(self, row: Sequence, cache: Cache) -> None:
        request = row.request
        if not self._space.store(row.in_cache, cache, len(request.prompt) - 1, request.places):
            self._recover()
        self.make_room()

    def _measure(self) -> None:
        meter = self._space.meter
        meter.batch_size = len(self._decoding)
        meter.kv_bytes = self._decoding.nbytes + sum(row.nbytes for row in self._prefilling.rows)


def _cancelled(request: Request) -> Over:
    return _over(request, request.cancelled)


def _over(request: Request, end: Callable[[], None]) -> Over:
    try:
        end()
    except BaseException as error:  # noqa: BLE001 - the border: a tokenizer's fault
        return request, request.failed(error)
    return request, None
