"""Sparse KV caches: positions apart from storage, alone and in a batch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_engine.generation.cache.joint_cache import merge
from mlx_engine.generation.cache.snapshot import snapshot
from mlx_engine.generation.cache.sparse_cache import (
    BatchSparseKVCache,
    SparseKVCache,
    skip_to,
    sparse,
)
from tests.architectures import make, words
from tests.conftest import on_mlx_thread

pytestmark = pytest.mark.anyio

Ranges = list[tuple[int, int]]


def prefilled(model: Any, prompt: list[int], ranges: Ranges) -> Any:
    """A sparse cache with some parts of a prompt in it."""
    cache = sparse(make_prompt_cache(model))
    for a, b in ranges:
        skip_to(cache, a)
        mx.eval(model(mx.array([prompt[a:b]]), cache=cache))
    return cache


def decoded(model: Any, cache: Any, tokens: list[list[int]]) -> mx.array:
    """Feed one token a row at a time; logits of shape (rows, steps, vocabulary)."""
    steps = [
        model(mx.array([[t] for t in step]), cache=cache)[:, 0]
        for step in zip(*tokens, strict=True)
    ]
    return mx.stack(steps, axis=1)


def off(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max().item())


def filled(count: int, at: int | None = None) -> SparseKVCache:
    """``count`` tokens, numbered by their values; the next one is at ``at``."""
    entry = SparseKVCache()
    value = mx.broadcast_to(mx.arange(count, dtype=mx.float32)[:, None], (1, 2, count, 4))
    entry.update_and_fetch(value, value)
    entry.skip_to(count if at is None else at)
    return entry


def stored(entry: Any) -> list[float]:
    keys, values = entry.keys_and_values()
    assert mx.array_equal(keys, values).item()
    return keys[0, 0, :, 0].tolist()  # type: ignore[no-any-return]


@on_mlx_thread
def test_position_and_storage_go_their_own_ways() -> None:
    entry = SparseKVCache()
    assert entry.empty()
    assert (entry.size(), entry.nbytes, entry.offset) == (0, 0, 0)
    entry = filled(3)
    entry.skip_to(300)
    keys, _ = entry.update_and_fetch(mx.ones((1, 2, 2, 4)), mx.ones((1, 2, 2, 4)))
    assert keys.shape == (1, 2, 5, 4)
    assert (entry.offset, entry.size(), entry.stored) == (302, 5, 5)
    assert stored(entry) == [0, 1, 2, 1, 1]
    assert entry.nbytes == 2 * 2 * 256 * 4 * 4
    assert not entry.empty()
    assert entry.is_trimmable()
    again = SparseKVCache.from_state(entry.state)
    assert (again.offset, again.size(), stored(again)) == (302, 5, stored(entry))
    with pytest.raises(ValueError, match="position 301 is before 302"):
        entry.skip_to(301)
    with pytest.raises(NotImplementedError, match="cannot be quantised"):
        entry.to_quantized()


@on_mlx_thread
def test_masks_are_made_for_what_is_stored() -> None:
    entry = filled(3, 100)
    assert entry.make_mask(1) is None
    assert entry.make_mask(2) == "causal"
    assert entry.make_mask(2, return_array=True).tolist() == [
        [True, True, True, True, False],
        [True, True, True, True, True],
    ]
    with pytest.raises(ValueError, match="no sliding window"):
        entry.make_mask(2, window_size=8)


@on_mlx_thread
def test_decoded_tokens_are_taken_back_and_done_again() -> None:
    model, prompt = make("llama"), words(1, 60)
    ranges: Ranges = [(0, 8), (20, 30), (50, 52)]
    cache = prefilled(model, prompt, ranges)
    expected = decoded(model, prefilled(model, prompt, ranges), [prompt[52:]])
    decoded(model, cache, [[*prompt[52:54], 9, 9, 9]])
    assert [entry.trim(3) for entry in cache] == [3, 3]
    assert {(entry.offset, entry.stored) for entry in cache} == {(54, 22)}
    assert off(decoded(model, cache, [prompt[54:]]), expected[:, 2:]) < 1e-5


@on_mlx_thread
def test_a_dense_cache_becomes_sparse_and_other_layers_stay() -> None:
    model, prompt = make("llama"), words(2, 40)
    dense, twin = make_prompt_cache(model), make_prompt_cache(model)
    for cache in (dense, twin):
        mx.eval(model(mx.array([prompt[:30]]), cache=cache))
    converted = sparse(dense)
    assert {type(entry) for entry in converted} == {SparseKVCache}
    assert off(decoded(model, converted, [prompt[30:]]), decoded(model, twin, [prompt[30:]])) < 1e-5
    state = ArraysCache(2)
    assert sparse([state, converted[0]]) == [state, converted[0]]
    with pytest.raises(ValueError, match="a RotatingKVCache cannot be sparse"):
        sparse([RotatingKVCache(max_size=8)])


@on_mlx_thread
def test_a_copy_can_be_written_into() -> None:
    model, prompt = make("llama"), words(6, 70)
    cache = prefilled(model, prompt, [(0, 8), (50, 60)])
    copy = snapshot(cache)
    first = decoded(model, copy, [prompt[60:]])
    assert {(entry.offset, entry.stored) for entry in cache} == {(60, 18)}
    assert off(decoded(model, cache, [prompt[60:]]), first) < 1e-5


ROWS: list[Ranges] = [[(0, 8), (30, 40), (70, 75)], [(0, 9)], [(0, 4), (16, 50)], []]
NEXT = [75, 9, 50, 0]


@on_mlx_thread
def test_rows_of_every_kind_decode_together_as_alone() -> None:
    """Sparse, dense, sparse again, and one of a single token; some join, leave and come out."""
    model, prompt = make("llama"), words(3, 100)
    later = [words(10 + i, 24) for i in range(4)]
    rows = range(4)

    def caches() -> list[Any]:
        return [prefilled(model, prompt, ranges) for ranges in ROWS]

    expected = [decoded(model, cache, [later[i]]) for i, cache in enumerate(caches())]

    def same(got: mx.array, who: list[int], since: int) -> None:
        for place, i in enumerate(who):
            end = since + got.shape[1]
            assert off(got[place], expected[i][0, since:end]) < 1e-5, (i, since)

    alone = caches()
    cache = merge(alone[:3])
    assert {type(entry) for entry in cache} == {BatchSparseKVCache}
    assert cache[0].offset.tolist() == NEXT[:3]
    assert cache[0].size() == 38
    same(decoded(model, cache, [later[i][:8] for i in (0, 1, 2)]), [0, 1, 2], 0)
    # A late row has gone through the same number of tokens by itself.
    decoded(model, alone[3], [later[3][:8]])
    for entry, other in zip(cache, merge([alone[3]]), strict=True):
        entry.extend(other)
    same(decoded(model, cache, [later[i][8:12] for i in rows]), [0, 1, 2, 3], 8)
    for entry in cache:
        entry.filter([3, 1, 0])  # the longest in store has left
    assert cache[0].size() < 38
    same(decoded(model, cache, [later[i][12:16] for i in (3, 1, 0)]), [3, 1, 0], 12)
    decoded(model, cache, [[1, 2], [3, 4], [5, 6]])
    assert [entry.trim(2) for entry in cache] == [2, 2]
    same(decoded(model, cache, [later[i][16:18] for i in (3, 1, 0)]), [3, 1, 0], 16)
    for place, i in enumerate((3, 1, 0)):
        own = [entry.extract(place) for entry in cache]
        assert {type(entry) for entry in own} == {SparseKVCache}
        assert {entry.offset for entry in own} == {NEXT[i] + 18}
        assert own[0].stored == sum(b - a for a, b in ROWS[i]) + 18
        same(decoded(model, own, [later[i][18:]]), [i], 18)


@on_mlx_thread
def test_prompts_of_different_lengths_go_in_together_padded() -> None:
    model, prompt = make("llama"), words(4, 100)
    more = [words(20, 5), words(21, 2), words(22, 7), words(23, 3)]
    later = [words(30 + i, 6) for i in range(4)]
    expected = []
    for i, ranges in enumerate(ROWS):
        cache = prefilled(model, prompt, ranges)
        mx.eval(model(mx.array([more[i]]), cache=cache))
        expected.append(decoded(model, cache, [later[i]])[0])
    cache = merge([prefilled(model, prompt, ranges) for ranges in ROWS])
    lengths = [len(each) for each in more]
    padding = [max(lengths) - length for length in lengths]
    for entry in cache:
        entry.prepare(lengths=lengths, right_padding=padding)
    model(mx.array([[*t, *[0] * pad] for t, pad in zip(more, padding, strict=True)]), cache=cache)
    for entry in cache:
        entry.finalize()
    assert cache[0].offset.tolist() == [at + n for at, n in zip(NEXT, lengths, strict=True)]
    got = decoded(model, cache, later)
    for i in range(4):
        assert off(got[i], expected[i]) < 1e-5


@on_mlx_thread
def test_a_batch_of_empty_rows_and_one_with_a_plain_cache() -> None:
    batch = SparseKVCache.merge([SparseKVCache(), SparseKVCache()])
    assert isinstance(batch, BatchSparseKVCache)
    assert batch.extract(1).empty()
    dense = KVCache()
    dense.update_and_fetch(mx.ones((1, 2, 2, 4)), mx.ones((1, 2, 2, 4)))
    batch = SparseKVCache.merge([filled(3, 50), dense])
    assert batch.offset.tolist() == [50, 2]
    assert stored(batch.extract(0)) == [0, 1, 2]
    assert batch.extract(0).offset == 50
    assert stored(batch.extract(1)) == [1, 1]
    assert batch.make_mask(1)[:, 0, 0].tolist() == [[True] * 4, [False, True, True, True]]
    with pytest.raises(ValueError, match="no sliding window"):
        batch.make_mask(1, window_size=8)
