"""The prompt cache: what is reused, that nothing changes by it, and what it holds."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import falcon_h1, gemma3_text, mamba
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.models.deepseek_v41 import LayerCache

from mlx_engine import SimpleEngine
from mlx_engine.generation.cache.prompt_cache import Hit, PromptCache, PromptCacheLookup
from mlx_engine.generation.cache.snapshot import arrays, snapshot, state_arrays

pytestmark = pytest.mark.anyio

MB = 2**20
Test = Callable[..., None]


@pytest.fixture
def engine_type() -> type[SimpleEngine]:
    """Of either kind of engine only the MLX thread and the model are used here."""
    return SimpleEngine


def on_mlx_thread(test: Test) -> Any:
    """MLX belongs to one thread, in tests too; ``test`` asks for the fixture ``engine``."""

    @functools.wraps(test)
    async def run(**fixtures: Any) -> None:
        engine: SimpleEngine = fixtures["engine"]
        await engine.run_blocking(functools.partial(test, **fixtures))

    return run


def llama(engine: SimpleEngine) -> Any:
    return engine._holder.model().model


def hybrid() -> Any:
    """Attention and recurrent state in every layer, as a CacheList."""
    mx.random.seed(3)
    return falcon_h1.Model(
        falcon_h1.ModelArgs(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            mamba_d_ssm=32,
            mamba_d_head=16,
            mamba_n_heads=2,
            mamba_d_state=8,
            vocab_size=64,
        )
    )


def recurrent() -> Any:
    mx.random.seed(4)
    args = {"hidden_size": 32, "intermediate_size": 64, "state_size": 8, "num_hidden_layers": 2}
    bias = {"use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    return mamba.Model(
        mamba.ModelArgs(model_type="mamba", vocab_size=64, conv_kernel=4, **args, **bias)
    )


def windowed() -> Any:
    """Sliding windows of 32 tokens in one layer of two."""
    mx.random.seed(5)
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            hidden_size=32,
            num_hidden_layers=4,
            intermediate_size=48,
            num_attention_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            vocab_size=64,
            sliding_window=32,
            sliding_window_pattern=2,
        )
    )


def put(model: Any, tokens: list[int], cache: Any = None, chunk: int = 4096) -> Any:
    """Prefill ``tokens`` into ``cache``."""
    cache = cache or make_prompt_cache(model)
    for start in range(0, len(tokens), chunk):
        model(mx.array(tokens[start : start + chunk])[None], cache=cache)
        mx.eval(arrays(cache))
    return cache


def greedy(model: Any, cache: Any, token: int, steps: int = 20) -> tuple[list[int], mx.array]:
    """Decode on; the tokens, and the first step's logits."""
    tokens, first = [token], None
    for _ in range(steps):
        logits = model(mx.array([tokens[-1:]]), cache=cache)[0, -1]
        first = logits if first is None else first
        tokens.append(int(mx.argmax(logits).item()))
    return tokens[1:], first


def words(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1, 60) for _ in range(count)]


def kv(count: int, heads: int = 2) -> Any:
    """A one-layer cache of ``count`` tokens, made without a model: 64 bytes a token."""
    layer = KVCache()
    layer.update_and_fetch(mx.ones((1, heads, count, 4)), mx.ones((1, heads, count, 4)))
    return [layer]


def lookup(cache: PromptCache) -> PromptCacheLookup:
    found = cache.stats().last_lookup
    assert found is not None
    return found


def frozen(cache: Any) -> list[Any]:
    return [array.tolist() for array in arrays(cache)]


@on_mlx_thread
def test_a_growing_conversation_goes_on_where_it_was(engine: SimpleEngine) -> None:
    model, stored, history = llama(engine), PromptCache(MB), words(1, 40)
    for turn in range(4):
        prompt = history + words(10 + turn, 30)
        hit = stored.fetch(prompt)
        assert hit.cached == (len(history) if turn else 0)
        cache = put(model, prompt[hit.cached : -1], hit.cache)
        cold = greedy(model, put(model, prompt[:-1]), prompt[-1])
        answer, logits = greedy(model, cache, prompt[-1])
        assert answer == cold[0]
        assert mx.allclose(logits, cold[1], atol=1e-4).item()
        history = prompt + answer[:-1]
        assert stored.store(history, cache)
        assert len(stored) == 1, "the longer one has all that the shorter one had"


