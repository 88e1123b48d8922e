"""Choosing how much to propose: simulated machines and texts, and what that costs."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from mlx_engine.generation.speculative.depth import MAX_AUTO_DEPTH, DepthChooser

GOOD = (0.7, 0.65, 0.6, 0.55)
HOSTILE = (0.05, 0.05, 0.05, 0.05)
Text = Callable[[int], Sequence[float]]


class Run:
    """A decode on a simulated machine.

    Args:
        costs: seconds of a cycle at each depth.
        text: chances of acceptance at a token.
    """

    def __init__(
        self,
        chooser: DepthChooser,
        costs: Sequence[float],
        text: Text,
        tokens: int,
        seed: int = 0,
    ) -> None:
        draw = random.Random(seed)
        self.cycles: Counter[int] = Counter()
        seconds, done = 0.0, 0
        while done < tokens:
            depth, accepted = chooser.choose(100), 0
            while accepted < depth and draw.random() < text(done)[accepted]:
                accepted += 1
            took = costs[depth] * draw.lognormvariate(0, 0.1)
            chooser.record(depth, took, accepted)
            seconds += took
            done += accepted + 1
            self.cycles[depth] += 1
        self.rate = done / seconds


def rates(costs: Sequence[float], text: Text, tokens: int) -> float:
    """Tokens a second against plain decoding, by a new chooser; the median of some runs."""
    runs = [Run(DepthChooser("auto"), costs, text, tokens, seed).rate for seed in range(15)]
    return statistics.median(runs) * costs[0]


def steady(chances: Sequence[float]) -> Text:
    return lambda _: chances


@pytest.mark.parametrize("depth", [1, 3, 16])
def test_a_fixed_depth_is_always_used_as_far_as_there_is_room(depth: int) -> None:
    chooser = DepthChooser(depth)
    for _ in range(50):
        assert chooser.choose(100) == depth
        assert chooser.choose(0) == 0
        chooser.record(depth, 1.0, 0)
    assert not chooser.parked


@pytest.mark.parametrize(
    ("costs", "chances", "at_least"),
    [
        ((1, 1.3, 1.6, 1.9, 2.2), GOOD, 1.25),  # the best there is: 1.35
        ((1, 1.1, 1.15, 1.2, 1.25), GOOD, 1.7),  # 1.9
        ((1, 1.05, 1.1, 1.15, 1.2), (0.95,) * 4, 3.2),  # 3.8
    ],
)
def test_what_pays_is_used(
    costs: Sequence[float], chances: Sequence[float], at_least: float
) -> None:
    assert rates(costs, steady(chances), 1000) > at_least


@pytest.mark.parametrize(
    ("costs", "chances"),
    [
        ((1, 1.4, 1.8, 2.2, 2.6), HOSTILE),
        ((1, 2.0, 2.6, 3.0, 3.5), GOOD),
        ((1, 3.0, 4.0, 5.0, 6.0), HOSTILE),
        ((1, 1.5, 2.0, 2.5, 3.0), (0.5,) * 4),
    ],
)
def test_what_does_not_pay_is_left_alone(costs: Sequence[float], chances: Sequence[float]) -> None:
    assert rates(costs, steady(chances), 500) > 0.97
    chooser = DepthChooser("auto")
    Run(chooser, costs, steady(chances), 300)
    later = Run(chooser, costs, steady(chances), 2000)
    assert later.cycles[0] > 0.8 * later.cycles.total()


def test_it_follows_the_text() -> None:
    costs = (1, 1.3, 1.6, 1.9, 2.2)
    chooser = DepthChooser("auto")
    for _ in range(3):
        Run(chooser, costs, steady(HOSTILE), 1000)
        assert chooser.parked
        Run(chooser, costs, steady(GOOD), 1000)
        assert not chooser.parked


def test_what_one_request_has_taught_the_next_one_knows() -> None:
    costs = (1, 1.3, 1.6, 1.9, 2.2)
    chooser = DepthChooser("auto")
    Run(chooser, costs, steady(GOOD), 500)
    short = [Run(chooser, costs, steady(GOOD), 20, seed).rate for seed in range(30)]
    assert statistics.mean(short) > 1.2


def test_a_slow_cycle_now_and_then_changes_nothing() -> None:
    draw = random.Random(1)
    chooser = DepthChooser("auto")
    for _ in range(600):
        depth = chooser.choose(100)
        slow = 20.0 if draw.random() < 0.03 else 1.0
        chooser.record(depth, slow * (1 + 0.1 * depth), depth)
    assert not chooser.parked
    assert chooser.choose(100) >= 2


def test_no_more_is_chosen_than_there_is_room_for() -> None:
    chooser = DepthChooser("auto")
    draw = random.Random(2)
    for _ in range(500):
        room = draw.randrange(MAX_AUTO_DEPTH + 1)
        depth = chooser.choose(room)
        assert depth <= room
        chooser.record(depth, 1.0 + 0.05 * depth, depth)
