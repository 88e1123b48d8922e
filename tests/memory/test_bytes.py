"""The ledger's bytes are MLX's: compared while engines work, for models of many architectures."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import DraftModel, SimpleEngine
from mlx_engine.core.ledger import Ledger
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.work import ThreadJob
from tests.architectures import CONFIG, OTHER
from tests.chat_models import ARCHITECTURES
from tests.conftest import make_tiny
from tests.memory.machines import machine_of

pytestmark = pytest.mark.anyio

KINDS = [
    "llama",
    "cohere",
    "deepseek_v3",
    "falcon_h1",
    "gemma3_text",
    "glm4_moe",
    "gpt2",
    "gpt_oss",
    "phi3",
    "qwen3",
    "qwen3_5",
    "qwen3_moe",
    "qwen3_next",
    "jamba",
    "lfm2",
    "mamba",
    "mamba2",
    "nemotron-nas",
    "smollm3",
]
LARGER = {"hidden_size": 128, "block_dim": 128, "num_hidden_layers": 4}
SIZED: dict[str, dict[str, Any]] = {  # by the hidden size, and what has to be there
    "glm4_moe": {"rope_scaling": {"rope_type": "default"}},
    "lfm2": {"block_dim": 128, "block_ff_dim": 192, "full_attn_idxs": [1, 3]},
    "mamba": {"intermediate_size": 256, "state_size": 16},
    "mamba2": {"num_heads": 16},
}
TOLERANCE = 0.05
# How much of the one before its prompt begins with, tokens behind that, tokens of the answer.
REQUESTS = ((0, 300, 40), (0.5, 900, 280), (1, 40, 3), (0.3, 300, 40))
STEP = 256  # tokens for which memory is claimed ahead, which are a part of small models
VOCABULARY = 263


class Measured:
    """MLX's bytes beside the ledger's, at many moments of work on the MLX thread.

    Attributes:
        pairs: (the ledger's, MLX's).
    """

    def __init__(self, book: Ledger) -> None:
        self.pairs: list[tuple[int, int]] = []
        self._book = book
        self._before = 0
        self.ahead = 0  # bytes that may be claimed and not there yet
        self.tokens = 0  # of the request in work

    async def begin(self) -> None:
        gc.collect()
        await mlx_thread.run(ThreadJob(mx.clear_cache))
        self._before = await mlx_thread.run(ThreadJob(mx.get_active_memory))

    def look(self) -> None:
        self.pairs.append((self._book.use.total, mx.get_active_memory() - self._before))

    def processor(self, tokens: mx.array, logits: mx.array) -> mx.array:
        # What has just been stored shares its buffers with the request until that writes there,
        # and a draft begins with the first proposal: for a token or two there is less than told.
        self.tokens += 1
        if self.tokens > 3:
            self.look()
        return logits


def config_of(kind: str) -> dict[str, Any]:
    changed = {**CONFIG, **OTHER.get(kind, {}), **LARGER, **ARCHITECTURES.get(kind, {})}
    del changed["rope_scaling"]  # transformers warns of it, even where it is None
    changed |= SIZED.get(kind, {})
    if "text_config" in changed:
        text = {**changed["text_config"], **LARGER, "vocab_size": VOCABULARY}
        changed["text_config"] = {key: text[key] for key in text if key != "rope_scaling"}
    if kind == "gpt_oss":
        changed["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return {**changed, "model_type": kind, "vocab_size": VOCABULARY}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "model", "--other", json.dumps(config_of(request.param)))


async def test_the_ledger_tells_what_mlx_does(folder: Path) -> None:
    draw = random.Random(5)
    with machine_of(10**9) as book:
        measured = Measured(book)
        await measured.begin()
        async with SimpleEngine(folder, prompt_cache_bytes=40 * 2**20) as engine:
            await engine.run_blocking(measured.look)
            measured.ahead = step_of(engine)
            before: list[int] = []
            for kept, length, limit in REQUESTS:
                measured.tokens = 0
                new = (draw.randrange(1, 250) for _ in range(length))
                prompt = [*before[: int(kept * len(before))], *new]
                result = await engine.generate(
                    prompt,
                    max_tokens=limit,
                    ignore_eos=True,
                    logits_processors=[measured.processor],
                )
                before = [*prompt, *result.tokens]
                await engine.run_blocking(measured.look)
                if kept == 1:
                    await engine.run_blocking(engine._holder.runner().prompt_cache.evict)
                    await engine.run_blocking(measured.look)
        await mlx_thread.run(ThreadJob(measured.look))
    compare(measured)


async def test_so_it_does_with_a_draft(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(config_of("llama")))
    with machine_of(10**9) as book:
        measured = Measured(book)
        await measured.begin()
        async with SimpleEngine(folder, decode=DraftModel(folder, 2)) as engine:
            measured.ahead = 2 * step_of(engine)
            for n in range(4):
                measured.tokens = 0
                await engine.generate(
                    [n + 1] * 900, max_tokens=30, logits_processors=[measured.processor]
                )
                await engine.run_blocking(measured.look)
        await mlx_thread.run(ThreadJob(measured.look))
    compare(measured)


def step_of(engine: SimpleEngine) -> int:
    """Bytes by which the KV cache of a request grows."""
    footprint = engine._holder.runner().footprint
    return footprint.nbytes(2 * STEP) - footprint.nbytes(STEP)


def compare(measured: Measured) -> None:
    """Never more than 5 % above the ledger, nor below it by more than what is claimed ahead; and
    nothing is left behind.
    """
    *during, (left, still_there) = measured.pairs
    assert len(during) > 50
    for told, there in during:
        assert -measured.ahead <= there - told + TOLERANCE * told
        assert there - told <= TOLERANCE * told
    assert left == 0
    assert still_there < 2**16
