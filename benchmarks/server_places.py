"""Servers and a client for ``benchmarks.server``: as little of either as can be measured with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from socket import create_server
from typing import Any

import uvicorn

from mlx_engine import BaseEngine, BatchedEngine
from mlx_engine.server import create_app

CHAT = "/v1/chat/completions"
ROWS = 32
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_PATIENCE = 120.0  # seconds for a server to start, or to end


@dataclass(frozen=True, slots=True)
class Told:
    """One answer.

    Attributes:
        text: of it.
        first: seconds until its first text was there; of a whole answer, all of it.
        seconds: until its end.
        prompt, cached: tokens of its prompt, and those of them that had not to be computed.
        tokens: of it.
    """

    text: str
    first: float
    seconds: float
    prompt: int
    cached: int
    tokens: int


class Http:
    """A server by its port."""

    def __init__(self, port: int, model: str) -> None:
        self.port = port
        self.model = model

    async def connect(self) -> Connection:
        """A connection, so that it is not measured how many a server takes at a moment."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)

    async def stream(
        self, messages: list[Any], connection: Connection | None = None, **options: Any
    ) -> Told:
        """A streamed answer."""
        start = time.perf_counter()
        body = {"stream": True, "stream_options": {"include_usage": True}}
        reader, writer = await self.open(messages, connection, **body, **options)
        texts: list[str] = []
        first, usage = 0.0, dict[str, Any]()
        try:
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    if line.startswith(b"data: [DONE]"):
                        break
                    continue
                told = json.loads(line[6:])
                usage = told.get("usage") or usage
                for choice in told.get("choices", ()):
                    if text := choice["delta"].get("content"):
                        first = first or time.perf_counter()
                        texts.append(text)
        finally:
            writer.close()
        return _told("".join(texts), first - start, time.perf_counter() - start, usage)

    async def whole(self, messages: list[Any], **options: Any) -> Told:
        """An answer that is not streamed."""
        start = time.perf_counter()
        reader, writer = await self.open(messages, **options)
        try:
            length = 0
            while (line := await reader.readline()).strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            told = json.loads(await (reader.readexactly(length) if length else reader.read()))
        finally:
            writer.close()
        seconds = time.perf_counter() - start
        text = told["choices"][0]["message"].get("content") or ""
        return _told(text, seconds, seconds, told["usage"])

    async def open(
        self, messages: list[Any], connection: Connection | None = None, **options: Any
    ) -> Connection:
        """Ask, and wait for the status; what follows is to be read."""
        reader, writer = await self.send(messages, connection, **options)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"{status!r}: {await reader.read(2000)!r}")
        return reader, writer

    async def send(
        self, messages: list[Any], connection: Connection | None = None, **options: Any
    ) -> Connection:
        """Ask; all that is answered is to be read."""
        reader, writer = connection or await self.connect()
        body = json.dumps({"model": self.model, "messages": messages, **options}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return reader, writer


class Here:
    """An engine in this process, asked as a server is."""

    def __init__(self, engine: BaseEngine) -> None:
        self.engine = engine

    async def connect(self) -> None:
        """Nothing: there is no connection."""

    async def stream(
        self, messages: list[Any], connection: Connection | None = None, **options: Any
    ) -> Told:
        """A streamed answer."""
        start = time.perf_counter()
        first = 0.0
        async with self.engine.stream_chat(messages, **_own(options)) as stream:
            async for chunk in stream:
                if chunk.text:
                    first = first or time.perf_counter()
        return self._told(stream.result, first - start, time.perf_counter() - start)

    async def whole(self, messages: list[Any], **options: Any) -> Told:
        """An answer that is not streamed."""
        start = time.perf_counter()
        result = await self.engine.chat(messages, **_own(options))
        seconds = time.perf_counter() - start
        return self._told(result, seconds, seconds)

    def _told(self, result: Any, first: float, seconds: float) -> Told:
        usage = result.usage
        counts = usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
        return Told(result.text, first, seconds, *counts)


Place = Http | Here


def _own(options: dict[str, Any]) -> dict[str, Any]:
    bias = {int(token): value for token, value in options.get("logit_bias", {}).items()}
    return {**options, "logit_bias": bias}


def _told(text: str, first: float, seconds: float, usage: dict[str, Any]) -> Told:
    details = usage.get("prompt_tokens_details") or {}
    counts = usage["prompt_tokens"], details.get("cached_tokens") or 0, usage["completion_tokens"]
    return Told(text, first, seconds, *counts)


def free_port() -> int:
    """One that nobody listens on."""
    with create_server(("127.0.0.1", 0)) as door:
        return int(door.getsockname()[1])


@contextlib.asynccontextmanager
async def started(*command: str, port: int, model: str) -> AsyncIterator[Http]:
    """A server in a process of its own, once it answers."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    place = Http(port, model)
    try:
        async with asyncio.timeout(_PATIENCE):
            while True:
                if process.returncode is not None:
                    raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
                with contextlib.suppress(OSError):
                    await place.whole([{"role": "user", "content": "Hi"}], max_tokens=1)
                    break
                await asyncio.sleep(0.1)
        yield place
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def everywhere(model: str) -> AsyncIterator[dict[str, Place]]:
    """An engine in this process, and servers around it and around others of the same model."""
    async with contextlib.AsyncExitStack() as stack:
        engine = BatchedEngine(model, max_batch_size=ROWS)
        await stack.enter_async_context(engine)
        here = Here(engine)
        places: dict[str, Place] = {"in process": here, "in process again": here}
        own = ["-m", "mlx_engine", "serve", "--quiet", "--model", f"model={model}"]
        own += ["--max-batch-size", str(ROWS)]
        for name, more in (("serve", []), ("serve --in-process", ["--in-process"])):
            port = free_port()
            command = [*own, *more, "--port", str(port)]
            places[name] = await stack.enter_async_context(
                started(*command, port=port, model="model")
            )
        port = free_port()
        command = ["-m", "mlx_lm", "server", "--model", model, "--port", str(port)]
        command += ["--decode-concurrency", str(ROWS), "--log-level", "ERROR"]
        places["mlx_lm.server"] = await stack.enter_async_context(
            started(*command, port=port, model=model)
        )
        yield places


@contextlib.asynccontextmanager
async def served_here(engine: BaseEngine) -> AsyncIterator[Http]:
    """A server in this process, so that what its engine does can be seen."""
    port = free_port()
    config = uvicorn.Config(create_app(engine), port=port, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield Http(port, engine.model or "model")
    finally:
        server.should_exit = True
        await serving
