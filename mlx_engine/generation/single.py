"""A request by itself, from its prompt to its result, in one call on the MLX thread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator
from contextlib import closing

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.core.stop import Interrupted
from mlx_engine.errors import MLXEngineError
from mlx_engine.generation.cache.snapshot import trimmable
from mlx_engine.generation.course import (
    advance,
    finish_drafting,
    keep_scored,
    speculative_decoder,
    take_up,
)
from mlx_engine.generation.decode import decode
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sequence import Sequence
from mlx_engine.generation.speculative.decoder import Emitted
from mlx_engine.outputs import GenerationResult

_MEASURE = 256  # steps after which the size of the KV cache is looked at again
_CLEAR = 256  # steps after which MLX's free buffers are given back, as in mlx_lm


def generate_single(request: Request, space: ModelRunner) -> GenerationResult:
    """Do a prepared request. Cancelled, it returns what there is by then.

    Raises:
        InvalidRequest: a logits processor cannot be imported.
        GenerationError: MLX, the tokenizer or a logits processor raised.
    """
    error = _attempt(request, space)
    del space  # a raised error keeps this frame, and so would keep the model
    if error is not None:
        raise error
    return request.result()


def _attempt(request: Request, space: ModelRunner) -> MLXEngineError | None:
    try:
        try:
            if request.begin():
                _run(request, space)
        finally:
            # A step may be under way that nobody waits for any more.
            mx.synchronize(generation_stream)
    except BaseException as error:  # noqa: BLE001
        # The border: MLX and user code raise anything, a CancelledError that is nobody's, or an
        # exit, which would end the caller's event loop.
        return request.failed(error)
    finally:
        space.meter.kv_bytes = space.meter.batch_size = 0
    return None


def _run(request: Request, space: ModelRunner) -> None:
    row = Sequence(request)
    take_up(space, row)
    _prefill(space, row)
    cache = row.cache
    assert cache is not None
    if request.should_stop:
        request.cancelled()
        space.store(row.in_cache, cache, row.held, request.places)  # a retry goes on from there
        return
    if request.limit == 0:
        request.ended_without_tokens()
        finish_drafting(row)
        space.store(row.in_cache, cache, row.held)
        return
    prefilled, can_trim = row.held, trimmable(cache)
    if not can_trim and row.keeps_end:  # what is decoded cannot be taken out of such a cache
        space.store(row.in_cache, cache, prefilled, request.places)
    try:
        _decode(space, row)
    except Interrupted:
        request.cancelled()
    finish_drafting(row)
    # What is decoded was not computed in prefill chunks; that matters to some caches.
    if can_trim or row.held <= len(row.in_cache):
        space.store(row.in_cache, cache, prefilled, request.places)


def _prefill(space: ModelRunner, row: Sequence) -> None:
    request, meter, step = row.request, space.meter, space.config.prefill_step_size
    assert row.cache is not None
    while row.left:
        if request.should_stop:
            break
        began = time.perf_counter()
        # Chunks end at multiples of the step, wherever the first one began.
        advance(space, row, step if row.sparse is not None else step - row.held % step)
        meter.prefill_seconds += time.perf_counter() - began
        meter.kv_bytes = row.nbytes
        if row.held in row.places:
            space.store(row.in_cache, row.cache, row.held, request.places)
    else:
        request.prefilled()
    keep_scored(row)


def _decode(space: ModelRunner, row: Sequence) -> None:
    """Take tokens until one of them, or the text they make, is the last."""
    request, meter = row.request, space.meter
    assert row.cache is not None
    meter.batch_size = 1
    meter.step("decode")
    before = time.perf_counter()
    with closing(_steps(space, row)) as steps:
        for count, burst in enumerate(steps):
            now = time.perf_counter()
            meter.decode_seconds += now - before
            before = now
            meter.step("decode")
            if count % _MEASURE == 0:
                meter.kv_bytes = row.nbytes
            for token, logprobs in burst:
                meter.completion_tokens += 1
                if request.take(token, logprobs):
                    return


def _steps(space: ModelRunner, row: Sequence) -> Generator[list[Emitted], None, None]:
    """Yield the tokens of each step; ``row.held`` is kept right.

    Raises:
        Interrupted: the request was cancelled.
    """
    request = row.request
    assert row.cache is not None
    if row.drafter is None:
        row.held = len(request.prompt)
        try:
            for step in decode(space.loaded.model, row.cache, request, space.config):
                row.held += 1  # the forward for the next token is under way
                yield [step]
        except Interrupted:
            row.held += 1  # and so is the one that was left undone
            raise
        return
    decoder = speculative_decoder(space, row, row.cache)
    for count in itertools.count():
        if request.should_stop:
            raise Interrupted
        if count % _CLEAR == 0:
            mx.clear_cache()
        burst = decoder.step()
        row.held = decoder.held
        yield burst
