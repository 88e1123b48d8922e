"""What the soak asks of an engine: requests of every kind, and the answers that are right.

The right answers are made at the beginning, when nothing else runs. Greedy ones by raw
``mlx_lm.generate.generate_step``, a prompt at a time, and only as far as the best token is
clearly the best: where the two best logits are closer than ``MARGIN``, a batch may round the
other way. Seeded ones by the engine itself, alone.

A request ends in one of the ways of ``Ending``; whatever else it does is a fault of the engine.
"""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream

from mlx_engine import BatchedEngine, GenerationError, GenerationResult

LONGEST = 96  # tokens of an answer
MARGIN = 1e-3  # nats between the two best tokens
PREFIXES = (8, 40, 130, 300, 600)  # tokens that several prompts begin with
SUFFIXES = (1, 5, 17, 33, 60)
SEEDS = (1, 2, 3)
PATIENCE = 60.0  # seconds after which a request counts as hanging


class Ending(enum.Enum):
    """What became of a request."""

    RIGHT = "finished, tokens compared"
    UNCHECKED = "finished, free sampling or a new prompt: length compared"
    CANCELLED = "task cancelled"
    TIMED_OUT = "timed out"
    CLOSED = "stream closed early"
    STOPPED = "stream.cancel()"
    FAULTED = "its logits processor raised"
    OWN = "a function on the MLX thread"


class WrongAnswer(Exception):
    """The engine gave something that it should not have given."""


class Fault(Exception):
    """What the bad logits processors raise."""


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt, and the tokens that are right, as many as are sure."""

    prompt: list[int]
    tokens: list[int]
    seed: int | None = None

    @property
    def options(self) -> dict[str, float | int]:
        """How it was sampled."""
        return {} if self.seed is None else {"temperature": 0.8, "seed": self.seed}


async def make_known(engine: BatchedEngine) -> list[Known]:
    """The table of right answers."""
    chooser = random.Random(0)
    known = []
    for prefix_length in PREFIXES:
        prefix = new_prompt(chooser, prefix_length)
        for suffix_length in SUFFIXES:
            prompt = prefix + new_prompt(chooser, suffix_length)
            tokens = await engine.run_blocking(_greedy_alone, engine, prompt)
            known.append(Known(prompt, tokens))
    for seed in SEEDS:
        for base in known[:: len(SUFFIXES) + 1]:
            result = await engine.generate(
                base.prompt, max_tokens=LONGEST, ignore_eos=True, temperature=0.8, seed=seed
            )
            known.append(Known(base.prompt, list(result.tokens), seed))
    return known


def _greedy_alone(engine: BatchedEngine, prompt: list[int]) -> list[int]:
    """On the MLX thread."""
    tokens = []
    steps = generate_step(mx.array(prompt), engine._holder.model().model, max_tokens=LONGEST)
    for token, logprobs in steps:
        second, best = mx.topk(logprobs, 2).tolist()
        if abs(best - second) < MARGIN:
            break
        tokens.append(int(token))
    mx.synchronize(generation_stream)
    return tokens


def new_prompt(chooser: random.Random, length: int) -> list[int]:
    return [chooser.randrange(64, 154) for _ in range(length)]


def fault_at(step: int) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor that raises at its ``step``-th call."""
    calls = 0

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls > step:
            raise Fault(f"at call {calls}")
        return logits

    return process


@dataclass(slots=True)
class Tally:
    """What has become of everything that was asked.

    Attributes:
        endings: how many requests ended in which way.
        tokens: that the finished requests had.
        compared: of those, the ones whose right value is known.
        cached: prompt tokens that came from the prompt cache.
        cancels: seconds from a cancel to ``CancelledError``.
        wrong: what was wrong, a line each.
    """

    endings: Counter[Ending] = field(default_factory=Counter)
    tokens: int = 0
    compared: int = 0
    cached: int = 0
    cancels: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """All together."""
        return sum(self.endings.values()) + len(self.wrong)


