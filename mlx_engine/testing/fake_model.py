"""The model of a ``FakeEngine``: a script, and the steps in which it is played."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.checks import flag, number, shown
from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.machine import Memory
from mlx_engine.core.sliced_job import Rest
from mlx_engine.core.stop import Interrupted
from mlx_engine.errors import EngineDead, InvalidRequest, MLXEngineError, another
from mlx_engine.memory_stats import MemoryStats
from mlx_engine.outputs import (
    Progress,
    ProgressCallback,
    ToolCall,
)
from mlx_engine.questions import PromptFacts, PromptQuestion
from mlx_engine.requests import ChatPrompt, TextPrompt
from mlx_engine.testing.fake_answer import Answers, FakeAnswer, Script, checked_answers, choose
from mlx_engine.testing.fake_cache import FakePromptCache
from mlx_engine.testing.fake_call import pieces_of
from mlx_engine.testing.fake_gate import Gate
from mlx_engine.testing.fake_options import LoadPiece
from mlx_engine.testing.fake_prompt import encode, render
from mlx_engine.testing.fake_tokens import TokenTexts
from mlx_engine.testing.script_error import ScriptError, mistake
from mlx_engine.testing.scripted_request import ScriptedRequest

Fail = Callable[[Callable[[], EngineDead]], None]

LOOK = 0.001  # seconds between two looks at a closed gate
_SLICE = 0.01  # seconds of prefill, or of a load, after which to look whether to stop


class FakeModel:
    """The script of a ``FakeEngine``, in the place of a model. On the engine's thread.

    Attributes:
        counters: counters of the work done with it. From any thread.
        dead: why it cannot be used any more.
        mistakes: those of the script that have come up.
        texts: of its tokens. From any thread.
    """

    def __init__(
        self,
        answers: Answers,
        context_length: int | None,
        memory: Memory,
        options: Mapping[str, Any],
    ) -> None:
        self.texts = TokenTexts()
        self.counters = EngineCounters()
        self.dead: EngineDead | None = None
        self.mistakes: list[ScriptError] = []
        self._answers = checked_answers(answers)
        load = options["load"]
        self._load = load if isinstance(load, Iterator) else _load_pieces(load)
        self._context_length = context_length
        self._seconds_per_token = _seconds("seconds_per_token", options)
        self._prefill_seconds = _seconds("prefill_seconds", options)
        self._load_seconds = _seconds("load_seconds", options)
        self._supports_tools = flag("supports_tools", options["supports_tools"])
        self._supports_reasoning = flag("supports_reasoning", options["supports_reasoning"])
        self._memory = MemoryStats(limit=memory if isinstance(memory, int) else None)
        self._call_numbers = itertools.count(1)
        self._cache: FakePromptCache | None = None

    @property
    def loaded(self) -> bool:
        """Whether it has been loaded. From any thread."""
        return self._cache is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether there can be chats. From any thread."""
        return self.loaded

    @property
    def supports_tools(self) -> bool:
        """Whether its chats may have tools. From any thread."""
        return self.loaded and self._supports_tools

    @property
    def supports_reasoning(self) -> bool:
        """Whether its answers may have reasoning. From any thread."""
        return self.loaded and self._supports_reasoning

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together, if limited. From any thread."""
        return self._context_length if self.loaded else None

    @property
    def cache(self) -> FakePromptCache:
        """The prompt cache."""
        if self._cache is None:
            raise EngineDead("the engine has no model any more")
        return self._cache

    def prompt_cache_stats(self) -> PromptCacheStats:
        """Counters of the prompt cache. From any thread."""
        cache = self._cache
        return PromptCacheStats() if cache is None else cache.stats()

    def memory_stats(self) -> MemoryStats:
        """Memory that it may have; it needs none. From any thread."""
        return self._memory

    def load(self, on_progress: ProgressCallback | None, should_stop: Callable[[], bool]) -> None:
        """Play the script of a load.

        Raises:
            Interrupted: it has ended early.
            Exception: what is scripted.
        """
        load = next(self._load, ()) if isinstance(self._load, Iterator) else self._load
        for piece in _load_pieces(load):
            if isinstance(piece, Exception):
                raise another(piece)
            piece.arrive()
            while piece.holds(should_stop()):
                time.sleep(LOOK)
        for done, total, seconds in _slices(self._load_seconds):
            if on_progress is not None:
                on_progress(Progress("load", done, total))
            if should_stop():
                raise Interrupted
            time.sleep(seconds)
        if should_stop():
            raise Interrupted
        self._cache, self.dead = FakePromptCache(), None

    def save_prompt_cache(self, path: Path) -> Rest[int]:
        """Begin to write the prompt cache into a file; the rest gives the number of prompts."""
        return lambda turns: turns.take(self.cache.save, path)

    def load_prompt_cache(self, path: Path) -> Rest[int]:
        """Begin to add the prompts of a file to the prompt cache; the rest gives their number."""
        return lambda turns: turns.take(self.cache.load, path)

    def unload(self) -> None:
        """Forget what was seen."""
        self._cache = None
        self.counters.batch_size = 0

    def die(self, error: EngineDead, fail: Fail) -> None:
        """Be dead; ``fail`` is told what new requests are told. From any thread."""
        self.dead = error
        fail(lambda: another(error))

    def check_alive(self) -> None:
        """Raise its ``EngineDead`` if it is dead."""
        if self.dead is not None:
            raise another(self.dead)

    def answer(self, question: PromptQuestion) -> PromptFacts:
        """Answer a question about a prompt. On any thread.

        Raises:
            InvalidRequest: the model could not take it.
        """
        self.check_alive()
        source = question.source
        self._check_source(source)
        tokens = encode(source, self.texts)
        if question.subject == "decode":
            return PromptFacts(text="".join(map(self.texts.text, tokens)))
        text = render(source) if isinstance(source, ChatPrompt) else ""
        cached = self.cache.peek(tokens) if question.subject == "render_chat" else 0
        return PromptFacts(len(tokens), text, tuple(tokens), cached)

    def _check_source(self, source: TextPrompt | ChatPrompt) -> None:
        try:
            (render(source) if isinstance(source, ChatPrompt) else str(source.prompt)).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(source.option, f"is not valid Unicode text ({error})") from error
        if not isinstance(source, ChatPrompt):
            return
        if source.offered and not self._supports_tools:
            raise InvalidRequest("tools", "this model's chat template does not show tools to it")
        if source.thinking and not self._supports_reasoning:
            raise InvalidRequest("thinking", "this model's chat template has no reasoning")

    def prepare(self, request: ScriptedRequest) -> MLXEngineError | None:
        """Count the tokens of its prompt; the error if that fails. On any thread."""
        try:
            self._check_source(request.asked.source)
            request.prepare(self.context_length)
        except Exception as error:  # noqa: BLE001 - told to its caller
            return request.failed(error)
        return None

    def play(self, request: ScriptedRequest) -> Iterator[float | None]:
        """Do a prepared request, step by step; it is over when this ends.

        Yields:
            seconds that the step takes; ``None`` while the request is held at a gate.

        Raises:
            EngineDead: the engine ends here.
            ScriptError: nothing is scripted that a model could answer.
            Exception: what is scripted.
        """
        self.check_alive()
        request.begin(self.cache.look_up(request.prompt))
        self.counters.prompt_tokens += len(request.prompt)
        self.counters.cached_tokens += request.result().usage.cached_tokens
        try:
            yield from self._steps(request)
        finally:
            if self._cache is not None:
                self._cache.store(request.all_tokens)

    def _steps(self, request: ScriptedRequest) -> Iterator[float | None]:
        answer = FakeAnswer() if request.limit == 0 else self._choose(request)
        for _, _, seconds in _slices(self._prefill_seconds):
            self.counters.step("prefill")
            self.counters.prefill_seconds += seconds
            yield seconds
            if self._stops(request):
                return
        request.prefilled()
        if request.limit == 0:
            request.end("length")
            return
        while True:
            for segment, piece in answer:
                if isinstance(piece, Exception):
                    raise another(piece)
                if isinstance(piece, Gate):
                    over = yield from self._hold(request, piece)
                elif isinstance(piece, ToolCall):
                    over = yield from self._call(request, piece)
                elif segment == "reasoning" and request.has_reasoned_enough:
                    continue
                else:
                    over = yield from self._token(request, partial(request.take, segment, piece))
                if over:
                    return
            if answer.finish_reason != "stop":
                request.end(answer.finish_reason)
                return
            if (yield from self._token(request, request.take_end)):
                return

    def _choose(self, request: ScriptedRequest) -> FakeAnswer:
        """The answer to a request, which a model could give."""
        try:
            answer = choose(self._answers, request.shown)
            answer.check(request.asked.source, request.asked.params.constraint)
            if answer.reasoning and not self._supports_reasoning:
                raise ScriptError("reasoning is scripted, but supports_reasoning is False")
        except ScriptError as error:
            self.mistakes.append(error)
            raise
        return answer

    def check_script(self) -> None:
        """Raise what is wrong with the script, once: a mistake that has come up, or answers that
        were not asked for.
        """
        mistakes, self.mistakes = self.mistakes, []
        if mistakes:
            more = f" (and {len(mistakes) - 1} more mistakes)" if mistakes[1:] else ""
            raise mistake(f"{mistakes[0]}{more}", mistakes[0])
        if isinstance(self._answers, Script):
            self._answers.check_used()

    def _call(self, request: ScriptedRequest, call: ToolCall) -> Generator[float, None, bool]:
        """Make the tokens of a call; whether the request is over with that."""
        if not call.id:
            call = replace(call, id=f"call{next(self._call_numbers):05}")
        if call.ok and request.has_called_enough:
            call = replace(call, arguments={}, error="parallel calls are switched off")
        for piece in pieces_of(call, request.calls):
            if (yield from self._token(request, partial(request.take_call, piece))):
                return True
        return False

    def _hold(self, request: ScriptedRequest, gate: Gate) -> Generator[None, None, bool]:
        """Stay at a gate; whether the request is over with that."""
        gate.arrive()
        while gate.holds(request.should_stop):
            yield
            self.check_alive()
        return self._stops(request)

    def _token(
        self, request: ScriptedRequest, take: Callable[[], bool]
    ) -> Generator[float, None, bool]:
        """Make a token; whether the request is over with it."""
        self.counters.step("decode")
        self.counters.decode_seconds += self._seconds_per_token / max(1, self.counters.batch_size)
        yield self._seconds_per_token
        if self._stops(request):
            return True
        self.counters.completion_tokens += 1
        return take()

    def _stops(self, request: ScriptedRequest) -> bool:
        """Whether it has been cancelled, or its time is over, and so is it."""
        self.check_alive()
        reason = request.stop_reason
        if reason is not None:
            request.end(reason)
        return reason is not None


def _slices(seconds: float) -> Iterator[tuple[int, int, float]]:
    """Number, count and seconds of the slices into which a time is cut."""
    count = max(1, math.ceil(seconds / _SLICE))
    return ((number, count, seconds / count) for number in range(count))


def _load_pieces(load: object) -> tuple[LoadPiece, ...]:
    pieces = (load,) if isinstance(load, Gate | Exception) else load
    if not isinstance(pieces, Sequence) or not all(isinstance(p, LoadPiece) for p in pieces):
        raise InvalidRequest("load", f"must be gates and exceptions, not {shown(load)}")
    return tuple(pieces)


def _seconds(option: str, options: Mapping[str, Any]) -> float:
    return number(option, options[option], low=0, what="seconds")
