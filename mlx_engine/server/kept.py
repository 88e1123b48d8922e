"""Items that clients of ``/v1/responses`` name by their ids, and do not send again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from mlx_engine.server.api import encode

_MOST = 16 * 2**20  # bytes


class KeptItems:
    """The last output items, as far as there is room for them.

    Vercel's SDK, as it comes, sends the ids of what an assistant has said in the steps before.
    Nobody finds an item without its id, which cannot be guessed.

    Args:
        most: bytes of all items; those that were not asked for longest go first.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._items: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def keep(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Keep some, and forget what there is no more room for."""
        for item in items:
            self._items[item["id"]] = data = encode(item)
            self._bytes += len(data)
        while self._bytes > self._most:
            self._bytes -= len(self._items.popitem(last=False)[1])

    def find(self, item_id: str) -> dict[str, Any] | None:
        """One of them, as a client would send it; ``None`` if it is not there."""
        if (data := self._items.get(item_id)) is None:
            return None
        self._items.move_to_end(item_id)
        item: dict[str, Any] = msgspec.json.decode(data)
        return item
