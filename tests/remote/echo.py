"""A link to a child process that sends frames back, in place of a core."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from mlx_engine.errors import MLXEngineError
from mlx_engine.remote.links.link import Ending, Link
from tests.waiting import until

CHILD = Path(__file__).with_name("echo_child.py")
LENGTH = struct.Struct(">I")


class EchoLink(Link):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._killed = False
        self._said = b""

    async def open(self) -> None:
        if self._name == "broken":
            self.gone.set_result(Ending("there is no core"))
            raise MLXEngineError("there is no core")
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-S", str(CHILD), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
            )
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._receiving = loop.create_task(self._receive(reader))
        threading.Thread(target=self._wait, args=(loop,), daemon=True).start()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                size = LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]
                self.on_frame(await reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._writer.close()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._process.stderr as stderr:  # type: ignore[union-attr]
            while piece := stderr.read1():  # type: ignore[attr-defined]
                self._said += piece
        said = self._said.decode()
        code = self._process.wait()
        asyncio.run_coroutine_threadsafe(self._end(code, said), loop)

    async def _end(self, code: int, said: str) -> None:
        await self._receiving
        self.gone.set_result(Ending(f"ended with {code}", code, said))

    def send(self, frame: bytes) -> None:
        self._writer.write(LENGTH.pack(len(frame)) + frame)

    async def dump_stacks(self) -> None:
        self._process.send_signal(signal.SIGUSR1)
        await until(lambda: b"Current thread" in self._said)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        if not self._killed and not self.gone.done():
            self._killed = True
            self._process.kill()
