"""Copies of a batch's KV cache, when rows come, go and grow: never of all layers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlx_engine.config import ModelConfig
from mlx_engine.generation.cache import kv_cache
from mlx_engine.generation.cache.joint_cache import extend, keep_rows, merge
from mlx_engine.generation.cache.kv_cache import (
    Cache,
    footprint_of,
    grow,
    kv_nbytes,
    make_kv_cache,
)
from mlx_engine.generation.prefill import padded_prefill
from tests.architectures import make
from tests.conftest import on_mlx_thread

pytestmark = pytest.mark.anyio

LAYERS, LENGTH = 16, 512
ROW = LAYERS * 2 * 4 * LENGTH * 64 * 4  # bytes of a request's cache
LAYER_OF_8 = 8 * ROW // LAYERS


@pytest.fixture(autouse=True)
def this_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_LITTLE", 0)


def filled(
    length: int = LENGTH,
    kind: Callable[[], Any] = KVCache,
    number: int = 0,
    layers: int = LAYERS,
) -> Cache:
    cache = [kind() for _ in range(layers)]
    for layer, entry in enumerate(cache):
        value = mx.full((1, 4, length, 64), float(layer * 1000 + number))
        entry.update_and_fetch(value, value + 1)
    mx.eval([entry.state for entry in cache])
    return cache


def excess(do: Callable[[], object]) -> int:
    """The bytes that there were meanwhile, beyond those before it or after it."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with mx.stream(generation_stream):
        do()
    return mx.get_peak_memory() - max(before, mx.get_active_memory())


@on_mlx_thread
def test_rows_that_come_cost_a_layer_besides() -> None:
    with mx.stream(generation_stream):
        cache = merge([filled(number=n) for n in range(7)])
        new = [filled(number=7)]
    assert kv_nbytes(cache) == 7 * ROW
    assert excess(lambda: extend(cache, new, joint=False, batched=True)) <= LAYER_OF_8 * 1.1
    assert new == [[]]
    assert kv_nbytes(cache) == 8 * ROW
    for layer, entry in enumerate(cache):
        assert entry.keys[:, 0, -1, 0].tolist() == [layer * 1000 + n for n in range(8)]


@on_mlx_thread
def test_the_first_row_becomes_a_batch_a_layer_at_a_time() -> None:
    with mx.stream(generation_stream):
        cache, new = filled(number=0), [filled(300, number=1)]
    assert excess(lambda: extend(cache, new, joint=False, batched=False)) <= LAYER_OF_8 // 2
    assert [entry.offset.tolist() for entry in cache] == [[LENGTH, 300]] * LAYERS


@pytest.mark.parametrize("rows", [[0, 1, 2, 4, 5, 7], [3], []])
@on_mlx_thread
def test_rows_that_go_cost_a_layer_besides(rows: list[int]) -> None:
    with mx.stream(generation_stream):
        cache = merge([filled(number=n) for n in range(8)])
    own: list[Cache] = []
    assert excess(lambda: own.extend(keep_rows(cache, rows, [6]))) <= LAYER_OF_8 * 1.1
    assert [entry.keys[0, 0, -1, 0].item() for entry in own[0]] == [
        layer * 1000 + 6 for layer in range(LAYERS)
    ]
    for layer, entry in enumerate(cache):
        assert entry is None or entry.keys[:, 0, -1, 0].tolist() == [layer * 1000 + n for n in rows]


@on_mlx_thread
def test_what_only_the_longest_row_needed_is_given_back() -> None:
    """mlx-lm's cache shows a part of an array then, which would stay whole."""
    with mx.stream(generation_stream):
        cache = merge([filled(4 * LENGTH), *(filled(number=n) for n in range(1, 4))])
        before = mx.get_active_memory()
        keep_rows(cache, [1, 2, 3], [])
    assert kv_nbytes(cache) == 3 * ROW
    assert before - mx.get_active_memory() >= 12 * ROW


@on_mlx_thread
def test_the_state_of_a_row_that_goes_does_not_keep_those_of_others() -> None:
    def one() -> Cache:
        entry = ArraysCache(1)
        entry[0] = mx.zeros((1, 2**20))
        mx.eval(entry[0])
        return [entry]

    before = mx.get_active_memory()
    with mx.stream(generation_stream):
        cache = merge([one() for _ in range(8)])
        own = keep_rows(cache, [], [3])
    assert kv_nbytes(own[0]) == 2**22
    assert mx.get_active_memory() - before < 2**22 * 1.1


