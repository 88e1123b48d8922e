"""A stored prompt in a file: its arrays as bytes, and what there is to say of it in JSON."""

from __future__ import annotations

import math
from itertools import islice

import mlx.core as mx
import numpy as np

from mlx_engine.generation.cache.array_bytes import array_of, dtype_named, in_slices
from mlx_engine.generation.cache.entry_file import Described
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.layer_record import fits, holds, rebuild
from mlx_engine.generation.cache.snapshot import cut_to, state_arrays
from mlx_engine.generation.cache.stored_prompt import Mark


class RecordedPrompt:
    """A prompt in a file; nothing of it needs to be read before its arrays are made.

    Made and used on the MLX thread, read on any.

    Args:
        described: what the file's index has of it, which is not trusted.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, ArithmeticError: it is broken.

    Attributes:
        described: the same.
        nbytes: bytes of its KV cache and its places.
        slices: bytes of its arrays, slice by slice.
        prefilled: as of an ``Entry``.
    """

    def __init__(self, described: Described) -> None:
        self.described = described
        self.prefilled: int = described["prefilled"]
        self._kinds = [
            (dtype_named(dtype), _checked_shape(shape)) for dtype, shape in described["arrays"]
        ]
        sizes = [math.prod(shape) * dtype.size for dtype, shape in self._kinds]
        left = iter(sizes)
        self.slices = [list(islice(left, count)) for count in in_slices(sizes)]
        self.nbytes = sum(sizes) - sizes[int(described["tokens"]["array"])]
        if sum(sizes) != described["nbytes"]:
            raise ValueError("the arrays of an entry have other sizes than it has")

    def fits(self, template: Cache, *, until_quantized: bool) -> bool:
        """Whether it is of a model whose caches are like ``template``.

        Raises:
            ValueError and others: it is broken; see the class.
        """
        # Never evaluated: they take no memory, and have shapes and dtypes all the same.
        stand_ins = [mx.zeros(shape, dtype) for dtype, shape in self._kinds]
        try:
            return self._fits(stand_ins, template, until_quantized)
        except RuntimeError as error:  # mlx's, of what cannot be sliced so
            raise ValueError(str(error)) from error

    def _fits(self, stand_ins: list[mx.array], template: Cache, until_quantized: bool) -> bool:
        tokens, cache, marks = self._rebuilt(stand_ins)
        size = tokens.size
        if not (
            tokens.ndim == 1
            and tokens.dtype == mx.int32
            and 0 <= self.prefilled <= size
            and all(holds(entry, size) for entry in cache)
            and all(_has_place(mark, cache, size) for mark in marks)
        ):
            raise ValueError("a KV cache does not hold the tokens that it should")
        return fits(cache, template, until_quantized=until_quantized)

    def arrays_in(self, data: memoryview, after: int) -> list[mx.array]:
        """The arrays of a slice that was read, the first ``after`` having been made."""
        made: list[mx.array] = []
        start = 0
        for dtype, shape in self._kinds[after:]:
            end = start + math.prod(shape) * dtype.size
            if end > len(data):
                break
            made.append(array_of(data[start:end], dtype, shape))
            start = end
        mx.eval(made)
        return made

    def rebuilt(self, arrays: list[mx.array]) -> tuple[list[int], Cache, list[Mark]]:
        """Its tokens, its KV cache and its places, of arrays that were read."""
        tokens, cache, marks = self._rebuilt(arrays)
        return np.array(tokens).tolist(), cache, marks

    def _rebuilt(self, arrays: list[mx.array]) -> tuple[mx.array, Cache, list[Mark]]:
        found = {str(number): array for number, array in enumerate(arrays)}
        described = self.described
        marks = [
            Mark(place, state, sum(array.nbytes for array in state_arrays(state)))
            for place, state in rebuild(described["marks"], found)
        ]
        return rebuild(described["tokens"], found), rebuild(described["layers"], found), marks


def _checked_shape(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ValueError(f"{shape!r} is no shape")
    return tuple(shape)


def _has_place(mark: Mark, cache: Cache, size: int) -> bool:
    """Whether the prompt can be taken back there, and is of the same kind then."""
    if not 0 < mark.tokens < size:
        return False
    there = cut_to(cache, mark.state, mark.tokens)
    return all(holds(entry, mark.tokens) for entry in there) and fits(
        there, cache, until_quantized=False
    )
