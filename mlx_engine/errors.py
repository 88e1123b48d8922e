"""Every exception that mlx_engine raises on purpose.

MLXEngineError
├── ModelLoadError                 not found, unsupported, broken files
│   └── NotEnoughMemory            its weights do not fit beside what others have
├── InvalidRequest (ValueError)    a bad option, prompt or message
│   └── ContextLengthExceeded      prompt + max_tokens does not fit
├── EngineBusy                     the queue or wait limit is reached
├── EngineNotRunning
│   ├── EngineNotStarted           start() has not finished yet
│   ├── EngineStopped              draining or stopped
│   └── EngineDead                 its thread or process is gone
├── GenerationError                this request failed inside MLX or in a processor
│   └── OutputInvalid              the answer is complete, and the caller's type refuses it
├── StreamClosed                   the stream was closed before this was asked of it
├── StreamUnfinished               its answer is still being made
└── StreamConsumed                 a stream is read once

Errors of MLX, mlx-lm and the file system become one of these at one border each,
raised ``from`` the original. ``asyncio.CancelledError`` is never wrapped.

Which may be retried, ``error.retryable`` tells: EngineBusy after ``error.retry_after`` seconds,
EngineDead after ``await engine.restart()``, GenerationError as it is.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

E = TypeVar("E", bound=BaseException)


class MLXEngineError(Exception):
    """Base of every error of this library.

    Attributes:
        retryable: whether the same request may succeed if it is made again, a little later: the
            fault was of the moment, not of the request. Before that, ``EngineBusy`` wants
            ``retry_after`` seconds, and ``EngineDead`` an ``await engine.restart()``.
    """

    retryable: bool = False


class ModelLoadError(MLXEngineError):
    """The model cannot be loaded; the message names the file and what to do."""


class NotEnoughMemory(ModelLoadError):
    """The weights of a model do not fit into the memory that is left, or that it may have.

    Attributes:
        needed: bytes that it needs, its drafts included.
        available: bytes that it could have.
    """

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, (type(self), str(self), self.__dict__.copy())


class InvalidRequest(MLXEngineError, ValueError):
    """An option, prompt or message is not acceptable.

    Attributes:
        option: the name of the option that was refused, as the caller spells it.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, (type(self), str(self), self.__dict__.copy())


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the tokens asked for do not fit into the model's context.

    Attributes:
        prompt_tokens: tokens in the prompt; ``None`` when the text is so long that it was
            refused without being tokenized.
        max_tokens: tokens asked for; ``None`` means "as many as fit".
        context_length: tokens that fit.
    """

    def __init__(
        self,
        problem: str,
        *,
        prompt_tokens: int | None,
        max_tokens: int | None,
        context_length: int,
        option: str = "prompt",
    ) -> None:
        super().__init__(option, problem)
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length


class EngineBusy(MLXEngineError):
    """The engine has as many waiting requests as it accepts, or one waited too long.

    Attributes:
        retry_after: seconds after which a place is likely to be free, an estimate.
    """

    retryable = True

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, (type(self), str(self), self.__dict__.copy())


class EngineNotRunning(MLXEngineError):
    """The engine cannot take this request in its present state."""


class EngineNotStarted(EngineNotRunning):
    """``start()`` has not been called, or has not finished."""


class EngineStopped(EngineNotRunning):
    """The engine is draining or stopped; a request in flight was aborted by that."""


class EngineDead(EngineNotRunning):
    """The process, actor or thread that the engine runs on is gone, or MLX does not work any more.

    ``await engine.restart()`` brings it back, and does nothing if it is back already: what was
    asked may be asked again then, unless ``retryable`` is ``False``, since it may be what has
    ended it.

    Attributes:
        reason: what is known of the end, in words.
        exit_code: of the process that ended, if it was a process; negative is the number of
            the signal that ended it.
        signal: the name of that signal, e.g. ``"SIGKILL"``.
        phase: what it was doing: ``start``, ``load``, ``idle``, ``prefill`` or ``decode``.
        stderr: the last lines of the process's standard error, with the stacks of its threads
            if it had to be ended because it was stuck. Tracebacks show it as a note; it is no
            part of the message, which may go to a client.
    """

    retryable = True

    def __init__(
        self,
        reason: str,
        *,
        exit_code: int | None = None,
        signal: str | None = None,
        phase: str | None = None,
        stderr: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_code = exit_code
        self.signal = signal
        self.phase = phase
        self.stderr = stderr
        if stderr:
            self.add_note(f"its last words:\n{stderr}")


class GenerationError(MLXEngineError):
    """This request failed inside MLX, in a logits processor or in the tokenizer.

    It may be ``retryable``: memory is short for a while, or another request of a batch was at
    fault. Where the same would come out again, it is not.
    """

    retryable = True


class OutputInvalid(GenerationError):
    """The answer is complete and as its schema says, but the type of ``output=`` refuses it: by a
    validator of its own, for example, of which no schema tells.

    It is ``retryable`` if tokens were drawn by chance, and without a seed: a greedy answer would
    be the same one again.

    Attributes:
        result: the answer, a ``GenerationResult``; its ``parsed`` is ``None``.
    """

    def __init__(self, message: str, *, result: Any, retryable: bool = False) -> None:
        super().__init__(message)
        self.result = result
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, (type(self), str(self), self.__dict__.copy())


class StreamClosed(MLXEngineError):
    """The stream was closed or cancelled before it had what was asked of it."""


class StreamUnfinished(MLXEngineError):
    """The stream's answer is still being made: there is no result of it yet."""


class StreamConsumed(MLXEngineError):
    """The stream is being read, or has been read, already: it can be read once."""


def rebuild(kind: type[MLXEngineError], message: str, state: dict[str, object]) -> MLXEngineError:
    """Unpickle an error whose constructor does not take just its message."""
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error


def failed_by(error: BaseException, message: str) -> GenerationError:
    """The error of a request that ``error`` has failed, which is no error of ours: what MLX and
    the system raise may be of the moment, a mistake in code or data is not.
    """
    failed = GenerationError(message)
    if not isinstance(error, RuntimeError | MemoryError | OSError):
        failed.retryable = False
    failed.__cause__ = error
    return failed


def for_good(error: E) -> E:
    """The same error, which the same request would meet again."""
    if isinstance(error, MLXEngineError):
        error.retryable = False
    return error


def renamed(error: InvalidRequest, option: str) -> InvalidRequest:
    """The same error about an option that its caller knows under another name."""
    message = f"{option}: {str(error).removeprefix(f'{error.option}: ')}"
    made = rebuild(type(error), message, {**vars(error), "option": option})
    assert isinstance(made, InvalidRequest)
    return made


def describe(error: BaseException) -> str:
    """The kind of an error and its message, whatever its own code makes of that."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - code of the caller's, or of whom else
        message = "<its message cannot be shown>"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def drop_frames(error: BaseException) -> None:
    """Take the tracebacks off an error that leaves the MLX thread.

    Their frames hold KV caches and models, and so would whoever keeps the error. Clearing the
    frames is not enough, for their functions' closures hold them as well.
    """
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is None or id(link) in seen:  # a chain may be a ring
            continue
        seen.add(id(link))
        link.__traceback__ = None
        links += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            links += link.exceptions


def another(error: E) -> E:
    """A copy of an error of ours: one object, raised in many tasks, would gather all their frames.

    Errors of others are given back as they are; they may not be made to be copied.
    """
    if not isinstance(error, MLXEngineError):
        return error
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied
