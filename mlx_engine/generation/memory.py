"""Memory for KV caches: how much there is, who gets it, which requests it is enough for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

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


class Pool(Protocol):
    """Memory that several uses share, of one engine or of many: each is a part that has a name.

    The parts of an engine's caches are ``live``, of the requests in work, and ``stored``, of
    earlier prompts, which give way. From any thread.
    """

    def room(self, *kinds: str) -> int | None:
        """Bytes that these parts may come to together: theirs, and what is free; ``None`` is any
        number.
        """

    def most(self, *kinds: str) -> int | None:
        """Bytes that these parts could come to if nobody else were in work; ``None`` is any
        number.
        """

    def claim(self, kind: str, nbytes: int) -> bool:
        """Let a part be so many bytes from now on; ``False``, and nothing has changed, if there
        is no room for it. To shrink never fails.
        """


class MemoryBudget:
    """Bytes that the requests of a batch may take, and the pool that they come from.

    Args:
        footprint: of one request's KV cache.
        pool: where they are claimed.
        drafts: of what each of the engine's strategies keeps besides, by option.
    """

    def __init__(
        self,
        footprint: KVFootprint,
        pool: Pool,
        drafts: Mapping[str, KVFootprint] | None = None,
    ) -> None:
        self.pool = pool
        self._footprint = footprint
        self._drafts = drafts or {}

    def check(self, request: Request) -> None:
        """Refuse a prepared request that could never have what it may need, were it alone.

        One that asks for as many tokens as fit gets as many as fit into memory, too. One that
        fits without its strategies only does without them, and is told.

        Raises:
            InvalidRequest: with both numbers.
        """
        limit = self.pool.most("live", "stored")
        if limit is None:
            return
        if (most := self._footprint.tokens(limit)) is not None:
            self._check_length(request, most, limit)
        if self.need([request]) > limit:
            do_without_drafts(request, limit, "kv_cache_memory_bytes")

    def _check_length(self, request: Request, most: int, limit: int) -> None:
        """Refuse it if ``limit`` bytes, which are for ``most`` tokens, are too few for it alone."""
        length = len(request.prompt)
        if request.open_ended and length < most:
            request.limit = min(most if request.limit is None else request.limit, most - length)
        new = 1 if request.limit is None else request.limit
        if length + new > most:
            need = self._footprint.claim(length + new)
            raise InvalidRequest(
                "prompt",
                f"{length} prompt tokens and up to {new} new ones need {need} bytes of "
                f"KV cache, and the engine may use {limit} (kv_cache_memory_bytes), which "
                f"is enough for {most} tokens; shorten the prompt or lower max_tokens",
            )

    def need(self, requests: Sequence[Request], ahead: int | None = None) -> int:
        """Bytes that requests take together once each has ``ahead`` tokens more than now, or as
        many as it may have, if that is less or ``ahead`` is ``None``.
        """
        if not requests:
            return 0
        # In a batch, every sequence is padded to the longest one.
        longest = max(_length(request, ahead) for request in requests)
        besides = sum(self._besides(request, ahead) for request in requests)
        return self._footprint.claim(longest, len(requests), besides)

    def _besides(self, request: Request, ahead: int | None) -> int:
        """Bytes of a request's drafts: of one that scores, then of one that proposes."""
        prefill, decode = request.strategies.prefill, request.strategies.decode
        scoring = proposing = 0
        if prefill is not None and not request.tokens and len(request.prompt) >= prefill.threshold:
            scoring = self._drafts["prefill"].nbytes(len(request.prompt))
        if decode is not None:
            proposing = self._drafts["decode"].nbytes(_length(request, ahead))
        return max(scoring, proposing)


def do_without_drafts(request: Request, limit: int, option: str) -> None:
    """Have a prepared request use none of its strategies, and be told: memory is too small."""
    request.strategies = Strategies()
    request.note(
        "prefilled in full and decoded one token at a time: there is no memory for a "
        f"draft beside its own KV cache ({limit} bytes, {option})"
    )


def _length(request: Request, ahead: int | None) -> int:
    """Tokens that a request's KV cache comes to within so many more."""
    done, limit = len(request.tokens), request.limit or 0
    if ahead is not None:
        limit = done + ahead if request.limit is None else min(done + ahead, limit)
    return len(request.prompt) + limit
