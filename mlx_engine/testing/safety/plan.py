"""A plan of what is cancelled, in which way, at which moment, and in which order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.testing.safety.operations import Operation
from mlx_engine.testing.safety.trial import Moment, TrialResult
from mlx_engine.testing.safety.ways import ALL_WAYS, Way

_SHARES: Final = 8  # moments in between, over the duration of an operation
_SEPARATOR: Final = " / "


@dataclass(frozen=True)
class Strike:
    """One trial of many.

    Attributes:
        usual: how the operation goes unharmed.
    """

    operation: Operation
    way: type[Way[Any]]
    moment: Moment
    usual: TrialResult

    def __str__(self) -> str:
        return _SEPARATOR.join((self.operation.name, self.way.name, str(self.moment)))


@dataclass(frozen=True)
class Choice:
    """A choice of what to try, by its names; ``None`` is all."""

    operation: str | None = None
    way: str | None = None
    moment: Moment | None = None

    @classmethod
    def parse(cls, text: str | None) -> Choice:
        """From ``operation / way / moment``, or the beginning of that.

        Raises:
            InvalidRequest: there is no such way or moment.
        """
        if text is None:
            return cls()
        names = text.split(_SEPARATOR)
        if len(names) > 3:
            raise InvalidRequest("only", f"must be 'operation / way / moment', not {shown(text)}")
        operation, way, moment = (*names, None, None)[:3]
        if way is not None and way not in (ways := [one.name for one in ALL_WAYS]):
            raise InvalidRequest("only", f"there is no way {shown(way)}, only {_listed(ways)}")
        when = None if moment is None else Moment.parse(moment)
        if moment is not None and when is None:
            raise InvalidRequest("only", f"a moment is 'step 3' or '40%', not {moment!r}")
        return cls(operation, way, when)

    def of(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        """The operations that are to be tried.

        Raises:
            InvalidRequest: there is no such operation.
        """
        if self.operation is None:
            return operations
        chosen = [one for one in operations if one.name == self.operation]
        if not chosen:
            names = _listed(one.name for one in operations)
            raise InvalidRequest(
                "only", f"there is no operation {shown(self.operation)}, only {names}"
            )
        return chosen

    @property
    def ways(self) -> list[type[Way[Any]]]:
        """Ways in which to cancel."""
        return [way for way in ALL_WAYS if self.way in (None, way.name)]


class Plan:
    """The strikes of some operations, in turns: in each, one of each operation.

    Ways change from operation to operation and from turn to turn, so that a few turns have
    seen them all; moments are in an order that ``draw`` has shuffled.
    """

    def __init__(self, choice: Choice, draw: random.Random) -> None:
        self._choice = choice
        self._draw = draw
        self._usual: dict[str, TrialResult] = {}
        self._moments: dict[tuple[str, str], Iterator[Moment]] = {}

    def add(self, operation: Operation, usual: TrialResult) -> dict[str, int]:
        """Strike this operation, too; how many moments there are for each way."""
        self._usual[operation.name] = usual
        planned = {}
        for way in self._choice.ways:
            moments = _moments(usual.steps)
            self._draw.shuffle(moments)
            only = self._choice.moment
            planned[way.name] = len(moments) if only is None else 1
            self._moments[operation.name, way.name] = (
                iter(moments) if only is None else itertools.repeat(only)
            )
        return planned

    def strike(self, operation: Operation, number: int) -> Strike | None:
        """The next one of an operation in the way with a number; ``None`` if there is none."""
        usual = self._usual.get(operation.name)
        if usual is None:
            return None
        ways = self._choice.ways
        way = ways[number % len(ways)]
        moment = next(self._moments[operation.name, way.name], None)
        return None if moment is None else Strike(operation, way, moment, usual)

    @property
    def turns(self) -> int:
        """Turns after which each operation has been tried in each way."""
        return len(self._choice.ways)


def _moments(steps: int) -> list[Moment]:
    between = [Moment(share=round((n + 0.5) / _SHARES, 2)) for n in range(_SHARES)]
    return [*(Moment(step=n) for n in range(1, steps + 1)), *between]


def _listed(names: Iterator[str] | list[str]) -> str:
    return ", ".join(map(repr, names))
