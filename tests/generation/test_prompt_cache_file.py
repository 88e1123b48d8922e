"""A prompt cache in a file: all of it comes back, or an error says why not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)
from mlx_lm.models.deepseek_v41 import LayerCache

from mlx_engine import InvalidRequest, SimpleEngine
from mlx_engine.core.stop import Interrupted
from mlx_engine.generation.cache import array_bytes, entry_file
from mlx_engine.generation.cache.entry_file import EntryReader, EntryWriter, digest_of
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.cache.prompt_cache_file import fingerprint
from mlx_engine.generation.cache.snapshot import arrays
from tests.conftest import ROOT, make_tiny
from tests.generation.slices import TurnsHere, load, nothing, save
from tests.generation.test_prompt_cache import (
    MB,
    frozen,
    greedy,
    hybrid,
    kv,
    llama,
    on_mlx_thread,
    put,
    quantized,
    recurrent,
    windowed,
    words,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine_type() -> type[SimpleEngine]:
    """Of either kind of engine only the MLX thread and the model are used here."""
    return SimpleEngine


def filled(model: Any, sizes: list[int]) -> PromptCache:
    stored = PromptCache(16 * MB)
    for size in sizes:
        assert stored.store(words(size, size), put(model, words(size, size)))
    return stored


def refused(path: Path, match: str, *, limit: int = MB, template: Any = None) -> InvalidRequest:
    """Load, into a cache that must stay as it was."""
    stored = PromptCache(limit)
    stored.store(words(1, 20), kv(20))
    before = stored.stats()
    with pytest.raises(InvalidRequest, match=match) as caught:
        load(path, stored, "model", template or kv(1))
    assert caught.value.option == "path"
    assert str(path) in str(caught.value)
    assert stored.stats() == before
    return caught.value


@pytest.mark.parametrize("make", [llama, hybrid, recurrent, windowed])
@on_mlx_thread
def test_what_was_saved_comes_back(
    engine: SimpleEngine, tmp_path: Path, make: Callable[..., Any]
) -> None:
    model = make(engine) if make is llama else make()
    old, path = filled(model, [20, 60, 45]), tmp_path / "cache.bin"
    old.fetch([*words(20, 20), 1])  # now the latest
    assert save(path, old, "model") == 3
    new = PromptCache(16 * MB)
    assert load(path, new, "model", put(model, [1])) == 3
    assert os.listdir(tmp_path) == ["cache.bin"]
    for a, b in zip(old.entries(), new.entries(), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert (a.prefilled, a.trimmable, a.first, a.last) == (
            b.prefilled,
            b.trimmable,
            b.first,
            b.last,
        )
        assert frozen(a.cache) == frozen(b.cache)
        assert [array.dtype for array in arrays(a.cache)] == [
            array.dtype for array in arrays(b.cache)
        ]
    path.unlink()  # nothing is bound to it any more
    for size in [20, 60, 45]:
        prompt = [*words(size, size), 9]
        answers = [greedy(model, each.fetch(prompt).cache, 9, 5)[0] for each in (old, new)]
        assert answers[0] == answers[1] == greedy(model, put(model, prompt[:-1]), 9, 5)[0]


@on_mlx_thread
def test_quantised_caches_come_back(engine: SimpleEngine, tmp_path: Path) -> None:
    model, path = llama(engine), tmp_path / "cache"
    old, new = (PromptCache(MB, grid=16, quantized_from=30) for _ in range(2))
    for size in (20, 60):  # one of them is not quantised yet
        prompt = words(size, size)
        assert old.store(prompt, quantized(model, prompt, None, 16, 30), prefilled=size)
    save(path, old, "model")
    template = quantized(model, [1], None, 16, 0)
    assert load(path, new, "model", template) == 2
    for size in (20, 60):
        a, b = (each.fetch([*words(size, size), 9]) for each in (old, new))
        assert a.cached == b.cached == size // 16 * 16
        assert greedy(model, a.cache, 9, 5)[0] == greedy(model, b.cache, 9, 5)[0]
    with pytest.raises(InvalidRequest, match="kv_bits"):
        load(path, PromptCache(MB, grid=16, quantized_from=30), "model", put(model, [1]))
    with pytest.raises(InvalidRequest, match="prefill_step_size"):
        load(path, PromptCache(MB, grid=32, quantized_from=30), "model", template)


@on_mlx_thread
def test_other_kinds_and_dtypes_come_back(engine: SimpleEngine, tmp_path: Path) -> None:
    def made(count: int) -> Any:
        state, chunked, unused = ArraysCache(3), ChunkedKVCache(16), KVCache()
        state[1] = mx.ones((1, 3), dtype=mx.bfloat16)
        keys = mx.random.normal((1, 2, count, 4)).astype(mx.bfloat16)
        chunked.update_and_fetch(keys, keys)
        chunked.maybe_trim_front()
        index = KVCache()  # deepseek_v32's has no values
        index.update_and_fetch(keys, mx.zeros((1, 2, count, 0)))
        window = RotatingKVCache(max_size=16)
        window.update_and_fetch(keys, keys)
        window.update_and_fetch(keys[:, :, :1], keys[:, :, :1])
        chunked.update_and_fetch(keys[:, :, :1], keys[:, :, :1])
        index.update_and_fetch(keys[:, :, :1], mx.zeros((1, 2, 1, 0)))
        return [CacheList(state, CacheList(index)), chunked, unused, window]

    old, new, path = PromptCache(MB), PromptCache(MB), tmp_path / "cache"
    assert old.store(words(1, 41), made(40))
    assert save(path, old, "model") == 1
    assert load(path, new, "model", made(1)) == 1
    assert frozen(old.entries()[0].cache) == frozen(new.entries()[0].cache)
    for a, b in zip(old.entries()[0].cache[1:], new.entries()[0].cache[1:], strict=True):
        scalars = [name for name, value in vars(a).items() if isinstance(value, int)]
        assert [getattr(a, name) for name in scalars] == [getattr(b, name) for name in scalars]


@on_mlx_thread
def test_caches_of_unknown_classes_are_left_out(engine: SimpleEngine, tmp_path: Path) -> None:
    layer, stored = LayerCache(4), PromptCache(MB)
    layer.update_window(mx.ones((1, 20, 2)))
    assert stored.store(words(1, 20), [layer])
    assert stored.store(words(2, 30), kv(30))
    assert save(tmp_path / "cache", stored, "model") == 1


@on_mlx_thread
def test_the_latest_are_kept_when_the_limit_is_small(engine: SimpleEngine, tmp_path: Path) -> None:
    old, path = PromptCache(MB), tmp_path / "cache"
    for seed in range(4):
        old.store(words(seed, 32), kv(32))
    save(path, old, "model")
    new = PromptCache(2 * 32 * 64)
    new.store(words(9, 20), kv(20))
    assert load(path, new, "model", kv(1)) == 2
    assert [entry.tokens.tolist() for entry in new.entries()] == [words(2, 32), words(3, 32)]
    more = PromptCache(MB)
    more.store(words(9, 20), kv(20))
    assert load(path, more, "model", kv(1)) == 4
    assert len(more) == 5, "what was there is still there"


@on_mlx_thread
def test_an_empty_cache_can_be_saved(engine: SimpleEngine, tmp_path: Path) -> None:
    assert save(tmp_path / "cache", PromptCache(MB), "model") == 0
    assert load(tmp_path / "cache", PromptCache(MB), "model", kv(1)) == 0


@on_mlx_thread
def test_a_broken_file_says_so_and_changes_nothing(engine: SimpleEngine, tmp_path: Path) -> None:
    path, stored = tmp_path / "cache", PromptCache(MB)
    refused(path, "no such file")
    refused(tmp_path, "no regular file")
    stored.store(words(1, 100), kv(100))
    save(path, stored, "model")
    whole = path.read_bytes()
    for size in [0, 5, 60, 600, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path, "no readable prompt cache.*delete it")
    path.write_bytes(b"\xff" * 300)
    refused(path, "no readable prompt cache")
    path.write_bytes(whole)
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.ones(3)})
    refused(tmp_path / "x.safetensors", "no readable prompt cache")
    assert load(path, stored, "model", kv(1)) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
@on_mlx_thread
def test_a_file_that_may_not_be_read_says_so(engine: SimpleEngine, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    save(path, PromptCache(MB), "model")
    path.chmod(0)
    refused(path, "Permission")


@pytest.mark.parametrize("at", range(1, 9))
async def test_a_file_that_fails_while_it_is_read_changes_nothing_or_adds_what_is_whole(
    engine: SimpleEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    fill, reads = EntryReader._fill, 0

    def broken(reader: EntryReader, start: int, data: memoryview) -> None:
        nonlocal reads
        reads += 1
        if reads == at:
            raise OSError(5, "Input/output error")
        fill(reader, start, data)

    def check() -> None:
        path, old, new = tmp_path / "cache", PromptCache(MB), PromptCache(MB)
        for seed in range(3):
            old.store(words(seed, 40), kv(40))
        save(path, old, "model")
        monkeypatch.setattr(EntryReader, "_fill", broken)
        with pytest.raises(InvalidRequest, match="Input/output error") as caught:
            load(path, new, "model", kv(1))
        assert caught.value.option == "path"
        # Trailer, index, three entries to check them, and three to add them.
        assert len(new) == max(0, at - 6)
        for entry, whole in zip(new.entries(), old.entries(), strict=False):
            assert entry.tokens.tolist() == whole.tokens.tolist()
            assert frozen(entry.cache) == frozen(whole.cache)

    await engine.run_blocking(check)


@on_mlx_thread
def test_a_damaged_prompt_is_named_and_nothing_is_added(
    engine: SimpleEngine, tmp_path: Path
) -> None:
    path, stored = tmp_path / "cache", PromptCache(MB)
    for seed in range(3):
        stored.store(words(seed, 40), kv(40))
    save(path, stored, "model")
    whole, entries = path.read_bytes(), index_of(path)["entries"]
    for number, entry in enumerate(entries, 1):
        for place in (0, entry["nbytes"] // 2, entry["nbytes"] - 1):
            damaged = bytearray(whole)
            damaged[entry["at"] + place] ^= 1
            path.write_bytes(damaged)
            refused(path, f"entry {number} of 3 is damaged: the checksum is wrong")
    start = entries[0]["at"] + 3 * entries[0]["nbytes"]
    for place in (*range(26), *range(start, len(whole), 7)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        refused(path, "no readable prompt cache|written in format")
    path.write_bytes(whole)
    assert load(path, PromptCache(MB), "model", kv(1)) == 3


@on_mlx_thread
def test_files_of_other_versions_are_told_from_what_is_none(
    engine: SimpleEngine, tmp_path: Path
) -> None:
    path = tmp_path / "cache.safetensors"
    about = {"mlx_engine.prompt_cache": json.dumps({"format": 1, "entries": []})}
    mx.save_safetensors(str(path), {"0": mx.ones(3)}, about)
    refused(path, "written in format 1, this version reads 2; delete it")
    save(path, PromptCache(MB), "model")
    whole = path.read_bytes()
    for number in ("3", "17"):
        path.write_bytes(whole.replace(b"cache 2\n", f"cache {number}\n".encode(), 1))
        refused(path, f"written in format {number}, this version reads 2")


def index_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return EntryReader(file, nothing).about


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the file again with another index, and a checksum that is right."""
    about = index_of(path)
    start, _, _ = entry_file._TRAILER.unpack(path.read_bytes()[-entry_file._TRAILER.size :])
    data = path.read_bytes()[:start]
    change(about)
    index = json.dumps(about).encode()
    checksum = digest_of(data[: data.index(b"\n") + 1], index)
    path.write_bytes(data + index + entry_file._TRAILER.pack(start, len(index), checksum))


