"""Memory had back from engines in other processes, for one that starts."""

from __future__ import annotations

import asyncio
import time

from mlx_engine.core.ledger import Account, Ledger

_PATIENCE = 3.0  # seconds until what was asked for should be free, once all have answered
_LONGEST = 60.0  # seconds for an answer: a process may be at its imports
_LOOK = 0.02  # seconds between two looks


async def reclaim(book: Ledger, needed: int = 0) -> None:
    """Have ``needed`` bytes free, or a fair share if that is more, as far as that can be.

    Engines in other processes have parts of the memory, and give back what they have no use for.
    Nothing happens if there are none; who asks has to see what it has got.

    Args:
        needed: bytes of its weights, if they are known.

    Cancellation: ends the waiting; what comes back is free.
    """
    goal = _ask(book, needed)
    began = answered = time.monotonic()
    while goal is not None and (free := book.free) is not None and free < goal:
        now = time.monotonic()
        if now - began < _LONGEST and any(one.lent and one.lent.pending for one in book.accounts):
            answered = now
        elif now - answered > _PATIENCE:
            return
        await asyncio.sleep(_LOOK)


def _ask(book: Ledger, needed: int) -> int | None:
    """Ask those who have something to spare; the bytes that should be free then, if any come."""
    spares = [(one, one.lent.spare()) for one in book.accounts if one.lent is not None]
    spares = [(one, spare) for one, spare in spares if spare > 0]
    free, spare = book.free, sum(spare for _, spare in spares)
    if free is None or not spare:
        return None
    share = (free + spare) // (members(book) + 1)
    wanted = min(max(needed, share) - free, spare)
    if wanted <= 0:
        return None
    for one, its in spares:
        if one.lent is not None:
            one.lent.give_back(-(-wanted * its // spare))
    return free + wanted


def members(book: Ledger) -> int:
    """Engines that have memory and use more of it as they need it."""
    return sum(map(is_member, book.accounts))


def is_member(one: Account) -> bool:
    """Whether it has a model, or a part that may become another."""
    return one.use.weights > 0 or (one.lent is not None and one.use.processes > 0)
