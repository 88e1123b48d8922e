"""Lookups of prompts among those that are stored, told in words."""

from __future__ import annotations

from mlx_engine.cache_stats import PromptCacheLookup
from mlx_engine.generation.cache.stored_prompt import SMALLEST_HIT, Entry, Tokens


def explain(
    request_id: str,
    prompt: Tokens,
    cached: int,
    closest: Entry | None,
    common: int,
    grid: int | None,
) -> PromptCacheLookup:
    """A lookup in words: what was found, and where the closest prompt differs.

    Args:
        request_id: of who asked.
        prompt: token ids that were looked for.
        cached: tokens of it that were found.
        closest: stored prompt that has most of its beginning; ``None`` if nothing is stored.
        common: tokens that they share.
        grid: tokens of a prefill chunk, where only whole ones are reused; ``None`` elsewhere.
    """
    size = len(prompt)
    at = common if closest is not None and common < size else None
    stored: int | None = None
    if closest is not None and at is not None and at < len(closest.tokens):
        stored = int(closest.tokens[at])
    return PromptCacheLookup(
        request_id=request_id,
        prompt_tokens=size,
        cached_tokens=cached,
        diverged_at=at,
        prompt_token=None if at is None else int(prompt[at]),
        stored_token=stored,
        reason=_reason(cached, closest, common, size, grid),
    )


def _reason(cached: int, closest: Entry | None, common: int, size: int, grid: int | None) -> str:
    if closest is None:
        return "nothing is stored"
    if size < 2:
        return "only what precedes the last token is looked for"
    same = min(common, size - 1)
    if cached == same and cached == size - 1:
        return "all of the prompt was stored; its last token is decoded in any case"
    if cached == same:
        verb = "ends at" if common == len(closest.tokens) else "differs from"
        return f"the closest prompt {verb} token {common}" + " on" * (verb != "ends at")
    if same < SMALLEST_HIT:
        return f"{same} tokens are the same; fewer than {SMALLEST_HIT} are not worth a copy"
    if not closest.trimmable:
        places = ", ".join(map(str, closest.places))
        return (
            f"this model's cache cannot be cut back to token {same}, and is kept only at {places}"
        )
    return (
        f"{same} tokens are the same, but a quantised or bounded cache is reused only in whole "
        f"prefill chunks of {grid}, here from {closest.first} to {closest.last} tokens"
    )
