"""SpecPrefill: the parts that are kept are as if the others were masked."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_engine import SpecPrefill
from mlx_engine.config import ModelConfig
from mlx_engine.generation.cache.attention_tap import install, tapped
from mlx_engine.generation.cache.cached_model import CachedModel
from mlx_engine.generation.cache.kv_cache import KVFootprint
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.cache.snapshot import length
from mlx_engine.generation.cache.sparse_cache import SparseKVCache, skip_to, sparse
from mlx_engine.generation.sparse.chunk_choice import average_pool, choose_chunks, join, keeps_all
from mlx_engine.generation.sparse.importance import (
    TAIL,
    Importance,
    Recorder,
    attention_weights,
    cannot_score,
)
from mlx_engine.generation.sparse.setup import SparsePrefilling
from mlx_engine.generation.sparse.specprefill import SparsePrefill
from mlx_engine.generation.trials import sparse as sparse_trial
from mlx_engine.generation.trials.sparse import check_sparse
from tests.architectures import make, words
from tests.conftest import on_mlx_thread

pytestmark = pytest.mark.anyio

CHUNK = 4
DENSE = [  # chunks may be rows
    "cohere",
    "deepseek_v3",
    "gemma",
    "glm4_moe",
    "gpt2",
    "llama",
    "mimo",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
]
HYBRID = ["qwen3_next", "qwen3_5"]


def put(model: Any, cache: Any, tokens: list[int]) -> Any:
    for start in range(0, len(tokens), 32):
        mx.eval(model(mx.array([tokens[start : start + 32]]), cache=cache))
    return cache


def decoded(model: Any, cache: Any, tokens: list[int]) -> mx.array:
    """Logits of shape (tokens, vocabulary)."""
    return mx.concatenate([model(mx.array([[t]]), cache=cache)[:, 0] for t in tokens])


def off(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max().item())


class Prefill(SparsePrefill):
    """Of a tiny model, with what it was asked to do.

    Args:
        draft: scores the prompt.
        draft_held: tokens of the prompt that its prompt cache has.
    """

    def __init__(
        self,
        model: Any,
        prompt: list[int],
        *,
        draft: Any = None,
        draft_held: int = 0,
        rows: bool = True,
        keep: float = 0.3,
        cache: Any = None,
        held: int = 0,
    ) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.starts: list[list[int]] = []

        def run(tokens: mx.array, cache: Any, starts: list[int]) -> None:
            model(tokens, cache=cache)
            self.shapes.append(tokens.shape)
            self.starts.append(starts)

        install(model)
        draft = make("llama", 5) if draft is None else draft
        self.stored = PromptCache(2**30)
        if draft_held:
            known = put(draft, make_prompt_cache(draft), prompt[:draft_held])
            self.stored.store(prompt[:draft_held], known)
        loaded: Any = SimpleNamespace(model=draft, vocab_size=10**6, context_length=None)
        draft = CachedModel(loaded, ModelConfig(model="draft"), self.stored, KVFootprint(0, ()))
        asked = SpecPrefill("draft", keep=keep, lookahead=2)
        cache = make_prompt_cache(model) if cache is None else cache
        super().__init__(
            run, SparsePrefilling(draft, rows), asked, prompt, cache, held, chunk=CHUNK
        )

    @property
    def put_in(self) -> int:
        """Tokens that went into the target."""
        return sum(rows * n for rows, n in self.shapes)

    def run(self, size: int = 16) -> Any:
        """All steps; the cache."""
        while self.left:
            self.step(size)
        return self.cache


class Masked(KVCache):
    """A dense cache of which only some tokens are seen, by anybody."""

    def __init__(self, ranges: list[tuple[int, int]], end: int) -> None:
        super().__init__()
        self.kept = [any(a <= at < b for a, b in ranges) or at >= end for at in range(end + 99)]

    def make_mask(self, n: int, return_array: bool = False, window_size: Any = None) -> mx.array:
        size = self.offset + n
        # What is left out sees itself, or it would see nothing.
        itself = mx.arange(size) == mx.arange(self.offset, size)[:, None]
        return create_causal_mask(n, self.offset) & (mx.array(self.kept[:size]) | itself)


def expected(model: Any, prompt: list[int], ranges: Any, answer: list[int]) -> mx.array:
    """The oracle: all of the prompt at its positions, the parts left out masked."""
    cache = [Masked(ranges, len(prompt) - 1) for _ in make_prompt_cache(model)]
    put(model, cache, prompt[:-1])
    return decoded(model, cache, [prompt[-1], *answer])


def compact(model: Any, prompt: list[int], ranges: Any, answer: list[int]) -> mx.array:
    """The control: the parts kept, as if the others had never been there."""
    cache = put(model, make_prompt_cache(model), [t for a, b in ranges for t in prompt[a:b]])
    return decoded(model, cache, [prompt[-1], *answer])


@pytest.mark.parametrize("architecture", DENSE)
@on_mlx_thread
def test_the_rest_is_as_if_what_is_left_out_were_masked(architecture: str) -> None:
    model, prompt, answer = make(architecture), words(1, 54), words(2, 5)
    assert check_sparse(model).reason is None
    assert check_sparse(model).rows
    caches = []
    for rows in (True, False):
        prefill = Prefill(model, prompt, rows=rows)
        caches.append(prefill.run())
        ranges = prefill.ranges
        assert sum(b - a for a, b in ranges) == prefill.put_in <= 28
        assert len(ranges) > 2
        assert any(shape[0] > 1 for shape in prefill.shapes) is rows
        assert max(rows * n for rows, n in prefill.shapes) <= 16
    truth = expected(model, prompt, ranges, answer)
    control = off(truth, compact(model, prompt, ranges, answer))
    for row, run in zip(*caches, strict=True):
        for one, other in zip(row.keys_and_values(), run.keys_and_values(), strict=True):
            assert off(one, other) < 1e-5
    for cache in caches:
        assert length(cache) == len(prompt) - 1
        wrong = off(truth, decoded(model, cache, [prompt[-1], *answer]))
        assert wrong < 1e-5
        assert control > 1e-3


@pytest.mark.parametrize("architecture", HYBRID)
@on_mlx_thread
def test_recurrent_state_takes_what_is_kept_in_order(architecture: str) -> None:
    model, prompt, answer = make(architecture), words(1, 54), words(2, 5)
    support = check_sparse(model)
    assert support.reason is None
    assert not support.rows
    prefill = Prefill(model, prompt, rows=support.rows)
    got = decoded(model, prefill.run(), [prompt[-1], *answer])
    cache = sparse(make_prompt_cache(model))
    for a, b in prefill.ranges:
        skip_to(cache, a)
        for token in prompt[a:b]:
            mx.eval(model(mx.array([[token]]), cache=cache))
    truth = decoded(model, cache, [prompt[-1], *answer])
    assert off(got, truth) < 1e-5
    assert off(truth, compact(model, prompt, prefill.ranges, answer)) > 1e-3


@pytest.mark.parametrize("rows", [True, False])
@on_mlx_thread
def test_all_kept_is_a_plain_prefill_without_a_draft(rows: bool) -> None:
    model, prompt = make("llama"), words(3, 70)
    prefill = Prefill(model, prompt, keep=1.0, rows=rows)
    assert not prefill.scoring
    cache = prefill.run()
    assert prefill.ranges == [(0, 69)]
    assert (prefill.scored, prefill.stored.entries()) == (0, [])
    plain = put(model, make_prompt_cache(model), prompt[:-1])
    assert off(decoded(model, cache, prompt[-1:]), decoded(model, plain, prompt[-1:])) < 1e-5


@on_mlx_thread
def test_a_prompt_goes_on_from_what_is_held_of_it() -> None:
    model, prompt, answer = make("qwen3"), words(4, 90), words(5, 5)
    prefill = Prefill(
        model,
        prompt,
        draft_held=40,
        cache=put(model, make_prompt_cache(model), prompt[:21]),
        held=21,
    )
    assert (prefill.scored, prefill.done) == (40, 40)
    cache = prefill.run()
    assert prefill.ranges[0][0] == 0
    assert prefill.ranges[0][1] >= 21
    assert prefill.ranges[-1][1] == 89
    assert 21 + prefill.put_in == sum(b - a for a, b in prefill.ranges) < 60
    got = decoded(model, cache, [prompt[-1], *answer])
    assert off(got, expected(model, prompt, prefill.ranges, answer)) < 1e-5


@on_mlx_thread
def test_nothing_is_left_to_do_when_all_is_held() -> None:
    model, prompt = make("llama"), words(4, 20)
    held = put(model, make_prompt_cache(model), prompt[:-1])
    prefill = Prefill(model, prompt, cache=held, held=19)
    assert (prefill.left, prefill.scoring) == (0, False)
    assert prefill.ranges == [(0, 19)]
    one = Prefill(model, prompt[:1])
    assert (one.left, one.scoring) == (0, False)
    assert one.ranges == []
    with pytest.raises(ValueError, match="a step of 0 tokens"):
        one.step(0)


@pytest.mark.parametrize("size", [3, 10, 64])
@on_mlx_thread
def test_every_step_is_one_bounded_forward(size: int) -> None:
    model, prompt, calls = make("llama"), words(8, 80), []

    class Draft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make("llama", 5)
            self.layers = self.inner.layers

        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            calls.append(tokens.size)
            return self.inner(tokens, cache=cache)

    prefill = Prefill(model, prompt, draft=Draft(), keep=0.6)
    draft_cache: Any = prefill._draft_cache
    steps, before = 0, (0, 0)
    while prefill.left:
        went = prefill.step(size)
        steps += 1
        assert len(calls) + len(prefill.shapes) == steps
        assert length(draft_cache) == prefill.scored
        now = (prefill.scored, prefill.put_in)
        assert before < now or prefill.scored == 80
        assert went == sum(now) - sum(before)
        before = now
    assert [len(entry.tokens) for entry in prefill.stored.entries()] == [80]
    assert max(calls) <= max(size, TAIL)
    assert max(rows * n for rows, n in prefill.shapes) <= size
    got = decoded(model, prefill.cache, prompt[-1:])
    assert off(got, expected(model, prompt, prefill.ranges, [])) < 1e-5
    draft = make("llama", 5)
    plain = put(draft, make_prompt_cache(draft), prompt)
    assert off(decoded(draft, draft_cache, [9]), decoded(draft, plain, [9])) < 1e-5


@on_mlx_thread
def test_a_model_may_be_its_own_draft() -> None:
    model, prompt, answer = make("mimo"), words(7, 61), words(8, 3)  # 15 whole chunks
    prefill = Prefill(model, prompt, draft=model)
    got = decoded(model, prefill.run(), [prompt[-1], *answer])
    assert len(prefill.ranges) > 1
    assert off(got, expected(model, prompt, prefill.ranges, answer)) < 1e-5


def weights_of(llama: Any, tokens: list[int]) -> mx.array:
    """Attention weights from its projections, of shape (layers, heads, queries, keys)."""
    hidden, found = llama.model.embed_tokens(mx.array([tokens])), []
    mask = create_causal_mask(len(tokens))
    for layer in llama.model.layers:
        attention, x = layer.self_attn, layer.input_layernorm(hidden)

        def split(y: mx.array) -> mx.array:
            return attention.rope(y.reshape(len(tokens), -1, 16).swapaxes(0, 1)[None])[0]  # noqa: B023

        q, k = split(attention.q_proj(x)), split(attention.k_proj(x))
        k = mx.repeat(k, q.shape[0] // k.shape[0], axis=0)
        found.append(mx.softmax(mx.where(mask, q @ k.swapaxes(1, 2) / 4, -mx.inf), axis=-1))
        hidden = layer(hidden, mask)
    return mx.stack(found)


@on_mlx_thread
def test_scores_are_the_attention_weights_of_the_draft() -> None:
    draft, prompt, lookahead = make("llama", 5), words(9, 40), 3
    cache = make_prompt_cache(draft)
    scorer = Importance(draft=draft, cache=cache, held=0, prompt=prompt, lookahead=lookahead)
    while scorer.scores is None:
        scorer.step(7)
    tokens = list(prompt)
    for _ in range(lookahead):
        tokens.append(int(mx.argmax(draft(mx.array([tokens]))[0, -1]).item()))
    weights = weights_of(draft, tokens).max(axis=(0, 1))
    truth = weights[len(prompt) - TAIL :, : len(prompt)].mean(axis=0)
    assert np.allclose(scorer.scores, np.array(truth), atol=1e-6)
    assert not hasattr(cache[0], "tap")


@on_mlx_thread
def test_a_draft_that_holds_the_prompt_scores_it_all_the_same() -> None:
    draft, prompt = make("llama", 5), words(9, 40)
    found = []
    for held in (0, 35, 40):
        cache = put(draft, make_prompt_cache(draft), prompt[:held])
        scorer = Importance(draft=draft, cache=cache, held=held, prompt=prompt, lookahead=0)
        while scorer.scores is None:
            scorer.step(64)
        assert length(cache) == scorer.held == 40
        found.append(scorer.scores)
    assert np.allclose(found[0], found[1], atol=1e-6)
    assert np.allclose(found[0], found[2], atol=1e-6)
    hybrid = make("qwen3_next")
    with pytest.raises(ValueError, match="has no queries"):
        cache = put(hybrid, make_prompt_cache(hybrid), prompt)
        Importance(draft=hybrid, cache=cache, held=40, prompt=prompt, lookahead=1)


@on_mlx_thread
def test_a_hybrid_draft_is_left_with_the_prompt() -> None:
    draft, prompt = make("qwen3_next"), words(9, 40)
    cache = make_prompt_cache(draft)
    scorer = Importance(draft=draft, cache=cache, held=0, prompt=prompt, lookahead=4)
    while scorer.scores is None:
        scorer.step(16)
    plain = put(draft, make_prompt_cache(draft), prompt)
    assert off(decoded(draft, cache, [9, 8]), decoded(draft, plain, [9, 8])) < 1e-5


@on_mlx_thread
def test_weights_follow_masks_and_sinks() -> None:
    queries, keys = mx.random.normal((1, 4, 3, 8)), mx.random.normal((1, 2, 5, 8))
    values, sinks = mx.eye(5)[None, None] * mx.ones((1, 2, 1, 1)), mx.array([1.0, 2.0, -1.0, 0.5])
    allowed = create_causal_mask(3, 2)
    for mask in ("causal", allowed, mx.where(allowed, 0.25, -1e9), None):
        for extra in (None, sinks):
            got = attention_weights(queries, keys, scale=0.3, mask=mask, sinks=extra)
            # Attention over one-hot values gives its weights.
            truth = mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=0.3, mask=mask, sinks=extra
            )
            assert off(got, truth) < 1e-6


@on_mlx_thread
def test_a_tap_is_asked_only_while_it_is_there_and_the_hook_is_set_once() -> None:
    model, cache = make("qwen2"), None
    install(model)
    install(model)
    cache, recorder = make_prompt_cache(model), Recorder()
    with pytest.raises(RuntimeError), tapped(cache, recorder):
        put(model, cache, words(1, 6))
        raise RuntimeError
    assert recorder.weights(6).shape == (6, 6)
    put(model, cache, words(1, 6))
    assert recorder.weights(6).shape == (6, 6)
    with pytest.raises(ValueError, match="does not see every token"):
        recorder.weights(7)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gemma3_text", "its RotatingKVCache cannot leave tokens out"),
        ("falcon_h1", "its CacheList cannot leave tokens out"),
        ("mamba", "it has no layer with attention"),
        ("afm7", "its queries have no positions of their own"),
    ],
)
@on_mlx_thread
def test_a_target_that_cannot_be_sparse_is_told_why(architecture: str, reason: str) -> None:
    support = check_sparse(make(architecture))
    assert support.reason is not None
    assert support.reason.startswith(reason)
    assert not support.rows


@on_mlx_thread
def test_a_target_that_fails_or_cannot_take_rows_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One takes one position for all rows, one mistakes the rows of a mask for heads.
    for architecture in ("gpt_bigcode", "gemma2"):
        support = check_sparse(make(architecture))
        assert support.reason is None
        assert not support.rows
    monkeypatch.setattr(sparse_trial, "_KNOWN", {})
    reason = check_sparse(make("afm7")).reason or ""
    assert reason.startswith("it goes wrong without some tokens")
    monkeypatch.setattr(SparseKVCache, "make_mask", lambda *_, **__: 1 / 0)
    reason = check_sparse(make("llama")).reason
    assert reason == "leaving tokens out fails (ZeroDivisionError: division by zero)"


@on_mlx_thread
def test_a_draft_that_cannot_score_is_told_why() -> None:
    for architecture in ("llama", "deepseek_v3", "qwen3_next", "gemma3_text", "falcon_h1"):
        assert cannot_score(make(architecture)) is None
    assert cannot_score(make("gemma2")) == (
        "its attention is not mlx_lm's, or does not see every token"
    )
    assert cannot_score(make("mamba")) == (
        "its layers' caches (ArraysCache) do not hold every token of the prompt"
    )
    broken = make("llama")
    broken.model.norm = None
    assert (cannot_score(broken) or "").startswith("TypeError")


def test_the_first_chunk_and_the_last_are_kept_whatever_the_scores() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        tokens, chunk = int(draw.integers(1, 400)), int(draw.integers(1, 40))
        keep, start = float(draw.random()), int(draw.integers(0, 20))
        scores = draw.random(tokens) ** 8
        ranges = choose_chunks(scores, keep, chunk=chunk, start=start)
        if start >= tokens:
            assert ranges == []
            continue
        kept = {at for a, b in ranges for at in range(a, b)}
        assert ranges == join(ranges) == sorted(ranges)
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(ranges))
        assert ranges[-1][1] == tokens
        assert kept <= set(range(start, tokens))
        if start < chunk:
            assert {*range(start, min(start + chunk, tokens))} <= kept
        chunks = -(-(tokens - start) // chunk)
        assert -(-len(kept) // chunk) >= min(chunks, max(keep * chunks, 5)) - 1
        assert keeps_all(tokens, keep, chunk=chunk, start=start) is (ranges == [(start, tokens)])
        assert choose_chunks(scores, 1.0, chunk=chunk, start=start) == [(start, tokens)]


def test_the_chunks_with_the_highest_scores_are_chosen() -> None:
    scores = np.zeros(32 * 40)
    scores[[100, 500, 501, 900]] = [0.3, 0.2, 0.2, 0.5]
    scores[32 * 20 + 1] = 0.9  # at a border: what is before it counts, too
    ranges = choose_chunks(scores, 0.0)
    assert ranges == [(0, 32), (480, 512), (608, 672), (896, 928), (1248, 1280)]


def test_pooling_does_not_take_the_ends_for_less() -> None:
    assert np.allclose(average_pool(np.ones(20), 13), 1)
    assert np.allclose(average_pool(np.ones(3), 13), 1)
    pooled = average_pool(np.eye(20)[10], 5)
    assert np.allclose(pooled, [0.2 if 8 <= i <= 12 else 0 for i in range(20)])
