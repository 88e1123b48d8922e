"""A prompt cache in a file, so that it outlives the process."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten

from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.layer_record import can_be_recorded, fits, holds, rebuild, record
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.cache.snapshot import arrays, cut_to, state_arrays
from mlx_engine.generation.cache.stored_prompt import Mark
from mlx_engine.models.loading import LoadedModel
from mlx_engine.models.whole_file import replace_safetensors

_FORMAT = 1
_KEY = "mlx_engine.prompt_cache"  # in the metadata of the safetensors file
_SAMPLE = 64  # values of each parameter that go into a fingerprint
_ADVICE = "delete it, or give another path"


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


def save(path: Path, cache: PromptCache, fingerprint: str) -> int:
    """Write all of it into one file, in place of the one that is there. On the MLX thread.

    Whatever happens, the path has either the old file or the new one, which only its owner can
    read. Prompts with caches of a class that a file cannot have are left out.

    Args:
        fingerprint: of the model.

    Returns:
        The number of prompts written.

    Raises:
        InvalidRequest: it cannot be written, or is no regular file; what was there is as it was.
    """
    try:
        path = path.resolve()  # a symbolic link stays one
    except (OSError, RuntimeError) as error:  # a ring of them, say
        raise InvalidRequest("path", f"{path}: {error}; give another path") from error
    found: dict[str, mx.array] = {}
    entries = [
        {
            "tokens": record(mx.array(entry.tokens), found),
            "prefilled": entry.prefilled,
            "layers": record(entry.cache, found),
            "marks": [[mark.tokens, record(mark.state, found)] for mark in entry.marks],
        }
        for entry in cache.entries()
        if can_be_recorded(entry.cache)
    ]
    about = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "mlx_lm": mlx_lm.__version__,
        "exact": [cache.grid, cache.quantized_from],
        "entries": entries,
    }
    try:
        replace_safetensors(path, found, {_KEY: json.dumps(about)}, private=True)
    except (OSError, RuntimeError) as error:  # mlx raises the latter
        raise InvalidRequest(
            "path", f"{path}: the prompt cache cannot be written there ({error}); give another path"
        ) from error
    return len(entries)


def load(path: Path, cache: PromptCache, fingerprint: str, template: Cache) -> int:
    """Add what a file has to ``cache``, which is not touched before all is read and checked.

    If there is more than its limit, what was used most recently is kept. On the MLX thread.

    Args:
        fingerprint: of the model.
        template: a cache of the model with a token in it, as its prompts get it; quantised
            if the engine quantises, from whichever token on.

    Returns:
        The number of prompts added.

    Raises:
        InvalidRequest: there is no such file, or it is broken, of another version, of
            another model, or of an engine with other KV cache options.
    """
    try:
        there, regular = path.exists(), path.is_file()
    except OSError:  # its name is too long, say
        there = regular = False
    if there and not regular:  # one would wait for ever at the end of a pipe
        raise InvalidRequest("path", f"{path}: it is no regular file; give another path")
    if not there:
        raise InvalidRequest("path", f"{path}: there is no such file; save a prompt cache first")
    try:
        with path.open("rb"):
            pass  # mlx does not say why a file cannot be opened
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        found, metadata = loaded
        about = json.loads(metadata[_KEY])
        version = about["format"]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    if version != _FORMAT:
        raise InvalidRequest(
            "path", f"{path}: written in format {version}, this version reads {_FORMAT}; {_ADVICE}"
        )
    if about.get("fingerprint") != fingerprint:
        raise InvalidRequest("path", f"{path}: the prompt cache of another model; {_ADVICE}")
    try:
        entries = [_FileEntry(each, found) for each in about["entries"]]
        fit = about["exact"] == [cache.grid, cache.quantized_from] and all(
            fits(entry.cache, template, until_quantized=cache.quantized_from > 0)
            for entry in entries
        )
        kept = _latest(entries, cache.limit) if fit else []
        # Until now they are only bound to the file.
        mx.eval([[entry.tokens, *entry.arrays] for entry in kept])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    if not fit:
        raise InvalidRequest(
            "path",
            f"{path}: its KV caches are not as this engine makes them; load it with the kv_bits, "
            f"max_kv_size and prefill_step_size that it was saved with, {_ADVICE}",
        )
    return sum(
        cache.store(
            np.array(entry.tokens).tolist(),
            entry.cache,
            prefilled=entry.prefilled,
            marks=entry.marks,
        )
        for entry in kept
    )


class _FileEntry:
    """An entry as a file has it; its arrays are not read yet.

    Raises ValueError, LookupError, TypeError or AttributeError if it is broken.
    """

    def __init__(self, described: dict[str, Any], found: dict[str, mx.array]) -> None:
        self.tokens: mx.array = rebuild(described["tokens"], found)
        self.prefilled: int = described["prefilled"]
        self.cache: Cache = rebuild(described["layers"], found)
        self.marks = [
            Mark(place, state, sum(array.nbytes for array in state_arrays(state)))
            for place, state in rebuild(described.get("marks", []), found)
        ]
        size = self.tokens.size
        if not (
            self.tokens.ndim == 1
            and self.tokens.dtype == mx.int32
            and 0 <= self.prefilled <= size
            and all(holds(entry, size) for entry in self.cache)
            and all(self._has_place(mark) for mark in self.marks)
        ):
            raise ValueError("a KV cache does not hold the tokens that it should")

    @property
    def arrays(self) -> list[mx.array]:
        states = [state_arrays(mark.state) for mark in self.marks]
        return [*arrays(self.cache), *itertools.chain(*states)]

    def _has_place(self, mark: Mark) -> bool:
        """Whether the prompt can be taken back there, and is of the same kind then."""
        if not 0 < mark.tokens < self.tokens.size:
            return False
        there = cut_to(self.cache, mark.state, mark.tokens)
        return all(holds(entry, mark.tokens) for entry in there) and fits(
            there, self.cache, until_quantized=False
        )


def _latest(entries: list[_FileEntry], limit: int) -> list[_FileEntry]:
    """The last ones, as many as ``limit`` bytes can have."""
    for index in range(len(entries) - 1, -1, -1):
        limit -= sum(array.nbytes for array in entries[index].arrays)
        if limit < 0:
            return entries[index + 1 :]
    return entries


def _unreadable(path: Path, error: Exception) -> InvalidRequest:
    said = f"{type(error).__name__}: {error}"
    return InvalidRequest("path", f"{path}: no readable prompt cache ({said}); {_ADVICE}")
