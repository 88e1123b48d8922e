"""A link to a child process: started, listened to, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import pty
import signal
import socket
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from mlx_engine.core.threads import dead
from mlx_engine.errors import EngineDead
from mlx_engine.remote.links.child_process import Child
from mlx_engine.remote.links.link import Ending, FrameProtocol, SocketEnd

_LINES = 60  # of standard error that are kept
_WIDTH = 500  # characters of each
_READS = 4  # pieces of it at a time
_DUMP = 0.2  # seconds for the stacks to be written
_CODE_WAIT = 1.0  # seconds from the end of the connection to the exit code
_SPAWN_WAIT = 0.5  # seconds that one who ends it waits until it is there
_REST_WAIT = 0.25  # seconds from the exit code to the end of the connection

_UNWANTED = "it was ended before its process was there"

_log = logging.getLogger("mlx_engine.core")
_links: weakref.WeakSet[ProcessLink] = weakref.WeakSet()


class ProcessLink(SocketEnd):
    """A child process of a new interpreter, never forked, for ``mlx_engine.remote.serving.child``.

    Its end is noticed by a thread that waits for it, and by the end of its socket; nothing is
    polled. The child ends when this process does: its socket then ends; and if it is stuck or
    stopped, the hang-up of the terminal that it was given, whose other side is here, ends it.

    Args:
        name: shown among the child's arguments, and in the log.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._child: Child | None = None
        self._born: asyncio.Future[None] = self._loop.create_future()
        self._failure: EngineDead | None = None
        self._unwanted = False
        self._errors: int | None = None  # file descriptors
        self._lifeline: int | None = None
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._line = b""
        self._code: int | None = None
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._flaw: str | None = None

    @property
    def pid(self) -> int | None:
        """The id of the child's process, once it has been started."""
        return None if self._child is None else self._child.pid

    async def open(self) -> None:
        """Start the child."""
        try:
            ours, child = self._begin()
            try:
                await self._birth(child)
                assert self._errors is not None
                self._loop.add_reader(self._errors, self._read_errors)
            except BaseException:
                ours.close()
                raise
            await self._loop.create_unix_connection(lambda: FrameProtocol(self), sock=ours)
        except OSError as error:
            told = dead("the engine's process could not be started", error)
            self._fail(told.reason)
            raise told from error
        except EngineDead as error:
            self._fail(error.reason)
            raise
        except BaseException:
            self.kill()
            raise

    def _fail(self, reason: str) -> None:
        """Be gone, as it could not be opened; a child that is there all the same is ended."""
        if self._child is None or self._failure is not None:
            self._end(reason)
        else:
            self.kill()

    async def _birth(self, child: Child) -> None:
        """Wait until the child is there."""
        limit = child.limit()
        try:
            ends: set[asyncio.Future[Any]] = {self._born, self.gone}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            limit.cancel()
        if self._failure is not None:
            raise self._failure
        if self.gone.done():
            raise self.gone.result().error(self.gone.result().detail)

    async def dump_stacks(self) -> None:
        """Have the child write the stacks of all its threads to its standard error."""
        self._signal(signal.SIGUSR1)
        await asyncio.sleep(_DUMP)

    def terminate(self) -> None:
        """SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL. A child that is not there in time is waited for no longer: its thread ends it
        as soon as it is there.
        """
        self._unwanted = True
        if self._child is None:
            self._end(_UNWANTED)
            return
        if not self._born.done():
            self._set_timer(_SPAWN_WAIT, functools.partial(self._end, _UNWANTED))
        self._signal(signal.SIGKILL)

    def _begin(self) -> tuple[socket.socket, Child]:
        """Have the child started; our end of the socket comes with it."""
        if self.gone.done():
            raise EngineDead(_UNWANTED)
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as childs:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            ours.setblocking(False)
            childs.callback(theirs.close)
            self._errors, errors = os.pipe()
            os.set_blocking(self._errors, False)
            childs.callback(os.close, errors)
            self._lifeline, terminal = _terminal()
            _links.add(self)
            passed = [_above_two(theirs.fileno(), childs)]
            if terminal is not None:
                childs.callback(os.close, terminal)
                passed.append(_above_two(terminal, childs))
            # -P: the folder in which the application was started must not shadow anything.
            arguments = [
                "-P",
                "-m",
                "mlx_engine.remote.serving.child",
                self._name,
                *map(str, passed),
            ]
            child = Child(
                arguments,
                passed,
                errors,
                childs.pop_all(),
                started=self._soon(self._started),
                failed=self._soon(self._not_started),
                exited=self._soon(self._exited),
            )
            child.begin()
            self._child = child
            undo.pop_all()
        return ours, child

    def _soon(self, func: Callable[..., object]) -> Callable[..., None]:
        """``func``, to be called in the loop from whatever thread."""

        def call(*args: object) -> None:
            try:
                self._loop.call_soon_threadsafe(func, *args)
            except RuntimeError:
                pass  # the interpreter is shutting down

        return call

    def forget_lifeline(self) -> None:
        """Close the lifeline in a fork of this process, which must not keep the child alive."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None and self._code is None:
            self._child.signal(number)

    # What its thread tells, once

    def _started(self) -> None:
        self._born.set_result(None)
        if self._timer is not None:
            self._timer.cancel()

    def _not_started(self, error: EngineDead) -> None:
        self._failure = error
        self._born.set_result(None)
        if self._unwanted:  # nobody opens it any more
            self._end(error.reason)

    # What may happen, in any order: the exit code comes, the socket ends.

    def _exited(self, code: int) -> None:
        self._code = code
        if self.transport is None or self._closed:
            self._finish()
        else:  # what it has said at last may still be on its way
            self._set_timer(_REST_WAIT, self._finish)

    def flawed(self, flaw: str) -> None:
        """End the other end: what came over the socket makes no sense."""
        _log.error("%s: %s; its process is ended", self._name, flaw)
        self._flaw = flaw
        self.kill()

    def disconnected(self, error: Exception | None) -> None:
        """Wait for the exit code: the socket has ended."""
        self._closed = True
        if self._code is not None:
            self._finish()
        else:
            self._set_timer(_CODE_WAIT, self.kill)  # it goes on without us: that is no use

    def _set_timer(self, seconds: float, then: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, then)  # type: ignore[arg-type]

    def _finish(self) -> None:
        code = self._code
        ending = Ending("", code)
        if self._flaw is not None:
            detail = self._flaw
        elif ending.signal_name is not None:
            detail = f"its process was ended by {ending.signal_name}"
        else:
            detail = f"its process ended with exit code {code}"
        self._end(detail)

    def _end(self, detail: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.transport is not None:
            self.transport.abort()
        if self._errors is not None:
            self._read_errors()
            self._loop.remove_reader(self._errors)
        for descriptor in (self._errors, self._lifeline):
            if descriptor is not None:
                os.close(descriptor)
        self._errors = self._lifeline = None
        if not self.gone.done():
            self._keep_line(self._line)
            self.gone.set_result(Ending(detail, self._code, "\n".join(self._lines)))

    def _read_errors(self) -> None:
        """Keep the last lines of the child's standard error."""
        assert self._errors is not None
        for _ in range(_READS):  # one that writes without a pause must not stop all others
            try:
                data = os.read(self._errors, 65536)
            except BlockingIOError:
                return
            if not data:
                self._loop.remove_reader(self._errors)
                return
            *lines, self._line = (self._line + data).split(b"\n")
            self._line = self._line[-_WIDTH:]
            for line in lines:
                self._keep_line(line)

    def _keep_line(self, line: bytes) -> None:
        text = line[:_WIDTH].decode("utf-8", "replace").rstrip()
        if text:
            self._lines.append(text)
            _log.info("%s: %s", self._name, text)


def _terminal() -> tuple[int | None, int | None]:
    """A pseudo-terminal, if there is one to be had: our side and the child's."""
    try:
        return pty.openpty()
    except OSError:
        return None, None


def _above_two(descriptor: int, stack: contextlib.ExitStack) -> int:
    """The same, but not where the child's standard streams go: ours may be closed."""
    if descriptor > 2:
        return descriptor
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    stack.callback(os.close, copy)
    return copy


def _forked() -> None:
    """Close all lifelines in a fork of this process: they must end with this process."""
    for link in list(_links):
        link.forget_lifeline()


os.register_at_fork(after_in_child=_forked)
