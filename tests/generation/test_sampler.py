"""Options are data: the tokens of mlx_lm's samplers, for all rows at once, nothing compiled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import sample_utils

from mlx_engine import BatchedEngine, DraftModel, InvalidRequest, SamplingParams, SimpleEngine
from mlx_engine.generation import sampler as sampler_module
from mlx_engine.generation.sampler import Sampler, SamplerOptions
from mlx_engine.generation.sampling import check_sampling, make_sampling

pytestmark = pytest.mark.anyio

EDGES = [
    {"temperature": 1e-6},
    {"temperature": 1e-6, "top_k": 3},
    {"temperature": 50.0},
    {"top_k": 1},
    {"top_p": 1e-9},
    {"top_p": 1e-40},
    {"top_p": 1 - 1e-7},
    {"min_p": 1.0},
    {"min_p": 1e-30},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    {"xtc_probability": 1.0, "xtc_threshold": 0.5, "xtc_special_tokens": (0, 1)},
    {"top_p": 0.5, "min_p": 0.2, "top_k": 2, "xtc_probability": 0.5},
]


@contextmanager
def uncompiled() -> Iterator[None]:
    """mlx_lm's samplers as they are written: hundreds of them would take minutes to compile."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def mlx_lm_sampler(options: SamplerOptions) -> Any:
    given = {k: v for k, v in asdict(options).items() if k not in ("temperature", "seed")}
    given["xtc_special_tokens"] = list(options.xtc_special_tokens)
    if 0 < options.top_p < 1e-30:  # float32 has no such number
        given["top_p"] = 1e-30
    return sample_utils.make_sampler(temp=options.temperature, **given)


def drawn(draw: random.Random, vocabulary: int, **fixed: Any) -> SamplerOptions:
    """Options at random; each filter is used about half of the time."""
    chance: dict[str, Any] = {"temperature": draw.choice([0.3, 0.7, 1.0, draw.uniform(0.05, 3)])}
    if draw.random() < 0.5:
        chance["top_p"] = draw.choice([0.5, 0.9, draw.uniform(0.01, 1)])
    if draw.random() < 0.4:
        chance["min_p"] = draw.choice([0.05, draw.random()])
    if draw.random() < 0.4:
        chance["xtc_probability"] = draw.choice([0.5, 1.0])
        chance["xtc_threshold"] = draw.choice([0.0, 0.01, 0.1, 0.5])
        chance["xtc_special_tokens"] = draw.choice([(), (0, 3)])
    if draw.random() < 0.5:
        chance["top_k"] = draw.choice([1, 2, draw.randrange(1, vocabulary)])
    return SamplerOptions(**{**chance, **fixed})


def some_logprobs(draw: random.Random, rows: int, vocabulary: int) -> mx.array:
    """Flat ones, spiky ones, and ones with many ties."""
    key = mx.random.key(draw.randrange(2**32))
    logits = mx.random.normal((rows, vocabulary), key=key) * draw.choice([0.1, 1, 3, 10])
    if draw.random() < 0.3:
        logits = mx.round(logits)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def both(options: SamplerOptions, logprobs: mx.array, seed: int) -> tuple[int, int]:
    """The token of mlx_lm's sampler and of ours, from the same random state."""
    mx.random.seed(seed)
    expected = mlx_lm_sampler(options)(logprobs).item()
    mx.random.seed(seed)
    return int(expected), int(Sampler([options])(logprobs, [0]).item())


async def test_a_row_gets_the_token_of_mlx_lm(engine: SimpleEngine) -> None:
    """240 random sets of options, and vocabularies up to 50,000 tokens."""

    def compare() -> list[object]:
        draw, wrong = random.Random(17), []
        with uncompiled():
            for n in range(240):
                vocabulary = draw.choice([5, 64, 512, 3000, 50_000 if n % 8 == 0 else 700])
                options = drawn(draw, vocabulary)
                logprobs = some_logprobs(draw, 1, vocabulary)
                expected, got = both(options, logprobs, n)
                if expected != got:
                    wrong.append((options, vocabulary, expected, got))
        return wrong

    assert await engine.run_blocking(compare) == []


