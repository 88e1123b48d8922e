"""Who may ask, and how much at once."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import urlsplit

from mlx_engine.errors import InvalidRequest
from mlx_engine.server.failures import Failure

Scope = Any  # ASGI's

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Access:
    """Keys, host names, and the requests of each client.

    Args:
        keys: of which a client needs one; without any, everybody may ask.
        hosts: names that the server may be called by; ``None`` takes all. A page in a browser can
            have its own name point here (DNS rebinding), but not choose what is sent as that.
        most: requests that a client may have in work or waiting.

    Raises:
        InvalidRequest: a key is empty, or cannot be sent.
    """

    def __init__(self, keys: Collection[str], hosts: Collection[str] | None, most: int) -> None:
        if isinstance(keys, str) or not all(key and key.isascii() for key in keys):
            raise InvalidRequest("api_keys", "must be a list of texts in ASCII, none of them empty")
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._most = most
        self._busy: Counter[bytes] = Counter()

    @property
    def keyed(self) -> bool:
        """Whether clients need a key."""
        return bool(self._keys)

    def check(self, scope: Scope, *, keyed: bool = True) -> bytes:
        """Whether it may come in; a name of the client for ``place``.

        Args:
            keyed: whether a key is needed, if there are keys.

        Raises:
            Failure: it may not.
        """
        headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        self._check_host(headers)
        if self._keys and keyed:
            # Clients send both, where one is what another server's key is told by.
            given = headers.get(b"x-api-key", b""), _bearer(headers.get(b"authorization", b""))
            for digest in map(_digest, given):
                # All keys, each in constant time: nothing is told of how near a guess has come.
                if sum(hmac.compare_digest(digest, key) for key in self._keys):
                    return digest
            raise Failure("key", "the API key is missing or wrong")
        client = scope.get("client")
        return str(client[0] if client else "").encode()

    def check_place(self, client: bytes) -> None:
        """Whether a client has a place left.

        Raises:
            Failure: it has none.
        """
        if self._busy[client] >= self._most:
            said = f"this client has {self._most} requests in work already, which is the most"
            raise Failure("busy", said, retry_after=1)

    @contextlib.contextmanager
    def place(self, client: bytes) -> Iterator[None]:
        """One of the places that a client has.

        Raises:
            Failure: it has none left.
        """
        self.check_place(client)
        self._busy[client] += 1
        try:
            yield
        finally:
            self._busy[client] -= 1
            if not self._busy[client]:
                del self._busy[client]

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if self._hosts is None:
            return
        host = _host(b"//" + headers.get(b"host", b""))
        if host not in self._hosts:
            raise Failure("forbidden", "this server is not known by the name in the Host header")
        origin = headers.get(b"origin", b"")
        if origin.startswith((b"http:", b"https:")) and _host(origin) not in self._hosts:
            raise Failure("forbidden", "pages of other sites may not use this server")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _bearer(header: bytes) -> bytes:
    kind, _, key = header.partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""


def _host(url: bytes) -> str | None:
    try:
        return urlsplit(url.decode("latin-1")).hostname
    except ValueError:
        return None
