"""32 clients that come, stay, and vanish, on real sockets and a real model, for a while.

``MLX_ENGINE_LOAD_SECONDS=300`` makes it five minutes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BatchedEngine
from mlx_engine.cli.http_server import HttpServer, bound
from mlx_engine.server import create_app
from tests.conftest import other_tasks, settled
from tests.waiting import PATIENCE, until

SECONDS = float(os.environ.get("MLX_ENGINE_LOAD_SECONDS", "8"))
CLIENTS = 32

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(SECONDS + 200)]


@dataclass
class Crowd:
    """The clients, and what became of them."""

    port: int
    draw: random.Random
    ends: float
    endings: Counter[str] = field(default_factory=Counter)

    async def client(self) -> None:
        """One after another, all different."""
        while asyncio.get_running_loop().time() < self.ends:
            self.endings[await self._one()] += 1

    async def _one(self) -> str:
        draw = self.draw
        text = draw.choice(("Hi", "a" * 40, f"{draw.random()}" * 20))
        said = {"messages": [{"role": "user", "content": text}]}
        path, body = draw.choice(
            [
                ("/v1/chat/completions", said),
                ("/v1/chat/completions", {**said, "n": 2}),
                ("/v1/completions", {"prompt": text}),
                ("/v1/responses", {"input": text, "max_output_tokens": 12}),
                ("/v1/messages", said),
                ("/v1/messages/count_tokens", said),
                ("/v1/chat/completions", {"messages": 1}),
            ]
        )
        stream = draw.random() < 0.6
        data = json.dumps({"max_tokens": 12, "ignore_eos": True, **body, "stream": stream}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
        vanishes = draw.choice((None, None, "head", "body", "answer", "later"))
        try:
            writer.write(head.encode() + b"connection: close\r\n")
            if vanishes == "head":
                return "vanished"
            writer.write(b"\r\n" + (data[:9] if vanishes == "body" else data))
            await writer.drain()
            if vanishes == "body":
                return "vanished"
            if vanishes == "answer":
                await reader.read(1)
                return "vanished"
            if vanishes == "later":
                await asyncio.sleep(draw.random() * 0.05)
                return "vanished"
            return self._checked(await reader.read(), path, stream)
        finally:
            writer.transport.abort()

    def _checked(self, answer: bytes, path: str, stream: bool) -> str:
        """Whole answers alone count."""
        status = int(answer.split(b" ", 2)[1])
        if status != 200:
            assert status == 400, answer
            return "refused"
        if stream and "count" not in path:
            end = {"messages": b"message_stop", "responses": b"response.incomplete"}
            assert end.get(path.rpartition("/")[2], b"data: [DONE]") in answer, answer
        else:
            json.loads(answer.partition(b"\r\n\r\n")[2])
        return "answered"


def memory() -> int:
    """Bytes that this process has in memory."""
    gc.collect()
    told = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(told.stdout) * 1024


async def test_a_crowd_comes_and_goes(tiny_path: Path, record_property: Any) -> None:
    loop = asyncio.get_running_loop()
    engine = BatchedEngine(tiny_path, max_batch_size=8, prompt_cache_bytes=2**20)
    async with engine:
        app = create_app(engine, max_requests_per_client=1_000)
        server = HttpServer(app)
        with bound("127.0.0.1", 0) as door:
            serving = asyncio.create_task(server.serve(sockets=[door]))
            await server.listening(serving)
            sizes, objects = [], []
            endings: Counter[str] = Counter()
            for part in range(3):
                crowd = Crowd(door.getsockname()[1], random.Random(part), loop.time() + SECONDS / 3)
                async with asyncio.TaskGroup() as group:
                    for _ in range(CLIENTS):
                        group.create_task(crowd.client())
                endings += crowd.endings
                async with asyncio.timeout(PATIENCE):
                    await until(lambda: not (engine.stats().running or engine.stats().waiting))
                    await until(lambda: not server.server_state.tasks)
                sizes.append(memory())
                objects.append(len(gc.get_objects()))
            server.should_exit = True
            await serving
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.failed, stats.kv_bytes) == (0, 0, 0, 0)
        assert min(endings[how] for how in ("answered", "vanished", "refused")) > 20
        turns = app.state.models.names[tiny_path.name].turns
        assert (turns.waiting, turns._given) == (0, 0)
        assert not app.routes[0].app._site.access._busy
        assert sizes[2] - sizes[1] < 32 * 2**20, sizes
        assert objects[2] - objects[1] < 5_000, objects
        for what, value in (("endings", dict(endings)), ("bytes", sizes), ("objects", objects)):
            record_property(what, value)
    await settled()
    assert not other_tasks()