def first_layer(about: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = about["entries"][0]["layers"][0]
    return layer


BROKEN = "no readable"
CHANGES: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("another model", lambda about: about.update(fingerprint="other")),
    ("another model", lambda about: about.pop("fingerprint")),
    ("not as this engine makes them", lambda about: about.update(exact=[512, 0])),
    ("not as this engine makes them", lambda about: about["entries"][0]["layers"].clear()),
    (BROKEN, lambda about: about.update(entries=7)),
    (BROKEN, lambda about: about["entries"][0].pop("tokens")),
    (BROKEN, lambda about: about["entries"][0].update(prefilled=10**6)),
    (BROKEN, lambda about: about["entries"][0].update(prefilled="a")),
    (BROKEN, lambda about: about["entries"][0].update(layers=7)),
    (BROKEN, lambda about: first_layer(about).update({"class": "Path"})),
    (BROKEN, lambda about: first_layer(about).update({"class": "LRUPromptCache"})),
    (BROKEN, lambda about: first_layer(about).update({"class": ["KVCache"]})),
    (BROKEN, lambda about: first_layer(about).update(offset=39)),
    (BROKEN, lambda about: first_layer(about).update(offset=None)),
    (BROKEN, lambda about: first_layer(about).update(keys={"array": "99"})),
    (BROKEN, lambda about: first_layer(about).update(keys=5)),
    (BROKEN, lambda about: first_layer(about).pop("values")),
    (BROKEN, lambda about: about["entries"].append(7)),
    (BROKEN, lambda about: about["entries"][0].update(at=0)),
    (BROKEN, lambda about: about["entries"][0].update(at=about["entries"][0]["at"] + 1)),
    (BROKEN, lambda about: about["entries"][0].update(nbytes=10**15)),
    (BROKEN, lambda about: about["entries"][0].update(nbytes=-1)),
    (BROKEN, lambda about: about["entries"][0].update(nbytes="a")),
    (BROKEN, lambda about: about["entries"][0].update(digest=None)),
    (BROKEN, lambda about: about["entries"][0].update(arrays=7)),
    (BROKEN, lambda about: about["entries"][0]["arrays"].pop()),
    (BROKEN, lambda about: about["entries"][0]["arrays"].append(["float32", [1]])),
    (BROKEN, lambda about: about["entries"][0]["arrays"].append(["float32", [2**40, 0]])),
    (BROKEN, lambda about: about["entries"][0]["arrays"].append(["float32", [-1]])),
    (BROKEN, lambda about: about["entries"][0]["arrays"][0].__setitem__(0, "object")),
    (BROKEN, lambda about: about["entries"][0]["arrays"][1].__setitem__(1, [1, 2, 4, 40])),
    (BROKEN, lambda about: about["entries"][0].update(marks=[[20, 5]])),
    (BROKEN, lambda about: about["entries"][0].update(marks=[[0, [None]]])),
]


