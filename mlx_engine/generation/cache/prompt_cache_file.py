"""A prompt cache in a file, so that it outlives the process.

It is saved and loaded in slices, a few arrays a turn of the MLX thread, so that requests go on.
What is the file's is done on another thread, which keeps nothing of MLX's between two turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten

from mlx_engine.core.sliced_job import Rest
from mlx_engine.core.turns import Turns
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.array_bytes import as_bytes, described_arrays, in_slices
from mlx_engine.generation.cache.entry_file import (
    FORMAT,
    Described,
    EntryReader,
    EntryWriter,
    WrongFormat,
)
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.layer_record import can_be_recorded, record
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.cache.recorded_prompt import RecordedPrompt
from mlx_engine.models.loading import LoadedModel
from mlx_engine.models.whole_file import replacing

_SAMPLE = 64  # values of each parameter that go into a fingerprint
_ADVICE = "delete it, or give another path"
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

Beat = Callable[[], None]


def fingerprint(loaded: LoadedModel) -> str:
    """Names a model by its configuration and a sample of its weights. On the MLX thread.

    The same model in another folder has the same one; a fine-tune or an adapter has not.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(loaded.config, sort_keys=True, default=str).encode())
    samples = []
    for name, value in sorted(tree_flatten(loaded.model.parameters()), key=lambda item: item[0]):
        digest.update(f"\n{name} {value.shape} {value.dtype}".encode())
        samples.append(value.reshape(-1)[:_SAMPLE].view(mx.uint8))
    if samples:
        digest.update(np.array(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()


def save(path: Path, cache: PromptCache, fingerprint: str, beat: Beat) -> Rest[int]:
    """Begin to write all of it into one file, in place of the one that is there.

    On the MLX thread. Whatever happens, the path has either the old file or the new one, which
    only its owner can read. Prompts with caches of a class that a file cannot have are left out,
    and so are those that are evicted before their turn: what was used last is written first.

    Args:
        fingerprint: of the model.
        beat: called after each piece of it.

    Returns:
        The rest, which gives the number of prompts written. It raises ``InvalidRequest`` if it
        cannot be written, or what is there is no regular file; that is as it was then.
    """
    about = {
        "fingerprint": fingerprint,
        "mlx_lm": mlx_lm.__version__,
        "exact": [cache.grid, cache.quantized_from],
    }
    slices = _slices(cache)

    def rest(turns: Turns) -> int:
        try:
            with _told(path), replacing(_resolved(path), private=True) as temporary:
                with temporary.open("wb") as file:
                    writer = EntryWriter(file, beat)
                    while (one := turns.take(next, slices, None)) is not None:
                        data, described = one
                        beat()
                        writer.write(data)
                        if described is not None:
                            writer.end_entry(described)
                    writer.entries.reverse()  # what was used last comes last
                    writer.finish(about)
                return len(writer.entries)
        finally:
            turns.drop(slices.close)

    return rest


def _slices(cache: PromptCache) -> Generator[tuple[memoryview, Described | None]]:
    """Slices of all entries, to be written; after an entry's last one, what there is to say of it.

    Each step of it is a turn. Until the next one it holds the entry that is under way.
    """
    written: set[int] = set()
    for old_key, tokens in reversed(cache.outlines()):
        key, entry = cache.heir(old_key, tokens)
        if entry is None or key in written or not can_be_recorded(entry.cache):
            continue
        written.add(key)
        found: dict[str, mx.array] = {}
        described = {
            "tokens": record(mx.array(entry.tokens), found),
            "prefilled": entry.prefilled,
            "layers": record(entry.cache, found),
            "marks": [[mark.tokens, record(mark.state, found)] for mark in entry.marks],
            "arrays": described_arrays(found.values()),
        }
        left = list(found.values())
        for count in in_slices([array.nbytes for array in left]):
            some, left = left[:count], left[count:]
            yield as_bytes(some), None if left else described


def load(
    path: Path,
    cache: PromptCache,
    fingerprint: str,
    template: Cache,
    beat: Beat,
    stored: Callable[[], None] = lambda: None,
) -> Rest[int]:
    """Begin to add what a file has to ``cache``.

    On the MLX thread. Nothing is added before all of the file was read and checked once. What a
    load that is stopped then has added stays: each of them is whole. If there is more than the
    limit of the cache, what was used most recently is kept.

    Args:
        fingerprint: of the model.
        template: a cache of the model with a token in it, as its prompts get it; quantised
            if the engine quantises, from whichever token on.
        beat: called after each piece of it.
        stored: called on the MLX thread after each prompt that was added.

    Returns:
        The rest, which gives the number of prompts added. It raises ``InvalidRequest`` if there
        is no such file, or it is broken, of another version, of another model, or of an engine
        with other KV cache options.
    """
    shelf = _Shelf(cache, template, stored)

    def rest(turns: Turns) -> int:
        try:
            with _readable(path) as file:
                reader = EntryReader(file, beat)
                if reader.about.get("fingerprint") != fingerprint:
                    raise InvalidRequest(
                        "path", f"{path}: the prompt cache of another model; {_ADVICE}"
                    )
                for entry in reader.entries:
                    reader.check(entry)
                kept = turns.take(shelf.latest, reader.about, reader.entries)
                if kept is None:
                    raise _other_options(path)
                for prompt in kept:
                    for data in reader.read(prompt.described, map(sum, prompt.slices)):
                        turns.take(shelf.take, prompt, data)
                        beat()
                    turns.take(shelf.store, prompt)
                return shelf.count
        finally:
            turns.drop(shelf.clear)

    return rest


class _Shelf:
    """Where a load puts what it has read. On the MLX thread, all but ``count``.

    Attributes:
        count: prompts that were added.
    """

    def __init__(self, cache: PromptCache, template: Cache, stored: Callable[[], None]) -> None:
        self.count = 0
        self._made: tuple[PromptCache, Cache] | None = cache, template
        self._stored = stored
        self._arrays: list[mx.array] = []  # of the prompt that is under way

    def latest(self, about: Described, entries: list[Described]) -> list[RecordedPrompt] | None:
        """The last ones, as many as the cache can have; ``None`` if some do not fit the model."""
        cache, template = self._parts()
        prompts = [RecordedPrompt(entry) for entry in entries]
        fit = about["exact"] == [cache.grid, cache.quantized_from] and all(
            prompt.fits(template, until_quantized=cache.quantized_from > 0) for prompt in prompts
        )
        if not fit:
            return None
        left = cache.limit
        for index in range(len(prompts) - 1, -1, -1):
            left -= prompts[index].nbytes
            if left < 0:
                return prompts[index + 1 :]
        return prompts

    def take(self, prompt: RecordedPrompt, data: memoryview) -> None:
        """The next slice of a prompt is read."""
        self._arrays += prompt.arrays_in(data, after=len(self._arrays))

    def store(self, prompt: RecordedPrompt) -> None:
        """All of it is read, and its checksum was right."""
        made, self._arrays = self._arrays, []
        tokens, kept, marks = prompt.rebuilt(made)
        cache, _ = self._parts()
        self.count += cache.store(tokens, kept, prefilled=prompt.prefilled, marks=marks)
        self._stored()

    def clear(self) -> None:
        """Nothing more comes."""
        self._arrays, self._made = [], None

    def _parts(self) -> tuple[PromptCache, Cache]:
        assert self._made is not None, "it is cleared after the last turn"
        return self._made


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()  # a symbolic link stays one
    except RuntimeError as error:  # a ring of them, say
        raise OSError(str(error)) from error


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """A block in which a file is written; errors of the system become ours."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(
            "path", f"{path}: the prompt cache cannot be written there ({error}); give another path"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[BufferedReader]:
    """A file to be read in the block; errors that it is broken become ours."""
    try:
        there, regular = path.exists(), path.is_file()
    except OSError:  # its name is too long, say
        there = regular = False
    if there and not regular:  # one would wait for ever at the end of a pipe
        raise InvalidRequest("path", f"{path}: it is no regular file; give another path")
    if not there:
        raise InvalidRequest("path", f"{path}: there is no such file; save a prompt cache first")
    try:
        with path.open("rb") as file:
            yield file
    except InvalidRequest:  # which is a ValueError
        raise
    except WrongFormat as error:
        raise InvalidRequest(
            "path", f"{path}: written in format {error}, this version reads {FORMAT}; {_ADVICE}"
        ) from error
    except (OSError, *_BROKEN) as error:
        said = f"{type(error).__name__}: {error}"
        raise InvalidRequest(
            "path", f"{path}: no readable prompt cache ({said}); {_ADVICE}"
        ) from error


def _other_options(path: Path) -> InvalidRequest:
    return InvalidRequest(
        "path",
        f"{path}: its KV caches are not as this engine makes them; load it with the kv_bits, "
        f"max_kv_size and prefill_step_size that it was saved with, {_ADVICE}",
    )
