"""Memory that the requests in work have claimed, which they do as they grow."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence as Sequence_

import mlx.core as mx

from mlx_engine.errors import GenerationError
from mlx_engine.generation.memory import MemoryBudget
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sequence import Sequence

MARGIN = 64  # tokens that a request in work may get before its memory is looked at again, or more
AHEAD = 256  # tokens that there must be room for, for each, before another one is let in


class BatchMemory:
    """Memory that requests in work have claimed. On the MLX thread.

    Args:
        runner: has the stored prompts, which give way.
        budget: how much each needs, and the pool that it comes from.
    """

    def __init__(self, runner: ModelRunner, budget: MemoryBudget) -> None:
        self._runner = runner
        self._budget = budget
        self._claimed = 0  # bytes

    def claim(self, requests: Sequence_[Request], ahead: int) -> bool:
        """Claim what these need, and no others, for so many tokens more each.

        Returns:
            ``False``, and nothing has changed, if there is too little.
        """
        need, pool = self._budget.need(requests, ahead), self._budget.pool
        if not pool.claim("live", need):
            room = pool.room("live", "stored")
            if room is None or need > room:
                return False
            give_back()
            self._fit_stored(room - need)
            if not pool.claim("live", need):
                return False
        self._claimed = need
        return True

    def could_claim(self, requests: Sequence_[Request], ahead: int) -> bool:
        """Whether there is as much, now that stored prompts have not given way yet."""
        room = self._budget.pool.room("live", "stored")
        return room is None or self._budget.need(requests, ahead) <= room

    def refusal(self, request: Request) -> GenerationError | None:
        """Why one cannot go on, if it could not even were nobody else in work: models that came
        after it was taken in have the memory that it would need.
        """
        most, need = self._budget.pool.most("live", "stored"), self._budget.need([request], MARGIN)
        if most is None or need <= most:
            return None
        return GenerationError(
            f"{request.request_id} failed: its {len(request.prompt)} prompt tokens and "
            f"{len(request.tokens)} more need {need} bytes of KV cache, and {most} are left beside "
            "the models of this process, of which one has come since it was submitted; shorten "
            "the prompt, or let each engine have a part of the memory (memory=)"
        )

    def fit_stored(self) -> None:
        """Drop stored prompts that there is no room for, and claim what the others take."""
        room = self._budget.pool.room("live", "stored")
        if room is not None:
            self._fit_stored(room - self._claimed)

    def _fit_stored(self, limit: int) -> None:
        self._runner.shrink_stored(max(0, limit))
        self._budget.pool.claim("stored", self._runner.stored_bytes)

    def can_store(self, nbytes: int) -> bool:
        """Whether there is room for a prompt of so many bytes among those that are stored."""
        room = self._budget.pool.room("stored")
        return room is None or nbytes <= room


def give_back() -> None:
    """Give back the memory of arrays that are gone."""
    with contextlib.suppress(Exception):  # a fault of MLX's is told of where it matters
        mx.clear_cache()


def requests_of(sequences: Sequence_[Sequence]) -> list[Request]:
    """The requests that they are of."""
    return [each.request for each in sequences]
