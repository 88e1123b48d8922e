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

from collections.abc import Sequence as Sequence_

from mlx_engine.core.ranked import FAIR
from mlx_engine.generation.batch_memory import AHEAD, MARGIN, BatchMemory, requests_of
from mlx_engine.generation.decode_batch import Pending
from mlx_engine.generation.request import Request
from mlx_engine.generation.sequence import Sequence

_WORTH = 8  # tokens in a cache for each that must then have room, before it is computed again


class Preempted:
    """Sequences that have left the batch to make room, and come back. On the MLX thread.

    Attributes:
        sequences: the first to come back first.
    """

    def __init__(self, memory: BatchMemory) -> None:
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
