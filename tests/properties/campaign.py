"""The same requests again and again, each time with a fault at another call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    EngineDead,
    EngineState,
    MLXEngineError,
)
from mlx_engine.core.mlx_thread import mlx_thread
from tests.conftest import other_tasks, settled
from tests.properties.cases import ALL, Act, Answers
from tests.properties.faults import Faults, Place, chain
from tests.waiting import PATIENCE


class Campaign:
    """The same requests again and again, each time with another fault."""

    def __init__(self, engine: BaseEngine, act: Act, faults: Faults) -> None:
        self.engine: Any = engine
        self._act = act
        self._faults = faults
        self.expected: Answers = []
        self.problems: list[str] = []
        self.struck: list[tuple[str, int]] = []
        self._calls: dict[str, int] = {}

    async def rehearse(self) -> None:
        """Do it without a fault: what it gives, and which calls that takes."""
        self._faults.arm()
        self.expected = await self._done()
        self._faults.disarm()
        self._calls = dict(self._faults.calls)
        assert not [a for a in self.expected if isinstance(a, BaseException)], self.expected
        again = await self._done()  # from the prompt cache, too
        assert again == self.expected, f"at the second time {again}, not {self.expected}"

    def targets(self, turn: int) -> list[tuple[str, int]]:
        """Calls to fail: of each hook one, in each case another one; or all of them."""
        if ALL:
            return [(hook, n + 1) for hook in sorted(self._calls) for n in range(self._calls[hook])]
        found: list[tuple[str, int]] = []
        for number, hook in enumerate(sorted(self._calls), turn):
            count = self._calls[hook]
            some = sorted({1, min(2, count), (count + 1) // 2, max(1, count - 1), count})
            found.append((hook, some[number % len(some)]))
        return found

    async def strike(self, hook: str, n: int, error: Callable[[], BaseException]) -> None:
        """Fail this call, and look at everything afterwards."""
        await self._forget()
        before = self.engine.stats()
        self._faults.arm(hook, n, error)
        answers = await self._done()
        self._faults.disarm()
        raised = self._faults.raised
        if raised is None:
            return  # it depends on time whether a batch comes to this call
        self.struck.append((hook, n))
        what = f"{hook} #{n} {type(raised).__name__}"
        if answers:
            self._check(what, answers, before)
        if self.engine.state is EngineState.FAILED:
            with pytest.raises(EngineDead):
                await self.engine.generate([1])
            await self.engine.stop()
            await self.engine.start()
        again = await self._done()
        if again != self.expected:
            self.problems.append(f"{what}: afterwards {again}, not {self.expected}")
        stats = self.engine.stats()
        if stats.batch_size or stats.kv_bytes:
            self.problems.append(f"{what}: batch of {stats.batch_size}, {stats.kv_bytes} bytes")

    async def _done(self) -> Answers:
        try:
            async with asyncio.timeout(PATIENCE):
                answers = await self._act(self.engine, self._faults)
        except TimeoutError:
            self.problems.append(f"hung: {self._faults.raised!r} {sorted(self._faults.where)}")
            return []
        await settled()
        return answers

    async def _forget(self) -> None:
        """Empty the prompt caches, so that the same calls come again."""
        runner = self.engine._holder.runner()
        sides = [cache for cache, _ in runner.strategies.side_caches]
        await self.engine.run_blocking(
            lambda: [each.clear() for each in (runner.prompt_cache, *sides)]
        )
        await settled()

    def _check(self, what: str, answers: Answers, before: Any) -> None:
        raised, where = self._faults.raised, self._faults.where
        failed = [i for i, answer in enumerate(answers) if isinstance(answer, BaseException)]
        wrong = [
            i for i, answer in enumerate(answers) if i not in failed and answer != self.expected[i]
        ]
        say = self.problems.append
        if wrong:
            say(f"{what}: wrong tokens for {wrong}")
        for i in failed:
            if not isinstance(raised, Exception) and isinstance(answers[i], type(raised)):
                continue  # see the last tests
            if not isinstance(answers[i], MLXEngineError):
                say(f"{what}: {answers[i]!r} is no error of ours {sorted(where)}")
            elif not tells_of(raised, answers[i]):
                say(f"{what}: {answers[i]!r} does not say where it came from {sorted(where)}")
        most = may_fail(where, len(answers)) if isinstance(raised, Exception) else len(answers)
        if len(failed) > most:
            say(f"{what}: cost {len(failed)} of {len(answers)}, not {most} {sorted(where)}")
        if isinstance(raised, Exception) and self.engine.state is not EngineState.RUNNING:
            say(f"{what}: the engine is {self.engine.state} {sorted(where)}")
        stats = self.engine.stats()
        finished, more = stats.finished - before.finished, stats.failed - before.failed
        # Once an engine has failed, those who come are refused at its door, and not counted.
        refused = len(failed) - more if self.engine.state is EngineState.FAILED else 0
        if (finished, more + refused) != (len(answers) - len(failed), len(failed)) or refused < 0:
            say(f"{what}: {len(failed)} failed, but it counts {finished} finished, {more} failed")
        if stats.cancelled != before.cancelled or stats.rejected != before.rejected:
            say(f"{what}: cancelled or rejected: {stats}")
        if stats.running or stats.waiting:
            say(f"{what}: {stats.running} running, {stats.waiting} waiting")
        if mlx_thread.busy or other_tasks():
            say(f"{what}: left behind: {other_tasks()}")
        runner = self.engine._holder._runner
        for cache in [runner.prompt_cache, *(cache for cache, _ in runner.strategies.side_caches)]:
            held = sum(entry.nbytes for entry in cache.entries())
            if not cache.nbytes == held <= cache.limit:
                say(f"{what}: the prompt cache counts {cache.nbytes}, holds {held}")


def tells_of(raised: BaseException | None, error: BaseException) -> bool:
    """Whether an error says where it came from: by its causes, or in its text."""
    if isinstance(raised, StopIteration):
        return True  # it ends a zip() somewhere without a word
    return any(link is raised for link in chain(error)) or str(raised) in str(error)


# A fault at these places is nobody's: it is done again in another way, or does not matter.
_NOBODYS: set[Place] = {
    ("prefill_queue", "_together"),
    ("batch", "_store"),
    ("batch", "_extract"),
    ("batch", "rest"),
    ("runner", "store"),
    ("sequence", "finish_drafting"),
    ("sequence", "keep_scored"),
    ("drafter", "catch_up"),
    ("drafter", "propose"),
    ("drafter", "verified"),
    ("mtp", "catch_up"),
    ("mtp", "propose"),
    ("mtp", "verified"),
}
# At these, one step for several; but a row's own processor or sampler in it is its own.
_JOINT = {("decode_batch", name) for name in ("step", "join", "leave", "end_alone", "extract")}
_OWN: set[Place] = {("request", "process"), ("decode_batch", "_sample_row")}


def may_fail(where: frozenset[Place], requests: int) -> int:
    """How many requests a fault may cost that was raised on behalf of these functions."""
    if where & _NOBODYS:
        return 0
    if where & _JOINT and not where & _OWN:
        return requests
    return 1
