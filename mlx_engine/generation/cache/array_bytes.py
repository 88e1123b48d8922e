"""Arrays as bytes, in slices, and out of them again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import mlx.core as mx
import numpy as np

_SLICE = 2**24  # bytes of arrays that go through one turn, or one array if that is larger

_DTYPES: dict[str, mx.Dtype] = {
    str(dtype).rpartition(".")[2]: dtype
    for dtype in (
        mx.bool_,
        mx.uint8,
        mx.uint16,
        mx.uint32,
        mx.uint64,
        mx.int8,
        mx.int16,
        mx.int32,
        mx.int64,
        mx.float16,
        mx.bfloat16,
        mx.float32,
        mx.complex64,
    )
}


def in_slices(sizes: Iterable[int]) -> Iterator[int]:
    """How many of the next arrays go into a slice, again and again, by their bytes."""
    count = held = 0
    for size in sizes:
        if count and held + size > _SLICE:
            yield count
            count = held = 0
        count += 1
        held += size
    if count:
        yield count


def described_arrays(arrays: Iterable[mx.array]) -> list[list[object]]:
    """Dtype and shape of each."""
    return [[str(array.dtype).rpartition(".")[2], list(array.shape)] for array in arrays]


class Copies:
    """Copies of arrays as bytes that are not MLX's, one after another in the same memory.

    To get memory for the first time costs several times what the copy does.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def of(self, arrays: Collection[mx.array]) -> memoryview:
        """A copy, one array after another; good until the next one. On the MLX thread."""
        size = sum(array.nbytes for array in arrays)
        if size > self._memory.size:
            self._memory = np.empty(size, np.uint8)
        start = 0
        for array in arrays:
            if not array.size:
                continue
            flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
            mx.eval(flat)
            self._memory[start : start + flat.size] = np.asarray(flat)
            start += flat.size
        return self._memory[:size].data


def dtype_named(name: str) -> mx.Dtype:
    """The dtype that ``described_arrays`` calls so.

    Raises:
        LookupError, TypeError: there is none.
    """
    return _DTYPES[name]


def array_of(data: memoryview, dtype: mx.Dtype, shape: tuple[int, ...]) -> mx.array:
    """An array of these bytes, which are as many as it has. On the MLX thread."""
    if not data:
        return mx.zeros(shape, dtype)
    return mx.array(np.frombuffer(data, np.uint8)).view(dtype).reshape(shape)
