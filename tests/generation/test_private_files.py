"""Files with prompts in them: only their owner reads them, and nothing but a file is replaced."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from mlx_engine import InvalidRequest, SimpleEngine
from mlx_engine.generation.cache.entry_file import EntryWriter
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.testing.fake_cache import FakePromptCache
from tests.generation.slices import load, save
from tests.generation.test_prompt_cache import MB, kv, on_mlx_thread, words
from tests.remote.hosting import short_folder

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine_type() -> type[SimpleEngine]:
    return SimpleEngine


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def stored() -> PromptCache:
    cache = PromptCache(MB)
    cache.store(words(1, 50), kv(50))
    return cache


@on_mlx_thread
def test_a_prompt_cache_is_its_owners_alone_whatever_the_umask(
    engine: SimpleEngine, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    write = EntryWriter.write

    def spy(writer: EntryWriter, data: memoryview) -> None:
        seen.extend(map(mode, tmp_path.iterdir()))
        write(writer, data)
        seen.extend(map(mode, tmp_path.iterdir()))

    monkeypatch.setattr(EntryWriter, "write", spy)
    assert save(tmp_path / "cache", stored(), "model") == 1
    assert seen == [0o600, 0o600], "while it is written too"
    assert mode(tmp_path / "cache") == 0o600
    assert load(tmp_path / "cache", PromptCache(MB), "model", kv(1)) == 1


@on_mlx_thread
def test_what_the_old_file_forbids_stays_forbidden(engine: SimpleEngine, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    for before, after in ((0o644, 0o600), (0o400, 0o400), (0o666, 0o600)):
        path.write_bytes(b"old")
        path.chmod(before)
        save(path, stored(), "model")
        assert mode(path) == after
        path.unlink()


@contextmanager
def fifo(path: Path) -> Iterator[None]:
    os.mkfifo(path)
    yield


@contextmanager
def unix_socket(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        yield


@contextmanager
def link_to_a_fifo(path: Path) -> Iterator[None]:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))
    yield


@contextmanager
def link_to_a_device(path: Path) -> Iterator[None]:
    """A terminal: where those are no file can be made, so that nothing is lost if this fails."""
    ends = os.openpty()
    path.symlink_to(os.ttyname(ends[1]))
    yield
    for end in ends:
        os.close(end)


@contextmanager
def folder(path: Path) -> Iterator[None]:
    path.mkdir()
    yield


@pytest.mark.parametrize("make", [fifo, unix_socket, link_to_a_fifo, link_to_a_device, folder])
@on_mlx_thread
def test_what_is_no_regular_file_is_neither_replaced_nor_read(
    engine: SimpleEngine, make: Callable[[Path], AbstractContextManager[None]]
) -> None:
    with short_folder() as there, make(path := there / "cache"):
        before = path.lstat(), path.stat(), sorted(there.iterdir())
        for cache in (stored(), FakePromptCache()):
            with pytest.raises(InvalidRequest, match=r"no regular file|a folder"):
                if isinstance(cache, FakePromptCache):
                    cache.save(path)
                else:
                    save(path, cache, "model")
        with pytest.raises(InvalidRequest, match="no regular file"):
            load(path, stored(), "model", kv(1))
        with pytest.raises(InvalidRequest, match="no regular file"):
            FakePromptCache().load(path)
        after = path.lstat(), path.stat(), sorted(there.iterdir())
        for old, new in zip(before[:2], after[:2], strict=True):
            assert (old.st_ino, old.st_mode) == (new.st_ino, new.st_mode)  # type: ignore[attr-defined]
        assert before[2] == after[2]


@on_mlx_thread
def test_a_link_to_a_file_that_is_not_there_yet_makes_it_there(
    engine: SimpleEngine, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "cache")
    assert save(link, stored(), "model") == 1
    assert link.is_symlink()
    assert mode(tmp_path / "there" / "cache") == 0o600


def test_a_fake_prompt_cache_is_its_owners_alone_too(tmp_path: Path, umask: int) -> None:
    cache = FakePromptCache()
    cache.store([1, 2, 3])
    assert cache.save(tmp_path / "cache") == 1
    assert mode(tmp_path / "cache") == 0o600
    assert FakePromptCache().load(tmp_path / "cache") == 1


def test_a_fake_prompt_cache_has_an_end() -> None:
    cache = FakePromptCache()
    for number in range(3000):
        cache.store([number, *range(100)])
        cache.look_up([number - 1, *range(50)])
    stats = cache.stats()
    assert stats.entries <= 256
    assert stats.stored == 3000
    assert stats.evicted == stats.stored - stats.entries
    assert stats.hits == 2999
    assert cache.look_up([2999, *range(100)]) == 100
    assert cache.look_up([5, *range(100)]) == 0


def test_what_a_fake_prompt_cache_used_last_stays() -> None:
    cache = FakePromptCache()
    cache.store([7, 7, 7])
    for number in range(1000):
        cache.store([1000 + number])
        assert cache.look_up([7, 7, 7, 7]) == 3
    cache.store(range(2_000_000))
    assert cache.stats().refused == 1
    assert cache.look_up([7, 7, 7, 7]) == 3
