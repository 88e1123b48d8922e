"""An engine that another program hosts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits, checked_limits
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.remote.links.link import Link
from mlx_engine.remote.links.socket_file import checked_socket_path
from mlx_engine.remote.links.socket_link import SocketLink
from mlx_engine.remote.wire.frames import MAX_CLIENT_FRAME
from mlx_engine.remote.wire.heartbeat import Watchdog
from mlx_engine.remote.wire.messages import Hello, encode
from mlx_engine.strategies import EngineDefault, SpecPrefill, Strategies

# The model is loaded already: a host that says nothing for that long is stopped or stuck.
_WATCHDOG = Watchdog(start=30.0)


class RemoteEngine(LinkedEngine):
    """The engine that a program on this machine hosts on a Unix socket, shared with others.

    ``mlx-engine host MODEL --socket PATH``, or ``EngineHost``, serves there. ``start()``
    connects, and loads nothing. ``stop()`` and ``shutdown()`` end what was asked over this
    connection and then the connection; the host and its other clients go on. When the host
    goes away, requests get ``EngineDead``; ``restart()`` connects again. When it is
    asked to end, what is in flight may finish, and new requests get ``EngineStopped``.

    Requests are those of a client among others: ``stats`` and ``check_health`` are of the
    engine as a whole. ``save_prompt_cache`` and ``load_prompt_cache`` take a plain name, of a
    file in the folder that the host has for them (``--cache-folder``, ``cache_folder``); without
    one they are refused.

    What cannot go there: ``run_blocking``, logits processors, by name or not, chat templates
    among ``chat_template_kwargs``, and requests of more than 8 MiB or 131,072 values, or above
    the host's ``RequestLimits`` (``InvalidRequest``). Who has 1,024 requests or 64 MiB of them
    under way gets ``EngineBusy``; who leaves 64 MiB of answers unread is cut off
    (``EngineDead``).
    """

    frame_limit = MAX_CLIENT_FRAME

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        watchdog: Watchdog | None = _WATCHDOG,
        name: str | None = None,
        limits: RequestLimits = DEFAULT_LIMITS,
    ) -> None:
        """Make an engine; nobody is asked before it is started.

        Args:
            path: of the socket.
            watchdog: when the host counts as stuck, so that the connection is closed;
                ``None``: never. ``start`` is how long it may take to say a first word.
            name: for logs.
            limits: how large a request may be; the host has its own as well.

        Raises:
            InvalidRequest: an argument is of the wrong type; ``path`` is too long for a
                socket.
        """
        self._path = checked_socket_path(path)
        self.limits = checked_limits(limits)
        super().__init__(name or f"engine at {self._path}", watchdog, None)

    def _make_link(self) -> Callable[[], Link]:
        return functools.partial(SocketLink, self._path)

    def _greeting(self) -> Callable[[int | None], bytes]:
        return lambda _: encode([Hello()])

    def _file_there(self, path: Path) -> str:
        return str(path)  # a name in the host's folder

    def check_strategies(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> None:
        # What its engine was made with is for the host to check; their kinds are not.
        Strategies().of_request("default" if isinstance(prefill, SpecPrefill) else prefill, decode)
