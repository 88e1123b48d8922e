"""A request's way into its KV cache, a slice at a time, whatever its strategies."""

from __future__ import annotations

import contextlib
from functools import partial

import mlx.core as mx

from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.prefill import prefill_chunk
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sequence import Sequence
from mlx_engine.generation.sparse.chunk_choice import join
from mlx_engine.generation.sparse.scored_prefill import ScoredPrefill, why_in_full
from mlx_engine.generation.speculative.decoder import Pending, SpeculativeDecoder
from mlx_engine.generation.speculative.drafter import Drafter


def take_up(space: ModelRunner, row: Sequence) -> None:
    """Look its prompt up, give it a cache, and choose how it goes on."""
    request, equipment = row.request, space.equipment
    cache, hit = space.look_up(request)
    row.held = row.cached = hit.cached
    row.places = space.places_of(request, hit)
    asked = request.strategies
    for option, note in equipment.notes.items():
        if getattr(asked, option) is not None:
            request.note(note)
    if asked.decode is not None and equipment.speculation is not None:
        row.drafter = equipment.speculation.make_drafter()
        row.drafter.begin(request.prompt, hit.cached)
    row.cache = cache
    if asked.prefill is None or equipment.sparse is None:
        return
    reason = why_in_full(equipment.sparse, asked.prefill, request.prompt, row.held)
    if reason is not None:
        request.note(reason)
        return
    run = partial(_forward, space, request.prompt, row.drafter)
    row.sparse = ScoredPrefill(
        run, equipment.sparse, asked.prefill, request.prompt, cache, row.held
    )
    row.cache, row.places, row.alone = row.sparse.cache, (), True


def advance(space: ModelRunner, row: Sequence, size: int) -> int:
    """Prefill at most ``size`` tokens more; a slice also ends at each of ``row.places``.

    Returns:
        Tokens that went through a model.

    Raises:
        Exception: MLX failed; what is in the row's cache is not known then.
    """
    request, prompt = row.request, row.request.prompt
    space.meter.step("prefill")
    if row.sparse is not None:
        went = row.sparse.step(size)
        request.progress(row.sparse.done, "score" if row.sparse.scoring else "prefill")
        if not row.left:
            request.kept(join([*row.sparse.ranges, (len(prompt) - 1, len(prompt))]))
            row.held, row.sparse = len(prompt) - 1, None
        return went
    assert row.cache is not None
    end = min(row.held + size, len(prompt) - 1)
    if row.stop is not None:
        end = min(end, row.stop)
    went = end - row.held
    if went:
        run = partial(_forward, space, prompt, row.drafter, starts=[row.held])
        prefill_chunk(run, row.cache, prompt, row.held, end, space.config)
        row.held = end
        request.progress(end)
    return went


def speculative_decoder(
    space: ModelRunner, row: Sequence, cache: Cache, pending: Pending | None = None
) -> SpeculativeDecoder:
    """What decodes a row that has a drafter; ``pending`` is its next token, if there is one."""
    speculation = space.equipment.speculation
    assert speculation is not None
    assert row.drafter is not None
    return SpeculativeDecoder(
        row.request,
        speculation.forward,
        cache,
        row.drafter,
        speculation.chooser,
        space.meter,
        pending,
    )


def finish_drafting(row: Sequence) -> None:
    """Keep what its drafter knows; nobody's answer depends on it."""
    if row.drafter is not None:
        with contextlib.suppress(Exception):
            row.drafter.finish([*row.request.prompt, *row.request.tokens])


def keep_scored(row: Sequence) -> None:
    """Keep what the draft of a sparse prefill has read by now; nobody's answer depends on it."""
    if row.sparse is not None:
        with contextlib.suppress(Exception):
            row.sparse.keep_scored()


def _forward(
    space: ModelRunner,
    prompt: list[int],
    drafter: Drafter | None,
    tokens: mx.array,
    cache: Cache,
    starts: list[int],
) -> None:
    """Tokens of shape (rows, n), whose first ones are at ``starts``; a drafter may watch."""
    speculation = space.equipment.speculation
    if drafter is None or speculation is None:
        space.loaded.model(tokens, cache=cache)
        return
    hidden = speculation.forward.prefill(tokens, cache)
    if hidden is not None:
        for start, states in zip(starts, hidden, strict=True):
            drafter.observe(prompt, start, states)
