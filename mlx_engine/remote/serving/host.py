"""The host of an engine for several programs: ``RemoteEngine`` is their side of it."""

from __future__ import annotations

import asyncio
import functools
import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlx_engine.checks import integer, number, shown
from mlx_engine.core.drain import clean_up, is_destroyed, wait_shielded
from mlx_engine.core.lifecycle import checked_timeout
from mlx_engine.errors import EngineStopped, InvalidRequest
from mlx_engine.outputs import ShutdownReport
from mlx_engine.remote.links.socket_file import SocketFile, check_free, checked_socket_path
from mlx_engine.remote.serving.acceptor import Acceptor
from mlx_engine.remote.serving.cache_folder import CacheFolder
from mlx_engine.remote.serving.client_connection import ClientConnection
from mlx_engine.remote.serving.client_requests import ClientRequests
from mlx_engine.remote.serving.service import Service
from mlx_engine.remote.wire.heartbeat import HEARTBEAT_INTERVAL
from mlx_engine.remote.wire.messages import Draining, Refused, Stopped

if TYPE_CHECKING:
    from mlx_engine.engine.in_process import InProcessEngine

_MAX_STRANGERS = 64  # clients that have not said who they are
_ASKED_TO_END = "the host was asked to end"


class EngineHost:
    """Serves an engine on a Unix socket, in the event loop that starts it.

        async with SimpleEngine("demo") as engine, EngineHost(engine, "demo.sock") as host:
            with install_signal_handlers(host) as handlers:
                await handlers.wait()

    Only the user who runs it can connect: the socket is created with these permissions. Each
    client has requests of its own; those of one that goes away are cancelled. One that says
    what makes no sense, says nothing or does not read is sent away, with a line in the log
    ``mlx_engine.host``, at most one of its kind in ten seconds. Clients cannot have functions
    imported, nor give chat templates, which are programs, nor name files, unless there is a
    folder for them. They share the engine: the long prompt of one delays the others.

    A message of a client has 8 MiB at most, and 131,072 values beside the token ids of its
    prompt, of which a list or a map counts as four; a request what the engine's
    ``RequestLimits`` allow (more get ``InvalidRequest``); a client has 1,024 requests and 64 MiB
    of them under way at a time (more get ``EngineBusy``), and up to 64 MiB may wait for it to be
    read. What clients send is taken in turns, and a client is not listened to while there is
    something of its to be taken. Of those who do not say who they are, the one that has been
    there longest goes when there are more than 64.

    Attributes:
        engine: what is served; the application may use it too, as long as the host serves it:
            the end of ``async with host``, and ``shutdown()``, end the engine as well.
        path: of the socket.
    """

    def __init__(
        self,
        engine: InProcessEngine,
        path: str | os.PathLike[str],
        *,
        max_clients: int = 64,
        hello_timeout: float = 10.0,
        cache_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Make a host; nothing listens before it is started.

        Args:
            engine: of this process; to be started before the host is.
            path: of the socket. That of a host that is dead is replaced.
            max_clients: how many may be connected at once; others are refused.
            hello_timeout: seconds in which a client must have said who it is.
            cache_folder: in which clients may save and load prompt caches, by plain names;
                up to 100 files. Without one, they cannot.

        Raises:
            InvalidRequest: an argument is of the wrong type or out of its range; something
                serves at ``path`` already, or it is a file of another kind.
        """
        if not hasattr(engine, "counters"):
            raise InvalidRequest(
                "engine", f"must be SimpleEngine or BatchedEngine, not {shown(engine)}"
            )
        self.engine = engine
        self.path = checked_socket_path(path)
        self._max_clients = integer("max_clients", max_clients, low=1)
        hello_timeout = number(
            "hello_timeout", hello_timeout, low=0, above=True, endless=True, what="seconds"
        )
        folder = None if cache_folder is None else CacheFolder(cache_folder)
        check_free(self.path)  # so that it is known before a model is loaded
        self._service = Service(engine, hello_timeout, folder)
        self._heartbeats = self._service.heartbeats
        self._connections: set[ClientConnection] = set()  # strangers included
        self._strangers: dict[ClientConnection, None] = {}  # the oldest first
        self._acceptor: Acceptor | None = None
        self._beating: asyncio.Task[None] | None = None
        self._draining = False
        self._closing: asyncio.Task[None] | None = None
        self._entered_in: asyncio.AbstractEventLoop | None = None

    @property
    def clients(self) -> int:
        """The number of clients that are connected."""
        return sum(connection.served for connection in self._connections)

    @property
    def pending(self) -> int:
        """Requests of clients that are not over."""
        return self._heartbeats.pending

    async def start(self) -> None:
        """Listen. A host is started once.

        Cancellation: nothing stays behind.

        Raises:
            EngineNotRunning: the engine does not run, or is being shut down.
            InvalidRequest: it cannot listen at ``path``, or something serves there already.
            RuntimeError: it has been started before.
        """
        self.engine.check_running()
        if self._acceptor is not None:
            raise RuntimeError("a host is started once: make a new one")
        self._heartbeats.engine = self.engine
        self._acceptor = Acceptor(await SocketFile.open(self.path), self._new_connection)
        if self._draining:  # meanwhile
            self._acceptor.close()
            raise EngineStopped(_ASKED_TO_END)
        self._beating = asyncio.create_task(self._beat_for_ever())

    async def stop(self) -> ShutdownReport:
        """End everything in flight now: ``shutdown(0)``."""
        return await self.shutdown(0)

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Shut down the engine, and stop serving.

        The socket is removed at once, so that another host may take its place. Clients learn
        that no new requests are taken, and get the answers to those in flight.

        Args:
            timeout: seconds that requests in flight may take; then they are aborted and
                their callers get ``EngineStopped``. ``None`` waits for all of them, 0 for
                none.

        Returns:
            Which requests finished, and which were aborted, by the engine's names for them.

        May be called any number of times, from several tasks: the earliest deadline counts.

        Cancellation: requests still in flight are aborted, clients are told, then
        ``CancelledError`` is raised.

        Raises:
            InvalidRequest: ``timeout`` is not such a number.
        """
        checked_timeout(timeout)
        if not self._draining:
            self._draining = True
            if self._acceptor is not None:
                self._acceptor.close()
            for connection in self._connections:
                connection.put(Draining(_ASKED_TO_END))
        report = ShutdownReport()
        error: BaseException | None = None
        try:
            report = await self.engine.shutdown(timeout)
        except BaseException as raised:
            error = raised
            raise
        finally:
            if not is_destroyed(error):
                if self._closing is None:
                    self._closing = asyncio.create_task(self._close(report))
                await clean_up(error, functools.partial(wait_shielded, self._closing))
        return report

    async def __aenter__(self) -> Self:
        await self.start()
        self._entered_in = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        home = self._entered_in or asyncio._get_running_loop()
        await clean_up(exc, self.stop, home)

    async def _close(self, report: ShutdownReport) -> None:
        """Tell everybody that the engine is stopped."""
        if self._acceptor is not None:
            await self._acceptor.closed()
        connections = list(self._connections)
        for connection in connections:
            if connection.requests is None:
                connection.say_last(Refused(_ASKED_TO_END))
            else:
                await connection.requests.over()
                connection.say_last(Stopped(report))
        if connections:  # those who do not listen are cut off within a second
            await asyncio.wait({connection.gone for connection in connections})
        if self._beating is not None:
            self._beating.cancel()

    async def _beat_for_ever(self) -> None:
        while True:
            heartbeat = self._heartbeats.heartbeat()
            for connection in self._connections:
                connection.beat(heartbeat)
            await asyncio.sleep(HEARTBEAT_INTERVAL)

    # What clients do

    def _new_connection(self) -> ClientConnection:
        return ClientConnection(self._service, self._arrived, self._greeted)

    def _arrived(self, connection: ClientConnection) -> str | None:
        """Let somebody in who has connected; a reason to refuse it."""
        self._connections.add(connection)
        connection.gone.add_done_callback(lambda _: self._left(connection))
        if self._draining:
            return _ASKED_TO_END
        self._strangers[connection] = None
        waiting = [one for one in self._strangers if not one.over]
        if len(waiting) > _MAX_STRANGERS:
            waiting[0].evict(
                f"{_MAX_STRANGERS} others have connected since and have not said who they are, "
                "and neither have you"
            )
        if len(self._strangers) > 2 * _MAX_STRANGERS:  # they do not go when they are told to
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()
        return None

    def _greeted(self, connection: ClientConnection, requests: ClientRequests) -> str | None:
        """Take a client that has said who it is; a reason to refuse it."""
        if self._draining:
            return _ASKED_TO_END
        if self.clients >= self._max_clients:
            return f"this host serves {self._max_clients} clients already, which is its limit"
        self._strangers.pop(connection, None)
        self._heartbeats.clients.add(requests)
        return None

    def _left(self, connection: ClientConnection) -> None:
        """Forget a client whose connection is closed, and whose requests are over."""
        self._connections.discard(connection)
        self._strangers.pop(connection, None)
        if connection.requests is not None:
            self._heartbeats.clients.discard(connection.requests)
