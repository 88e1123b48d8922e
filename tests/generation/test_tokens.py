"""The same tokens as mlx_lm (I8), and every sampling option honoured (I7)."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_logits_processors

from mlx_engine import GenerationError, InvalidRequest, SamplingParams, SimpleEngine
from mlx_engine.generation.cache import prompt_cache_file
from mlx_engine.generation.sampling import make_sampling
from tests.conftest import make_tiny

pytestmark = pytest.mark.anyio

PROMPT = "The quick brown fox"


def raw(engine: SimpleEngine, prompt: str | list[int], **options: Any) -> list[int]:
    """What mlx_lm itself generates with the engine's model. On the MLX thread."""
    loaded = engine._holder.model()
    return [r.token for r in stream_generate(loaded.model, loaded.tokenizer, prompt, **options)]


@pytest.mark.parametrize("seed", range(5))
async def test_greedy_tokens_equal_mlx_lm(tmp_path: Path, seed: int) -> None:
    async with SimpleEngine(make_tiny(tmp_path, str(seed))) as engine:
        expected = await engine.run_blocking(raw, engine, PROMPT, max_tokens=200)
        result = await engine.generate(PROMPT, max_tokens=200)
        async with engine.stream_generate(PROMPT, max_tokens=200) as stream:
            streamed = [token async for chunk in stream for token in chunk.tokens]
    assert list(result.tokens) == expected
    assert streamed == expected
    assert len(set(expected)) > 10, "a model in a loop proves little"


async def test_greedy_text_equals_mlx_lm(engine: SimpleEngine) -> None:
    def text() -> str:
        loaded = engine._holder.model()
        answer = stream_generate(loaded.model, loaded.tokenizer, PROMPT, max_tokens=150)
        return "".join(r.text for r in answer)

    expected = await engine.run_blocking(text)
    assert (await engine.generate(PROMPT, max_tokens=150)).text == expected


@pytest.mark.parametrize("step", [1, 7, 64, 4096])
async def test_prefill_chunks_do_not_change_the_tokens(tiny_path: Path, step: int) -> None:
    prompt = [i * 7 % 250 for i in range(130)]
    async with SimpleEngine(tiny_path, prefill_step_size=step) as engine:
        expected = await engine.run_blocking(raw, engine, prompt, max_tokens=50)
        assert list((await engine.generate(prompt, max_tokens=50)).tokens) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"logit_bias": {5: 30.0, 9: 29.0}},
        {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "logit_bias": {7: -5.0}},
    ],
)
async def test_logits_processors_see_the_whole_prompt(
    engine: SimpleEngine, options: dict[str, Any]
) -> None:
    def expected() -> list[int]:
        processors = make_logits_processors(**options)
        return raw(engine, PROMPT, max_tokens=60, logits_processors=processors)

    wanted = await engine.run_blocking(expected)
    result = await engine.generate(PROMPT, max_tokens=60, **options)
    assert list(result.tokens) == wanted
    assert wanted != await engine.run_blocking(raw, engine, PROMPT, max_tokens=60)


async def test_a_users_processor_gets_prompt_and_answer_so_far(engine: SimpleEngine) -> None:
    seen: list[list[int]] = []

    def spy(tokens: mx.array, logits: mx.array) -> mx.array:
        assert logits.shape == (1, engine._holder.model().vocab_size)
        seen.append(tokens.tolist())  # type: ignore[arg-type]
        return logits

    prompt = [10, 20, 30, 40]
    result = await engine.generate(prompt, max_tokens=4, logits_processors=[spy])
    assert seen[0] == prompt
    assert seen[3] == [*prompt, *result.tokens[:3]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
        {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "xtc_probability": 0.2},
    ],
)
async def test_a_seed_repeats_whatever_runs_between(
    engine: SimpleEngine, options: dict[str, Any]
) -> None:
    first = await engine.generate(PROMPT, max_tokens=40, seed=7, **options)
    await engine.generate(PROMPT, max_tokens=9, temperature=1.0)
    async with engine.stream_generate(PROMPT, max_tokens=40, seed=7, **options) as stream:
        async for _ in stream:
            pass
    other = await engine.generate(PROMPT, max_tokens=40, seed=8, **options)
    assert stream.result.tokens == first.tokens
    assert other.tokens != first.tokens


async def test_without_a_seed_sampling_differs(engine: SimpleEngine) -> None:
    texts = {(await engine.generate(PROMPT, max_tokens=20, temperature=1.0)).text for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"min_p": 0.5}, {0, 1}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.25}, {1, 2, 3}),
        ({"top_k": 10**6}, {0, 1, 2, 3}),
    ],
)
@pytest.mark.parametrize("seeded", [False, True])
async def test_filters_leave_only_the_tokens_they_should(
    engine: SimpleEngine, options: dict[str, Any], allowed: set[int], seeded: bool
) -> None:
    def sample() -> set[int]:
        logprobs = mx.log(mx.array([[0.45, 0.3, 0.15, 0.1]]))
        found = set()
        for seed in range(150):
            params = SamplingParams(temperature=1.0, seed=seed if seeded else None, **options)
            found.add(int(make_sampling(params, vocab_size=4).sample(logprobs, 0).item()))
        return found

    assert await engine.run_blocking(sample) == allowed