@pytest.mark.parametrize("options", EDGES)
async def test_a_row_with_options_at_their_edges_gets_the_token_of_mlx_lm(
    engine: SimpleEngine, options: dict[str, Any]
) -> None:
    def compare() -> list[tuple[int, int]]:
        draw = random.Random(5)
        with uncompiled():
            return [
                both(SamplerOptions(**{"temperature": 0.8, **options}), logprobs, n)
                for n in range(12)
                for logprobs in [some_logprobs(draw, 1, draw.choice([8, 300]))]
            ]

    for expected, got in await engine.run_blocking(compare):
        assert got == expected


async def test_a_row_gets_the_token_of_mlx_lm_as_it_is_compiled(engine: SimpleEngine) -> None:
    options = SamplerOptions(
        temperature=0.7, top_p=0.9, min_p=0.05, xtc_probability=0.5, xtc_threshold=0.1, top_k=20
    )

    def compare() -> list[tuple[int, int]]:
        draw = random.Random(9)
        return [both(options, some_logprobs(draw, 1, 300), n) for n in range(30)]

    for expected, got in await engine.run_blocking(compare):
        assert got == expected


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
async def test_a_row_in_a_batch_gets_what_it_gets_alone(
    engine: SimpleEngine, dtype: mx.Dtype
) -> None:
    def compare() -> list[tuple[list[int], list[int]]]:
        draw, found = random.Random(3), []
        for _ in range(25):
            rows, vocabulary = draw.randrange(2, 10), draw.choice([7, 300, 2000])
            options = [
                drawn(draw, vocabulary, seed=draw.randrange(2**64))
                if draw.random() < 0.8
                else SamplerOptions()
                for _ in range(rows)
            ]
            logprobs = some_logprobs(draw, rows, vocabulary).astype(dtype)
            places = [draw.randrange(5000) for _ in range(rows)]
            alone = [
                int(Sampler([options[i]])(logprobs[i : i + 1], [places[i]]).item())
                for i in range(rows)
            ]
            found.append((Sampler(options)(logprobs, places).tolist(), alone))
        return found  # type: ignore[return-value]

    for together, alone in await engine.run_blocking(compare):
        assert together == alone


async def test_a_seed_beside_rows_without_one_decides_its_own_row_only(
    engine: SimpleEngine,
) -> None:
    def sample() -> tuple[set[int], set[int]]:
        options = SamplerOptions(temperature=1.5, top_p=0.99, xtc_probability=0.3)
        sampler = Sampler([options, replace(options, seed=4), options])
        logprobs = some_logprobs(random.Random(1), 1, 500) * mx.ones((3, 1)) * 0.1
        tokens = [sampler(logprobs, [0, 7, 0]).tolist() for _ in range(8)]
        return {row[1] for row in tokens}, {row[0] for row in tokens} | {row[2] for row in tokens}  # type: ignore[index]

    seeded, others = await engine.run_blocking(sample)
    assert len(seeded) == 1
    assert len(others) > 8


