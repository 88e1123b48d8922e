"""The requests of one client, at work on an engine in this process."""

from __future__ import annotations

import asyncio
import functools
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_engine.core.log import logged
from mlx_engine.core.stream import Emit, Producer
from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import GenerationError, InvalidRequest, describe
from mlx_engine.outputs import GenerationChunk, GenerationResult, Progress
from mlx_engine.params import SamplingParams
from mlx_engine.questions import PromptFacts
from mlx_engine.remote.serving.cache_folder import CacheFolder
from mlx_engine.remote.wire.frames import WireError
from mlx_engine.remote.wire.messages import (
    Ask,
    CacheFile,
    CacheFileDone,
    Cancel,
    Done,
    ErrorReply,
    Facts,
    Generate,
    ProgressUpdate,
    ToServer,
    Welcome,
)
from mlx_engine.remote.wire.outbox import Outbox
from mlx_engine.remote.wire.values import (
    chunk_to_wire,
    error_to_wire,
    question_from_wire,
    request_from_wire,
    result_to_wire,
)

_NAME = re.compile(r"[\w.@-]{1,64}")  # of a request; it shows in texts
_OPTIONS = frozenset(field.name for field in fields(SamplingParams))
_LONGEST_TEXT = 4000  # characters of an error; it may have what the client has sent in it
_AT_ONCE = 16  # requests that are cancelled without looking after anything else