async def test_seeded_sampling_has_the_distribution_of_mlx_lm(engine: SimpleEngine) -> None:
    """Frequencies of 3,000 draws, within five standard deviations of the truth."""

    def frequencies() -> tuple[list[float], list[float]]:
        logprobs = mx.log(mx.array([[0.6, 0.3, 0.1]]))
        sampling = make_sampling(SamplingParams(temperature=0.7, seed=11), vocab_size=3)
        draws = [int(sampling.sample(logprobs, i).item()) for i in range(3000)]
        truth = mx.softmax(logprobs[0] / 0.7)
        return [draws.count(i) / 3000 for i in range(3)], truth.tolist()  # type: ignore[return-value]

    found, truth = await engine.run_blocking(frequencies)
    for share, p in zip(found, truth, strict=True):
        assert abs(share - p) < 5 * (p * (1 - p) / 3000) ** 0.5


async def test_stop_tokens_and_eos(engine: SimpleEngine) -> None:
    free = await engine.generate(PROMPT, max_tokens=30)
    end = free.tokens[7]
    stopped = await engine.generate(PROMPT, max_tokens=30, stop_token_ids=[end])
    cut = free.tokens.index(end)
    assert stopped.tokens == free.tokens[: cut + 1]
    assert stopped.finish_reason == "stop"

    eos = 257
    ended = await engine.generate(PROMPT, max_tokens=30, logit_bias={eos: 1000.0})
    assert ended.tokens == (eos,)
    assert ended.finish_reason == "stop"
    assert ended.text == ""
    ignored = await engine.generate(PROMPT, max_tokens=5, logit_bias={eos: 1000.0}, ignore_eos=True)
    assert ignored.tokens == (eos,) * 5
    assert ignored.finish_reason == "length"
    assert ignored.text == "<|im_end|>" * 5, "what ends nothing is text, as decode has it"


async def test_logprobs(engine: SimpleEngine) -> None:
    result = await engine.generate(PROMPT, max_tokens=6, logprobs=3)
    assert [entry.token for entry in result.logprobs] == list(result.tokens)
    for entry in result.logprobs:
        assert len(entry.top) == 3
        best = entry.top[0]
        assert (best.token, best.text) == (entry.token, entry.text), "greedy takes the best"
        assert best.logprob == pytest.approx(entry.logprob)
        assert best.logprob >= entry.top[1].logprob >= entry.top[2].logprob
        assert entry.logprob <= 0
    assert (await engine.generate(PROMPT, max_tokens=2, logprobs=0)).logprobs[0].top == ()
    assert (await engine.generate(PROMPT, max_tokens=2)).logprobs == ()
    async with engine.stream_generate(PROMPT, max_tokens=6, logprobs=3) as stream:
        streamed = [entry async for chunk in stream for entry in chunk.logprobs]
    assert tuple(streamed) == result.logprobs


async def test_max_tokens_none_goes_on_to_the_end_of_the_context(tiny_path: Path) -> None:
    async with SimpleEngine(tiny_path, context_length=40) as engine:
        result = await engine.generate([1] * 10, max_tokens=None, ignore_eos=True)
    assert len(result.tokens) == 30
    assert result.finish_reason == "length"


async def test_one_token_in_one_token_out(engine: SimpleEngine) -> None:
    result = await engine.generate([65], max_tokens=1, ignore_eos=True)
    assert len(result.tokens) == 1
    assert result.usage.total_tokens == 2
    assert result.timings.tokens_per_second == 0


@pytest.mark.parametrize("bits", [4, 8])
async def test_quantised_kv_cache_gives_what_mlx_lm_gives(tiny_path: Path, bits: int) -> None:
    options = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": 8}
    prompt = [i * 7 % 250 for i in range(60)]
    async with SimpleEngine(tiny_path, prefill_step_size=16, **options) as engine:  # type: ignore[arg-type]
        expected = await engine.run_blocking(
            raw, engine, prompt, max_tokens=40, prefill_step_size=16, **options
        )
        plain = await engine.run_blocking(raw, engine, prompt, max_tokens=40)
        result = await engine.generate(prompt, max_tokens=40)
    assert list(result.tokens) == expected
    if bits == 4:
        assert expected != plain, "it made no difference, so it was not quantised"


