"""A heap that can be left anywhere, and what it costs to ask it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlx_engine.core.ranked import Ranked


class Counted(tuple[int, ...]):
    """A rank that counts how often ranks are compared."""

    compared = 0

    def __lt__(self, other: Any) -> bool:
        Counted.compared += 1
        return tuple.__lt__(self, other)


@pytest.mark.parametrize("seed", range(20))
def test_it_gives_what_a_sorted_list_would(seed: int) -> None:
    draw = random.Random(seed)
    ranked: Ranked[int] = Ranked()
    there: dict[tuple[int, ...], int] = {}
    for number in range(400):
        rank = (draw.randrange(3), number)
        if draw.random() < 0.6:
            ranked.add(rank, number)
            there[rank] = number
        elif there:
            gone = draw.choice(list(there))
            ranked.discard(gone)
            del there[gone]
        assert len(ranked) == len(there)
        assert ranked.first() == (there[min(there)] if there else None)
        lower, most = sum(other < rank for other in there), draw.randrange(1, 40)
        assert ranked.below(rank, most) == min(lower, most)
        if there and draw.random() < 0.2:
            ranked.discard(min(there))
            del there[min(there)]


@pytest.mark.parametrize("leave", ["none", "the first", "all but the first"])
def test_whether_some_come_before_does_not_cost_a_look_at_all(leave: str) -> None:
    """Each request that gets a place asks, however many wait."""
    ranked: Ranked[None] = Ranked()
    ranks = [Counted((0, number)) for number in range(10_000)]
    for rank in ranks:
        ranked.add(rank, None)
    asked, Counted.compared = 0, 0
    for number in range(1, 500):
        if leave != "none":
            ranked.discard(ranks[number - (leave == "the first")])
        assert ranked.below(ranks[number + 1], 1) == 1
        asked += 1
    assert Counted.compared < 3_000 * asked