@pytest.mark.parametrize("make", [hybrid, recurrent, windowed])
@on_mlx_thread
def test_a_model_that_cannot_be_cut_back_goes_on_too(engine: SimpleEngine, make: Test) -> None:
    model: Any = make()
    stored, history = PromptCache(MB), words(2, 50)
    for turn in range(3):
        prompt = history + words(20 + turn, 25)
        hit = stored.fetch(prompt)
        assert hit.cached == (len(history) if turn else 0)
        cache = put(model, prompt[hit.cached : -1], hit.cache)
        answer, logits = greedy(model, cache, prompt[-1])
        expected, cold = greedy(model, put(model, prompt[:-1]), prompt[-1])
        assert answer == expected
        assert mx.allclose(logits, cold, atol=1e-4).item()
        history = prompt + answer[:-1]
        assert stored.store(history, cache)
    assert stored.stats().hits == 2


@pytest.mark.parametrize("make", [llama, hybrid, recurrent, windowed])
@on_mlx_thread
def test_what_is_stored_does_not_change_when_a_copy_is_written(
    engine: SimpleEngine, make: Test
) -> None:
    model: Any = make(engine) if make is llama else make()
    stored, prompt = PromptCache(MB), words(3, 60)
    live = put(model, prompt)
    assert stored.store(prompt, live)
    (entry,) = stored.entries()
    before = frozen(entry.cache)
    greedy(model, live, 1, 5)  # the caller's own goes on too
    answers = []
    for _ in range(2):
        hit = stored.fetch([*prompt, 7])
        assert hit.cached == 60
        answers.append(greedy(model, hit.cache, 7, 40)[0])
        assert frozen(entry.cache) == before
    assert answers[0] == answers[1]


@on_mlx_thread
def test_forks_and_interleaved_conversations_share_what_they_can(engine: SimpleEngine) -> None:
    """Random trees of prompts, against the definition of the longest common prefix."""
    generator, stored = random.Random(7), PromptCache(64 * MB)
    known: list[list[int]] = []
    for step in range(120):
        base = generator.choice(known)[: generator.randrange(200)] if known and step % 5 else []
        prompt = base + words(step, generator.randrange(2, 60))
        longest = max((shared(prompt, each) for each in known), default=0)
        longest = min(longest, len(prompt) - 1)
        hit = stored.fetch(prompt)
        assert hit.cached == (longest if longest >= 16 else 0)
        assert hit.checkpoint is None
        if hit.cache is not None:
            assert hit.cache[0].offset == hit.cached == hit.cache[0].keys.shape[2]
        if stored.store(prompt, kv(len(prompt))):
            known.append(prompt)
    assert stored.stats().evicted == 0


@on_mlx_thread
def test_caches_that_cannot_be_cut_are_used_whole_or_not_at_all(engine: SimpleEngine) -> None:
    generator, stored = random.Random(8), PromptCache(64 * MB)
    known: list[list[int]] = []
    for step in range(120):
        base = generator.choice(known)[: generator.randrange(200)] if known and step % 5 else []
        prompt = base + words(step, generator.randrange(20, 60))
        whole = [each for each in known if prompt[:-1][: len(each)] == each]
        longest = max(map(len, whole), default=0)
        hit = stored.fetch(prompt)
        assert hit.cached == longest
        most = max((min(shared(prompt, each), len(prompt) - 1) for each in known), default=0)
        assert hit.checkpoint == (most if most - longest >= 16 else None)
        state = ArraysCache(2)
        state[0] = mx.ones((1, 3, 4))
        assert stored.store(prompt, [state])
        known.append(prompt)