@pytest.mark.parametrize(("match", "change"), CHANGES)
@on_mlx_thread
def test_nothing_in_the_metadata_is_trusted(
    engine: SimpleEngine, tmp_path: Path, match: str, change: Callable[[dict[str, Any]], object]
) -> None:
    path, stored = tmp_path / "cache.safetensors", PromptCache(MB)
    stored.store(words(1, 40), kv(40))
    save(path, stored, "model")
    edited(path, lambda about: None)
    assert load(path, PromptCache(MB), "model", kv(1)) == 1
    edited(path, change)
    refused(path, match)


@on_mlx_thread
def test_caches_of_another_shape_are_refused(engine: SimpleEngine, tmp_path: Path) -> None:
    path, stored = tmp_path / "cache", PromptCache(MB)
    stored.store(words(1, 40), kv(40))
    save(path, stored, "model")
    half, wide = KVCache(), KVCache()
    half.update_and_fetch(*[mx.ones((1, 2, 1, 4), dtype=mx.float16)] * 2)
    wide.update_and_fetch(*[mx.ones((1, 2, 1, 8))] * 2)
    rotating = RotatingKVCache(max_size=50)
    rotating.update_and_fetch(*[mx.ones((1, 2, 1, 4))] * 2)
    state = ArraysCache(2)
    state[0] = mx.ones((1, 2))
    for template in (kv(1, heads=1), kv(1) * 2, [half], [wide], [rotating], [state]):
        refused(path, "not as this engine makes them", template=template)


