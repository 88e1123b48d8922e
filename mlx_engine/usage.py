"""Tokens and times of an answer."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_engine.plain import PlainData, short_repr


@dataclass(frozen=True, slots=True)
class Usage(PlainData):
    """Tokens read and written.

    Attributes:
        prompt_tokens: in the prompt, chat template included.
        completion_tokens: generated, the end-of-sequence token included.
        cached_tokens: tokens of the prompt that the prompt cache had, so that they were not
            prefilled again.
        kept_tokens: tokens of the prompt that the model has seen, those cached included, if
            ``SpecPrefill`` left others out; ``None`` if it has seen all.
        kept_ranges: the same as (first, last + 1), if ``SpecPrefill`` was asked for them.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    kept_tokens: int | None = None
    kept_ranges: tuple[tuple[int, int], ...] | None = None

    __repr__ = short_repr

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        """Both together, as of a conversation; what was kept of each prompt is not told then."""
        if not isinstance(other, Usage):
            return NotImplemented
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Timings(PlainData):
    """Times of a request, in seconds.

    Attributes:
        queued: from the call to the moment its work began on the MLX thread.
        prefill: from then until the prompt was in the KV cache; in a batch, pauses for others
            included.
        time_to_first_token: from the call to the first token; 0 if there was none.
        decode: from the first token to the last.
        total: from the call to the end.
        prompt_tokens_per_second: tokens of the prompt that were not in the prompt cache, over
            ``prefill``; 0 if unknown.
        tokens_per_second: tokens after the first, over ``decode``; 0 if unknown.
        draft_tokens: tokens that a draft model or MTP head proposed.
        accepted_tokens: of which the model itself would have chosen these.
        preempted: that it was paused for want of memory, until it was back where it had been;
            part of the times above, too.
    """

    queued: float
    prefill: float
    time_to_first_token: float
    decode: float
    total: float
    prompt_tokens_per_second: float
    tokens_per_second: float
    draft_tokens: int = 0
    accepted_tokens: int = 0
    preempted: float = 0.0

    __repr__ = short_repr

    @property
    def acceptance_rate(self) -> float:
        """Accepted over proposed tokens; 0 if none was proposed."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0
