"""A client of a host names no files of the host's user."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlx_engine import BaseEngine, BatchedEngine, InvalidRequest
from mlx_engine.remote.remote_engine import RemoteEngine
from mlx_engine.remote.serving import cache_folder
from mlx_engine.remote.serving.cache_folder import CacheFolder
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.wire.messages import CacheFile, ErrorReply
from tests.remote.hosting import PROMPT, Stranger, client, generate, hosted

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine_type() -> type[BatchedEngine]:
    return BatchedEngine


async def test_a_client_replaces_and_reads_no_file_of_the_hosts_user(
    host: EngineHost, remote: RemoteEngine, tmp_path: Path
) -> None:
    victim = tmp_path / ".zshrc"
    victim.write_text("export EDITOR=ed\n")
    assert (await remote.generate(PROMPT, max_tokens=2)).tokens
    for path in (victim, tmp_path / "new", "name"):
        for ask in (remote.save_prompt_cache, remote.load_prompt_cache):
            with pytest.raises(InvalidRequest, match=r"keeps no prompt caches.*--cache-folder"):
                await ask(path)
    assert victim.read_text() == "export EDITOR=ed\n"
    assert list(tmp_path.iterdir()) == [victim]
    assert (await remote.generate(PROMPT, max_tokens=2)).tokens


BAD = [
    "",
    ".",
    "..",
    "../cache",
    "/etc/passwd",
    "folder/cache",
    "./cache",
    ".hidden",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 300,
    "pipe",
    "link",
    "there",
]


@pytest.mark.parametrize("action", ["save", "load"])
async def test_with_a_folder_a_client_gives_plain_names_of_files_in_it(
    engine: BaseEngine, tmp_path: Path, action: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "there").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    (folder / "link").symlink_to(outside)
    async with (
        hosted(engine, cache_folder=folder) as host,
        Stranger.at(host, hello=True) as stranger,
    ):
        names = [name for name in BAD if name.isascii()]
        await stranger.say(*(CacheFile(n, action, name) for n, name in enumerate(names, 1)))  # type: ignore[arg-type]
        while len(stranger.heard) < 1 + len(names):
            assert await stranger.hear()
        assert all(isinstance(said, ErrorReply) for said in stranger.heard[1:])
        assert {said.kind for said in stranger.heard[1:]} == {"InvalidRequest"}  # type: ignore[union-attr]
    assert outside.read_text() == "untouched"
    assert sorted(one.name for one in folder.iterdir()) == ["link", "pipe", "there"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "outside"]


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path)
    for name in BAD[:-3]:
        for to_be_written in (True, False):
            with pytest.raises(InvalidRequest) as refused:
                folder.path(name, to_be_written=to_be_written)
            assert refused.value.option == "path"
            assert len(str(refused.value)) < 400
    assert folder.path("chat 1.cache", to_be_written=True) == tmp_path / "chat 1.cache"


def test_a_folder_that_is_full_takes_no_new_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "_MOST_FILES", 3)
    folder = CacheFolder(tmp_path)
    for name in ("a", "b", "c"):
        folder.path(name, to_be_written=True).touch()
    with pytest.raises(InvalidRequest, match="3 files already"):
        folder.path("d", to_be_written=True)
    assert folder.path("a", to_be_written=True) == tmp_path / "a"
    assert folder.path("d", to_be_written=False) == tmp_path / "d"


async def test_a_folder_that_is_none_is_refused_before_anybody_is_served(
    engine: BaseEngine, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "none", tmp_path / "file", "", 5, "a\0b"):
        with pytest.raises(InvalidRequest) as refused:
            EngineHost(engine, tmp_path / "s", cache_folder=wrong)  # type: ignore[arg-type]
        assert refused.value.option == "cache_folder"


async def test_a_stranger_gets_no_megabytes_of_its_own_words_back(host: EngineHost) -> None:
    long = "x" * 2_000_000
    async with Stranger.at(host, hello=True) as stranger:
        stranger.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        for number, params in enumerate(({long: 1}, {"stop": [long, 7]}, {"seed": long}), 1):
            message = generate(number)
            message.params = params
            await stranger.say(message)
        while len(stranger.heard) < 4:
            assert await stranger.hear()
        for said in stranger.heard[1:]:
            assert isinstance(said, ErrorReply)
            assert said.kind == "InvalidRequest"
            assert len(said.message) <= 4000
            assert all(len(str(value)) <= 4000 for value in said.state.values())


async def test_clients_share_what_is_in_the_folder(engine: BaseEngine, tmp_path: Path) -> None:
    async with hosted(engine, cache_folder=tmp_path) as host:
        async with client(host) as one:
            await one.generate(PROMPT * 30, max_tokens=3)
            assert await one.save_prompt_cache("chat.cache") == 1
        async with client(host) as other:
            assert await other.load_prompt_cache("chat.cache") == 1
            with pytest.raises(InvalidRequest, match="no plain name"):
                await other.save_prompt_cache(tmp_path / "chat.cache")
    assert [one.name for one in tmp_path.iterdir()] == ["chat.cache"]
