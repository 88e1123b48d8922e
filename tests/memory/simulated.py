"""A machine with engines on which nothing is computed: who has memory is all that happens.

What decides about memory is the library's own: the ledger, the accounts of engines, parts of other
processes, the batch that admits, preempts and takes back, and the memory of a request that is
alone. In the place of models, KV caches and stored prompts are their sizes.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any, cast

from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.ledger import Account, Ledger
from mlx_engine.core.pressure import admits
from mlx_engine.engine.engine_memory import EngineMemory
from mlx_engine.errors import GenerationError, InvalidRequest, MLXEngineError
from mlx_engine.generation import batch as real
from mlx_engine.generation.cache.kv_cache import KVFootprint
from mlx_engine.generation.memory import MemoryBudget
from mlx_engine.generation.sequence import Sequence
from mlx_engine.generation.single_memory import LiveMemory, check_prompt
from mlx_engine.memory_stats import MemoryStats, MemoryUse
from mlx_engine.remote.part import Part
from mlx_engine.remote.wire.messages import Budget, decode_from_client
from mlx_engine.strategies import Strategies

TOKEN = 1024  # bytes in a KV cache
CHUNK = 512  # tokens of a prefill chunk
BURST = 8  # tokens of a decode step, as with a draft
REST = 16  # steps of a batch after which it makes way for others
FOOTPRINTS = (
    KVFootprint(0, ((TOKEN, None),)),
    # Recurrent state, and a sliding window.
    KVFootprint(40 * TOKEN, ((TOKEN // 2, None), (TOKEN, 300))),
)
DRAFTS = {
    "prefill": KVFootprint(0, ((TOKEN // 4, None),)),
    "decode": KVFootprint(TOKEN, ((TOKEN // 4, None),)),
}
_clock = itertools.count(1)


class Fault(RuntimeError):
    """MLX fails."""


class Request:
    """A request at work: so many tokens of prompt, and an answer that ends by itself.

    Attributes:
        end: tokens after which it does, if nothing else ends it.
        outcome: how it ended, once it has.
    """

    def __init__(
        self, length: int, limit: int | None, end: int, priority: int, strategies: Strategies
    ) -> None:
        self.request_id = f"request {next(_clock)}"
        self.prompt = [1] * length
        self.tokens: list[int] = []
        self.limit, self.end, self.priority = limit, end, priority
        self.open_ended = limit is None
        self.strategies = strategies
        self.should_stop = self.over = False
        self.outcome: str | None = None
        self.places: tuple[int, ...] = ()
        self.context = None
        self.wants_logprobs = False
        self.sampling = SimpleNamespace(options=None, processors=(), budget=None, grammar=None)
        self.preemptions = 0

    def begin(self) -> bool:
        return True

    def progress(self, *_: object) -> None:
        pass

    prefilled = resumed = interrupted = lambda self: None
    note = progress

    def preempted(self) -> None:
        self.preemptions += 1

    def take(self, token: int, _: object) -> bool:
        self.tokens.append(token)
        if len(self.tokens) >= min(self.end, self.limit or self.end):
            self.ends("finished")
        return self.over

    def ended_without_tokens(self) -> None:
        self.ends("finished")

    def cancelled(self) -> None:
        self.ends("cancelled")

    def failed(self, error: BaseException) -> MLXEngineError:
        self.ends("failed")
        return GenerationError(str(error))

    def ends(self, outcome: str) -> None:
        assert self.outcome is None, f"it ended twice: {self.outcome}, then {outcome}"
        self.outcome, self.over = outcome, True


class Entry:
    """All layers of a KV cache: its size."""

    def __init__(self, footprint: KVFootprint, sequence: Sequence) -> None:
        self._footprint, self._sequence = footprint, sequence

    @property
    def nbytes(self) -> int:
        return self._footprint.nbytes(self._sequence.held)


class Runner:
    """What a batch needs of a model, and the stored prompts.

    Attributes:
        fails_after: calls of MLX until one fails; ``None`` if none does.
    """

    def __init__(self, account: Account, footprint: KVFootprint) -> None:
        self.account, self.footprint = account, footprint
        self.counters = EngineCounters()
        self.prompt_cache = SimpleNamespace(limit=10**9)
        self.stored: OrderedDict[int, int] = OrderedDict()
        self.fails_after: int | None = None
        account.stored = self

    def call(self) -> None:
        """MLX does something."""
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                self.fails_after = None
                raise Fault("out of memory")

    def try_mlx(self) -> None:
        return None

    @property
    def stored_bytes(self) -> int:
        return sum(self.stored.values())

    def store(self, sequence: Sequence, cache: list[Any]) -> bool:
        nbytes = sum(entry.nbytes for entry in cache)
        if self.account.claim("stored", self.stored_bytes + nbytes):
            self.stored[next(_clock)] = nbytes
        return True

    def shrink_stored(self, limit: int) -> None:
        while self.stored_bytes > limit:
            self.evict()

    def oldest(self) -> float | None:
        return next(iter(self.stored), None)

    def evict(self) -> None:
        self.stored.popitem(last=False)
        self.account.set("stored", self.stored_bytes)


class Decoding:
    """In the place of ``DecodeBatch``: a row for each, padded to the longest."""

    def __init__(self, runner: Any) -> None:
        self._runner: Runner = runner
        self.sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def nbytes(self) -> int:
        longest = max((each.held for each in self.sequences), default=0)
        return len(self) * self._runner.footprint.nbytes(longest) if longest else 0

    def step(self) -> list[tuple[Sequence, int, None]]:
        self._runner.call()
        told: list[tuple[Sequence, int, None]] = []
        for each in self.sequences:
            if each.new:
                each.held, each.new = each.held + 1, False
                continue
            request = cast("Request", each.request)
            left = min(request.end, request.limit or request.end) - len(request.tokens)
            count = min(left, BURST)
            each.held += count
            told += [(each, 1, None)] * count
        return told

    def join(self, sequences: list[Sequence], merged: object) -> None:
        self._runner.call()
        for each in sequences:
            each.cache = None
        self.sequences += sequences

    def leave(
        self, gone: Collection[Sequence], wanted: Collection[Sequence] = ()
    ) -> dict[Sequence, list[Any]]:
        self.sequences = [each for each in self.sequences if each not in gone]
        self._runner.call()
        return {each: [Entry(self._runner.footprint, each)] for each in wanted}

    def end_alone(self) -> None:
        pass

    def pending(self) -> list[tuple[Sequence, tuple[int | None, float]]]:
        self._runner.call()
        return [(each, (None if each.new else 1, 0.0)) for each in self.sequences]


class Prefilling:
    """In the place of ``PrefillQueue``: the first in rank has the next chunk."""

    def __init__(self, runner: Any, max_pause: float | None) -> None:
        self._runner: Runner = runner
        self.sequences: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)
        self.sequences.sort(key=lambda each: each.rank)

    def choose(self) -> Sequence:
        return self.sequences[0]

    def begin(self, sequence: Sequence) -> None:
        if sequence.cache is None:
            self._runner.call()
            sequence.cache = [Entry(self._runner.footprint, sequence)]

    def slice(self, sequence: Sequence, *, beside_others: bool) -> tuple[list[Sequence], None]:
        self.begin(sequence)
        self._runner.call()
        sequence.held += min(sequence.left, CHUNK)
        return [] if sequence.left else [sequence], None


class Batched:
    """An engine with a batch of requests: the library's, on decoding that computes nothing."""

    def __init__(self, name: str, memory: int | None, weights: int, shape: int) -> None:
        self.memory = EngineMemory()
        self.memory.open(name, "auto" if memory is None else memory, weights, weights // 8)
        footprint = FOOTPRINTS[shape]
        self.runner = Runner(self.memory.account, footprint)
        self.budget = MemoryBudget(footprint, self.memory.account, DRAFTS)
        self.batch = real.Batch(cast("Any", self.runner), self.budget, None)
        self.waiting: list[Request] = []
        self.requests: list[Request] = []
        self._turns = 0

    def submit(self, request: Request) -> None:
        """Refused at once, or waiting."""
        self.requests.append(request)
        try:
            self.budget.check(cast("Any", request))
        except InvalidRequest:
            request.ends("refused")
            return
        self.waiting.append(request)
        self.waiting.sort(key=lambda each: each.priority)

    def turn(self, book: Ledger) -> bool:
        """Admit, and make a step; whether anything has happened."""
        for request in [each for each in self.waiting if each.should_stop]:
            self.waiting.remove(request)
            request.cancelled()
        while self.waiting and admits(book, len(self.batch)):
            if not self.batch.fits(cast("Any", self.waiting[0])):
                break
            over = self.batch.add(cast("Any", self.waiting.pop(0)))
            assert over is None or isinstance(over[1], GenerationError)
        before = self._state()
        for _, error in self._step():
            assert error is None or isinstance(error, MLXEngineError)
        self._turns += 1
        if self._turns % REST == 0 or not self.batch:
            self.batch.rest()
        if self.batch.broken is not None:
            self.batch.clear()
            for request in self.requests:
                if not request.over:
                    request.ends("failed")
            self.waiting.clear()
            self.batch.broken = None
        return self._state() != before

    def _step(self) -> Iterator[real.Over]:
        """A step of the batch: what is computed in it was claimed, and the first goes on."""
        batch = self.batch
        first = min(batch._working, key=lambda each: each.rank, default=None)
        before = 0 if first is None else cast("Request", first.request).preemptions
        for over in batch.step():
            self._check_claimed()
            yield over
        self._check_claimed()
        if first is not None and cast("Request", first.request).preemptions > before:
            others = [each for each in batch._working if each.rank > first.rank]
            assert not others, "one that is older made room for one that is younger"

    def _check_claimed(self) -> None:
        """What is there is no more than what is claimed."""
        sequences = self.batch._prefilling.sequences
        there = self.batch._decoding.nbytes + sum(each.nbytes for each in sequences)
        assert there <= self.memory.account.use.live

    def _state(self) -> list[object]:
        batch = self.batch
        places = (batch._decoding, batch._prefilling, batch._preempted)
        return [
            (each.request.request_id, each.held, len(each.request.tokens), number)
            for number, place in enumerate(places)
            for each in place.sequences
        ]

    def close(self) -> None:
        """All that are in work fail; nothing of it is left."""
        self.batch.clear()
        self.waiting.clear()
        for request in self.requests:
            if not request.over:
                request.ends("failed")
        self.runner.stored.clear()
        self.memory.close()


class Simple:
    """An engine that serves one request at a time: the library's claims, and no model."""

    def __init__(self, name: str, memory: int | None, weights: int, shape: int) -> None:
        self.memory = EngineMemory()
        self.memory.open(name, "auto" if memory is None else memory, weights, 0)
        self.runner = Runner(self.memory.account, FOOTPRINTS[shape])
        self.waiting: list[Request] = []
        self.requests: list[Request] = []
        self._now: tuple[Sequence, LiveMemory] | None = None

    def submit(self, request: Request) -> None:
        """Waiting for those before it."""
        self.requests.append(request)
        try:
            check_prompt(self.memory.account, self.runner.footprint, cast("Any", request))
        except InvalidRequest:
            request.ends("refused")
        else:
            self.waiting.append(request)

    def turn(self, book: Ledger) -> bool:
        """A chunk, or a token, of the request whose turn it is; whether there is one."""
        if self._now is None:
            if not self.waiting:
                return False
            sequence = Sequence(cast("Any", self.waiting.pop(0)))
            sequence.cache = [Entry(self.runner.footprint, sequence)]
            memory = LiveMemory(self.memory.account, sequence, [self.runner.footprint])
            self._now = sequence, memory
        sequence, memory = self._now
        request = cast("Request", sequence.request)
        try:
            if request.should_stop:
                request.cancelled()
            else:
                self._work(sequence, memory)
        except (Fault, MLXEngineError) as error:
            request.failed(error)
        memory.measure()
        if request.over:
            if request.outcome == "finished":
                self.runner.store(sequence, cast("Any", sequence.cache))
            memory.close()
            self._now = None
        return True

    def _work(self, sequence: Sequence, memory: LiveMemory) -> None:
        request = cast("Request", sequence.request)
        if sequence.left:
            memory.prefill(CHUNK)
            self.runner.call()
            sequence.held += min(sequence.left, CHUNK)
            return
        if not sequence.batched:
            memory.begin_decoding()
        self.runner.call()
        sequence.held, sequence.batched = sequence.held + 1, 1
        for _ in range(BURST // 2):
            memory.decode()
            if request.take(1, None):
                return
            sequence.held += 1
        assert self.runner.footprint.nbytes(sequence.held) <= self.memory.account.use.live

    def close(self) -> None:
        """All that are in work fail; nothing of it is left."""
        self._now = None
        self.waiting.clear()
        for request in self.requests:
            if not request.over:
                request.ends("failed")
        self.runner.stored.clear()
        self.memory.close()


class Process:
    """The process of an engine elsewhere on this machine: it keeps to what it was told last.

    Attributes:
        limit: that.
        inbox: frames on their way to it.
    """

    def __init__(self, part: Part, weights: int) -> None:
        self.part = part
        self.inbox: list[bytes] = []
        limit = part.begin(self.inbox.append)
        assert limit is not None
        self.limit = limit
        self.use = MemoryUse(weights=min(weights, limit))

    def receive(self) -> None:
        """Read what has come; stored prompts give way."""
        for frame in self.inbox:
            (budget,) = decode_from_client(frame)
            assert isinstance(budget, Budget)
            self.limit = budget.memory
        self.inbox.clear()
        over = max(0, self.use.total - self.limit)
        self._have(self.use.live, self.use.stored - min(over, self.use.stored))

    def work(self, live: int, stored: int) -> None:
        """Have so much in use, as far as it may."""
        room = max(0, self.limit - self.use.weights)
        if live <= self.use.live or live <= room:
            self._have(live, min(stored, max(0, room - live)))

    def _have(self, live: int, stored: int) -> None:
        self.use = MemoryUse(weights=self.use.weights, live=live, stored=stored)
        self.part.told(MemoryStats(limit=self.limit, use=self.use))
