"""Values that tell of an engine's prompt cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptCacheLookup:
    """The prompt cache's part in one request: what it had, and why it had no more.

    Attributes:
        request_id: the engine's name for the request.
        prompt_tokens: tokens in its prompt.
        cached_tokens: of which the prompt cache had these; 0 is a miss.
        diverged_at: index of the first token in which the closest stored prompt differs;
            ``None`` if there was nothing to compare, or no difference.
        prompt_token: the prompt's token id there.
        stored_token: the stored one; ``None`` if it ends there.
        reason: the same in a sentence.
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    diverged_at: int | None
    prompt_token: int | None
    stored_token: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class PromptCacheStats:
    """A snapshot of an engine's prompt cache.

    Attributes:
        entries: prompts stored.
        nbytes: bytes that they take.
        limit: bytes that they may take.
        hits: requests that found a prefix of their prompt.
        misses: requests that did not.
        hit_tokens: prompt tokens that were found, all requests together.
        stored: prompts stored since the start.
        evicted: of which were evicted, least recently used first.
        refused: prompts that could not be stored: too big, or their cache cannot be reused.
        last_lookup: what the latest request found.
    """

    entries: int = 0
    nbytes: int = 0
    limit: int = 0
    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    stored: int = 0
    evicted: int = 0
    refused: int = 0
    last_lookup: PromptCacheLookup | None = None