class Load:
    """One user of the engine, who asks for one thing after another.

    Args:
        engine: to ask.
        known: right answers.
        seed: of what is asked.
        tally: where what became of it is counted; users share it.
    """

    def __init__(self, engine: BatchedEngine, known: list[Known], seed: int, tally: Tally) -> None:
        self._engine = engine
        self._known = known
        self._random = random.Random(seed)
        self._tally = tally
        kinds: dict[Callable[[], object], int] = {
            self._generate: 30,
            self._stream: 25,
            self._unchecked: 10,
            self._batch: 3,
            self._task_cancel: 12,
            self._time_out: 6,
            self._close_early: 6,
            self._stream_cancel: 4,
            self._fault: 4,
            self._own: 3,
        }
        self._kinds, self._weights = list(kinds), list(kinds.values())

    async def run_until(self, end: float) -> None:
        """Until ``time.monotonic`` says so, or something is wrong."""
        while time.monotonic() < end and not self._tally.wrong:
            (kind,) = self._random.choices(self._kinds, self._weights)
            task = asyncio.create_task(kind(), name=f"soak {kind.__name__}")
            done, _ = await asyncio.wait({task}, timeout=PATIENCE)
            if not done:
                self._tally.wrong.append(f"{kind.__name__}: hangs for {PATIENCE:.0f} s: {task}")
                return
            try:
                self._tally.endings[task.result()] += 1
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
                self._tally.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _pick(self) -> tuple[Known, int]:
        known = self._random.choice(self._known)
        return known, self._random.randint(1, LONGEST)

    def _check(self, known: Known, tokens: list[int] | tuple[int, ...], wanted: int) -> Ending:
        right = known.tokens[:wanted]
        if len(tokens) != wanted:
            raise WrongAnswer(f"{len(tokens)} tokens, not {wanted}")
        self._compare(known, tokens[: len(right)], right)
        self._tally.tokens += wanted
        return Ending.RIGHT

    def _compare(self, known: Known, tokens: list[int] | tuple[int, ...], right: list[int]) -> None:
        if list(tokens) != right:
            place = next(i for i, (a, b) in enumerate(zip(tokens, right, strict=True)) if a != b)
            raise WrongAnswer(
                f"prompt of {len(known.prompt)} tokens, seed {known.seed}: "
                f"token {place} is {tokens[place]}, not {right[place]}"
            )
        self._tally.compared += len(right)

    def _finished(self, known: Known, result: GenerationResult, wanted: int) -> Ending:
        self._tally.cached += result.usage.cached_tokens
        return self._check(known, result.tokens, wanted)

    async def _generate(self) -> Ending:
        known, count = self._pick()
        result = await self._engine.generate(
            known.prompt, max_tokens=count, ignore_eos=True, **self._extras(), **known.options
        )
        return self._finished(known, result, count)

    def _extras(self) -> dict[str, object]:
        """Options that change no token."""
        chance = self._random.random()
        if chance < 0.1:
            return {"logprobs": 2}
        if chance < 0.2:
            return {"logits_processors": [lambda tokens, logits: logits]}
        if chance < 0.3:
            return {"stop": ["this will not be said"]}
        if chance < 0.5:
            return {"priority": self._random.choice((-1, 1))}
        return {}

    async def _stream(self) -> Ending:
        known, count = self._pick()
        tokens: list[int] = []
        text = ""
        async with self._engine.stream_generate(
            known.prompt, max_tokens=count, ignore_eos=True, **self._extras(), **known.options
        ) as chunks:
            async for chunk in chunks:
                tokens.extend(chunk.tokens)
                text += chunk.text
                if self._random.random() < 0.02:
                    await asyncio.sleep(0.01)  # a slow reader
        if list(chunks.result.tokens) != tokens or chunks.result.text != text:
            raise WrongAnswer("the chunks of a stream, joined, are not its result")
        return self._finished(known, chunks.result, count)

    async def _batch(self) -> Ending:
        asked = self._random.choices([known for known in self._known if known.seed is None], k=3)
        count = self._random.randint(1, LONGEST)
        results = await self._engine.generate_batch(
            [known.prompt for known in asked], max_tokens=count, ignore_eos=True
        )
        for known, result in zip(asked, results, strict=True):
            self._finished(known, result, count)
        return Ending.RIGHT

    async def _unchecked(self) -> Ending:
        """A new prompt, which also pushes others out of the prompt cache."""
        count = self._random.randint(1, LONGEST)
        result = await self._engine.generate(
            new_prompt(self._random, self._random.randint(1, 900)),
            max_tokens=count,
            ignore_eos=True,
            temperature=self._random.choice((0.0, 0.7, 1.2)),
            top_p=self._random.choice((1.0, 0.9)),
            repetition_penalty=self._random.choice((None, 1.1)),
        )
        if len(result.tokens) != count:
            raise WrongAnswer(f"{len(result.tokens)} tokens, not {count}")
        self._tally.tokens += count
        return Ending.UNCHECKED

    async def _task_cancel(self) -> Ending:
        known, count = self._pick()
        stream = self._random.random() < 0.5
        task = asyncio.create_task(
            self._read_all(known, count)
            if stream
            else self._engine.generate(
                known.prompt, max_tokens=count, ignore_eos=True, **known.options
            )
        )
        await asyncio.wait({task}, timeout=self._moment())
        start = time.perf_counter()
        task.cancel()
        if self._random.random() < 0.3:
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        if task.cancelled():
            self._tally.cancels.append(time.perf_counter() - start)
            return Ending.CANCELLED
        return self._finished(known, task.result(), count)  # it had ended before

    async def _read_all(self, known: Known, count: int) -> GenerationResult:
        async with self._engine.stream_generate(
            known.prompt, max_tokens=count, ignore_eos=True, **known.options
        ) as chunks:
            async for _ in chunks:
                pass
        return chunks.result

    def _moment(self) -> float:
        """Seconds: at once, in the queue, in prefill, in decode."""
        return self._random.choice((0.0, 0.01, 0.1, 1.0, 2.0)) * self._random.random()

    async def _time_out(self) -> Ending:
        known, count = self._pick()
        try:
            async with asyncio.timeout(self._moment()):
                result = await self._engine.generate(
                    known.prompt, max_tokens=count, ignore_eos=True, **known.options
                )
        except TimeoutError:
            return Ending.TIMED_OUT
        return self._finished(known, result, count)

    async def _close_early(self) -> Ending:
        known, count = self._pick()
        leave_after = self._random.randint(0, count)
        tokens: list[int] = []
        async with self._engine.stream_generate(
            known.prompt, max_tokens=count, ignore_eos=True, **known.options
        ) as chunks:
            while len(tokens) < leave_after:
                tokens += (await anext(chunks)).tokens
        self._compare_beginning(known, tokens)
        return Ending.CLOSED

    async def _stream_cancel(self) -> Ending:
        known, count = self._pick()
        cancel_after = self._random.randint(0, count)
        tokens: list[int] = []
        async with self._engine.stream_generate(
            known.prompt, max_tokens=count, ignore_eos=True, **known.options
        ) as chunks:
            if cancel_after == 0:
                chunks.cancel()
            async for chunk in chunks:
                tokens += chunk.tokens
                if len(tokens) == cancel_after:
                    chunks.cancel()
        self._compare_beginning(known, tokens)
        return Ending.STOPPED

    def _compare_beginning(self, known: Known, tokens: list[int]) -> None:
        count = min(len(tokens), len(known.tokens))
        self._compare(known, tokens[:count], known.tokens[:count])

    async def _own(self) -> Ending:
        """MLX work of the user's, between the batch's."""
        size = self._random.randint(1, 1000)
        total = await self._engine.run_blocking(lambda: int(mx.ones(size).sum().item()))
        if total != size:
            raise WrongAnswer(f"run_blocking gave {total}, not {size}")
        return Ending.OWN

    async def _fault(self) -> Ending:
        known, _ = self._pick()
        step = self._random.randrange(LONGEST // 2)
        try:
            await self._engine.generate(
                known.prompt,
                max_tokens=LONGEST,
                ignore_eos=True,
                logits_processors=[fault_at(step)],
                **known.options,
            )
        except GenerationError as error:
            if not isinstance(error.__cause__, Fault):
                raise WrongAnswer(f"failed by {error.__cause__!r}, not by its own fault") from error
            return Ending.FAULTED
        raise WrongAnswer("a logits processor raised, and the request finished")
