"""Memory for KV caches: how much there is, who gets it, which requests it is enough for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_engine.config import ModelConfig
from mlx_engine.core.ledger import Account
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.kv_cache import KVFootprint
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.request import Request
from mlx_engine.strategies import Strategies

_GUESS = 2**30  # bytes of prompt cache where others need the machine's memory, too
_TYPICAL = 8192  # tokens of a request, for dividing memory


def prompt_cache_limit(config: ModelConfig, account: Account) -> int:
    """Bytes that all prompt caches of an engine may take together.

    By default a quarter of what the models leave; on machines whose memory is everybody's, a GiB
    at most, unless the engine was told how much it may have.
    """
    if config.prompt_cache_bytes is not None:
        return config.prompt_cache_bytes
    room = account.room("live", "stored")
    if room is None:
        return _GUESS
    return room // 4 if account.planned else min(room // 4, _GUESS)


def share_out(limit: int, caches: Sequence[tuple[PromptCache, KVFootprint]]) -> None:
    """Divide ``limit`` bytes among prompt caches so that all hold about as many tokens."""
    sizes = [footprint.nbytes(_TYPICAL) for _, footprint in caches]
    for (cache, _), size in zip(caches, sizes, strict=True):
        cache.limit = limit * size // max(sum(sizes), 1)


class MemoryBudget:
    """Bytes that the requests of a batch may take, each grown to its limit.

    Args:
        footprint: of one request's KV cache.
        limit: bytes; ``None`` is no limit.
        drafts: of what each of the engine's strategies keeps besides, by option.
    """

    def __init__(
        self,
        footprint: KVFootprint,
        limit: int | None,
        drafts: Mapping[str, KVFootprint] | None = None,
    ) -> None:
        self._footprint = footprint
        self._limit = limit
        self._drafts = drafts or {}

    def check(self, request: Request) -> None:
        """Refuse a prepared request that could never have what it may need.

        One that asks for as many tokens as fit gets as many as fit into memory, too. One that
        fits without its strategies only does without them, and is told.

        Raises:
            InvalidRequest: with both numbers.
        """
        most = None if self._limit is None else self._footprint.tokens(self._limit)
        if most is None:
            return
        length = len(request.prompt)
        if request.open_ended and length < most:
            request.limit = min(most if request.limit is None else request.limit, most - length)
        new = 1 if request.limit is None else request.limit
        if length + new > most:
            need = self._footprint.nbytes(length + new)
            raise InvalidRequest(
                "prompt",
                f"{length} prompt tokens and up to {new} new ones need {need} bytes of "
                f"KV cache, and the engine may use {self._limit} (kv_cache_memory_bytes), which "
                f"is enough for {most} tokens; shorten the prompt or lower max_tokens",
            )
        left = self.left([request])
        if left is not None and left < 0:
            request.strategies = Strategies()
            request.note(
                "prefilled in full and decoded one token at a time: there is no memory for a "
                f"draft beside its own KV cache ({self._limit} bytes, kv_cache_memory_bytes)"
            )

    def left(self, requests: Sequence[Request]) -> int | None:
        """Bytes left beside these; negative if they do not fit, ``None`` if there is no limit."""
        if self._limit is None:
            return None
        if not requests:
            return self._limit
        # In a batch, every sequence is padded to the longest one.
        longest = max(map(_total, requests))
        own = len(requests) * self._footprint.nbytes(longest)
        return self._limit - own - sum(map(self._besides, requests))

    def _besides(self, request: Request) -> int:
        """Bytes of a request's drafts: of one that scores, then of one that proposes."""
        prefill, decode = request.strategies.prefill, request.strategies.decode
        scoring = proposing = 0
        if prefill is not None and len(request.prompt) >= prefill.threshold:
            scoring = self._drafts["prefill"].nbytes(len(request.prompt))
        if decode is not None:
            proposing = self._drafts["decode"].nbytes(_total(request))
        return max(scoring, proposing)


def _total(request: Request) -> int:
    """Tokens that a request's KV cache may come to."""
    return len(request.prompt) + (request.limit or 0)