class ClientRequests:
    """The requests of a client; does what it asks. In the event loop.

    Attributes:
        held: bytes of its requests that are not over, as far as they count.

    Args:
        engine: the engine; it may serve others too.
        outbox: answers go there.
        trusted: whether the client may name functions to import and files, and give chat
            templates.
        on_over: called after each request.
        client: what tells the names of its requests from those of other clients.
        cache_folder: where a client that is not trusted may keep prompt caches, if anywhere.
    """

    def __init__(
        self,
        engine: BaseEngine,
        outbox: Outbox,
        *,
        trusted: bool,
        on_over: Callable[[], None],
        client: str = "",
        cache_folder: CacheFolder | None = None,
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._trusted = trusted
        self._tasks: dict[int, asyncio.Task[Any]] = {}
        self._names: set[str] = set()
        self._on_over = on_over
        self._client = client
        self._cache_folder = cache_folder
        self._sizes: dict[int, int] = {}
        self.held = 0

    @property
    def pending(self) -> int:
        """Requests that are not over."""
        return len(self._tasks)

    def welcome(self) -> Welcome:
        """The first answer: what the client should know of the engine."""
        engine = self._engine
        model = engine.model
        if model is not None and os.path.isabs(model):
            model = os.path.basename(model)  # where this machine keeps it is nobody else's business
        return Welcome(
            model,
            engine.has_chat_template,
            engine.supports_tools,
            engine.supports_reasoning,
            engine.context_length,
            engine.width,
            engine.stats(),
        )

    def take(self, message: ToServer, size: int = 0) -> None:
        """Do what a message says.

        Args:
            size: bytes that it has, if they count.

        Raises:
            WireError: a client does not say that.
        """
        match message:
            case Generate():
                self._generate(message, size)
            case Cancel():
                if (task := self._tasks.get(message.number)) is not None:
                    task.cancel()
            case Ask():
                self._ask(message, size)
            case CacheFile():
                self._cache_file(message)
            case _:
                raise WireError(f"a client does not say {type(message).__name__} here")

    async def end(self) -> None:
        """Cancel everything, and wait until it is out of MLX."""
        for count, task in enumerate(list(self._tasks.values()), 1):
            task.cancel()
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)
        await self.over()

    async def over(self) -> None:
        """Wait until everything is over."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    def _check_new(self, number: int) -> None:
        if number in self._tasks:
            raise WireError(f"request {number} is under way already")

    def _generate(self, message: Generate, size: int) -> None:
        number = message.number
        self._check_new(number)
        progress = functools.partial(self._tell, number) if message.progress else None
        emit = functools.partial(self._emit, number) if message.stream else None
        try:
            _check_options(message)
            request = request_from_wire(message, trusted=self._trusted, limits=self._engine.limits)
            producer = self._engine.submit(request, progress, self._name(message))
        except Exception as error:  # noqa: BLE001 - the border: the client is told
            self._outbox.put(self._failed(number, error))
            return
        self._start(number, asyncio.ensure_future(_run(producer, emit)), producer, size)

    def _ask(self, message: Ask, size: int) -> None:
        self._check_new(message.number)
        try:
            question = question_from_wire(message, limits=self._engine.limits)
        except Exception as error:  # noqa: BLE001 - the border: the client is told
            self._outbox.put(self._failed(message.number, error))
            return
        work = asyncio.ensure_future(self._engine.answer(question))
        self._start(message.number, work, None, size)

    def _cache_file(self, message: CacheFile) -> None:
        self._check_new(message.number)
        save = message.action == "save"
        try:
            path = self._path(message.path, to_be_written=save)
        except InvalidRequest as error:
            self._outbox.put(self._failed(message.number, error))
            return
        engine = self._engine
        work = engine.save_prompt_cache(path) if save else engine.load_prompt_cache(path)
        self._start(message.number, asyncio.ensure_future(work), None)

    def _path(self, path: str, *, to_be_written: bool) -> Path:
        """The path of a client's file.

        Raises:
            InvalidRequest: it may not have one there.
        """
        if self._trusted:
            return Path(path)
        if self._cache_folder is None:
            raise InvalidRequest(
                "path",
                "this host keeps no prompt caches for its clients; whoever starts it may give it "
                "a folder for them, with --cache-folder or cache_folder",
            )
        return self._cache_folder.path(path, to_be_written=to_be_written)

    def _failed(self, number: int, error: BaseException) -> ErrorReply:
        """The error of a request; a stranger gets no megabytes of its own words back."""
        failed = error_to_wire(number, error)
        if not self._trusted:
            failed.message = failed.message[:_LONGEST_TEXT]
            failed.cause = failed.cause and failed.cause[:_LONGEST_TEXT]
            failed.state = {
                name: value[:_LONGEST_TEXT] if isinstance(value, str) else value
                for name, value in failed.state.items()
            }
        return failed

    def _name(self, message: Generate) -> str | None:
        """The name of a request in the engine; ``None`` leaves that to the engine."""
        name = f"{message.name}{self._client}"
        valid = _NAME.fullmatch(message.name) and name not in self._names
        return name if valid else None

    def _start(
        self,
        number: int,
        task: asyncio.Task[Any],
        producer: Producer | None,
        size: int = 0,
    ) -> None:
        self._tasks[number] = task
        if size:
            self._sizes[number] = size
            self.held += size
        if producer is not None:
            self._names.add(producer.request_id)
        task.add_done_callback(functools.partial(self._over, number, producer))

    def _over(
        self,
        number: int,
        producer: Producer | None,
        task: asyncio.Task[Any],
    ) -> None:
        del self._tasks[number]
        self.held -= self._sizes.pop(number, 0)
        if producer is not None:
            self._names.discard(producer.request_id)
        self._on_over()
        try:
            message = self._ending(number, producer, task)
        except Exception as error:  # noqa: BLE001 - else whoever waits for it would do so for ever
            message = self._failed(number, error)
        self._outbox.put(message)

    def _ending(
        self,
        number: int,
        producer: Producer | None,
        task: asyncio.Task[Any],
    ) -> Done | Facts | CacheFileDone | ErrorReply:
        """The message about a request that is over."""
        if task.cancelled():
            # Nobody waits for the number of prompts of a cancelled save or load, or for facts.
            partial = None if producer is None else producer.partial_result()
            return CacheFileDone(number, 0) if partial is None else result_to_wire(number, partial)
        if (error := task.exception()) is not None:
            return self._failed(number, error)
        if isinstance(outcome := task.result(), int):
            return CacheFileDone(number, outcome)
        if isinstance(outcome, PromptFacts):
            return Facts(number, outcome)
        return result_to_wire(number, outcome)

    def _emit(self, number: int, chunk: GenerationChunk) -> None:
        """Send a chunk. On the MLX thread."""
        self._outbox.put(chunk_to_wire(number, chunk))

    def _tell(self, number: int, progress: Progress) -> None:
        self._outbox.put(ProgressUpdate(number, progress.phase, progress.done, progress.total))


async def _run(producer: Producer, emit: Emit | None) -> GenerationResult:
    try:
        return await logged(producer.request_id, producer.run(emit))
    except (SystemExit, KeyboardInterrupt) as error:  # of a processor; asyncio would let it out
        raise GenerationError(f"the request failed: {describe(error)}") from error


def _check_options(message: Generate) -> None:
    """Check that there are such options; the nearest name is found for who types one, not here.

    Raises:
        InvalidRequest: there are not.
    """
    if unknown := message.params.keys() - _OPTIONS:
        raise InvalidRequest(f"{min(unknown):.64}", "there is no such option")
