"""Arrays as bytes, in slices, and out of them again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import mlx.core as mx
import numpy as np

_SLICE = 2**26  # bytes of arrays that go through one turn, or one array if that is larger

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


def as_bytes(arrays: Collection[mx.array]) -> memoryview:
    """A copy of them, one after another, that is not MLX's. On the MLX thread."""
    data = memoryview(bytearray(sum(array.nbytes for array in arrays)))
    start = 0
    for array in arrays:
        if not array.size:
            continue
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        mx.eval(flat)
        data[start : start + flat.size] = np.asarray(flat).data
        start += flat.size
    return data


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