@on_mlx_thread
def test_a_file_that_cannot_be_written_says_so(engine: SimpleEngine, tmp_path: Path) -> None:
    stored = PromptCache(MB)
    stored.store(words(1, 40), kv(40))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "cache", tmp_path / "file" / "cache", tmp_path):
        with pytest.raises(InvalidRequest, match="cannot be written") as caught:
            save(path, stored, "model")
        assert caught.value.option == "path"
        assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


async def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    engine: SimpleEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    def check() -> None:
        path, stored = tmp_path / "cache", PromptCache(MB)
        stored.store(words(1, 40), kv(40))
        save(path, stored, "model")
        stored.store(words(2, 40), kv(40))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InvalidRequest, match="No space left"):
            save(path, stored, "model")
        assert os.listdir(tmp_path) == ["cache"]
        assert load(path, PromptCache(MB), "model", kv(1)) == 1

    await engine.run_blocking(check)


KILLED = """
import os, signal, sys
from pathlib import Path

from mlx_engine.generation.cache.prompt_cache import PromptCache
from tests.generation.slices import save
from tests.generation.test_prompt_cache import kv, words

path, at, calls, sync = Path(sys.argv[1]), int(sys.argv[2]), [], os.fsync

def fsync(handle):
    calls.append(handle)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)

stored = PromptCache(10**6)
stored.store(words(1, 40), kv(40))
save(path, stored, "model")
stored.store(words(2, 50), kv(50))
os.fsync = fsync
save(path, stored, "model")
"""


