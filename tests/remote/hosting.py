"""A host in this process, strangers that talk to it byte by byte, and clients in processes."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from mlx_engine import BaseEngine, GenerationResult
from mlx_engine.remote.remote_engine import RemoteEngine
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.wire.frames import FrameSplitter, framed
from mlx_engine.remote.wire.messages import (
    Generate,
    Heartbeat,
    Hello,
    Refused,
    ToClient,
    decode_from_server,
    encode,
)
from tests.waiting import PATIENCE, until

PROMPT = [1, 2, 3]
ENDLESS = 16000  # tokens


@contextmanager
def short_folder() -> Iterator[Path]:
    """Not pytest's, whose path may be too long for a socket, on macOS for one."""
    folder = Path(tempfile.mkdtemp(prefix="mlx", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def hosted(engine: BaseEngine, **options: Any) -> AsyncIterator[EngineHost]:
    """A host of a running engine."""
    with short_folder() as folder:
        async with EngineHost(engine, folder / "socket", **options) as host:  # type: ignore[arg-type]
            yield host
        assert list(folder.iterdir()) == [], "nothing is left beside the socket either"


@asynccontextmanager
async def client(host: EngineHost) -> AsyncIterator[RemoteEngine]:
    async with RemoteEngine(host.path) as remote:
        yield remote


def endless(engine: BaseEngine) -> asyncio.Task[GenerationResult]:
    return asyncio.create_task(engine.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True))


async def running(host: EngineHost, count: int = 1) -> None:
    await until(lambda: host.pending == count, "requests arrive")
    await until(lambda: host.engine.stats().running, "and are taken up")


async def free(host: EngineHost) -> None:
    await until(lambda: not host.pending, "requests end")
    stats = host.engine.stats()
    assert stats.running == stats.waiting == 0


class Stranger:
    """Somebody on the socket who may say anything."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._frames = FrameSplitter()
        self.heard: list[ToClient] = []

    @classmethod
    @asynccontextmanager
    async def at(cls, host: EngineHost, *, hello: bool = False) -> AsyncIterator[Stranger]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, host.path)
            stranger = cls(sock)
            if hello:
                await stranger.say(Hello())
                await stranger.hear()
            yield stranger

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def say(self, *messages: Any) -> None:
        await self.send(framed(encode(list(messages))))

    async def hear(self) -> bool:
        """Read what there is; ``False`` at the end of the connection."""
        try:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        except ConnectionError:
            return False
        for frame in self._frames.feed(data):
            self.heard += [m for m in decode_from_server(frame) if not isinstance(m, Heartbeat)]
        return bool(data)

    async def end(self) -> list[ToClient]:
        """Everything it is told until the connection is closed."""
        async with asyncio.timeout(PATIENCE):
            while await self.hear():
                pass
        return self.heard

    async def refusal(self) -> str:
        """Why it is sent away."""
        last = (await self.end())[-1]
        assert isinstance(last, Refused)
        return last.reason


def generate(number: int, max_tokens: int = ENDLESS, *, stream: bool = False) -> Generate:
    """A request by hand."""
    params = {"max_tokens": max_tokens, "ignore_eos": True}
    return Generate(number, PROMPT, None, params, 0, "default", "default", stream, False)
