"""The KV cache of a request that is alone, in the ledger: claimed before it grows."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several

from mlx_engine.core.ledger import Account
from mlx_engine.errors import GenerationError, InvalidRequest
from mlx_engine.generation.cache.kv_cache import KVFootprint, joined
from mlx_engine.generation.memory import do_without_drafts
from mlx_engine.generation.request import Request
from mlx_engine.generation.sequence import Sequence

_AHEAD = 256  # tokens for which memory is claimed before they come; caches grow in such steps
_ENDLESS = 2**62  # tokens
_UNDER_WAY = 8  # tokens that may be in the cache before they are told of


class LiveMemory:
    """Memory of the one request of an engine that is in work. On the MLX thread.

    Args:
        account: of the engine.
        sequence: the request in its KV cache.
        footprints: of its KV cache, and of what its drafts keep.
    """

    def __init__(
        self, account: Account, sequence: Sequence, footprints: Several[KVFootprint]
    ) -> None:
        self._account = account
        self._sequence = sequence
        self._footprint = joined(footprints)
        self._claimed = 0  # tokens for which there is memory

    def prefill(self, size: int) -> None:
        """Have memory for ``size`` more tokens of its prompt; for all, if a draft scores them.

        Raises:
            GenerationError: there is none, since other engines have it.
        """
        sequence, length = self._sequence, len(self._sequence.request.prompt)
        tokens = length if sequence.sparse is not None else min(sequence.held + size, length)
        if not self._reach(tokens):
            raise self._too_little(tokens)

    def begin_decoding(self) -> None:
        """Have memory for its prompt, of which nothing may have been prefilled, and for a token.

        Raises:
            GenerationError: there is none, since other engines have it.
        """
        request = self._sequence.request
        length, limit = len(request.prompt), request.limit
        soon = _UNDER_WAY if limit is None else min(_UNDER_WAY, limit)
        if not any(
            size <= self._claimed or self._reach(size) for size in (length + soon, length + 1)
        ):
            raise self._too_little(length + 1)

    def decode(self) -> None:
        """Have memory for its next token and those after it, or have that be the last one."""
        request = self._sequence.request
        tokens = len(request.prompt) + len(request.tokens)
        if tokens + _UNDER_WAY < self._claimed:
            return
        most = len(request.prompt) + (_ENDLESS if request.limit is None else request.limit)
        if self._claimed >= most or self._reach(min(tokens + _AHEAD, most)):
            return
        if self._claimed > tokens or self._reach(tokens + 1):
            return
        if request.limit is None or request.limit > len(request.tokens) + 1:
            request.limit = len(request.tokens) + 1
            request.note(f"ended after {tokens} tokens: there is no memory for a longer KV cache")

    def measure(self) -> int:
        """Bytes that there are by now; if they are more than was expected, they count."""
        nbytes = self._sequence.nbytes
        self._account.set("live", max(self._account.use.live, nbytes))
        return nbytes

    def close(self) -> None:
        """Have nothing any more."""
        self._account.claim("live", 0)

    def _too_little(self, tokens: int) -> GenerationError:
        need, room = self._need(tokens), self._account.room("live")
        return GenerationError(
            f"{self._sequence.request.request_id} failed: {tokens} tokens need {need} bytes of "
            f"KV cache, and {room} are left beside what other engines of this process have "
            "now; try again later, or let each have a part of the memory (memory=)"
        )

    def _need(self, tokens: int) -> int:
        return max(self._footprint.claim(tokens), self._sequence.nbytes)

    def _reach(self, tokens: int) -> bool:
        if not self._account.claim("live", self._need(tokens)):
            return False
        self._claimed = tokens
        return True


def check_prompt(
    account: Account,
    footprint: KVFootprint,
    request: Request,
    drafts: Mapping[str, KVFootprint] | None = None,
) -> None:
    """Refuse a prepared request whose prompt could never have its KV cache. On any thread.

    One that fits without its drafts only does without them, and is told: with all the tokens
    that it asks for, if it does not ask for as many as fit.

    Args:
        drafts: of what each of the engine's strategies keeps besides, by option.

    Raises:
        InvalidRequest: with both numbers.
    """
    length, limit = len(request.prompt), request.limit
    first = 0 if limit == 0 else 1
    most, need = account.most("live", "stored"), footprint.claim(length + first)
    if most is not None and need > most:
        raise InvalidRequest(
            "prompt",
            f"{length} tokens need {need} bytes of KV cache, and there are {most} for "
            "it beside the models (memory); shorten the prompt, or let the engine have more",
        )
    if most is None or not drafts:
        return
    prefill, decode = request.strategies.prefill, request.strategies.decode
    scored = prefill is not None and length >= prefill.threshold
    together = [footprint, *([drafts["prefill"]] if scored else [])]
    together += [drafts["decode"]] if decode is not None else []
    new = first if limit is None or request.open_ended else limit
    if joined(together).claim(length + new) > most:
        do_without_drafts(request, most, "memory")
