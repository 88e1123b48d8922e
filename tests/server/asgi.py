"""A driver of ASGI applications, in the place of a server and its sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

CHAT = "/v1/chat/completions"


class Client:
    """One request to an application, and what has been answered so far.

    Args:
        app: the application.
        slow: whether it reads nothing: what is sent to it waits until it has gone.
    """

    def __init__(
        self,
        app: Any,
        path: str = CHAT,
        body: object = None,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        slow: bool = False,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.data = b""
        self.over = False  # the response is complete
        self._app = app
        self._given = [data]
        self._gone = asyncio.Event()
        self._slow = slow
        self._cut = False
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (k.lower().encode(), v.encode())
                for k, v in {"host": "localhost:8080", **(headers or {})}.items()
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8080),
        }

    async def run(self) -> Client:
        """Ask, until the application is done with it."""
        await self._app(self._scope, self._receive, self._send)
        return self

    def leave(self) -> None:
        """Close the connection."""
        self._gone.set()

    def cut(self) -> None:
        """Close it, so that nothing can be sent any more."""
        self._cut = True
        self._gone.set()

    @property
    def left(self) -> bool:
        """Whether it has closed the connection."""
        return self._gone.is_set()

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> list[Any]:
        """Data of the events; the last one of a chat completion is no JSON."""
        lines = [line[6:] for line in self.data.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    async def _receive(self) -> dict[str, Any]:
        if self._given:
            return {"type": "http.request", "body": self._given.pop(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self._cut:
            raise OSError("the connection is closed")
        assert not self.over, "the response was complete"
        if message["type"] == "http.response.start":
            assert not self.status, "the response had begun"
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            for value in self.headers.values():  # what servers refuse to send
                assert value == value.strip()
                assert value.isprintable()
            return
        assert self.status, "the response has not begun"
        self.over = not message.get("more_body", False)
        if self._slow:
            await self._gone.wait()
        self.data += message["body"]


async def ask(app: Any, body: object, path: str = CHAT, **options: Any) -> Client:
    """Ask, and wait for the whole answer."""
    client = await Client(app, path, body, **options).run()
    assert client.over
    return client
