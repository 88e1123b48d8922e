"""Continuous batching: requests join and leave at any step, and long prompts join in slices.

    add ─► prefill, slice by slice ─► decode, all sequences together ─► over
             │ ▲                        │
             │ └──── preempted ◄────────┤ when memory is short, until there is more
             │                          │
             └── from the prompt cache  └── into the prompt cache

A step decodes one token for every sequence, then prefills one slice, so that neither holds the
other up for longer than that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.core.wakeup import waking_together
from mlx_engine.errors import MLXEngineError
from mlx_engine.generation.batch_memory import AHEAD, MARGIN, BatchMemory, give_back, requests_of
from mlx_engine.generation.cache.kv_cache import Cache, kv_nbytes
from mlx_engine.generation.cache.snapshot import trimmable
from mlx_engine.generation.decode_batch import DecodeBatch, Pending
from mlx_engine.generation.memory import MemoryBudget
from mlx_engine.generation.preemption import Preempted
from mlx_engine.generation.prefill_queue import PrefillQueue
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sequence import Sequence

_WORTH_KEEPING = 64  # tokens newly prefilled that are stored while their request goes on
_CLEAR = 512  # decode steps after which MLX's free buffers are given back, as in mlx_lm
_MEASURE = 64  # decode steps after which the size of the KV cache is looked at again
_GIVE_UP = 3  # decode steps, one after another, that MLX may fail

Over = tuple[Request, MLXEngineError | None]  # a request, and the error if it failed


class Batch:
    """The requests that are in work. On the MLX thread.

    Args:
        runner: the model, and what belongs to it.
        budget: memory for the KV caches of the requests and the prompt cache.
        max_pause: seconds of prefill between two decode steps, roughly; ``None`` is no bound.

    Attributes:
        broken: why MLX cannot be used any more; ``None`` if it can.
    """

    def __init__(self, runner: ModelRunner, budget: MemoryBudget, max_pause: float | None) -> None:
        self._runner = runner
        self._memory = BatchMemory(runner, budget)
        self._preempted = Preempted(self._memory)
        self._kept_out = False  # whether somebody found no room in an empty batch
        self._decoding = DecodeBatch(runner)
        self._prefilling = PrefillQueue(runner, max_pause)
        self._steps = self._failures = 0
        self.broken: BaseException | None = None

    def __len__(self) -> int:
        return len(self._working) + len(self._preempted.sequences)

    @property
    def _working(self) -> list[Sequence]:
        return [*self._decoding.sequences, *self._prefilling.sequences]

    @property
    def stalled(self) -> bool:
        """Whether nothing can be done until somebody else gives memory back."""
        return not self._working and (self._kept_out or bool(self._preempted.sequences))

    def fits(self, request: Request) -> bool:
        """Whether there is memory for it now; stored prompts give way to it.

        Those that were preempted come before it, unless it has a better priority. One for which
        there cannot be any more is let in, to be told so.
        """
        if self._memory.refusal(request) is not None:
            return True
        if self._preempted.precede(request):
            return False
        working = self._working
        ahead = AHEAD if working else MARGIN
        fits = self._memory.claim([*requests_of(working), request], ahead)
        self._kept_out = not (fits or working)
        return fits

    def make_room(self) -> None:
        """Drop stored prompts that have no place beside the requests."""
        self._memory.fit_stored()

    def add(self, request: Request) -> Over | None:
        """Take up a prepared request; it may be over at once."""
        if (refusal := self._memory.refusal(request)) is not None:
            return request, request.failed(refusal)
        try:
            if not request.begin():
                return request, None
        except BaseException as error:  # noqa: BLE001 - the border: a caller's module is imported
            return request, request.failed(error)
        self._prefilling.add(Sequence(request))
        self._preempted.pass_by()
        return None

    def step(self) -> Iterator[Over]:
        """Drop what was cancelled, decode a token for every sequence, and prefill a slice.

        Yields each request as soon as it is over and its place is free.
        """
        yield from self.drop_cancelled()
        yield from self._keep_within_memory()
        yield from self._bring_back()
        if self._decoding.sequences:
            yield from self._decode()
        if self._prefilling.sequences:
            yield from self._prefill()

    def rest(self) -> None:
        """Wait until nothing of it is in MLX any more; no memory is claimed but for those in it."""
        with contextlib.suppress(Exception):  # a step that fails is told of where it is used
            mx.synchronize(generation_stream)
        self._memory.claim(requests_of(self._working), MARGIN)

    def clear(self) -> None:
        """Drop all requests, without a word to anybody."""
        self._decoding = DecodeBatch(self._runner)
        self._prefilling.sequences.clear()
        self._preempted.sequences.clear()
        self._measure()

    def drop_cancelled(self) -> Iterator[Over]:
        """Let go of those that were cancelled, or whose event loop is closed."""
        for sequence in [s for s in self._preempted.sequences if s.request.should_stop]:
            self._preempted.sequences.remove(sequence)
            if not self:
                self.rest()  # as in _leave
            yield _cancelled(sequence.request)
        yield from self._leave([s for s in self._decoding.sequences if s.request.should_stop])
        for sequence in [s for s in self._prefilling.sequences if s.request.should_stop]:
            self._prefilling.sequences.remove(sequence)
            self._measure()
            yield _cancelled(sequence.request)
            if sequence.cache is not None:
                sequence.keep_scored()
                self._store(sequence, sequence.cache)

    def _decode(self) -> Iterator[Over]:
        self._runner.counters.step("decode")
        began = time.perf_counter()
        try:
            steps = self._decoding.step()
            self._steps += 1
            if self._steps % _CLEAR == 0:
                mx.clear_cache()
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._failures += 1
            yield from self._lose_all(error)
            return
        self._failures = 0
        counters = self._runner.counters
        gone: list[Sequence] = []
        with waking_together():
            for sequence, token, logprobs in steps:
                if sequence in gone or sequence.fault is not None:
                    continue  # it came to its end within this step
                try:
                    counters.completion_tokens += 1
                    if sequence.request.take(token, logprobs):
                        gone.append(sequence)
                except BaseException as error:  # noqa: BLE001 - the border: a tokenizer's fault
                    sequence.fault = error
        gone += [each for each in self._decoding.sequences if each.fault is not None]
        counters.decode_seconds += time.perf_counter() - began
        if self._steps % _MEASURE == 0:
            self._measure()
        yield from self._leave(gone)

    def _leave(self, sequences: list[Sequence]) -> Iterator[Over]:
        """Let sequences of the decode batch go, and keep what they computed."""
        if not sequences:
            return
        for sequence in sequences:
            sequence.finish_drafting()
            if sequence.drafter is not None and sequence.batched:
                sequence.request.note(
                    f"{sequence.batched} of its tokens were decoded together with other requests, "
                    "where nothing is proposed"
                )
        caches, lost = self._let_go(sequences)
        self._measure()
        if not self:
            self.rest()  # the last one is told when nothing of it is in MLX
        for sequence in sequences:
            if sequence.fault is not None:
                yield sequence.request, sequence.request.failed(sequence.fault)
            elif sequence.request.over:
                yield sequence.request, None
            else:
                yield _cancelled(sequence.request)
        if lost is not None:
            yield from self._rescue(lost)
        for sequence, cache in caches.items():
            self._store(sequence, cache)

    def _let_go(self, leaving: list[Sequence]) -> tuple[dict[Sequence, Cache], Exception | None]:
        """Take sequences out of the decode batch: their KV caches, to be stored, and a fault."""
        storing = self._runner.prompt_cache.limit
        try:
            wanted = [each for each in leaving if storing and each.fault is None]
            return self._decoding.leave(leaving, wanted), None
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            return {}, error

    def _prefill(self) -> Iterator[Over]:
        sequence = self._prefilling.choose()
        try:
            done, merged = self._prefilling.slice(sequence, beside_others=bool(self._decoding))
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._prefilling.sequences.remove(sequence)
            self._measure()
            self._recover()
            yield sequence.request, sequence.request.failed(error)
            return
        if sequence.cache is not None and merged is None:
            self._store_prompt(sequence, sequence.cache)
        for each in done:
            each.request.prefilled()
            self._prefilling.sequences.remove(each)
        if done and sequence.request.limit == 0:
            yield from self._end_prefilled(sequence)
        elif done:
            try:
                self._decoding.end_alone()
            except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
                yield from self._lose_all(error)
            try:
                self._decoding.join(done, merged)
            except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
                for each in done:
                    yield each.request, each.request.failed(error)
                yield from self._rescue(error)
        self._measure()

    def _end_prefilled(self, sequence: Sequence) -> Iterator[Over]:
        """Let a sequence go that wants no tokens, once its prompt is kept: it is for that."""
        assert sequence.cache is not None
        sequence.finish_drafting()
        self._store(sequence, sequence.cache)
        if not self:
            self.rest()  # as in _leave
        yield _over(sequence.request, sequence.request.ended_without_tokens)

    def _keep_within_memory(self) -> Iterator[Over]:
        """Claim what the requests may soon need; as long as that is too much, preempt one."""
        while not self._memory.claim(requests_of(self._working), MARGIN):
            yield from self._preempt(max(self._working, key=lambda each: each.rank))

    def _preempt(self, sequence: Sequence) -> Iterator[Over]:
        """Take a sequence out of work, to go on when there is room for it.

        A fault of MLX's costs nobody an answer, unless it is one of the step that is under way.
        """
        cache, lost = sequence.cache, None
        pending: Pending | None = None
        if sequence in self._decoding.sequences:
            try:
                self._decoding.end_alone()
                pending = dict(self._decoding.pending())[sequence]
            except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
                yield from self._lose_all(error)
                return
            sequence.finish_drafting()
            caches, lost = self._let_go([sequence])
            cache = caches.get(sequence)
        else:
            self._prefilling.sequences.remove(sequence)
            sequence.keep_scored()
        if lost is not None:
            yield from self._rescue(lost)
        give_back()
        fit = self._memory.claim(requests_of(self._working), MARGIN)
        if fit and cache is not None and self._memory.can_store(kv_nbytes(cache)):
            self._store(sequence, cache)
        sequence.request.preempted()
        self._runner.counters.preemptions += 1
        yield from self._put_aside(sequence, pending)

    def _put_aside(self, sequence: Sequence, pending: Pending | None) -> Iterator[Over]:
        """Let a sequence that is in no batch any more wait until it may come back."""
        try:
            self._preempted.add(sequence, pending)
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            self._recover()
            yield sequence.request, sequence.request.failed(error)
        self._measure()

    def _bring_back(self) -> Iterator[Over]:
        """Let those that were preempted go on, as far as there is room for them."""
        for each in list(self._preempted.sequences):
            if (refusal := self._memory.refusal(each.request)) is not None:
                self._preempted.sequences.remove(each)
                yield each.request, each.request.failed(refusal)
        while (sequence := self._preempted.take(self._working)) is not None:
            try:
                self._prefilling.begin(sequence)  # takes what is stored of it before that gives way
            except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
                self._recover()
                yield sequence.request, sequence.request.failed(error)
                continue
            if not self._memory.claim(requests_of([*self._working, sequence]), MARGIN):
                yield from self._put_aside(sequence, None)
                return
            self._prefilling.add(sequence)
            if not sequence.returns:
                sequence.request.resumed()  # else when it has come to where it was

    def _rescue(self, error: Exception) -> Iterator[Over]:
        """Have all that decode go on in new caches: after a fault of MLX, nobody knows what the
        joint one holds. It costs them time, and their answers if it happens again.
        """
        try:
            pending = self._decoding.pending()
        except Exception:  # noqa: BLE001 - the border: MLX raises anything
            yield from self._lose_all(error)
            return
        self._decoding = DecodeBatch(self._runner)
        self._recover()
        for sequence, state in pending:
            if self.broken is not None or sequence.rescued:
                yield sequence.request, sequence.request.failed(error)
                continue
            sequence.rescued = True
            sequence.request.interrupted()
            yield from self._put_aside(sequence, state)
        self._measure()

    def _lose_all(self, error: Exception) -> Iterator[Over]:
        """Fail all that decode: after a fault of MLX, nobody knows what the joint cache holds."""
        sequences = self._decoding.sequences
        self._decoding = DecodeBatch(self._runner)
        self._measure()
        self._recover()
        if self._failures >= _GIVE_UP:
            self.broken = self.broken or error
        for sequence in sequences:
            yield sequence.request, sequence.request.failed(error)

    def _recover(self) -> None:
        """See whether MLX still works, after an error of it."""
        self.broken = self._runner.try_mlx() or self.broken

    def _store_prompt(self, sequence: Sequence, cache: Cache) -> None:
        """Keep what is prefilled by now, where others are likely to begin with the same."""
        new = sequence.held - sequence.cached
        at_end = not (sequence.left or sequence.returns) and sequence.keeps_end
        if sequence.held in sequence.places or (
            at_end and (new >= _WORTH_KEEPING or not trimmable(cache))
        ):
            self._store(sequence, cache)

    def _store(self, sequence: Sequence, cache: Cache) -> None:
        if not self._runner.store(sequence, cache):
            self._recover()
        self.make_room()

    def _measure(self) -> None:
        counters = self._runner.counters
        counters.batch_size = len(self._decoding)
        prefilling = sum(each.nbytes for each in self._prefilling.sequences)
        counters.kv_bytes = self._decoding.nbytes + prefilling


def _cancelled(request: Request) -> Over:
    return _over(request, request.cancelled)


def _over(request: Request, end: Callable[[], None]) -> Over:
    try:
        end()
    except BaseException as error:  # noqa: BLE001 - the border: a tokenizer's fault
        return request, request.failed(error)
    return request, None
