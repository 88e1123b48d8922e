"""An engine of this process for several programs: ``RemoteEngine`` is their side of it."""

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
from mlx_engine.remote.connection import BEAT
from mlx_engine.remote.links.socket_file import SocketFile, check_free, checked_socket_path
from mlx_engine.remote.serving.acceptor import Acceptor
from mlx_engine.remote.serving.cache_folder import CacheFolder
from mlx_engine.remote.serving.client_connection import ClientConnection
from mlx_engine.remote.serving.client_requests import ClientRequests
from mlx_engine.remote.serving.complaints import Complaints
from mlx_engine.remote.serving.heartbeats import Heartbeats
from mlx_engine.remote.serving.round_robin import RoundRobin
from mlx_engine.remote.wire.messages import Draining, Heartbeat, Refused, Stopped

if TYPE_CHECKING:
    from mlx_engine.engine.local import LocalEngine

_MAX_STRANGERS = 64  # who have not said who they are
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
        hello_timeout: seconds for a client to say who it is.
        cache_folder: where clients may keep prompt caches; ``None`` is nowhere.
        turns: gives clients slices of the event loop.
        complaints: the lines in the log.
    """

    def __init__(
        self,
        engine: LocalEngine,
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
        self.hello_timeout = number(
            "hello_timeout", hello_timeout, low=0, above=True, endless=True, what="seconds"
        )
        self.cache_folder = None if cache_folder is None else CacheFolder(cache_folder)
        check_free(self.path)  # so that it is known before a model is loaded
        self._heart = Heartbeats()
        self.turns = RoundRobin()
        self.complaints = Complaints()
        self._guests: set[ClientConnection] = (
            set()
        )  # strangers, who have not said who they are, included
        self._strangers: dict[ClientConnection, None] = {}  # the oldest first
        self._door: Acceptor | None = None
        self._beating: asyncio.Task[None] | None = None
        self._leaving = False
        self._closing: asyncio.Task[None] | None = None
        self._entered_in: asyncio.AbstractEventLoop | None = None

    @property
    def clients(self) -> int:
        """How many are connected."""
        return sum(guest.served for guest in self._guests)

    @property
    def pending(self) -> int:
        """Requests of clients that are not over."""
        return self._heart.pending

    async def start(self) -> None:
        """Listen. A host is started once.

        Cancellation: nothing stays behind.

        Raises:
            EngineNotRunning: the engine does not run, or is being shut down.
            InvalidRequest: it cannot listen at ``path``, or something serves there already.
            RuntimeError: it has been started before.
        """
        self.engine.check_running()
        if self._door is not None:
            raise RuntimeError("a host is started once: make a new one")
        self._heart.engine = self.engine
        self._door = Acceptor(await SocketFile.open(self.path), lambda: ClientConnection(self))
        if self._leaving:  # meanwhile
            self._door.close()
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
        if not self._leaving:
            self._leaving = True
            if self._door is not None:
                self._door.close()
            for guest in self._guests:
                guest.put(Draining(_ASKED_TO_END))
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
        """The engine is stopped: say so to everybody."""
        if self._door is not None:
            await self._door.closed()
        guests = list(self._guests)
        for guest in guests:
            if guest.session is None:
                guest.say_last(Refused(_ASKED_TO_END))
            else:
                await guest.session.over()
                guest.say_last(Stopped(report))
        if guests:  # those who do not listen are cut off within a second
            await asyncio.wait({guest.gone for guest in guests})
        if self._beating is not None:
            self._beating.cancel()

    async def _beat_for_ever(self) -> None:
        while True:
            heartbeat = self.heartbeat()
            for guest in self._guests:
                guest.beat(heartbeat)
            await asyncio.sleep(BEAT)

    # What guests tell

    def arrived(self, guest: ClientConnection) -> str | None:
        """Somebody has connected; a reason to refuse it."""
        self._guests.add(guest)
        if self._leaving:
            return _ASKED_TO_END
        self._strangers[guest] = None
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

    def greeted(self, guest: ClientConnection, session: ClientRequests) -> str | None:
        """It has said who it is; a reason to refuse it."""
        if self._leaving:
            return _ASKED_TO_END
        if self.clients >= self._max_clients:
            return f"this host serves {self._max_clients} clients already, which is its limit"
        self._strangers.pop(guest, None)
        self._heart.sessions.add(session)
        return None

    def heartbeat(self) -> Heartbeat:
        """A sign of life."""
        return self._heart.beat()

    def request_over(self, guest: ClientConnection) -> None:
        """A request of its is over: whoever asks for statistics should have them."""
        self._heart.request_over()
        guest.put_last(self.heartbeat)

    def left(self, guest: ClientConnection) -> None:
        """Its connection is closed, and its requests are over."""
        self._guests.discard(guest)
        self._strangers.pop(guest, None)
        if guest.session is not None:
            self._heart.sessions.discard(guest.session)
