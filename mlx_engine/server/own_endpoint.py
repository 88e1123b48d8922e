"""For endpoints of an application's own: work that ends when the client goes away.

Queued, in prefill or in decode: it is cancelled, and has left MLX before the endpoint is over.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_engine.core.drain import clean_up
from mlx_engine.errors import MLXEngineError
from mlx_engine.server.connected import do_while_connected
from mlx_engine.server.reply import ClientGone

T = TypeVar("T")

_GONE = 499  # nginx's; nobody gets it, but access logs have it
_EVENTS = "text/event-stream"


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``, as long as the client waits for it.

        result = await while_connected(request, engine.chat(messages))

    An endpoint that awaits its answer without this is not told of a client that goes away, and
    works to the end for nobody.

    Args:
        request: Starlette's or FastAPI's, whose body, if it has one, has been read.
        work: cancelled when the client closes its connection.

    Raises:
        HTTPException: the client has gone away, and the work is over; its status, 499, is for
            middleware and logs.
        BaseException: whatever ``work`` raises.
    """
    results: list[T] = []

    async def do() -> None:
        results.append(await work)

    try:
        await do_while_connected(request.receive, do)
    except ClientGone:
        raise _gone() from None
    return results[0]


class StreamingAnswer(StreamingResponse):
    """A ``StreamingResponse`` whose work is cancelled as soon as the client goes away.

        return StreamingAnswer(engine.stream_chat(messages).text())

    Starlette looks for that only once the response has begun, and not behind every server. This
    begins with the first text, so that an error before it has a status of its own, by the
    application's ``exception_handlers``; the client is looked after from the beginning.

    Args:
        content: texts, such as ``stream.text()``, or a generator, which keeps its stream within
            ``async with``. It is closed when the response is over.
        media_type: for ``"text/event-stream"``, proxies are told to pass events on as they come.
        failed: makes the last text out of an error of the library's behind the first text; without
            it the connection is cut, which clients notice.

    The others are those of ``StreamingResponse``.

    Raises:
        HTTPException: when it is sent: the client has gone away before the first text; 499.
    """

    def __init__(
        self,
        content: AsyncIterable[str | bytes],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = "text/plain",
        background: BackgroundTask | None = None,
        *,
        failed: Callable[[MLXEngineError], str | bytes] | None = None,
    ) -> None:
        super().__init__(content, status_code, headers, media_type, background)
        if media_type.startswith(_EVENTS):
            self.headers.setdefault("cache-control", "no-cache")
            self.headers.setdefault("x-accel-buffering", "no")
        self._failed = failed
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, until it is over or the client is gone."""
        try:
            await do_while_connected(receive, partial(self._answer, send))
        except ClientGone:
            if not self._begun:
                raise _gone() from None
        if self.background is not None:
            await self.background()

    async def _answer(self, send: Send) -> None:
        texts = aiter(self.body_iterator)
        try:
            try:
                text = await anext(texts, None)
                await self._begin(send)
                while text is not None:
                    await self._send(send, text)
                    text = await anext(texts, None)
            except MLXEngineError as error:
                if not self._begun or self._failed is None:
                    raise
                await self._send(send, self._failed(error))
            await self._send(send, b"", more=False)
        finally:
            if (close := getattr(texts, "aclose", None)) is not None:
                await clean_up(sys.exception(), close)

    async def _begin(self, send: Send) -> None:
        self._begun = True
        head = {"status": self.status_code, "headers": self.raw_headers}
        await _out(send, {"type": "http.response.start", **head})

    async def _send(self, send: Send, text: str | bytes | memoryview, *, more: bool = True) -> None:
        data = text.encode(self.charset) if isinstance(text, str) else text
        await _out(send, {"type": "http.response.body", "body": data, "more_body": more})


async def _out(send: Send, message: dict[str, object]) -> None:
    try:
        await send(message)
    except OSError as error:  # how some servers tell of a client that is gone
        raise ClientGone from error


def _gone() -> HTTPException:
    return HTTPException(_GONE, "the client has closed its connection")
