"""The socket of a host: who may connect, what it replaces, and why nobody answers."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

from mlx_engine import (
    BaseEngine,
    EngineDead,
    EngineState,
    InvalidRequest,
)
from mlx_engine.remote.remote_engine import RemoteEngine
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.wire.heartbeat import Watchdog
from tests.remote.hosting import (
    PROMPT,
    short_folder,
)
from tests.waiting import turns

pytestmark = pytest.mark.anyio
LOG = "mlx_engine.host"


async def test_only_its_owner_can_connect_to_the_socket(host: EngineHost) -> None:
    mode = os.stat(host.path).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_a_living_host_is_not_replaced_and_does_not_notice(
    engine: BaseEngine, host: EngineHost, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidRequest, match=f"another host serves on {host.path}"):
        EngineHost(engine, host.path)  # type: ignore[arg-type]
    await turns()
    assert caplog.records == []


async def test_the_socket_of_a_dead_host_is_replaced_and_other_files_never_are(
    engine: BaseEngine,
) -> None:
    with short_folder() as folder:
        path = folder / "socket"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        async with EngineHost(engine, path), RemoteEngine(path) as remote:  # type: ignore[arg-type]
            assert (await remote.generate(PROMPT, max_tokens=1)).tokens
        for make in (path.touch, path.mkdir, lambda: path.symlink_to(folder)):
            make()
            with pytest.raises(InvalidRequest, match="exists and is not a socket"):
                EngineHost(engine, path)  # type: ignore[arg-type]
            assert list(folder.iterdir()) == [path]
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


async def test_of_two_hosts_that_start_at_once_on_a_stale_socket_one_serves(
    engine: BaseEngine,
) -> None:
    with short_folder() as folder:
        path = folder / "socket"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        hosts = [EngineHost(engine, path) for _ in range(5)]  # type: ignore[arg-type]
        outcomes = await asyncio.gather(*(h.start() for h in hosts), return_exceptions=True)
        refused = [outcome for outcome in outcomes if outcome is not None]
        assert len(refused) == 4
        assert all("another host serves" in str(outcome) for outcome in refused)
        assert list(folder.iterdir()) == [path]
        for host in hosts:
            await host.stop()
        assert list(folder.iterdir()) == []


async def test_a_socket_that_another_host_has_put_there_stays(engine: BaseEngine) -> None:
    with short_folder() as folder:
        path = folder / "socket"
        async with EngineHost(engine, path):  # type: ignore[arg-type]
            path.unlink()
            path.touch()
        assert path.exists()


@pytest.mark.parametrize("path", ["", 3, None, b"socket", "a\0b", "x" * 200])
def test_a_path_that_no_socket_can_have_is_named(path: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^path: ") as caught:
        RemoteEngine(path)
    assert caught.value.option == "path"


async def test_the_longest_path_works_for_host_and_client(engine: BaseEngine) -> None:
    with short_folder() as folder:
        path = folder / ("x" * (103 - len(str(folder)) - 1))
        async with EngineHost(engine, path), RemoteEngine(path) as remote:  # type: ignore[arg-type]
            assert (await remote.generate(PROMPT, max_tokens=1)).tokens
        with pytest.raises(InvalidRequest, match="there is no folder"):
            EngineHost(engine, folder / "none" / "socket")  # type: ignore[arg-type]


async def test_why_nobody_answers_is_told(tmp_path: Path) -> None:
    with short_folder() as folder:
        (folder / "file").touch()
        with pytest.raises(EngineDead, match="is not a socket"):
            await RemoteEngine(folder / "file").start()
        with socket.socket(socket.AF_UNIX) as mute:
            mute.bind(str(folder / "mute"))
            mute.listen(5)
            silent = RemoteEngine(folder / "mute", watchdog=Watchdog(start=0.3))
            with pytest.raises(EngineDead, match=r"Watchdog.start=0.3"):
                await silent.start()
            assert silent.state is EngineState.CREATED
            task = asyncio.create_task(RemoteEngine(folder / "mute").start())
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_something_else_than_a_host_at_the_socket_is_an_error_of_start() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        await reader.read()  # or the client may see a closed connection before these words
        writer.close()

    with short_folder() as folder:
        server = await asyncio.start_unix_server(babble, folder / "socket")
        with pytest.raises(EngineDead, match="makes no sense"):
            await RemoteEngine(folder / "socket").start()
        server.close()
