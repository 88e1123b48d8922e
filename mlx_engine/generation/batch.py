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
from collections.abc import Iterator, Sequence

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_engine.errors import InvalidRequest, MLXEngineError
from mlx_engine.generation.decode_batch import DecodeBatch, Row, merge
from mlx_engine.generation.kv_cache import Cache, KVFootprint, kv_nbytes, make_kv_cache
from mlx_engine.generation.prefill import prefill_chunk
from mlx_engine.generation.request import Request
from mlx_engine.generation.snapshot import trimmable
from mlx_engine.generation.workspace import Workspace
from mlx_engine.turn import waking_together

_CAUTIOUS = 64  # tokens of the first slice beside running rows, before any was measured
_SMALLEST = 16  # tokens of a slice, however slow the prefill is
_SMOOTHING = 0.5  # weight of the newest slice in the average
_WORTH_KEEPING = 64  # tokens newly prefilled that are stored while their request goes on
_CLEAR = 512  # decode steps after which MLX's free buffers are given back, as in mlx_lm
_MEASURE = 64  # decode steps after which the size of the KV cache is looked at again
_GIVE_UP = 3  # decode steps in a row that MLX may fail

Over = tuple[Request, MLXEngineError | None]  # a request, and the error if it failed


class Batch:
    """The requests that are in work. On the MLX thread.

    Args:
        space: the model, and what belongs to it.
        footprint: of a request's KV cache.
        memory: bytes for the KV caches of the requests and the prompt cache; ``None`` is no
            limit.
        max_pause: seconds of prefill between two decode steps, roughly; ``None`` is no bound.

    Attributes:
        broken: why MLX cannot be used any more; ``None`` if it can.
    """

    def __init__(
        self,
        space: Workspace,
        footprint: KVFootprint,
        *,
        memory: int | None,
        max_pause: float | None,
    ) -> None:
        self._space = space
        self._footprint = footprint
        self._memory = memory
        self._max_pause = max_pause
        self._decoding = DecodeBatch(space.loaded.model)
        self._prefilling: list[Row] = []
        self._token_seconds = 0.0  # of prefill; 0 is not known yet
        self._oldest_next = True
        self._steps = self._failures = 0
        cache = make_kv_cache(space.loaded.model, space.config)
        # Recurrent models would have to mask the padding; whether each does is not known here.
        self._may_pad = all(isinstance(entry, KVCache | RotatingKVCache) for entry in cache)
        self.broken: BaseException | None = None

    def __len__(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def _rows(self) -> list[Row]:
        return [*self._decoding.rows, *self._prefilling]

    def check(self, request: Request) -> None:
        """Refuse a prepared request that could never have the memory that it may need.

        One that asks for as many tokens as fit gets as many as fit into memory, too.

        Raises:
            InvalidRequest: with both numbers.
        """
        if self._memory is None:
            return
        most = self._footprint.tokens(self._memory)
        if most is None:
            return
        length = len(request.prompt)
        if request.open_ended and length < most:
            request.limit = min(request.limit or most, most - length)
        if _total(request) > most:
            need = self._footprint.nbytes(_total(request))
            raise InvalidRequest(
                "prompt",
                f"{length} prompt tokens and up to {request.limit} new ones need {need} bytes of "
                f"KV cache, and the engine may use {self._memory} (kv_cache_memory_bytes), which "
                f"is enough for {most} tokens; shorten the prompt or lower max_tokens",
            )

    def fits(self, request: Request) -> bool:
        """Whether there is memory for it now; stored prompts give way to it."""
        if self._memory is None:
            return True
        left = self._memory - self._need([*(row.request for row in self._rows), request])
        if left >= 0:
            self._space.prompt_cache.shrink(left)
        return left >= 0

    def _need(self, requests: Sequence[Request]) -> int:
        """Bytes if all of them grow to their limits: rows are padded to the longest one."""
        if not requests:
            return 0
        return len(requests) * self._footprint.nbytes(max(map(_total, requests)))

    def add(self, request: Request) -> None:
        """Take up a prepared request."""
        request.begin()
        self._prefilling.append(Row(request))
        self._prefilling.sort(key=lambda row: row.request.priority)  # stable: else by arrival

    def step(self) -> Iterator[Over]:
        """Drop what was cancelled, decode a token for every row, and prefill a slice.

        Yields each request as soon as it is over and its place is free.
        """
        yield from self.drop_cancelled()
        if self._decoding.rows:
            yield from self._decode()
        if self._prefilling:
            yield from self._prefill()

    def rest(self) -> None:
        """Wait until nothing of it is in MLX any more."""
        with contextlib.suppress(Exception):  # a step that fails is told of where it is used
            mx.synchronize(generation_stream)

    def clear(self) -> None:
        """Drop all requests, without a word to anybody."""
        self._decoding = DecodeBatch(self._space.loaded.model)
        self._prefilling.clear()
        self._measure()

    def drop_cancelled(self) -> Iterator[Over]:
        """Let go of those that were cancelled, or whose event loop is closed."""
        yield from self._leave([row for row in self._decoding.rows if row.request.should_stop])
        for row in [row for row in self._prefilling if row.request.should_stop]:
            self._prefilling.remove(row)
            yield _cancelled(row.request)
            if row.cache is not None:
                self._store(row.in_cache, row.cache, row.held)

    # decode

    def _decode(self) -> Iterator[Over]:
        began = time.perf_counter()
        try:
            steps = self._decoding.step()
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            yield from self._lose_all(error)
            return
        self._failures = 0
        gone: list[Row] = []
        with waking_together():
            for row, token, logprobs in steps:
                try:
                    if row.request.take(token, logprobs):
                        gone.append(row)
                except BaseException as error:  # noqa: BLE001 - the border: a tokenizer's fault
                    row.fault = error
        gone += [row for row in self._decoding.rows if row.fault is not None]
        self._steps += 1
        meter = self._space.meter
        meter.completion_tokens += len(steps)
        meter.decode_seconds += time.perf_counter() - began
        if self._steps % _CLEAR == 0:
            mx.clear_cache()
        if self._steps % _MEASURE == 0:
            self._measure()
        yield from self._leave(gone)

    def _leave(self, rows: list[Row]) -> Iterator[Over]:
        """Let rows of the decode batch go, and keep what they computed."""
        if not rows:
            return
        keep = self._space.prompt_cache.limit > 0
        caches = [
            self._decoding.extract(row) if keep and row.fault is None else None for row in rows
        ]
        self._decoding.leave(rows)
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
        for row, cache in zip(rows, caches, strict=True):
            if cache is not None:
                self._store(row.in_cache, cache, len(row.request.prompt) - 1)

    def _lose_all(self, error: Exception) -> Iterator[Over]:
        """MLX failed in a step: nobody knows what the joint cache holds."""
        rows = self._decoding.rows
        self._decoding = DecodeBatch(self._space.loaded.model)
        self._failures += 1
        self._recover()
        if self._failures >= _GIVE_UP:
            self.broken = self.broken or error
        for row in rows:
            yield row.request, row.request.failed(error)

    # prefill

    def _prefill(self) -> Iterator[Over]:
        row = self._choose()
        try:
            size = self._slice_tokens()
            group = self._group(row, size)
            began, before = time.perf_counter(), sum(each.held for each in group)
            if len(group) == 1:
                self._prefill_alone(row, size)
            else:
                self._prefill_together(group)
            self._time(time.perf_counter() - began, sum(each.held for each in group) - before)
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._prefilling.remove(row)
            self._recover()
            yield row.request, row.request.failed(error)
        self._measure()

    def _choose(self) -> Row:
        """Every other slice goes to the first in order, the others to the shortest prompt.

        So a long prompt does not hold up short ones, and is not held up by them for ever.
        """
        first = self._prefilling[0]
        self._oldest_next = not self._oldest_next
        if not self._oldest_next or len(self._prefilling) == 1:
            return first
        shortest = min(self._prefilling, key=lambda row: row.left)
        if shortest.cache is None and shortest is not first:
            # What they have in common is stored once the first one is done.
            common = common_prefix(shortest.request.prompt, first.request.prompt)
            if common > first.left:
                return first
        return shortest

    def _slice_tokens(self) -> int:
        """Tokens of the next slice: fewer where running rows would wait too long for it."""
        most = self._space.config.prefill_step_size
        if not self._decoding.rows or self._max_pause is None:
            return most
        if not self._token_seconds:
            return min(_CAUTIOUS, most)
        return min(most, max(_SMALLEST, int(self._max_pause / self._token_seconds)))

    def _time(self, seconds: float, tokens: int) -> None:
        self._space.meter.prefill_seconds += seconds
        if tokens < _SMALLEST:
            return
        latest = seconds / tokens
        known = self._token_seconds
        # Slower at once, faster by and by: a token takes longer the more there are before it.
        self._token_seconds = max(latest, known + _SMOOTHING * (latest - known))

    def _begin(self, row: Row) -> None:
        """Look its prompt up, and give it a cache."""
        if row.cache is not None:
            return
        request, meter = row.request, self._space.meter
        hit = self._space.prompt_cache.fetch(request.prompt, request.request_id)
        row.cache = hit.cache or make_kv_cache(self._space.loaded.model, self._space.config)
        row.held = row.cached = hit.cached
        row.checkpoint = hit.checkpoint
        meter.prompt_tokens += len(request.prompt)
        meter.cached_tokens += hit.cached
        request.prefill_begins(hit.cached)

    def _group(self, row: Row, size: int) -> list[Row]:
        """The row, and others that can be prefilled with it in one slice."""
        self._begin(row)
        group, longest = [row], row.left
        if not self._may_pad or row.alone or longest > size or not longest:
            return group
        for other in self._prefilling:
            left = max(longest, other.left)
            if other is row or other.alone or left * (len(group) + 1) > size:
                continue
            self._begin(other)
            if other.left and other.checkpoint is None:
                group.append(other)
                longest = max(longest, other.left)
        return group

    def _prefill_alone(self, row: Row, size: int) -> None:
        """One slice of a row, in its own cache."""
        prompt, cache = row.request.prompt, row.cache
        assert cache is not None
        end = min(row.held + size, len(prompt) - 1)
        if row.checkpoint is not None and row.held < row.checkpoint < end:
            end = row.checkpoint
        if end > row.held:
            prefill_chunk(
                self._space.loaded.model, cache, prompt, row.held, end, self._space.config
            )
            row.held = end
            row.request.progress(end)
        if end == row.checkpoint:
            self._store(prompt[:end], cache, end)
        if not row.left:
            row.request.prefilled()
            if row.held - row.cached >= _WORTH_KEEPING or not trimmable(cache):
                # Requests with the same beginning need not wait for the end of this one.
                self._store(prompt[:end], cache, end)
            self._prefilling.remove(row)
            self._decoding.join([row])

    def _prefill_together(self, group: list[Row]) -> None:
        """All that is left of some rows, padded on the right to the same length."""
        lengths = [row.left for row in group]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        tokens = mx.array(
            [
                [*row.request.prompt[row.held : -1], *[0] * pad]
                for row, pad in zip(group, padding, strict=True)
            ]
        )
        try:
            with mx.stream(generation_stream):
                merged = merge([row.cache for row in group if row.cache is not None])
                if any(padding):
                    for entry in merged:
                        entry.prepare(lengths=lengths, right_padding=padding)
                self._space.loaded.model(tokens, cache=merged)
                mx.eval([entry.state for entry in merged])
                if any(padding):
                    for entry in merged:
                        entry.finalize()
                    mx.eval([entry.state for entry in merged])
                mx.clear_cache()
        except Exception:  # noqa: BLE001 - which row is at fault shows when each is alone
            self._recover()
            for row in group:
                row.alone = True
            return
        for row in group:
            row.held += row.left
            row.request.progress(row.held)
            row.request.prefilled()
            self._prefilling.remove(row)
        self._decoding.join(group, merged)

    # both

    def _store(self, tokens: list[int], cache: Cache, prefilled: int) -> None:
        store = self._space.prompt_cache
        try:
            store.store(tokens, cache, prefilled=prefilled)
            if self._memory is not None:
                need = self._need([row.request for row in self._rows])
                store.shrink(max(0, self._memory - need))
        except Exception:  # noqa: BLE001 - nobody's answer depends on it
            store.clear()
            self._recover()

    def _recover(self) -> None:
        """After an error of MLX: see whether it still works."""
        model, config = self._space.loaded.model, self._space.config
        try:
            mx.clear_cache()
            cache = make_kv_cache(model, config)
            with mx.stream(generation_stream):
                mx.eval(model(mx.array([[0]]), cache=cache))
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self.broken = error
            return
        try:
            mx.eval(mx.random.state)
        except Exception:  # noqa: BLE001 - it hung on what has failed
            mx.random.seed(time.time_ns())

    def _measure(self) -> None:
        meter = self._space.meter
        meter.batch_size = len(self._decoding)
        meter.kv_bytes = self._decoding.nbytes + sum(
            kv_nbytes(row.cache) for row in self._prefilling if row.cache is not None
        )


def _total(request: Request) -> int:
    """Tokens that its KV cache may come to."""
    return len(request.prompt) + (request.limit or 0)


def _cancelled(request: Request) -> Over:
    try:
        request.cancelled()
    except BaseException as error:  # noqa: BLE001 - the border: a tokenizer's fault
        return request, request.failed(error)
    return request, None


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    low, high = 0, min(len(one), len(other)) + 1
    while high - low > 1:  # equal up to ``low``, different or at an end before ``high``
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