async def test_a_filter_that_no_row_uses_is_not_computed(
    engine: SimpleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_rows: list[int] = []
    nucleus = sampler_module._nucleus

    def counted(logprobs: mx.array, top_p: mx.array) -> mx.array:
        sorted_rows.append(logprobs.shape[0])
        return nucleus(logprobs, top_p)

    monkeypatch.setattr(sampler_module, "_nucleus", counted)

    def sample() -> None:
        options = [SamplerOptions(), SamplerOptions(temperature=1.0, top_k=3)] * 3
        logprobs = some_logprobs(random.Random(1), 6, 50)
        mx.eval(Sampler(options)(logprobs, [0] * 6))
        options[2] = SamplerOptions(temperature=1.0, top_p=0.5)
        mx.eval(Sampler(options)(logprobs, [0] * 6))

    await engine.run_blocking(sample)
    assert sorted_rows == [1], "of the one row that uses top_p, in the second call"


async def test_an_excluded_token_is_never_sampled(engine: SimpleEngine) -> None:
    """Sums of a large vocabulary round; the largest random number must not fall behind them."""

    def sample() -> int:
        logits = mx.random.normal((400, 20_000), key=mx.random.key(2)) * 0.3
        logits[:, -5000:] = -mx.inf
        number = mx.full((400, 1), 1 - 2**-24)
        tokens = sampler_module._categorical(logits, number)
        return int(tokens.max().item())

    assert await engine.run_blocking(sample) < 15_000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
async def test_what_cannot_be_sampled_gives_ids_of_the_vocabulary(
    engine: SimpleEngine, value: float
) -> None:
    def sample() -> list[int]:
        options = [SamplerOptions(), *(drawn(random.Random(n), 40, seed=n) for n in range(30))]
        return Sampler(options)(mx.full((31, 40), value), [0] * 31).tolist()  # type: ignore[return-value]

    assert all(0 <= token < 40 for token in await engine.run_blocking(sample))


# ── nothing is compiled ─────────────────────────────────────────────────────────────────────

COMPILED = ("apply_top_k", "apply_min_p", "apply_top_p", "apply_xtc", "categorical_sampling")
NEVER_SEEN = [
    {"temperature": 0.70031},
    {"temperature": 0.70031, "seed": 5},
    {"temperature": 0.8, "top_p": 0.90007},
    {"temperature": 0.8, "min_p": 0.05003, "top_k": 37, "seed": 5},
    {"temperature": 0.8, "xtc_probability": 0.51, "xtc_threshold": 0.0307},
    {"repetition_penalty": 1.1003, "presence_penalty": 0.1007, "frequency_penalty": 0.2003},
    {"logit_bias": {5: 1.0009, 7: -0.3}, "logprobs": 7},
]
ENGINES: dict[str, Any] = {
    "simple": SimpleEngine,
    "batched": BatchedEngine,
    "with a draft": lambda model: SimpleEngine(model, decode=DraftModel(model, 2)),
}


@pytest.mark.parametrize("kind", ENGINES)
async def test_options_never_seen_before_are_no_new_programs(
    kind: str, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's CPU back end keeps what it compiles in files; and no compiled sampler is called."""

    def compiled(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a function that is compiled for each value of an option")

    for name in COMPILED:
        monkeypatch.setattr(sample_utils, name, compiled)
    async with ENGINES[kind](tiny_path) as engine:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        for options in NEVER_SEEN:
            result = await engine.generate("abc", max_tokens=4, ignore_eos=True, **options)
            assert len(result.tokens) == 4
    assert list(tmp_path.rglob("*")) == []


# ── checking is not making ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("logit_bias", {"logit_bias": {100: 1.0}}),
        ("stop_token_ids", {"stop_token_ids": [3, 100]}),
    ],
)
async def test_options_that_do_not_suit_a_model_are_refused_without_mlx(
    option: str, options: dict[str, Any]
) -> None:
    params = SamplingParams(**options)
    with pytest.raises(InvalidRequest, match=rf"^{option}"):
        check_sampling(params, 100)


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such_name", "math:pi"])
async def test_a_processor_that_cannot_be_imported_is_refused_when_its_work_begins(
    name: str,
) -> None:
    params = SamplingParams(logits_processors=[name])
    check_sampling(params, 100)  # a module may use MLX as soon as it is imported
    with pytest.raises(InvalidRequest, match=r"^logits_processors"):
        make_sampling(params, vocab_size=100)


async def test_checking_makes_no_logits_processor() -> None:
    params = SamplingParams(logits_processors=["tests.generation.test_sampler:Counted"] * 2)
    before = Counted.made
    check_sampling(params, 100)
    assert Counted.made == before
    first, second = make_sampling(params, vocab_size=100).processors
    assert first is not second
    assert Counted.made == before + 2


class Counted:
    """A logits processor with a state."""

    made = 0

    def __init__(self) -> None:
        Counted.made += 1

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        return logits
