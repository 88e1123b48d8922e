"""A request by itself, from its prompt to its result, in one call on the MLX thread."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.errors import MLXEngineError
from mlx_engine.generation.decode import decode
from mlx_engine.generation.kv_cache import Cache, kv_nbytes
from mlx_engine.generation.prefill import chunk_end, prefill_chunk
from mlx_engine.generation.request import Request
from mlx_engine.generation.snapshot import trimmable
from mlx_engine.generation.workspace import Workspace
from mlx_engine.outputs import GenerationResult
from mlx_engine.turn import Interrupted

_MEASURE = 256  # tokens after which the size of the KV cache is looked at again


def generate_single(request: Request, space: Workspace) -> GenerationResult:
    """Do a request. Cancelled, it returns what there is by then.

    Raises:
        InvalidRequest: the prompt or an option does not suit this model.
        GenerationError: MLX, the tokenizer or a logits processor raised.
    """
    error = _attempt(request, space)
    del space  # a raised error keeps this frame, and so would keep the model
    if error is not None:
        raise error
    return request.result()


def _attempt(request: Request, space: Workspace) -> MLXEngineError | None:
    request.begin()
    try:
        try:
            request.prepare(space.loaded)
            _run(request, space)
        finally:
            # A step may be under way that nobody waits for any more.
            mx.synchronize(generation_stream)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
        # The border: MLX and user code raise anything, a CancelledError that is nobody's too.
        return request.failed(error)
    finally:
        space.meter.kv_bytes = space.meter.batch_size = 0
    return None


def _run(request: Request, space: Workspace) -> None:
    prompt = request.prompt
    cache, hit = space.look_up(request)
    held = _prefill(request, space, cache, hit.cached, hit.checkpoint)
    if request.should_stop:
        request.cancelled()
        space.store(prompt[:held], cache, held)  # a retry goes on from there
        return
    can_trim = trimmable(cache)
    if not can_trim:  # what is decoded cannot be taken back out of such a cache
        space.store(prompt[:held], cache, held)
    try:
        _decode(request, space, cache)
    except Interrupted:
        request.cancelled()
        if not can_trim:
            return  # the step that was left undone has put its token into the cache
    # What is decoded was not computed in prefill chunks; that matters to some caches.
    space.store([*prompt, *request.tokens], cache, held)


def _prefill(
    request: Request, space: Workspace, cache: Cache, start: int, checkpoint: int | None
) -> int:
    """Prefill from token ``start`` on; how many tokens are in the cache then."""
    prompt, config, meter = request.prompt, space.config, space.meter
    while start < len(prompt) - 1:
        if request.should_stop:
            return start
        end = chunk_end(start, len(prompt), config.prefill_step_size, checkpoint)
        began = time.perf_counter()
        prefill_chunk(space.loaded.model, cache, prompt, start, end, config)
        meter.prefill_seconds += time.perf_counter() - began
        meter.kv_bytes = kv_nbytes(cache)
        start = end
        request.progress(start)
        if start == checkpoint:
            space.store(prompt[:start], cache, start)
    request.prefilled()
    return start


def _decode(request: Request, space: Workspace, cache: Cache) -> None:
    """Take tokens until one of them, or the text they make, is the last."""
    meter = space.meter
    meter.batch_size = 1
    before = time.perf_counter()
    with closing(decode(space.loaded.model, cache, request, space.config)) as steps:
        for count, (token, logprobs) in enumerate(steps):
            now = time.perf_counter()
            meter.decode_seconds += now - before
            before = now
            meter.completion_tokens += 1
            if count % _MEASURE == 0:
                meter.kv_bytes = kv_nbytes(cache)
            if request.take(token, logprobs):
                return
