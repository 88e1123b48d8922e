"""The ways to decode that ``benchmarks.decode`` compares, and what they go on with."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from benchmarks.decode_runs import Cycle, Run
from mlx_engine import MTP, DraftModel, SimpleEngine
from mlx_engine.strategies import Decode

WRONG = "MTP auto, wrong head"


@dataclass(frozen=True, slots=True)
class Text:
    """What is to be gone on with, and how.

    Attributes:
        hostile: random prompts.
        temperature: 0 is greedy.
    """

    hostile: bool
    temperature: float

    @property
    def options(self) -> dict[str, Any]:
        """For a request."""
        return {"temperature": self.temperature, "seed": 7} if self.temperature else {}


TEXTS = {
    "code greedy": Text(hostile=False, temperature=0.0),
    "code T=0.8": Text(hostile=False, temperature=0.8),
    "hostile": Text(hostile=True, temperature=1.2),
}


class Way:
    """An engine that answers.

    Args:
        engine: running.
        name: of the way.
    """

    def __init__(self, engine: SimpleEngine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._cycles: list[Cycle] = []

    @classmethod
    async def start(cls, stack: AsyncExitStack, name: str, model: Path, decode: Decode) -> Way:
        """Start an engine, which stops with the stack."""
        engine = SimpleEngine(model, decode=decode, prompt_cache_bytes=0)
        way = cls(await stack.enter_async_context(engine), name)
        await engine.run_blocking(way._watch)
        return way

    def _watch(self) -> None:
        """Note what the engine's chooser of depths is told."""
        speculation = self._engine._holder.runner().strategies.speculation
        if speculation is None:
            return
        tell = speculation.chooser.record

        def record(depth: int, seconds: float, accepted: int) -> None:
            self._cycles.append(Cycle(depth, accepted, seconds))
            tell(depth, seconds, accepted)

        speculation.chooser.record = record  # type: ignore[method-assign]

    async def run(self, prompt: list[int], text: Text, count: int) -> tuple[list[int], Run]:
        """One request: its tokens, and what it took."""
        self._cycles.clear()
        cpu, start = time.process_time(), time.perf_counter()
        result = await self._engine.generate(
            prompt, max_tokens=count, ignore_eos=True, **text.options
        )
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
        if result.notes and self._name != WRONG:
            raise SystemExit(f"{self._name}: {' '.join(result.notes)}")
        timings = result.timings
        run = Run(
            timings.decode,
            total,
            cpu,
            timings.draft_tokens,
            timings.accepted_tokens,
            tuple(self._cycles),
        )
        return list(result.tokens), run


class Raw(Way):
    """mlx_lm's own step, with the very model that the engine uses."""

    async def run(self, prompt: list[int], text: Text, count: int) -> tuple[list[int], Run]:
        """One request: its tokens, and what it took."""
        cpu, start = time.process_time(), time.perf_counter()
        tokens, decode = await self._engine.run_blocking(self._generate, prompt, text, count)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
        return tokens, Run(decode, total, cpu)

    def _generate(self, prompt: list[int], text: Text, count: int) -> tuple[list[int], float]:
        """On the MLX thread."""
        tokens: list[int] = []
        first = last = 0.0
        for token, _ in generate_step(
            mx.array(prompt),
            self._engine._holder.model().model,
            max_tokens=count,
            sampler=make_sampler(temp=text.temperature),
        ):
            last = time.perf_counter()
            first = first or last
            tokens.append(token)
        mx.synchronize()  # a step more has begun; the next way must not wait for it
        return tokens, last - first


def decodes(folder: Path) -> dict[str, Decode]:
    """How each way decodes, by its name."""
    return {
        "plain": None,
        "plain again": None,
        "MTP 1": MTP(1),
        "MTP 2": MTP(2),
        "MTP 3": MTP(3),
        "MTP auto": MTP(),
        WRONG: MTP(head=folder / "wrong_head.safetensors"),
        "draft 2": DraftModel(folder / "medium", num_draft_tokens=2),
        "draft auto": DraftModel(folder / "medium"),
        "small draft auto": DraftModel(folder / "small"),
        "itself auto": DraftModel(folder / "model"),
    }
