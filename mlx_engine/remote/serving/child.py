"""The process of one engine: ``python -m mlx_engine.remote.serving.child NAME SOCKET [TERMINAL]``.

Started by ``ProcessLink``, never by hand. The main thread runs the event loop, in which
nothing heavy ever happens: MLX is imported on another thread and used on the MLX thread. So
signs of life go out from the first moment on, and the parent's end is noticed at any.

Exit codes: 0 after a shutdown, 1 if the engine could not be started, and by the parent's end
there is nobody left to see one.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import functools
import os
import signal
import socket
import sys
import termios
import time
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from mlx_engine.core.ledger import ledger
from mlx_engine.core.threads import in_thread
from mlx_engine.errors import MLXEngineError, ModelLoadError, describe
from mlx_engine.outputs import Progress
from mlx_engine.remote.serving.client_requests import ClientRequests
from mlx_engine.remote.serving.heartbeats import Heartbeats
from mlx_engine.remote.wire.frames import FrameSplitter, framed
from mlx_engine.remote.wire.messages import (
    Budget,
    BudgetTaken,
    Configure,
    Draining,
    Hello,
    ProgressUpdate,
    Shutdown,
    Stopped,
    ToServer,
    decode_from_client,
)
from mlx_engine.remote.wire.options import options_from_wire
from mlx_engine.remote.wire.outbox import Outbox
from mlx_engine.remote.wire.values import error_to_wire

if TYPE_CHECKING:
    from mlx_engine.engine.local import LocalEngine

EXIT_FAILED = 1


def main() -> NoReturn:
    """Serve the parent as the process of an engine; does not return."""
    # An application may have blocked or ignored signals, which is inherited.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    faulthandler.enable()  # what native code was doing when it crashed goes to standard error
    faulthandler.register(signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent has blocked some until now
    descriptors = [int(text) for text in sys.argv[2:]]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if len(descriptors) > 1:
        _hang_on(descriptors[1])
    asyncio.run(_Server().run(socket.socket(fileno=descriptors[0])))
    raise AssertionError("the process ends in leave()")


def leave(code: int) -> NoReturn:
    """End the process at once: an interpreter's exit would wait for threads that may be stuck."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _hang_on(terminal: int) -> None:
    """Make a terminal, whose other side the parent has, the controlling one of this process.

    When the parent is gone, the system hangs it up: SIGHUP, and SIGCONT if this process is
    stopped. That needs no Python to run here, so that it works when native code has the GIL.
    """
    with contextlib.suppress(OSError):
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


class _Server(asyncio.Protocol):
    """The engine, the parent's requests, and the heartbeats."""

    def __init__(self) -> None:
        self._frames = FrameSplitter()
        self._parent = os.getppid()
        self._heartbeats = Heartbeats()
        self._code = 0
        self._draining: list[asyncio.Task[None]] = []
        self._engine: LocalEngine | None = None
        self._memory: int | None = None  # bytes that it may have, if that has changed
        self._requests: ClientRequests | None = None

    async def run(self, sock: socket.socket) -> NoReturn:
        """Serve the parent at the other end of ``sock``; it does not return."""
        loop = asyncio.get_running_loop()
        self._configured: asyncio.Future[Configure] = loop.create_future()
        self._end: asyncio.Future[None] = loop.create_future()
        self._outbox = Outbox(self._write)
        sock.setblocking(False)
        await loop.create_unix_connection(lambda: self, sock=sock)
        configure = await self._configured
        self._beating = asyncio.create_task(self._beat_for_ever(configure.heartbeat_interval))
        try:
            engine = self._engine = await self._made(configure)
            await engine.start()
        except Exception as error:  # noqa: BLE001 - the border: the parent raises it
            if not isinstance(error, MLXEngineError):
                error = ModelLoadError(f"the engine cannot be started: {describe(error)}")
            self._outbox.put(error_to_wire(0, error))
            await self._end_with(EXIT_FAILED)
        loop.add_signal_handler(signal.SIGTERM, self._sigterm)
        self._requests = ClientRequests(
            engine, self._outbox, trusted=True, on_over=self._request_over
        )
        self._heartbeats.clients.add(self._requests)
        self._heartbeats.engine = engine
        self._outbox.put(self._requests.welcome())
        await self._end
        await self._end_with(0)

    async def _end_with(self, code: int) -> NoReturn:
        """Say what is left to be said, and end when it is on its way."""
        self._code = code
        self._outbox.flush()
        self._transport.close()
        await asyncio.Event().wait()
        raise AssertionError("the process ends in connection_lost")

    async def _made(self, configure: Configure) -> LocalEngine:
        sys.path += [path for path in configure.sys_path if path not in sys.path]
        self._heartbeats.phase = "load"
        kind = {"simple": "SimpleEngine", "batched": "BatchedEngine"}[configure.kind]
        name = f"mlx_engine.engine.{configure.kind}"
        module = await in_thread(functools.partial(import_module, name), "import")
        engine: LocalEngine = getattr(module, kind)(
            configure.model,
            **options_from_wire(configure.options),
            on_progress=self._load_progress,
        )
        engine.limit_memory(
            configure.memory if self._memory is None else self._memory, configure.name
        )
        self._heartbeats.loading = engine
        return engine

    def _load_progress(self, progress: Progress) -> None:
        self._heartbeats.step()
        self._outbox.put(ProgressUpdate(0, progress.phase, progress.done, progress.total))

    # The wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        leave(self._code)  # all is said; or the parent is gone, or does not want this any more

    def data_received(self, data: bytes) -> None:
        for frame in self._frames.feed(data):
            for message in decode_from_client(frame):
                self._take(message)

    def _write(self, payload: bytes) -> None:
        self._transport.write(framed(payload))

    def _take(self, message: ToServer) -> None:
        match message:
            case Hello():
                pass  # it is of the same version: it was started from the same files
            case Configure():
                self._configured.set_result(message)
            case Budget():
                self._memory = message.memory
                if self._engine is not None:
                    self._engine.limit_memory(message.memory)
                    self._tell_soon()
                self._outbox.put(BudgetTaken(message.memory, ledger().use.total))
            case Shutdown():  # not while it loads: then the parent kills it
                self._drain(message.remaining)
            case _:
                if self._requests is not None:
                    self._requests.take(message)

    # The end

    def _sigterm(self) -> None:
        """Drain at the first SIGTERM, abort at the second one."""
        if not self._draining:
            self._outbox.put(Draining("its process was asked to end (SIGTERM)"))
            self._drain(None)
        else:
            self._drain(0.0)

    def _drain(self, remaining: float | None) -> None:
        self._draining.append(asyncio.create_task(self._shut_down(remaining)))

    async def _shut_down(self, remaining: float | None) -> None:
        assert self._engine is not None
        assert self._requests is not None
        report = await self._engine.shutdown(remaining)
        await self._requests.over()
        if not self._end.done():
            self._outbox.put(Stopped(report))
            self._end.set_result(None)

    # Heartbeats

    async def _beat_for_ever(self, interval: float) -> None:
        while True:
            if os.getppid() != self._parent:
                leave(0)  # somebody else holds our socket open: a fork of the parent's
            self._outbox.put(self._heartbeats.heartbeat())
            began = time.monotonic()
            await asyncio.sleep(interval)
            late = time.monotonic() - began - interval
            if late > interval:
                self._heartbeats.stood_still(late)

    def _request_over(self) -> None:
        self._heartbeats.step()
        self._tell_soon()

    def _tell_soon(self) -> None:
        self._outbox.put_last(self._heartbeats.heartbeat)  # whoever asks for statistics has them


if __name__ == "__main__":
    main()