@pytest.mark.parametrize("layers", [1, 2, 4, 8, 16])
@on_mlx_thread
def test_a_copy_has_room_in_the_claim_and_the_tenth_that_is_free(layers: int) -> None:
    with mx.stream(generation_stream):
        cache = merge([filled(number=n, layers=layers) for n in range(7)])
        one = filled(number=7, layers=layers)
        footprint, most, before = footprint_of(one), 0, mx.get_active_memory() - kv_nbytes(cache)
        for do in (
            lambda: extend(cache, [one], joint=False, batched=True),
            lambda: grow(cache, 1),
            lambda: keep_rows(cache, [0, 2, 3, 4, 5, 6], []),
        ):
            mx.reset_peak_memory()
            do()
            most = max(most, mx.get_peak_memory() - before)
    claimed = footprint.claim(LENGTH + 1, rows=8)
    assert footprint.nbytes(LENGTH + 1) * 8 <= claimed
    assert (claimed > footprint.nbytes(LENGTH + 1) * 8) == (layers < 9)
    assert most <= claimed * 10 / 9
    assert footprint.claim(footprint.tokens(claimed) or 0) <= claimed


@on_mlx_thread
def test_rows_grow_a_layer_at_a_time() -> None:
    with mx.stream(generation_stream):
        cache = merge([filled(number=n) for n in range(8)])
    assert excess(lambda: grow(cache, 1)) <= LAYER_OF_8 * 1.1
    assert kv_nbytes(cache) == 8 * ROW * 3 // 2
    assert excess(lambda: grow(cache, 1)) <= 0


@on_mlx_thread
def test_without_it_all_layers_may_be_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: MLX makes at once what it is asked for at once."""
    monkeypatch.setattr(kv_cache, "_MANY", 1)
    with mx.stream(generation_stream):
        cache = merge([filled(number=n) for n in range(8)])
    assert excess(lambda: keep_rows(cache, [0, 1, 2, 4, 5, 6], [7])) > 3 * LAYER_OF_8


@pytest.mark.parametrize(
    "kind", [KVCache, lambda: RotatingKVCache(max_size=64), lambda: ArraysCache(2)]
)
@on_mlx_thread
def test_every_kind_of_cache_comes_and_goes(kind: Callable[[], Any]) -> None:
    def one(number: int) -> Cache:
        entry = kind()
        if isinstance(entry, ArraysCache):
            entry[0], entry[1] = mx.full((1, 3), float(number)), mx.zeros((1, 2))
            return [entry]
        entry.update_and_fetch(mx.full((1, 1, 9, 8), float(number)), mx.zeros((1, 1, 9, 8)))
        return [entry]

    def first(entry: Any) -> list[float]:
        array = entry[0] if isinstance(entry, ArraysCache) else entry.keys[:, 0, 0]
        return array[:, 0].tolist()  # type: ignore[no-any-return]

    with mx.stream(generation_stream):
        cache = one(0)
        extend(cache, [one(1), one(2)], joint=False, batched=False)
        extend(cache, [merge([one(3), one(4)])], joint=True, batched=True)
        assert first(cache[0]) == [0, 1, 2, 3, 4]
        own = keep_rows(cache, [0, 2, 4], [1, 3])
        assert (first(cache[0]), [first(each[0]) for each in own]) == ([0, 2, 4], [[1], [3]])
        keep_rows(cache, [1], [])
        assert first(cache[0]) == [2]


@on_mlx_thread
def test_layers_that_a_model_does_not_use_stay_empty_in_a_batch_and_behind_it() -> None:
    model = make("nemotron-nas")
    cache = merge([make_kv_cache(model, ModelConfig(model="tiny")) for _ in range(2)])
    padded_prefill(model, cache, [[1, 2, 3], [4, 5]])
    (taken,) = keep_rows(cache, [0], [1])
    assert [entry.offset for entry in cache] == [3, 0, 3]
    assert [entry.offset for entry in taken] == [2, 0, 2]
