"""What is run in a sweep: operations, ways of ending them, and who goes first."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_engine.testing.safety.ways import Way, Work


class Unharmed(Way[Any]):
    """Nothing happens to it."""

    name = "not at all"

    async def run(self, operation: Work[Any]) -> Any:
        return await operation()

    def _strike(self) -> None:
        raise AssertionError("it is not to strike")


@dataclass(frozen=True)
class Schedule:
    """Who goes first when both the event loop and a thread could.

    Attributes:
        per_step: how often threads are let go before each step of the loop; ``None`` draws lots.
        look: seconds between any two looks at the clock by which work is measured; ``None``
            draws lots.
    """

    name: str
    per_step: int | None
    look: float | None

    def advances(self, draw: random.Random) -> int:
        return draw.choice((0, 0, 1, 2, 5)) if self.per_step is None else self.per_step

    def passes(self, draw: random.Random) -> float:
        return draw.choice((0.0, 1e-4, 0.003, 0.03)) if self.look is None else self.look


LOOP_FIRST = Schedule("loop first", 0, 1e-4)
IN_TURN = Schedule("in turn", 1, 0.003)  # a slow machine
THREADS_FIRST = Schedule("threads first", 10_000, 0.0)  # nothing takes any time
BY_LOT = Schedule("by lot", None, None)
SCHEDULES = (LOOP_FIRST, IN_TURN, THREADS_FIRST, BY_LOT)


@dataclass
class Scene:
    """An operation on an engine, and what must be true of it.

    Attributes:
        operate: the operation; what it gives is compared with what it gave unharmed.
        beside: something else that goes on at the same time, and is not cancelled.
        behind: whether the operation begins after that.
        reset: called before each run, in no event loop.
        rested: raises unless all is as it should be after a run. In no event loop.
        probe: uses the engine after a run, in an event loop of its own, and raises if it does
            not do what it should.
        late: model calls that may begin after work has been told to stop.
        lives: whether it starts or ends the engine.
    """

    operate: Work[Any]
    beside: Work[Any] | None = None
    behind: bool = False
    reset: Callable[[], None] = lambda: None
    rested: Callable[[], None] = lambda: None
    probe: Work[None] | None = None
    late: int = 1
    lives: bool = False
    expected: Any = None
