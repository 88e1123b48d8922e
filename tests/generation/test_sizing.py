"""What a model takes is known before its weights are read, and what fits beside it at start."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    ContextLengthExceeded,
    DraftModel,
    InvalidRequest,
    ModelLoadError,
    ProcessEngine,
    SimpleEngine,
)
from mlx_engine.config import ModelConfig
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.weight_size import stored_bytes
from mlx_engine.core.work import ThreadJob
from mlx_engine.engine.local import LocalEngine
from mlx_engine.engine.model_holder import ModelHolder
from mlx_engine.generation.cache import kv_cache
from mlx_engine.generation.cache.kv_cache import (
    Cache,
    KVFootprint,
    joined,
    kv_nbytes,
    make_kv_cache,
    measure_kv,
    quantize,
)
from mlx_engine.generation.sizing import (
    BATCHES,
    KV_BITS,
    ModelSize,
    fit_context,
    room_beside,
    size_of,
    size_unread,
    table,
)
from mlx_engine.models.loading import load_model
from tests.architectures import make
from tests.conftest import make_tiny, on_mlx_thread
from tests.engine.test_families import FAMILIES
from tests.memory.machines import machine_of
from tests.memory.test_bytes import config_of

pytestmark = pytest.mark.anyio

LLAMA: dict[str, Any] = {}
WIDE = {"head_dim": 64}  # of which groups of 64 can be quantised
BYTES_A_TOKEN = 512  # of the tiny model
ARCHITECTURES = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5",
    "gemma3_text",
    "phi3",
    "cohere",
    "smollm3",
    "gpt2",
    "mamba",
    "falcon_h1",
    "glm4_moe",
    "deepseek_v3",
    "deepseek_v41",
    "nemotron-nas",
)


def measured(config: ModelConfig, folder: Path) -> tuple[int, KVFootprint]:
    """Bytes of weights and of a KV cache, of the model in memory. On the MLX thread."""
    loaded = load_model(config, folder)
    weights = sum(value.nbytes for _, value in tree_flatten(loaded.model.parameters()))
    return weights, measure_kv(loaded.model, config)


def filled(config: ModelConfig, folder: Path, tokens: int) -> Cache:
    """The KV cache of so many tokens, after a prompt of most of them. On the MLX thread."""
    model = load_model(config, folder).model
    cache = make_kv_cache(model, config)
    for count in (tokens - 4, 1, 1, 1, 1):
        model(mx.array([[7] * count]), cache=cache)
        quantize(cache, config)
        mx.eval([entry.state for entry in cache])
    return cache


@pytest.mark.parametrize("family", ["llama", "wide", *FAMILIES])
async def test_the_size_before_weights_are_read_is_that_of_the_model_in_memory(
    tmp_path: Path, family: str
) -> None:
    other = {"llama": LLAMA, "wide": WIDE, **FAMILIES}[family]
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(other))
    config = ModelConfig(model=str(folder))

    def compare() -> None:
        before = mx.get_active_memory()
        size = size_unread(config, folder, None)
        assert mx.get_active_memory() - before < 10_000, "weights were read"
        assert set(size.footprints) == (set(KV_BITS) if family == "wide" else {None})
        for bits, footprint in size.footprints.items():
            quantised = ModelConfig(model=str(folder), kv_bits=bits)
            assert (size.weights, footprint) == measured(quantised, folder)
            taken = kv_nbytes(filled(quantised, folder, 300))
            assert footprint.nbytes(300) * 300 / 512 <= taken <= footprint.nbytes(300)

    await mlx_thread.run(ThreadJob(compare))


@pytest.mark.parametrize("name", ARCHITECTURES)
@on_mlx_thread
def test_a_kv_cache_is_sized_without_computing_in_every_architecture(name: str) -> None:
    model, config = make(name), ModelConfig(model=name)
    size = size_of(model, config, None)
    assert size.footprints[None] == measure_kv(model, config)
    assert size.weights == sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def test_rows_add_up_and_say_what_fits() -> None:
    plain, small = KVFootprint(100, ((10, None),)), KVFootprint(0, ((3, None),))
    size = ModelSize(10_000, {None: plain, 4: small}, 20_000)
    assert size.contexts() == [4096, 8192, 16384, 20_000]
    memory = 1_000_000
    rows = table(size, memory)
    assert len(rows) == 4 * len(BATCHES) + 4
    for row in rows:
        footprint = size.footprints[row["kv_bits"]]
        assert row["kv_bytes"] == row["batch"] * footprint.nbytes(row["context"])
        assert row["bytes"] == 10_000 + row["kv_bytes"]
        assert row["fits"] == (row["kv_bytes"] <= 0.9 * (memory - 10_000))
    assert {row["fits"] for row in rows} == {True, False}
    assert {row["batch"] for row in rows if row["kv_bits"] == 4} == {1}
    assert {row["fits"] for row in table(size, None)} == {None}


def test_the_longest_context_is_the_memorys_or_the_models() -> None:
    size = ModelSize(1000, {None: KVFootprint(0, ((10, None),))}, 20_000)
    assert size.longest(None, None) == 20_000
    assert size.longest(None, 10**9) == 20_000
    longest = size.longest(None, 101_000)
    assert longest is not None
    room = room_beside(1000, 101_000)
    assert room == 90_000
    assert 10 * longest <= room < 10 * (longest + 256)
    assert size.longest(None, 500) == 0, "the weights alone do not fit"
    endless = ModelSize(1000, {None: KVFootprint(5, ())}, None)
    assert endless.longest(None, 10**9) is None
    assert endless.contexts()[-1] == 131_072
    assert ModelSize(1, {}, 100).contexts() == [100]


# ── context_length="auto" ───────────────────────────────────────────────────────────────────


async def test_auto_is_the_models_own_where_memory_is_not_known_or_ample(
    engine_type: type[BaseEngine], tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (None, 2**40):
        monkeypatch.setattr(ModelHolder, "_kv_limit", lambda self, room=room: room)
        async with engine_type(tiny_path, context_length="auto") as engine:  # type: ignore[call-arg]
            assert engine.context_length == 16384


@pytest.mark.parametrize("tokens", [256, 1024])
async def test_auto_is_as_much_as_fits(
    engine_type: type[BaseEngine],
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
) -> None:
    monkeypatch.setattr(ModelHolder, "_kv_limit", lambda self: tokens * BYTES_A_TOKEN + 100)
    async with engine_type(tiny_path, context_length="auto") as engine:  # type: ignore[call-arg]
        assert engine.context_length == tokens
        result = await engine.generate([1] * (tokens - 3), max_tokens=None, ignore_eos=True)
        assert len(result.tokens) == 3
        with pytest.raises(ContextLengthExceeded, match=str(tokens)):
            await engine.generate([1] * (tokens + 1), max_tokens=1)
        assert isinstance(engine, LocalEngine)
        footprint = engine._holder.runner().footprint
        assert (
            footprint.nbytes(tokens) <= tokens * BYTES_A_TOKEN + 100 < footprint.nbytes(tokens + 1)
        )


async def test_auto_beside_a_draft_is_what_one_request_gets_with_it(
    engine_type: type[BaseEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_LITTLE", 0)  # so that layers are large
    folder = make_tiny(tmp_path / "model", "--layers", "1")
    draft = make_tiny(tmp_path / "draft", "--layers", "1")
    footprint = KVFootprint(0, ((BYTES_A_TOKEN // 2, None),))
    room = joined([footprint, footprint]).claim(1024)
    memory = stored_bytes(folder) + stored_bytes(draft) + room * 10 // 9 + 9
    with machine_of(memory):
        async with engine_type(  # type: ignore[call-arg]
            folder, context_length="auto", decode=DraftModel(draft, 2), prompt_cache_bytes=0
        ) as engine:
            assert engine.context_length == 1024
            result = await engine.generate([1] * 1000, max_tokens=None, ignore_eos=True)
            assert len(result.tokens) == 24
            assert "memory" not in " ".join(result.notes)


@on_mlx_thread
def test_where_nothing_fits_auto_tells_what_the_shortest_takes(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_LITTLE", 0)
    footprint = KVFootprint(0, ((BYTES_A_TOKEN, None),))
    need = footprint.claim(2)
    assert need > footprint.nbytes(2)
    loaded = load_model(ModelConfig(model=str(tiny_path)), tiny_path)
    with pytest.raises(InvalidRequest, match=f"takes {need};"):
        fit_context(loaded, [footprint], need - 1)


@pytest.fixture
async def beside_a_draft(
    engine_type: type[BaseEngine], tiny_path: Path, tmp_path: Path
) -> AsyncIterator[BaseEngine]:
    """An engine with memory for 1024 tokens of its own, or for a third of that with its draft."""
    draft = make_tiny(tmp_path / "draft", "--layers", "4")
    memory = stored_bytes(tiny_path) + stored_bytes(draft) + 1024 * BYTES_A_TOKEN * 10 // 9 + 9
    with machine_of(memory):
        async with engine_type(  # type: ignore[call-arg]
            tiny_path, decode=DraftModel(draft, 2), prompt_cache_bytes=0
        ) as engine:
            yield engine


async def test_a_prompt_that_fits_without_its_draft_only_does_without_it(
    beside_a_draft: BaseEngine,
) -> None:
    result = await beside_a_draft.generate([1] * 900, max_tokens=20, ignore_eos=True)
    assert len(result.tokens) == 20
    assert "no memory for a draft" in " ".join(result.notes)
    short = await beside_a_draft.generate([1] * 100, max_tokens=20, ignore_eos=True)
    assert short.notes == ()


async def test_so_does_one_whose_answer_fits_without_its_draft_only(
    beside_a_draft: BaseEngine,
) -> None:
    result = await beside_a_draft.generate([1] * 200, max_tokens=600, ignore_eos=True)
    assert len(result.tokens) == 600
    assert ["no memory for a draft" in note for note in result.notes] == [True]


async def test_so_does_one_of_a_model_whose_own_cache_never_grows(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(config_of("mamba2")))
    draft = make_tiny(tmp_path / "draft", "--layers", "8")
    with machine_of(stored_bytes(folder) + stored_bytes(draft) + 600_000):
        async with BatchedEngine(
            folder, decode=DraftModel(draft, 2), prompt_cache_bytes=0
        ) as engine:
            result = await engine.generate([1] * 900, max_tokens=5, ignore_eos=True)
            assert len(result.tokens) == 5
            assert "no memory for a draft" in " ".join(result.notes)


async def test_a_prompt_that_is_only_cached_needs_no_room_for_a_token(
    engine_type: type[BaseEngine], tiny_path: Path
) -> None:
    room = 512 * BYTES_A_TOKEN
    with machine_of(stored_bytes(tiny_path) + room * 10 // 9 + 9):
        async with engine_type(tiny_path) as engine:
            assert not (await engine.generate([1] * 512, max_tokens=0)).tokens
            with pytest.raises(InvalidRequest, match=r"^prompt: "):
                await engine.generate([1] * 512, max_tokens=1)


async def test_auto_takes_what_a_batched_engine_may_take(tiny_path: Path) -> None:
    budget = 512 * BYTES_A_TOKEN
    async with BatchedEngine(
        tiny_path, context_length="auto", kv_cache_memory_bytes=budget
    ) as engine:
        assert engine.context_length == 512
        result = await engine.generate([1] * 510, max_tokens=None, ignore_eos=True)
        assert len(result.tokens) == 2


async def test_a_draft_takes_its_part_of_it(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelHolder, "_kv_limit", lambda self: 1024 * BYTES_A_TOKEN)
    draft = DraftModel(str(tiny_path))
    async with SimpleEngine(tiny_path, context_length="auto", decode=draft) as engine:
        assert engine.context_length == 512


async def test_where_nothing_fits_the_start_says_so(
    engine_type: type[BaseEngine], tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelHolder, "_kv_limit", lambda self: 1000)
    engine = engine_type(tiny_path, context_length="auto")  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match=r"^context_length: .*1000 bytes.*131072") as caught:
        await engine.start()
    assert caught.value.option == "context_length"


async def test_a_bounded_cache_leaves_the_context_alone(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelHolder, "_kv_limit", lambda self: 256 * BYTES_A_TOKEN)
    async with SimpleEngine(tiny_path, context_length="auto", max_kv_size=64) as engine:
        assert engine.context_length == 16384


async def test_a_quantised_cache_makes_room_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(WIDE))
    monkeypatch.setattr(ModelHolder, "_kv_limit", lambda self: 1024 * 2 * BYTES_A_TOKEN)
    found = []
    for bits in (None, 8, 4):
        async with SimpleEngine(folder, context_length="auto", kv_bits=bits) as engine:
            found.append(engine.context_length)
    # Of 32 bits a value 9 and 5 are left, with a scale and a bias for 64 of them.
    assert found == [1024, 3584, 6400]


async def test_auto_goes_to_another_process(tiny_path: Path) -> None:
    budget = 512 * BYTES_A_TOKEN
    async with ProcessEngine(
        tiny_path, engine="batched", context_length="auto", kv_cache_memory_bytes=budget
    ) as engine:
        assert engine.context_length == 512


@on_mlx_thread
def test_files_that_are_missing_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        size_unread(ModelConfig(model=str(tmp_path)), tmp_path, None)
