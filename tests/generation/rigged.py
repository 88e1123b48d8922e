"""Proposals whose share of right ones a test chooses, so that both ways really happen."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_engine import BaseEngine
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.work import ThreadJob
from mlx_engine.generation.speculative.drafter import Drafter, Sample
from tests.models.mtp_checkpoints import Kind, Made


class Rigged(Drafter):
    """Does all the work of a real drafter, then proposes what is known to be right, or not.

    Args:
        real: whose work is done.
        sequence: what plain decoding gives, prompt included.
        wrong: share of proposals that are spoiled.
        draw: decides which.
    """

    def __init__(
        self, real: Drafter, sequence: Sequence[int], wrong: float, draw: random.Random
    ) -> None:
        self._real = real
        self._sequence = sequence
        self._wrong = wrong
        self._draw = draw

    @property
    def nbytes(self) -> int:
        return self._real.nbytes

    def begin(self, tokens: list[int], cached: int) -> None:
        self._real.begin(tokens, cached)

    def observe(self, tokens: list[int], start: int, hidden: mx.array) -> None:
        self._real.observe(tokens, start, hidden)

    def ended(self, tokens: list[int]) -> str | None:
        return self._real.ended(tokens)

    def catch_up(self, tokens: list[int]) -> bool:
        return self._real.catch_up(tokens)

    def ready(self, tokens: list[int]) -> bool:
        return self._real.ready(tokens)

    def propose(self, tokens: list[int], count: int, sample: Sample) -> mx.array:
        mx.eval(self._real.propose(tokens, count, sample))
        ahead = [*self._sequence[len(tokens) :], *[0] * count][:count]
        spoiled = [t ^ 1 if self._draw.random() < self._wrong else t for t in ahead]
        return mx.array(spoiled, dtype=mx.uint32)

    def verified(self, accepted: int) -> None:
        self._real.verified(0)

    def finish(self, tokens: list[int]) -> None:
        self._real.finish(tokens)


def rig(engine: BaseEngine, sequence: Sequence[int], wrong: float, seed: int = 0) -> None:
    """Let a running engine with a drafter propose like that."""
    speculation = engine._holder.runner().strategies.speculation
    assert speculation is not None
    make, draw = speculation.make_drafter, random.Random(seed)
    while isinstance(make, functools.partial):  # rigged before
        make = make.args[0]
    rigged = functools.partial(lambda make: Rigged(make(), sequence, wrong, draw), make)
    object.__setattr__(speculation, "make_drafter", rigged)


async def made(kind: Kind, folder: Path, seed: int = 1) -> Path:
    """The folder of a tiny random model of this kind that has its head with it."""
    await mlx_thread.run(ThreadJob(functools.partial(_make, kind, folder, seed)))
    return folder / "converted"


class Models:
    """Such models, each made the first time that it is asked for. Nobody changes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[tuple[str, int], Path] = {}

    async def of(self, kind: Kind, seed: int = 1) -> Path:
        """The folder of the one of this kind."""
        key = (str(kind), seed)
        if key not in self._paths:
            self._paths[key] = await made(kind, self._folder / f"{kind}-{seed}", seed)
        return self._paths[key]


def _make(kind: Kind, folder: Path, seed: int) -> None:
    from mlx_engine.models.mtp_extract import extract_mtp

    each = Made(kind, folder, seed)
    extract_mtp(each.checkpoint, each.converted)
