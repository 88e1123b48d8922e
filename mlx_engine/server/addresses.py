"""Paths, as clients mean them."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile("//+")
_ABSOLUTE = re.compile("https?://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)


class Addresses:
    """An ASGI application before another one, for clients whose base is not quite the server's.

    Bases are typed in by people, with a slash at the end or without, with ``/v1`` or without; and
    some clients add a ``/v1`` of their own. A redirection would not do: not all follow it with
    their body. Those that take the server for a proxy send whole URLs, whose host stands for the
    ``Host`` header (RFC 9112, 3.2.2).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http":
            root = scope.get("root_path", "")
            rest = scope["path"].removeprefix(root)
            headers = scope["headers"]
            if whole := _ABSOLUTE.fullmatch(rest):
                host, rest = whole.groups()
                others = [(name, value) for name, value in headers if name != b"host"]
                headers = [(b"host", host.encode()), *others]
            scope = {**scope, "path": root + meant(rest), "headers": headers}
        await self._app(scope, receive, send)


def meant(path: str) -> str:
    """A path without slashes that are too many, and with one ``/v1`` at most."""
    path = _SLASHES.sub("/", path).rstrip("/") or "/"
    while path.startswith("/v1/v1/"):
        path = path.removeprefix("/v1")
    return path
