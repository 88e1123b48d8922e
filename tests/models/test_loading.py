"""Loading: whatever is wrong with a model is said by name, and the next start can succeed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import DraftModel, EngineState, InvalidRequest, ModelLoadError, SimpleEngine
from mlx_engine.config import ModelConfig
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.work import ThreadJob
from mlx_engine.engine import mlx_work
from tests.conftest import ROOT
from tests.waiting import PATIENCE

pytestmark = pytest.mark.anyio


@pytest.fixture
def broken(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, for the test to break."""
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


async def refused(model: str | Path, words: str, **options: Any) -> None:
    engine = SimpleEngine(model, **options)
    with pytest.raises(ModelLoadError, match=words):
        await engine.start()
    assert engine.state is EngineState.CREATED
    assert not engine._holder.loaded


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    await refused(tmp_path / "nowhere", "there is no such folder")
    await refused("nonsense", "no such folder, and it is no Hugging Face id")
    await refused("./here/nor/there", "there is no such folder")


async def test_a_file_instead_of_a_folder(tiny_path: Path) -> None:
    await refused(tiny_path / "config.json", "is a file; give the folder")


async def test_an_empty_folder(tmp_path: Path) -> None:
    await refused(tmp_path, "config.json is missing")


async def test_missing_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    await refused(broken, r"no model\*\.safetensors")


async def test_a_missing_shard_is_named(broken: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    await refused(broken, "model-00002-of-00002.safetensors missing")
    (broken / "model.safetensors.index.json").write_text("{")
    await refused(broken, r"index\.json: broken")


async def test_missing_tokenizer(broken: Path) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    await refused(broken, "no tokenizer files")


async def test_truncated_weights(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    await refused(broken, "may be damaged")


async def test_weights_of_another_model(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    await refused(broken, "do not load")


async def test_a_model_type_that_mlx_lm_does_not_know(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
    await refused(broken, "Model type novel not supported")


async def test_broken_config_and_tokenizer(broken: Path) -> None:
    tokenizer = (broken / "tokenizer.json").read_text()
    (broken / "tokenizer.json").write_text(tokenizer[:100])
    await refused(broken, "do not load")
    (broken / "config.json").write_text("{")
    await refused(broken, "do not load")


async def test_missing_adapters(tiny_path: Path, tmp_path: Path) -> None:
    await refused(tiny_path, "check adapter_path", adapter_path=tmp_path / "none")


async def test_after_a_failed_start_it_can_be_tried_again(broken: Path) -> None:
    config = (broken / "config.json").read_text()
    (broken / "config.json").unlink()
    engine = SimpleEngine(broken)
    with pytest.raises(ModelLoadError):
        await engine.start()
    (broken / "config.json").write_text(config)
    async with engine:
        assert (await engine.generate("x", max_tokens=1)).usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model", ""),
        ("model", 5),
        ("model", None),
        ("context_length", 1),
        ("context_length", "long"),
        ("max_kv_size", 0),
        ("kv_bits", 7),
        ("kv_bits", "4"),
        ("kv_group_size", 48),
        ("kv_group_size", 32),
        ("quantized_kv_start", 100),
        ("revision", 5),
        ("trust_remote_code", 1),
        ("on_progress", 3),
        ("quantized_kv_start", -1),
        ("prefill_step_size", 0),
        ("prefill_step_size", 2.5),
        ("queue_limit", -1),
        ("max_wait", -0.5),
        ("max_wait", "soon"),
        ("max_wait", float("nan")),
    ],
)
def test_a_bad_engine_option_is_refused_by_name(
    tiny_path: Path, option: str, value: object
) -> None:
    arguments: dict[str, Any] = {"model": tiny_path, option: value}
    with pytest.raises(InvalidRequest, match=f"^{option}: "):
        SimpleEngine(**arguments)


def test_options_that_contradict_each_other_are_refused(tiny_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="drop kv_bits or max_kv_size"):
        SimpleEngine(tiny_path, max_kv_size=64, kv_bits=4)


async def test_kv_options_that_the_model_cannot_have_are_refused_at_load(tiny_path: Path) -> None:
    engine = SimpleEngine(tiny_path, kv_bits=4, kv_group_size=128)
    with pytest.raises(InvalidRequest, match="must divide the model's head dimension"):
        await engine.start()
    assert engine.state is EngineState.CREATED
    assert not engine._holder.loaded


async def test_an_error_of_the_load_does_not_keep_the_model_alive(tiny_path: Path) -> None:
    def active() -> int:
        mx.clear_cache()
        return mx.get_active_memory()

    async def on_mlx_thread() -> int:
        return await mlx_thread.run(ThreadJob(active))

    before = await on_mlx_thread()
    with pytest.raises(InvalidRequest) as kept:
        await SimpleEngine(tiny_path, kv_bits=4, kv_group_size=128).start()
    assert await on_mlx_thread() - before < 100_000
    assert kept.value.__cause__ is not None


async def test_a_revision_of_what_has_none_is_refused(tiny_path: Path) -> None:
    for model in (tiny_path, "demo"):
        with pytest.raises(InvalidRequest, match="revision: is for Hugging Face repositories"):
            await SimpleEngine(model, revision="main").start()


async def test_what_is_known_of_a_model(tiny_path: Path) -> None:
    from tests.tiny import CONTEXT

    async with SimpleEngine(tiny_path) as engine:
        loaded = engine._holder.model()
        assert loaded.vocab_size == 262
        assert loaded.context_length == CONTEXT
        assert loaded.vocabulary.longest_token == len("</tool_call>")
    async with SimpleEngine(tiny_path, context_length=100) as engine:
        assert engine._holder.model().context_length == 100


LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, {before})
from mlx_engine.engine.late import import_mlx
import_mlx()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((5000, 6000), (5000, 6000)),
        ((256, 6000), (2048, 6000)),
        ((256, 1000), (1000, 1000)),
    ],
)
def test_importing_mlx_lm_does_not_lower_the_limit_of_open_files(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITS.format(before=before)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    assert done.stdout == f"{after}\n", done.stderr


async def test_a_model_that_drafts_for_itself_is_found_once_with_its_revision(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, str | None]] = []

    def find(config: ModelConfig, *_: object) -> Path:
        found.append((config.model, config.revision))
        return tiny_path

    monkeypatch.setattr(mlx_work, "find_model", find)
    decode = DraftModel("org/model", 2)
    async with SimpleEngine("org/model", revision="v1", decode=decode) as engine:
        result = await engine.generate([1, 2, 3], max_tokens=9, ignore_eos=True)
        assert result.timings.draft_tokens > 0
    assert found == [("org/model", "v1")]
