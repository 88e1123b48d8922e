"""The part of the memory of a node that an engine there may have.

Each engine on a node is a process of its own, and finds all of the node's memory free when it
starts. So the process that has placed them keeps the books: a ledger for each node, or its own
where they are on its own machine. Engines that other programs place there are not in them.
"""

from __future__ import annotations

import platform
import threading

from mlx_engine.core.ledger import Ledger, ledger
from mlx_engine.remote.links.link import Link
from mlx_engine.remote.links.ray_link import RayLink
from mlx_engine.remote.links.relay import Place
from mlx_engine.remote.part import Part

_lock = threading.Lock()
_books: dict[str, Ledger] = {}  # by the name of the machine


class NodePart(Part):
    """The part of one life of an engine on a node: taken once it is known on which."""

    async def take(self) -> None:
        """Nothing yet."""

    async def place(self, link: Link) -> None:
        """Take it; raises what ``take`` does."""
        if isinstance(link, RayLink) and link.place is not None:
            self._book = book_of(link.place)
            await super().take()


def book_of(place: Place) -> Ledger:
    """The ledger of the machine where that is. From any thread."""
    if place.host == platform.node():
        return ledger()
    with _lock:
        book = _books.setdefault(place.host, Ledger(place.machine, lambda: False))
        if not book.accounts:
            book.machine = place.machine  # as it is now that nobody of ours is there
        return book
