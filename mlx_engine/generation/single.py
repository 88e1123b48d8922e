"""A request by itself, from its prompt to its result, in one call on the MLX thread."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator
from contextlib import closing

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream

from mlx_engine.config import ModelConfig
from mlx_engine.core.ledger import ledger
from mlx_engine.core.stop import Interrupted
from mlx_engine.errors import MLXEngineError
from mlx_engine.generation.cache.kv_cache import Cache, grow
from mlx_engine.generation.cache.snapshot import trimmable
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sampler import can_be_sampled
from mlx_engine.generation.sequence import Sequence
from mlx_engine.generation.single_memory import LiveMemory
from mlx_engine.generation.speculative.decoder import Emitted
from mlx_engine.outputs import GenerationResult

_MEASURE = 256  # steps after which the size of the KV cache is looked at again
_CLEAR = 256  # steps after which MLX's free buffers are given back, as in mlx_lm


def generate_single(request: Request, runner: ModelRunner) -> GenerationResult:
    """Do a prepared request. Cancelled, it returns what there is by then.

    Raises:
        InvalidRequest: a logits processor cannot be imported.
        GenerationError: MLX, the tokenizer or a logits processor raised.
    """
    error = _attempt(request, runner)
    del runner  # a raised error keeps this frame, and so would keep the model
    if error is not None:
        raise error
    return request.result()


def _attempt(request: Request, runner: ModelRunner) -> MLXEngineError | None:
    try:
        try:
            if request.begin():
                _run(request, runner)
        finally:
            # A step may be under way that nobody waits for any more.
            mx.synchronize(generation_stream)
    except BaseException as error:  # noqa: BLE001
        # The border: MLX and user code raise anything, a CancelledError that is nobody's, or an
        # exit, which would end the caller's event loop.
        return request.failed(error)
    finally:
        runner.counters.kv_bytes = runner.counters.batch_size = 0
    return None


def _run(request: Request, runner: ModelRunner) -> None:
    sequence = Sequence(request)
    runner.start(sequence)
    live = LiveMemory(runner.account, sequence, runner.footprints_of(sequence))
    try:
        _serve(runner, sequence, live)
    finally:
        live.close()
    assert sequence.cache is not None
    runner.store(sequence, sequence.cache)  # if it was cancelled, a retry goes on from there


def _serve(runner: ModelRunner, sequence: Sequence, live: LiveMemory) -> None:
    request = sequence.request
    _prefill(runner, sequence, live)
    cache = sequence.cache
    assert cache is not None
    if request.should_stop:
        request.cancelled()
        return
    if request.limit == 0:
        request.ended_without_tokens()
        sequence.finish_drafting()
        return
    live.begin_decoding()
    with mx.stream(generation_stream):
        grow(cache, 1)  # if all of it was stored, it has no room: mlx-lm's would be a step too much
    if sequence.keeps_end and not trimmable(cache):  # what is decoded cannot be taken out again
        runner.store(sequence, cache)
    try:
        _decode(runner, sequence, live)
    except Interrupted:
        request.cancelled()
    sequence.finish_drafting()


def _prefill(runner: ModelRunner, sequence: Sequence, live: LiveMemory) -> None:
    request, counters = sequence.request, runner.counters
    assert sequence.cache is not None
    while sequence.left:
        if request.should_stop:
            break
        chunk = runner.chunk_of(sequence)
        size = chunk.tokens
        if sequence.sparse is None:  # chunks end at multiples, wherever the first one began
            size -= sequence.held % size
        live.prefill(size)
        began = time.perf_counter()
        went = runner.prefill_step(sequence, size)
        seconds = time.perf_counter() - began
        chunk.took(seconds, went)
        ledger().relieve()
        counters.prefill_seconds += seconds
        counters.kv_bytes = live.measure()
        if sequence.held in sequence.places:
            runner.store(sequence, sequence.cache)
    else:
        request.prefilled()
    sequence.keep_scored()


def _decode(runner: ModelRunner, sequence: Sequence, live: LiveMemory) -> None:
    """Take tokens until one of them, or the text they make, is the last."""
    request, counters = sequence.request, runner.counters
    assert sequence.cache is not None
    counters.batch_size = 1
    counters.step("decode")
    before = time.perf_counter()
    with closing(_steps(runner, sequence)) as steps:
        for count, emitted in enumerate(steps):
            now = time.perf_counter()
            counters.decode_seconds += now - before
            before = now
            counters.step("decode")
            if count % _MEASURE == 0:
                counters.kv_bytes = live.measure()
            ledger().relieve()
            for token, logprobs in emitted:
                counters.completion_tokens += 1
                live.decode()
                if request.take(token, logprobs):
                    return


def _steps(runner: ModelRunner, sequence: Sequence) -> Generator[list[Emitted], None, None]:
    """Yield the tokens of each step; ``sequence.held`` is kept right.

    Raises:
        Interrupted: the request was cancelled.
    """
    request = sequence.request
    assert sequence.cache is not None
    if not sequence.speculates:
        sequence.held = len(request.prompt)
        try:
            for step in decode(runner.loaded.model, sequence.cache, request, runner.config):
                sequence.held += 1  # the forward for the next token is under way
                yield [step]
        except Interrupted:
            sequence.held += 1  # and so is the one that was left undone
            raise
        return
    decoder = runner.speculative_decoder(sequence, sequence.cache)
    for count in itertools.count():
        if request.should_stop:
            raise Interrupted
        if count % _CLEAR == 0:
            mx.clear_cache()
        emitted = decoder.step()
        sequence.held = decoder.held
        yield emitted


def decode(
    model: nn.Module, cache: Cache, request: Request, config: ModelConfig
) -> Generator[tuple[int, mx.array], None, None]:
    """Yield (token, log-probabilities of shape (vocabulary,)) until closed or the limit.

    Args:
        cache: holds all of the prompt but its last token.

    Raises:
        Interrupted: the request was cancelled; asked before each step is handed to MLX.
        GenerationError: a token's logits are not numbers.
    """
    prompt, hooks = request.prompt, _Hooks(request)
    steps = generate_step(
        mx.array(prompt[-1:], dtype=mx.uint32),
        model,
        max_tokens=-1 if request.limit is None else request.limit,
        sampler=hooks.sample,
        logits_processors=[hooks.process] if hooks.processes else None,
        prompt_cache=cache,
        kv_bits=config.kv_bits,
        kv_group_size=config.kv_group_size,
        quantized_kv_start=config.quantized_kv_start,
    )
    with closing(steps):
        for token, logprobs in steps:
            sound, model_was = hooks.checks.popleft()
            if not sound.item():
                raise request.nothing_to_sample(by_model=model_was is None or not model_was.item())
            yield token, logprobs


class _Hooks:
    """Hooks of mlx_lm's step for one answer, called in the order of its tokens.

    Attributes:
        checks: of tokens that have not been given out yet: whether there was anything to choose
            from, and whether the model's own logits were sound, if that is known.
    """

    def __init__(self, request: Request) -> None:
        assert request.sampling is not None
        self._request = request
        self._sampling = request.sampling
        self._history = mx.array(request.prompt[:-1], dtype=mx.uint32)
        self._before: mx.array | None = None  # whether the model's own logits were sound
        self._seen: list[mx.array] = []  # what mlx_lm remembers for processors
        self._latest: list[mx.array] = []  # the token that goes in next
        self._place = 0  # of the next token in the answer
        self.checks: deque[tuple[mx.array, mx.array | None]] = deque()

    @property
    def processes(self) -> bool:
        """Whether logits are changed."""
        sampling = self._sampling
        return bool(sampling.processors or sampling.budget or sampling.grammar)

    def process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits of shape (1, vocabulary) as the request wants them."""
        self._seen = [tokens]
        if self._request.context is not None:
            self._before = mx.isfinite(mx.logsumexp(logits, axis=-1))
        if self._sampling.processors:
            # ``generate_step`` knows only the last token of the prompt.
            logits = self._request.process(mx.concatenate([self._history, tokens]), logits)
        if self._sampling.budget is not None:
            logits = self._sampling.budget.apply(logits, self._place, self._latest)
        if self._sampling.grammar is not None:
            logits = self._sampling.grammar.apply(logits, self._place, self._latest)
        return logits

    def sample(self, logprobs: mx.array) -> mx.array:
        """A token id of shape (1,)."""
        # mlx_lm prepares a step before it gives out the token of the one before; this is the
        # last moment at which it can be left undone.
        if self._request.should_stop:
            raise Interrupted
        tokens = self._sampling.sample(logprobs, self._place)
        self._place += 1
        sound = can_be_sampled(logprobs, tokens)
        self.checks.append((sound, self._before))
        # Computed with the token: what is asked for later waits for the next step, and what
        # nobody looks at piles up.
        known = [sound, *self._seen]
        if self._before is not None:
            known.append(self._before)
        self._latest = mx.depends([tokens], known)
        return self._latest[0]