def killed(path: Path, at: int) -> int:
    command = [sys.executable, "-c", KILLED, str(path), str(at)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(("at", "entries", "left"), [(1, 1, 2), (2, 2, 1)])
async def test_a_kill_while_saving_leaves_the_old_file_or_the_new_one(
    engine: SimpleEngine, tmp_path: Path, at: int, entries: int, left: int
) -> None:
    path = tmp_path / "cache"
    assert killed(path, at) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == left

    def check() -> None:
        stored = PromptCache(MB)
        assert load(path, stored, "model", kv(1)) == entries
        save(path, stored, "model")
        assert os.listdir(tmp_path) == ["cache"], "what the killed one left is gone"

    await engine.run_blocking(check)


WRITES = (  # of a save of two prompts, a slice an array: what fails, and at which call
    *((EntryWriter, "write", number) for number in (1, 4, 6)),
    (EntryWriter, "end_entry", 2),
    (EntryWriter, "finish", 1),
    *((os, name, 1) for name in ("open", "fchmod", "fsync", "replace")),
)


@pytest.mark.parametrize(("holder", "name", "at"), WRITES)
async def test_a_disk_that_is_full_at_any_call_leaves_the_old_file_and_nothing_else(
    engine: SimpleEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    holder: Any,
    name: str,
    at: int,
) -> None:
    plain, calls = getattr(holder, name), 0

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(28, "No space left on device")
        return plain(*args, **kwargs)

    def check() -> None:
        path, stored = tmp_path / "cache", PromptCache(MB)
        stored.store(words(1, 40), kv(40))
        save(path, stored, "model")
        old = path.read_bytes()
        stored.store(words(2, 40), kv(40))
        monkeypatch.setattr(array_bytes, "_SLICE", 1)
        monkeypatch.setattr(holder, name, full)
        with pytest.raises(InvalidRequest, match="No space left") as caught:
            save(path, stored, "model")
        assert caught.value.option == "path"
        assert calls >= at
        assert os.listdir(tmp_path) == ["cache"]
        assert path.read_bytes() == old

    await engine.run_blocking(check)


@pytest.mark.parametrize("make", [llama, hybrid, windowed])
@on_mlx_thread
def test_slices_of_any_size_make_the_same_file(
    engine: SimpleEngine, tmp_path: Path, make: Callable[..., Any]
) -> None:
    model = make(engine) if make is llama else make()
    stored, files = filled(model, [20, 60, 45]), []
    whole = array_bytes._SLICE
    try:
        for size in (1, 5000, whole):
            array_bytes._SLICE = size
            turns, path = TurnsHere(), tmp_path / str(size)
            assert save(path, stored, "model", turns) == 3
            files.append((path.read_bytes(), turns.count))
            new, turns = PromptCache(16 * MB), TurnsHere()
            assert load(path, new, "model", put(model, [1]), turns) == 3
            assert [frozen(entry.cache) for entry in new.entries()] == [
                frozen(entry.cache) for entry in stored.entries()
            ]
    finally:
        array_bytes._SLICE = whole
    contents, counts = zip(*files, strict=True)
    assert contents[0] == contents[1] == contents[2]
    assert counts[0] > counts[1] > counts[2] == 3 + 1, "a turn each, and one to see the end"


@on_mlx_thread
def test_work_that_is_to_end_ends_at_any_turn(
    engine: SimpleEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_bytes, "_SLICE", 1)
    path, stored, turns = tmp_path / "cache", PromptCache(MB), TurnsHere()
    stored.store(words(1, 40), kv(40))
    save(path, stored, "model")
    old = path.read_bytes()
    stored.store(words(2, 40), kv(40))
    save(tmp_path / "whole", stored, "model", turns)
    assert turns.count > 6
    for most in range(turns.count):
        with pytest.raises(Interrupted):
            save(path, stored, "model", TurnsHere(most))
        assert path.read_bytes() == old
        assert sorted(os.listdir(tmp_path)) == ["cache", "whole"]
    turns = TurnsHere()
    load(tmp_path / "whole", PromptCache(MB), "model", kv(1), turns)
    for most in range(turns.count):
        new = PromptCache(MB)
        with pytest.raises(Interrupted):
            load(tmp_path / "whole", new, "model", kv(1), TurnsHere(most))
        for entry in new.entries():
            assert any(frozen(entry.cache) == frozen(each.cache) for each in stored.entries())


@on_mlx_thread
def test_what_is_evicted_before_its_turn_is_left_out(engine: SimpleEngine, tmp_path: Path) -> None:
    path, old, new = tmp_path / "cache", PromptCache(MB), PromptCache(MB)
    for seed in range(4):
        old.store(words(seed, 40), kv(40))
    turns = TurnsHere(between=lambda: old.shrink(2 * old.nbytes // len(old)))
    assert save(path, old, "model", turns) == 2, "those used last"
    assert load(path, new, "model", kv(1)) == 2
    assert [entry.tokens.tolist() for entry in new.entries()] == [words(2, 40), words(3, 40)]


@on_mlx_thread
def test_a_conversation_that_goes_on_meanwhile_is_saved_as_it_is_then(
    engine: SimpleEngine, tmp_path: Path
) -> None:
    path, old, new = tmp_path / "cache", PromptCache(MB), PromptCache(MB)
    chat = words(1, 60)
    old.store(chat[:40], kv(40))
    old.store(words(2, 40), kv(40))
    turns = TurnsHere(between=lambda: turns.count == 1 and old.store(chat, kv(60)))
    assert save(path, old, "model", turns) == 2
    assert load(path, new, "model", kv(1)) == 2
    assert sorted(len(entry.tokens) for entry in new.entries()) == [40, 60]


@on_mlx_thread
def test_two_that_save_at_once_do_not_meet(engine: SimpleEngine, tmp_path: Path) -> None:
    path, one, other = tmp_path / "cache", PromptCache(MB), PromptCache(MB)
    for seed in range(3):
        one.store(words(seed, 40), kv(40))
    other.store(words(7, 50), kv(50))
    inner: list[int] = []
    turns = TurnsHere(between=lambda: turns.count == 2 and inner.append(save(path, other, "model")))
    assert save(path, one, "model", turns) == 3
    assert inner == [1]
    assert os.listdir(tmp_path) == ["cache"]
    assert load(path, PromptCache(MB), "model", kv(1)) == 3


@on_mlx_thread
def test_a_symbolic_link_stays_one(engine: SimpleEngine, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    save(tmp_path / "link", PromptCache(MB), "model")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "cache").is_file()


async def test_a_fingerprint_is_that_of_the_model_and_not_of_its_folder(
    engine: SimpleEngine, tiny_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    mine = await engine.run_blocking(lambda: fingerprint(engine._holder.model()))
    others = []
    for folder in (copy, make_tiny(tmp_path / "other", "1")):
        async with SimpleEngine(folder) as other:
            loaded = await other.run_blocking(other._holder.model)
            others.append(await other.run_blocking(fingerprint, loaded))
            changed = replace(loaded, config={**loaded.config, "rope_theta": 5})
            assert await other.run_blocking(fingerprint, changed) != others[-1]
            del loaded, changed
    assert others[0] == mine != others[1]


@on_mlx_thread
def test_one_changed_weight_changes_the_fingerprint(engine: SimpleEngine) -> None:
    loaded = engine._holder.model()
    before = fingerprint(loaded)
    norm = loaded.model.model.norm
    norm.weight = norm.weight.astype(mx.bfloat16)
    changed = fingerprint(loaded)
    norm.weight[3] += 1
    assert len({before, changed, fingerprint(loaded)}) == 3