def shared(a: list[int], b: list[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


@on_mlx_thread
def test_a_fork_of_a_real_prompt_gives_the_cold_answer(engine: SimpleEngine) -> None:
    model, stored, system = llama(engine), PromptCache(MB), words(4, 300)
    stored.store(system + words(5, 90), put(model, system + words(5, 90)))
    prompt = [*system, 61, *words(6, 40)]
    hit = stored.fetch(prompt)
    assert hit.cached == 300
    answer, logits = greedy(model, put(model, prompt[300:-1], hit.cache), prompt[-1])
    expected, cold = greedy(model, put(model, prompt[:-1]), prompt[-1])
    assert answer == expected
    assert mx.allclose(logits, cold, atol=1e-4).item()


@on_mlx_thread
def test_a_checkpoint_lets_a_hybrid_model_share_a_system_prompt(engine: SimpleEngine) -> None:
    model, stored, system = hybrid(), PromptCache(MB), words(7, 40)
    first, second, third = ([*system, 50 + i, *words(30 + i, 20)] for i in range(3))
    stored.store(first, put(model, first))
    hit = stored.fetch(second)
    assert hit == Hit(None, 0, 40)
    assert "cannot be cut back to token 40, and is kept only at 61" in lookup(stored).reason
    cache = put(model, second[:40])
    assert stored.store(second[:40], cache)
    put(model, second[40:], cache)
    assert stored.store(second, cache)
    hit = stored.fetch(third)
    assert (hit.cached, hit.checkpoint) == (40, None)
    answer, _ = greedy(model, put(model, third[40:-1], hit.cache), third[-1])
    assert answer == greedy(model, put(model, third[:-1]), third[-1])[0]


@pytest.mark.parametrize("make", [hybrid, recurrent, windowed])
@pytest.mark.parametrize("longer_first", [False, True])
@on_mlx_thread
def test_places_of_a_conversation_hold_what_can_be_cut_back_once(
    engine: SimpleEngine, make: Test, longer_first: bool
) -> None:
    model: Any = make()
    prompt, places = words(11, 256), [60, 120, 200, 256]
    caches = {place: put(model, prompt[:place]) for place in places}
    alone = {}
    for place, cache in caches.items():
        single = PromptCache(64 * MB)
        assert single.store(prompt[:place], cache)
        alone[place] = single.nbytes
    stored = PromptCache(64 * MB)
    for place in sorted(places, reverse=longer_first):
        assert stored.store(prompt[:place], caches[place])
    assert len(stored) == 1
    (entry,) = stored.entries()
    assert stored.nbytes == entry.nbytes == sum(array.nbytes for array in held(entry))
    if make is not recurrent:
        assert stored.nbytes < 0.8 * sum(alone.values())
    for place in places:
        before = [array.tolist() for array in held(entry)]
        hit = stored.fetch([*prompt[:place], 61, 61])
        assert hit.cached == place
        answer, logits = greedy(model, put(model, [61], hit.cache), 61)
        expected, cold = greedy(model, put(model, [*prompt[:place], 61]), 61)
        assert answer == expected
        assert mx.allclose(logits, cold, atol=1e-4).item()
        assert [array.tolist() for array in held(entry)] == before
    assert "kept only at 60, 120, 200, 256" in explained(stored, [*prompt[:90], 61, 61])


def held(entry: Any) -> list[mx.array]:
    states = [state_arrays(mark.state) for mark in entry.marks]
    return [*arrays(entry.cache), *(array for state in states for array in state)]


def explained(stored: PromptCache, prompt: list[int]) -> str:
    stored.fetch(prompt)
    return lookup(stored).reason


@on_mlx_thread
def test_places_go_to_the_conversation_that_was_stored_last(engine: SimpleEngine) -> None:
    model, stored, system = hybrid(), PromptCache(MB), words(12, 50)
    first, second = ([*system, 50 + i, *words(40 + i, 30)] for i in range(2))
    for prompt in (system, first, second):
        stored.store(prompt, put(model, prompt), places=[50, len(prompt)])
    one, other = stored.entries()
    assert (one.places, other.places) == ([81], [50, 81])
    stored.shrink(stored.nbytes - 1)
    assert stored.fetch([*system, 1, 2]).cached == 50, "the beginning of both is left"


@on_mlx_thread
def test_an_answer_that_a_conversation_has_rewritten_is_the_first_to_go(
    engine: SimpleEngine,
) -> None:
    model, stored = hybrid(), PromptCache(MB)
    other, prompt = words(13, 60), words(14, 60)
    stored.store(other, put(model, other), places=[60])
    answered = [*prompt, *words(15, 40)]
    stored.store(answered, put(model, answered), places=[50, 60])
    stored.store(prompt, put(model, prompt), places=[50, 60])
    rewritten = [*prompt, *words(16, 30)]
    stored.store(rewritten, put(model, rewritten), places=[50, 60, 90])
    assert [len(entry.tokens) for entry in stored.entries()] == [100, 60, 90]
    stored.shrink(stored.nbytes - 1)
    assert stored.fetch([*other, 1, 2]).cached == 60


@on_mlx_thread
def test_of_many_turns_the_places_of_the_last_and_a_few_others_are_kept(
    engine: SimpleEngine,
) -> None:
    """Of the others, those after which the most tokens would have to be prefilled again."""
    stored, prompt = PromptCache(MB), words(17, 2000)
    ends = [40, 400, *range(410, 600, 10), 900, 1500]
    for end in ends:
        state = ArraysCache(1)
        state[0] = mx.ones((1, 3, 4))
        stored.store(prompt[:end], [state, *kv(end)], places=[40, end])
    (entry,) = stored.entries()
    assert len(entry.places) == 1 + 8 + 1
    assert {40, 400, 900, 1500} < set(entry.places)


@on_mlx_thread
def test_of_chats_that_leave_a_longer_one_at_many_places_a_few_are_kept(
    engine: SimpleEngine,
) -> None:
    stored, prompt = PromptCache(MB), words(17, 2000)
    for end in [2000, *range(100, 1900, 50)]:
        state = ArraysCache(1)
        state[0] = mx.ones((1, 3, 4))
        stored.store(prompt[:end], [state, *kv(end)], places=[40, end])
    (entry,) = stored.entries()
    assert len(entry.places) <= 1 + 8 + 2
    assert stored.nbytes == sum(each.nbytes for each in stored.entries())


@on_mlx_thread
def test_a_sliding_window_can_be_cut_until_it_is_full(engine: SimpleEngine) -> None:
    model, stored, prompt = windowed(), PromptCache(MB), words(8, 60)
    stored.store(prompt[:30], put(model, prompt[:30]))
    assert stored.fetch([*prompt[:20], 1, 2, 3]).cached == 20
    stored.store(prompt, put(model, prompt))
    assert len(stored) == 2, "a full window has not what the shorter one has"
    hit = stored.fetch([*prompt[:50], 1, 2, 3])
    assert (hit.cached, hit.checkpoint) == (30, 50)


@on_mlx_thread
def test_the_last_prompt_token_is_always_left_to_decode(engine: SimpleEngine) -> None:
    stored, prompt = PromptCache(MB), words(9, 50)
    stored.store(prompt, kv(50))
    assert stored.fetch(prompt).cached == 49
    assert stored.fetch(prompt[:30]).cached == 29
    assert lookup(stored).reason.startswith("all of the prompt was stored")
    assert stored.fetch(prompt[:1]) == stored.fetch([]) == Hit(None, 0, None)
    assert lookup(stored).reason == "only what precedes the last token is looked for"


@on_mlx_thread
def test_a_few_tokens_are_not_worth_a_copy(engine: SimpleEngine) -> None:
    stored, prompt = PromptCache(MB), words(10, 50)
    stored.store(prompt, kv(50))
    assert stored.fetch([*prompt[:15], 61, 61]).cached == 0
    assert stored.fetch([*prompt[:16], 61, 61]).cached == 16
    assert not stored.store(prompt[1:16], kv(15)), "no fetch would ever use it"


@on_mlx_thread
def test_what_was_used_least_recently_goes_first(engine: SimpleEngine) -> None:
    prompts = [words(seed, 32) for seed in range(4)]
    stored = PromptCache(3 * 32 * 64)
    for prompt in prompts[:3]:
        assert stored.store(prompt, kv(32))
    stored.fetch([*prompts[0], 1])
    stored.store(prompts[1][:20], kv(20))  # known already: it counts as a use
    stored.store(prompts[3], kv(32))
    kept = [entry.tokens.tolist() for entry in stored.entries()]
    assert kept == [prompts[0], prompts[1], prompts[3]]
    stored.shrink(2 * 32 * 64)
    assert [entry.tokens.tolist() for entry in stored.entries()] == [prompts[1], prompts[3]]
    stats = stored.stats()
    assert (stats.evicted, stats.stored, stats.entries) == (2, 4, 2)
    stored.clear()
    assert (len(stored), stored.nbytes) == (0, 0)


@on_mlx_thread
def test_bytes_are_those_that_are_really_held(engine: SimpleEngine) -> None:
    stored = PromptCache(MB)
    stored.store(words(1, 40), kv(40))
    assert stored.nbytes == 40 * 64, "216 tokens of spare capacity were copied away"
    stored.store(words(2, 250), kv(250))
    assert stored.nbytes == (40 + 256) * 64, "6 were not, and count"
    stored.clear()
    mx.clear_cache()
    before = mx.get_active_memory()
    state, padded = ArraysCache(1), mx.ones((1, 4000, 64))
    mx.eval(padded)
    state[0] = padded[:, -3:, :]  # what convolutions keep is such a slice
    stored.store(words(3, 50), [state])
    del state, padded
    mx.clear_cache()
    assert stored.nbytes == 3 * 64 * 4
    assert mx.get_active_memory() - before < 40_000


@on_mlx_thread
def test_what_does_not_fit_is_refused_and_counted(engine: SimpleEngine) -> None:
    stored = PromptCache(1000)
    assert not stored.store(words(1, 40), kv(40))
    state = ArraysCache(1)
    state[0] = mx.ones((1, 3, 4))
    assert stored.stats().refused == 1
    stored = PromptCache(MB)
    longer = [state, kv(50)[0]]
    assert not stored.store(words(1, 40), longer), "it has read tokens that cannot be undone"
    assert stored.stats().refused == 1
    for tokens, cache in [([], kv(20)), (words(1, 20), []), (words(1, 20), [KVCache()])]:
        assert not stored.store(tokens, cache)
    nothing = PromptCache(0)
    assert not nothing.store(words(1, 40), kv(40))
    assert nothing.stats().refused == 0
    assert not nothing.fetch(words(1, 40)).cached


@on_mlx_thread
def test_tokens_and_cache_are_cut_to_what_both_have(engine: SimpleEngine) -> None:
    stored, prompt = PromptCache(MB), words(1, 80)
    stored.store(prompt[:40], kv(43))
    stored.store(words(2, 80), kv(60))
    assert [len(entry.tokens) for entry in stored.entries()] == [40, 60]
    assert [entry.cache[0].offset for entry in stored.entries()] == [40, 60]


@on_mlx_thread
def test_a_lookup_says_where_and_why_the_prompt_diverged(engine: SimpleEngine) -> None:
    stored, prompt = PromptCache(MB), words(1, 40)
    stored.fetch(prompt, "req-1")
    assert lookup(stored) == PromptCacheLookup(
        "req-1", 40, 0, None, None, None, "nothing is stored"
    )
    stored.store(prompt, kv(40))
    changed = [*prompt[:12], 61, *prompt[13:]]
    stored.fetch(changed)
    found = lookup(stored)
    assert (found.diverged_at, found.prompt_token, found.stored_token) == (12, 61, prompt[12])
    assert found.reason == "12 tokens are the same; fewer than 16 are not worth a copy"
    stored.fetch([*prompt[:30], 61, 61])
    assert lookup(stored).reason == "the closest prompt differs from token 30 on"
    stored.fetch([*prompt, 5, 6])
    found = lookup(stored)
    assert (found.cached_tokens, found.diverged_at, found.stored_token) == (40, 40, None)
    assert found.reason == "the closest prompt ends at token 40"
    assert (stored.stats().hits, stored.stats().misses, stored.stats().hit_tokens) == (2, 2, 70)


def quantized(model: Any, tokens: list[int], cache: Any, chunk: int, start: int) -> Any:
    """Prefill as the engine does with ``kv_bits``; ``cache`` holds whole chunks."""
    cache = cache or make_prompt_cache(model)
    for at in range(0, len(tokens), chunk):
        model(mx.array(tokens[at : at + chunk])[None], cache=cache)
        maybe_quantize_kv_cache(cache, start, 32, 4)
        mx.eval(arrays(cache))
    return cache


@pytest.mark.parametrize("start", [0, 30, 32, 40, 100])
@on_mlx_thread
def test_a_quantised_cache_gives_the_cold_answer_bit_by_bit(
    engine: SimpleEngine, start: int
) -> None:
    """Prompts that end before, at and after the place where a cold run quantises."""
    model, generator, chunk = llama(engine), random.Random(start), 16
    stored, text, hits = PromptCache(4 * MB, grid=chunk, quantized_from=start), words(1, 150), 0
    for size in [20, 31, 33, 47, 48, 49, 65, 130, 18, 34, 80, 120]:
        prompt = text[:size] + words(size, generator.randrange(1, 40))
        hit = stored.fetch(prompt)
        hits += hit.cached > 0
        assert hit.cached % chunk == 0
        if hit.cache is not None:
            assert isinstance(hit.cache[0], QuantizedKVCache) is (hit.cached >= start)
        cache = quantized(model, prompt[hit.cached : -1], hit.cache, chunk, start)
        cold = quantized(model, prompt[:-1], None, chunk, start)
        assert frozen(snapshot(cache)) == frozen(snapshot(cold))
        answer, logits = greedy(model, cache, prompt[-1], 8)
        expected, wanted = greedy(model, cold, prompt[-1], 8)
        assert answer == expected
        assert mx.array_equal(logits, wanted).item()
        stored.store(prompt + answer[:-1], cache, prefilled=len(prompt) - 1)
    assert hits >= 4


@on_mlx_thread
def test_full_precision_does_not_stand_in_for_a_quantised_cache(engine: SimpleEngine) -> None:
    stored, prompt = PromptCache(MB, grid=16, quantized_from=40), words(1, 100)
    stored.store(prompt, kv(100))
    assert stored.fetch(prompt).cached == 32


@on_mlx_thread
def test_a_bounded_cache_is_reused_in_whole_chunks_until_it_drops_tokens(
    engine: SimpleEngine,
) -> None:
    def bounded() -> Any:
        return [RotatingKVCache(max_size=100, keep=4) for _ in range(2)]

    model, stored, prompt = llama(engine), PromptCache(MB, grid=16), words(1, 150)
    assert stored.store(prompt[:70], put(model, prompt[:70], bounded(), 16))
    hit = stored.fetch(prompt)
    assert hit.cached == 64
    assert lookup(stored).reason.endswith("whole prefill chunks of 16, here from 0 to 64 tokens")
    warm = put(model, prompt[64:-1], hit.cache, 16)
    cold = put(model, prompt[:-1], bounded(), 16)
    assert frozen(warm) == frozen(cold)
    assert not stored.store(prompt[:144], put(model, prompt[:144], bounded(), 16))
    assert stored.stats().refused == 1


@on_mlx_thread
def test_tokens_made_by_decode_are_not_reused_where_chunks_matter(engine: SimpleEngine) -> None:
    stored, prompt = PromptCache(MB, grid=16), words(1, 100)
    stored.store(prompt, kv(100), prefilled=40)
    assert stored.fetch([*prompt, 1]).cached == 32
    stored.store(prompt[:80], kv(80))
    assert stored.fetch([*prompt, 1]).cached == 80, "the shorter one reaches farther"
    stored.store([*prompt, 5], kv(101), prefilled=90)
    assert len(stored) == 1


def copied(entry: Any) -> Any:
    (new,) = snapshot([entry])
    assert type(new) is type(entry)
    assert set(vars(new)) == set(vars(entry)), "nothing that __init__ sets is missing"
    return new


@on_mlx_thread
def test_every_class_of_cache_can_be_copied_and_written(engine: SimpleEngine) -> None:
    def update(entry: Any, count: int) -> Any:
        made = mx.random.normal((1, 2, count, 32))
        return entry.update_and_fetch(made, made + 1)

    for make in [
        KVCache,
        ConcatenateKVCache,
        lambda: QuantizedKVCache(group_size=32, bits=4),
        lambda: RotatingKVCache(max_size=24, keep=2),
        lambda: RotatingKVCache(max_size=400),
        lambda: ChunkedKVCache(24),
    ]:
        assert copied(make()).empty()
        entry = make()
        update(entry, 20)
        update(entry, 1)
        for _ in range(8):
            update(entry, 1)
        before = frozen([entry])
        new = copied(entry)
        assert new.offset == 29
        update(new, 1)
        update(new, 5)
        mx.eval(arrays([new]))
        assert (entry.offset, new.offset) == (29, 35)
        assert frozen([entry]) == before
    state, layer = ArraysCache(2, left_padding=[0]), LayerCache(4)
    state[0] = mx.zeros((1, 3))
    layer.update_window(mx.ones((1, 6, 2)))
    nested = CacheList(state, CacheList(KVCache()), layer)
    update(nested[1][0], 5)
    new = copied(nested)
    new[0][0] += 1
    new[0][1] = mx.ones(1)
    update(new[1][0], 1)
    new[2].update_window(mx.zeros((1, 3, 2)))
    assert nested[0][0].sum().item() == 0
    assert nested[0][1] is None
    assert nested[1][0].offset == 5
    assert nested[2].offset == 6
    assert nested[2].window.sum().item() == 8


@on_mlx_thread
def test_a_chunked_cache_that_dropped_tokens_is_used_whole_only(engine: SimpleEngine) -> None:
    layer, stored, prompt = ChunkedKVCache(24), PromptCache(MB), words(1, 60)
    layer.update_and_fetch(mx.ones((1, 2, 20, 4)), mx.ones((1, 2, 20, 4)))
    stored.store(prompt[:20], [layer])
    layer.update_and_fetch(mx.ones((1, 2, 20, 4)), mx.ones((1, 2, 20, 4)))
    layer.maybe_trim_front()
    assert layer.is_trimmable(), "so it says"
    stored.store(prompt[:40], [layer])
    assert stored.fetch([*prompt[:30], 1]).cached == 20
    assert stored.fetch(prompt).cached == 40


@on_mlx_thread
def test_an_entry_that_is_dropped_while_its_copy_is_in_use_does_no_harm(
    engine: SimpleEngine,
) -> None:
    model, stored, prompt = llama(engine), PromptCache(MB), words(1, 60)
    stored.store(prompt, put(model, prompt))
    hit = stored.fetch([*prompt, 7])
    stored.clear()
    answer, _ = greedy(model, hit.cache, 7)
    assert answer == greedy(model, put(model, prompt), 7)[0]


@pytest.mark.parametrize("make", [llama, lambda _: hybrid()], ids=["llama", "hybrid"])
@on_mlx_thread
def test_the_index_tells_what_a_fetch_would_give(
    engine: SimpleEngine, make: Callable[[SimpleEngine], Any]
) -> None:
    """Whatever is stored, marked, taken over and evicted, and without being a use of it."""
    model, draw = make(engine), random.Random(3)
    cache = PromptCache(MB // 4)
    stems = [[draw.randrange(1, 60) for _ in range(60)] for _ in range(3)]
    for _ in range(40):
        stem = draw.choice(stems)
        prompt = stem[: draw.randrange(1, 60)] + [draw.randrange(1, 60) for _ in range(20)]
        order = list(cache._entries)
        told = cache.index.cached(prompt)
        assert list(cache._entries) == order
        assert told == cache.fetch(prompt, counted=False).cached
        assert set(cache.index._outlines) == set(cache._entries)
        filled = make_prompt_cache(model)
        mx.eval(model(mx.array([prompt]), cache=filled))
        cache.store(prompt, filled)
    assert cache.stats().evicted > 0
    cache.clear()
    assert cache.index.cached(stems[0]) == 0
