"""MTP heads that are missing or wrong are refused by name, and so is what cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import InvalidRequest, ModelLoadError
from mlx_engine.models.mtp_extract import extract_mtp
from mlx_engine.models.mtp_heads import load_head
from tests.conftest import ROOT, on_mlx_thread
from tests.models.mtp_checkpoints import (
    GLM,
    MIMO,
    MLA,
    QWEN_NEXT,
    Made,
    load,
    off,
)
from tests.waiting import PATIENCE

pytestmark = pytest.mark.anyio


# ── what is refused ─────────────────────────────────────────────────────────────────────────


@on_mlx_thread
def test_a_model_without_a_head_says_where_one_comes_from(tmp_path: Path) -> None:
    made = Made(MIMO, tmp_path)
    with pytest.raises(InvalidRequest, match=r"no MTP head.*mlx-engine extract-mtp"):
        load_head(made.loaded)
    with pytest.raises(ModelLoadError, match="there is no MTP head in it"):
        extract_mtp(made.converted, tmp_path)


@on_mlx_thread
def test_a_family_that_is_not_known(tiny_path: Path, tmp_path: Path) -> None:
    loaded = load(tiny_path)
    with pytest.raises(InvalidRequest, match="'llama' are not supported; of deepseek_v3, "):
        load_head(loaded)
    with pytest.raises(InvalidRequest, match="'llama' are not supported"):
        extract_mtp(tiny_path, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mtp.fc.weight": None}, "mtp.fc.weight is missing"),
        ({"mtp.layers.0.mlp.gate.weight": None}, r"mtp.layers.0.mlp.gate.weight is missing"),
        ({"mtp.layers.0.mlp.experts.2.up_proj.weight": None}, r"experts\.2\.up_proj.*is missing"),
        ({"mtp.layers.0.mlp.experts.3.up_proj.weight": None}, r"up_proj.* shape \(3, 32, 64\)"),
        (
            {"mtp.layers.0.mlp.experts.3.up_proj.weight": (3, 3)},
            r"experts\.3\.up.*other experts",
        ),
        ({"mtp.norm.weight": (32,)}, r"mtp.norm.weight has the shape \(32,\) instead of \(64,\)"),
        ({"mtp.layers.1.mlp.gate.weight": (4, 64)}, "mtp.layers.1.mlp.gate.weight has no place"),
        ({"mtp.fc.bias": (64,)}, "mtp.fc.bias has no place"),
        ({"mtp.fc.weight_scale_inv": (2, 2)}, r"fc.weight_scale_inv has the shape \(2, 2\)"),
        ({"mtp.what.weight_scale_inv": (1, 1)}, "what.weight is missing"),
        ({"mtp.fc.scales": (64, 7), "mtp.fc.biases": (64, 7)}, "mtp.safetensors: "),
    ],
    ids=str,
)
@on_mlx_thread
def test_a_tensor_that_is_wrong_is_named(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made = Made(QWEN_NEXT, tmp_path)
    tensors = made.head_tensors()
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = mx.zeros(shape)
    mx.save_safetensors(str(tmp_path / "mtp.safetensors"), tensors)
    with pytest.raises(ModelLoadError, match=words) as caught:
        load_head(made.loaded, tmp_path / "mtp.safetensors")
    assert str(tmp_path / "mtp.safetensors") in str(caught.value)


@on_mlx_thread
def test_a_joint_projection_that_does_not_fit(tmp_path: Path) -> None:
    made = Made(MLA, tmp_path)
    tensors = made.head_tensors() | {f"{MLA.prefix}self_attn.kv_b_proj.weight": mx.zeros((7, 32))}
    mx.save_safetensors(str(tmp_path / "mtp.safetensors"), tensors)
    with pytest.raises(ModelLoadError, match=r"layers\.2\.self_attn\.kv_b_proj\.weight does not"):
        load_head(made.loaded, tmp_path / "mtp.safetensors")


@on_mlx_thread
def test_a_dense_head_of_a_model_of_experts_only(tmp_path: Path) -> None:
    made = Made(QWEN_NEXT, tmp_path)
    tensors = {n: t for n, t in made.head_tensors().items() if ".experts." not in n}
    mx.save_safetensors(str(tmp_path / "mtp.safetensors"), tensors)
    with pytest.raises(ModelLoadError, match="the head is dense, and no layer of the model is"):
        load_head(made.loaded, tmp_path / "mtp.safetensors")


@on_mlx_thread
def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    made = Made(MIMO, tmp_path)
    path = tmp_path / "head.safetensors"
    with pytest.raises(ModelLoadError, match=r"head\.safetensors: missing or damaged"):
        load_head(made.loaded, path)
    extract_mtp(made.checkpoint, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"head\.safetensors: missing or damaged"):
        load_head(made.loaded, path)
    mx.save_safetensors(str(path), made.head_tensors() | {"x": mx.zeros((1,))})
    (tmp_path / "glm").mkdir()
    glm = Made(GLM, tmp_path / "glm")
    with pytest.raises(ModelLoadError, match=r"head\.safetensors: not a head of this model"):
        load_head(glm.loaded, path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ModelLoadError, match=r"head\.safetensors: missing or damaged"):
        load_head(made.loaded, path)
    for text in ("{", "[]"):
        (made.checkpoint / "config.json").write_text(text)
        with pytest.raises(ModelLoadError, match=r"config\.json: "):
            extract_mtp(made.checkpoint, path)
    with pytest.raises(ModelLoadError, match=r"config\.json: missing or broken"):
        extract_mtp(tmp_path / "nowhere", path)


@pytest.mark.parametrize(
    ("out", "options", "option"),
    [
        ("mtp.safetensors", {"q_bits": 7}, "q_bits"),
        ("mtp.safetensors", {"q_bits": 4, "q_group_size": 48}, "q_group_size"),
        ("mtp.bin", {}, "out"),
        ("model-mtp.safetensors", {}, "out"),
        ("nowhere/mtp.safetensors", {}, "out"),
    ],
)
@on_mlx_thread
def test_arguments_that_cannot_be_are_refused_by_name(
    out: str, options: dict[str, int], option: str, tmp_path: Path
) -> None:
    made = Made(MIMO, tmp_path)
    with pytest.raises(InvalidRequest, match=f"^{option}: "):
        extract_mtp(made.checkpoint, tmp_path / out, **options)
    assert not list(tmp_path.glob("*.safetensors"))


@on_mlx_thread
def test_the_old_file_stays_when_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(MIMO, tmp_path)
    path = extract_mtp(made.checkpoint, made.converted).path
    before = path.read_bytes()

    def fails(*args: object) -> None:
        Path(str(args[0])).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(mx, "save_safetensors", fails)
    with pytest.raises(InvalidRequest, match=r"out: .*cannot be written .disk full"):
        extract_mtp(made.checkpoint, made.converted, q_bits=4)
    assert path.read_bytes() == before
    assert not [p for p in made.converted.iterdir() if p.name.startswith(".")]


# ── the command ─────────────────────────────────────────────────────────────────────────────

COMMAND = """
import argparse, sys
from mlx_engine.cli.extract_mtp import run
sys.exit(run(argparse.Namespace(checkpoint=sys.argv[1], out=sys.argv[2], q_bits=8,
    q_group_size=32)))
"""


@on_mlx_thread
def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    made = Made(MIMO, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(made.checkpoint), str(made.converted)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    path = made.converted / "mtp.safetensors"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: MTP head of the mimo family, 32 tensors, 0.1 MB\n"
    assert off(load_head(made.loaded), made) < 0.3
