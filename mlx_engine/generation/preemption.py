"""Memory of the requests in work: claimed as they grow, and who makes room when it is short.

    a request needs:  prompt ─ generated ─ what it may get soon  (times the rows of the batch)

What it may get later is not reserved, so that a request that may have many tokens takes no more
than the few that it has. When there is no room for what is needed soon, MLX's free buffers are
given back, then stored prompts go, least recently used first, nobody new is let in, and then the
youngest request of the lowest priority is preempted: it leaves the batch, and comes back when there
is room. It holds nothing meanwhile, so that two can never wait for each other; and the oldest of
the best priority stays, which has enough for itself, or it would have been refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence as Sequence_

import mlx.core as mx

from mlx_engine.core.ranked import FAIR
from mlx_engine.generation.decode_batch import Pending
from mlx_engine.generation.memory import MemoryBudget
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sequence import Sequence

MARGIN = 64  # tokens that a request in work may get before its memory is looked at again, or more
AHEAD = 256  # tokens that there must be room for, for each, before another one is let in
_WORTH = 8  # tokens in a cache for each that must then have room, before it is computed again


class LiveMemory:
    """Memory that requests in work have claimed. On the MLX thread.

    Args:
        runner: has the stored prompts, which give way.
        budget: how much each needs, and the pool that it comes from.
    """

    def __init__(self, runner: ModelRunner, budget: MemoryBudget) -> None:
        self._runner = runner
        self._budget = budget

    def claim(self, requests: Sequence_[Request], ahead: int) -> bool:
        """Claim what these need, and no others, for so many tokens more each.

        Returns:
            ``False``, and nothing has changed, if there is too little.
        """
        need, pool = self._budget.need(requests, ahead), self._budget.pool
        if pool.claim("live", need):
            return True
        room = pool.room("live", "stored")
        if room is None or need > room:
            return False
        give_back()
        self._fit_stored(room - need)
        return pool.claim("live", need)

    def could_claim(self, requests: Sequence_[Request], ahead: int) -> bool:
        """Whether there is as much, now that stored prompts have not given way yet."""
        room = self._budget.pool.room("live", "stored")
        return room is None or self._budget.need(requests, ahead) <= room

    def fit_stored(self) -> None:
        """Drop stored prompts that there is no room for, and claim what the others take."""
        room = self._budget.pool.room("stored")
        if room is not None:
            self._fit_stored(room)

    def _fit_stored(self, limit: int) -> None:
        self._runner.shrink_stored(max(0, limit))
        self._budget.pool.claim("stored", self._runner.stored_bytes)

    def can_store(self, nbytes: int) -> bool:
        """Whether there is room for a prompt of so many bytes among those that are stored."""
        room = self._budget.pool.room("stored")
        return room is None or nbytes <= room


class Preempted:
    """Sequences that have left the batch to make room, and come back. On the MLX thread.

    Attributes:
        sequences: the first to come back first.
    """

    def __init__(self, memory: LiveMemory) -> None:
        self._memory = memory
        self._passed = 0  # new requests that were let in before the first of them
        self.sequences: list[Sequence] = []

    def precede(self, request: Request) -> bool:
        """Whether the first of them is to come back before a new request is let in.

        Others pass only if their priority is better, and then so many of them at most.
        """
        if not self.sequences:
            return False
        return self._passed >= FAIR - 1 or self.sequences[0].request.priority <= request.priority

    def pass_by(self) -> None:
        """Note that a new request was let in."""
        self._passed += bool(self.sequences)

    def add(self, sequence: Sequence, pending: Pending | None) -> None:
        """Let one wait that is in no batch any more.

        Args:
            pending: what it needs to go on if it has decoded.

        Raises:
            Exception: MLX failed; it does not wait.
        """
        if pending is None:
            sequence.leave_cache()
        else:
            sequence.leave_decoding(*pending)
        self.sequences.append(sequence)
        self.sequences.sort(key=lambda each: each.rank)

    def take(self, working: Sequence_[Sequence]) -> Sequence | None:
        """The first of them, no longer among them, if there is room for it beside others.

        The longer it is, the more there must be for all of them to grow, since there is more to
        be computed again.
        """
        if not self.sequences:
            return None
        first = self.sequences[0]
        length = len(first.request.prompt) + len(first.request.tokens)
        ahead = max(AHEAD, length // _WORTH) if working else MARGIN
        if not self._memory.could_claim(requests_of([*working, first]), ahead):
            return None
        self._passed = 0
        return self.sequences.pop(0)


def give_back() -> None:
    """Give back the memory of arrays that are gone."""
    with contextlib.suppress(Exception):  # a fault of MLX's is told of where it matters
        mx.clear_cache()


def requests_of(sequences: Sequence_[Sequence]) -> list[Request]:
    """The requests that they are of."""
    return [each.request for each in sequences]