async def test_bounded_kv_cache_holds_the_bound(tiny_path: Path) -> None:
    from mlx_engine.generation.cache.kv_cache import make_kv_cache
    from mlx_engine.generation.prefill import prefill_chunk

    async with SimpleEngine(tiny_path, max_kv_size=32, prefill_step_size=16) as engine:
        loaded = engine._holder.model()

        def lengths() -> list[int]:
            cache = make_kv_cache(loaded.model, engine._config.model)
            prompt = list(range(200))
            for start in range(0, 199, 16):
                end = min(start + 16, 199)
                prefill_chunk(loaded.model, cache, prompt, start, end, engine._config.model)
            loaded.model(mx.array([[1]]), cache=cache)
            return [entry.keys.shape[2] for entry in cache]

        assert all(length <= 32 for length in await engine.run_blocking(lengths))
        result = await engine.generate(list(range(200)), max_tokens=60, ignore_eos=True)
        assert len(result.tokens) == 60


@pytest.mark.parametrize("where", ["processor", "processor in a stream"])
async def test_a_failing_processor_fails_its_own_request(engine: SimpleEngine, where: str) -> None:
    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        if len(tokens) > 8:
            raise ZeroDivisionError("in the processor")
        return logits

    prompt = [1, 2, 3, 4]
    with pytest.raises(GenerationError, match="ZeroDivisionError: in the processor") as caught:
        if where == "processor":
            await engine.generate(prompt, logits_processors=[broken])
        else:
            async with engine.stream_generate(prompt, logits_processors=[broken]) as stream:
                async for _ in stream:
                    pass
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert engine.stats().failed == 1
    assert (await engine.generate(prompt, max_tokens=3)).finish_reason == "length"


async def test_odd_errors_of_a_processor_fail_the_request_too(engine: SimpleEngine) -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise KeyError("no words")

    ring = ValueError("ring")

    def in_a_ring() -> None:
        other = LookupError()
        ring.__cause__, other.__context__ = other, ring
        raise ring

    def unspeakable() -> None:
        raise Unspeakable

    def cancelled() -> None:
        raise asyncio.CancelledError("nobody's")

    for fail in (in_a_ring, unspeakable, cancelled):

        def processor(tokens: mx.array, logits: mx.array, fail: Any = fail) -> mx.array:
            fail()
            return logits

        with pytest.raises(GenerationError):
            await engine.generate([1, 2], logits_processors=[processor])
        with pytest.raises(GenerationError):
            async for _ in engine.stream_generate([1, 2], logits_processors=[processor]):
                pass
    assert engine.stats().failed == 6
    assert len((await engine.generate([1], max_tokens=2, ignore_eos=True)).tokens) == 2


async def test_an_error_keeps_neither_kv_cache_nor_model_alive(
    tiny_path: Path, engine_type: type[SimpleEngine]
) -> None:
    engine = engine_type(tiny_path, prompt_cache_bytes=0)
    await engine.start()

    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ZeroDivisionError

    def active() -> int:
        mx.clear_cache()
        return mx.get_active_memory()

    before = await engine.run_blocking(active)
    try:
        await engine.generate([1] * 3000, logits_processors=[broken])
    except GenerationError as error:
        kept = error
    assert await engine.run_blocking(active) - before < 100_000
    model = weakref.ref(engine._holder.model().model)
    await engine.stop()
    gc.collect()
    assert model() is None
    assert "in broken" in kept.__cause__.__notes__[0], "where it failed can still be read"


async def test_an_error_of_a_cache_file_keeps_no_model_alive(
    tiny_path: Path,
    tmp_path: Path,
    engine_type: type[SimpleEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("the disk is on fire")

    engine = engine_type(tiny_path)
    await engine.start()
    model = weakref.ref(engine._holder.model().model)
    with pytest.raises(InvalidRequest) as missing:
        await engine.load_prompt_cache(tmp_path / "none")
    monkeypatch.setattr(prompt_cache_file, "save", broken)
    with pytest.raises(GenerationError, match=r"saving the prompt cache failed.* on fire") as other:
        await engine.save_prompt_cache(tmp_path / "file")
    await engine.stop()
    gc.collect()
    assert model() is None, (missing, other)


@pytest.mark.parametrize(
    ("processor", "got"),
    [(lambda tokens, logits: logits[:, :-1], r"\(1, 261\)"), (lambda *_: None, "NoneType")],
    ids=["shape", "none"],
)
async def test_what_a_logits_processor_returns_is_checked(
    engine: SimpleEngine, processor: Any, got: str
) -> None:
    with pytest.raises(GenerationError, match=rf"must return an mx.array of shape .*not {got}"):
        await engine.generate(PROMPT, max_tokens=3, logits_processors=[processor])


@pytest.mark.parametrize("option", ["logit_bias", "stop_token_ids"])
async def test_token_ids_outside_of_the_vocabulary_are_refused(
    engine: SimpleEngine, option: str
) -> None:
    value: Any = {9999: 1.0} if option == "logit_bias" else [9999]
    with pytest.raises(InvalidRequest, match=f"{option}: token id 9999") as caught:
        await engine.generate(PROMPT, **{option: value})
    assert caught.value.option == option
