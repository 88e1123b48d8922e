"""MTP heads: read as their checkpoints mean it, and computing what they mean."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_engine import ModelLoadError
from mlx_engine.models.mtp_extract import extract_mtp
from mlx_engine.models.mtp_heads import load_head
from tests.conftest import on_mlx_thread
from tests.models.mtp_checkpoints import (
    DENSE_QWEN,
    DIFFERENT,
    EXACT,
    GLM,
    KINDS,
    MIMO,
    MLA,
    QWEN_NEXT,
    Kind,
    Made,
    N,
    Tensors,
    difference,
    load,
    off,
    pairs,
)

pytestmark = pytest.mark.anyio


# ── what a head computes ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS, ids=str)
@on_mlx_thread
def test_a_head_does_what_its_family_means(kind: Kind, tmp_path: Path) -> None:
    made = Made(kind, tmp_path)
    extract_mtp(made.checkpoint, made.converted)
    from_sidecar = load_head(made.loaded)
    from_checkpoint = load_head(made.loaded, made.checkpoint)
    tokens, hidden = pairs()
    expected = made.expected(tokens, hidden)
    for head in (from_sidecar, from_checkpoint):
        assert difference(head(tokens, hidden, head.make_cache()), expected) < EXACT
        cache = head.make_cache()
        one_by_one = [head(tokens[:, i : i + 1], hidden[:, i : i + 1], cache) for i in range(N)]
        assert difference(mx.concatenate(one_by_one, axis=1), expected) < EXACT
        cache = head.make_cache()
        chunks = [head(tokens[:, s], hidden[:, s], cache) for s in (slice(3), slice(3, N))]
        assert difference(mx.concatenate(chunks, axis=1), expected) < EXACT
        assert head.logits(expected).shape == (1, N, 262)
        assert difference(head.logits(expected), expected @ made.text.lm_head.weight.T) < EXACT


@pytest.mark.parametrize("kind", [k for k in KINDS if k.loads_original], ids=str)
@on_mlx_thread
def test_an_original_checkpoint_that_mlx_lm_loads_has_its_head_beside(
    kind: Kind, tmp_path: Path
) -> None:
    made = Made(kind, tmp_path)
    loaded = load(made.checkpoint)
    tokens, _ = pairs()
    assert difference(loaded.model(tokens), made.loaded.model(tokens)) < EXACT
    assert off(load_head(loaded), made) < EXACT


@pytest.mark.parametrize("kind", [GLM, QWEN_NEXT, MIMO], ids=str)
@on_mlx_thread
def test_the_other_order_differs(kind: Kind, tmp_path: Path) -> None:
    made = Made(kind, tmp_path)
    head = load_head(made.loaded, made.checkpoint)
    assert off(replace(head, embedding_first=kind.head_first), made) > DIFFERENT


@pytest.mark.parametrize("kind", [QWEN_NEXT, DENSE_QWEN], ids=str)
@on_mlx_thread
def test_norms_are_taken_as_they_are_stored(kind: Kind, tmp_path: Path) -> None:
    made = Made(kind, tmp_path)
    sidecar = extract_mtp(made.checkpoint, tmp_path / "mtp.safetensors").path
    plain = tensors_of(sidecar)
    assert difference(plain["mtp.norm.weight"], made.parts["norm_out"]) < EXACT
    mx.save_safetensors(str(tmp_path / "guessed.safetensors"), plain)
    assert off(load_head(made.loaded, tmp_path / "guessed.safetensors"), made) < EXACT
    # Those before the projection may have any mean; they do not decide.
    lifted = {n: t + 2 if "pre_fc" in n else t for n, t in made.head_tensors().items()}
    mx.save_safetensors(str(tmp_path / "lifted.safetensors"), lifted)
    made.parts["norm_hidden"] += 2
    made.parts["norm_embedding"] += 2
    assert off(load_head(made.loaded, tmp_path / "lifted.safetensors"), made) < EXACT


@on_mlx_thread
def test_a_sidecar_that_says_how_norms_are_is_believed(tmp_path: Path) -> None:
    made = Made(DENSE_QWEN, tmp_path)
    path = tmp_path / "mtp.safetensors"
    mx.save_safetensors(str(path), made.head_tensors(), {"norms": "plain"})
    assert off(load_head(made.loaded, path), made) > DIFFERENT


@on_mlx_thread
def test_norms_that_are_near_zero_but_of_another_family_stay(tmp_path: Path) -> None:
    made = Made(MIMO, tmp_path)
    made.block.input_layernorm.weight = made.block.input_layernorm.weight - 1
    made.write(made.head_tensors())
    assert off(load_head(made.loaded, made.checkpoint), made) < EXACT


@on_mlx_thread
def test_a_head_of_its_own_is_used_and_a_copy_is_left_out(tmp_path: Path) -> None:
    made = Made(GLM, tmp_path)
    model, head = made.model_tensors(), made.head_tensors()
    names = [f"{GLM.prefix}shared_head.head.weight", f"{GLM.prefix}embed_tokens.weight"]
    copies = {names[0]: model["lm_head.weight"], names[1]: model["model.embed_tokens.weight"]}
    made.write(model | head | copies)
    extracted = extract_mtp(made.checkpoint, made.converted)
    assert not copies.keys() & tensors_of(extracted.path).keys()

    own = {name: mx.random.normal(tensor.shape) for name, tensor in copies.items()}
    made.write(model | head | own)
    extract_mtp(made.checkpoint, made.converted)
    head_of_its_own = load_head(made.loaded)
    _, hidden = pairs()
    logits = head_of_its_own.logits(hidden)
    assert difference(logits, hidden @ own[names[0]].T) < EXACT
    assert off(head_of_its_own, made) > DIFFERENT
    made.text.model.embed_tokens.weight = own[names[1]]
    assert off(head_of_its_own, made) < EXACT


def tensors_of(path: Path) -> Tensors:
    loaded: Any = mx.load(str(path))
    return dict(loaded)


# ── types of numbers ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [k for k in KINDS if k.experts == "single"], ids=str)
@on_mlx_thread
def test_a_quantised_head_is_close_and_smaller(kind: Kind, tmp_path: Path) -> None:
    made = Made(kind, tmp_path)
    whole = extract_mtp(made.checkpoint, tmp_path / "whole.safetensors")
    small = extract_mtp(made.checkpoint, made.converted, q_bits=8, q_group_size=32)
    assert small.bytes < 0.6 * whole.bytes
    head = load_head(made.loaded)
    assert isinstance(head.parts.projection, nn.QuantizedLinear)
    assert isinstance(head.parts.block.self_attn.o_proj, nn.QuantizedLinear)
    assert EXACT < off(head, made) < 0.3
    tokens, hidden = pairs()
    got, expected = head(tokens, hidden, head.make_cache()), made.expected(tokens, hidden)
    assert mx.abs(got - expected).mean().item() < 0.03


@pytest.mark.parametrize("q_bits", [None, 4])
@pytest.mark.parametrize("kind", [MLA, QWEN_NEXT], ids=str)
@on_mlx_thread
def test_a_head_that_is_stored_quantised_stays_so(
    kind: Kind, q_bits: int | None, tmp_path: Path
) -> None:
    made = Made(kind, tmp_path)
    stored: Tensors = {}
    for name, tensor in made.head_tensors().items():
        stored[name] = tensor
        if tensor.ndim == 2 and not name.endswith("mlp.gate.weight"):
            layer = name.removesuffix(".weight")
            quantised = mx.quantize(tensor, 32, 8)
            stored |= dict(
                zip([name, f"{layer}.scales", f"{layer}.biases"], quantised, strict=True)
            )
    made.write(stored)
    extract_mtp(made.checkpoint, made.converted, q_bits=q_bits)
    for head in (load_head(made.loaded), load_head(made.loaded, made.checkpoint)):
        assert EXACT < off(head, made) < 0.3


@on_mlx_thread
def test_routers_and_norms_are_not_quantised(tmp_path: Path) -> None:
    made = Made(QWEN_NEXT, tmp_path)
    tensors = tensors_of(extract_mtp(made.checkpoint, tmp_path, q_bits=4, q_group_size=32).path)
    quantised = {n.removesuffix(".scales") for n in tensors if n.endswith(".scales")}
    assert "mtp.layers.0.mlp.switch_mlp.down_proj" in quantised
    assert "mtp.layers.0.mlp.shared_expert.down_proj" in quantised
    assert "mtp.layers.0.mlp.gate" not in quantised
    assert "mtp.layers.0.mlp.shared_expert_gate" not in quantised
    assert len(tensors) == 20 + 2 * len(quantised)


@on_mlx_thread
def test_a_head_takes_the_type_of_a_model_that_may_be_quantised(tmp_path: Path) -> None:
    made = Made(GLM, tmp_path)
    made.loaded.model.set_dtype(mx.bfloat16)
    nn.quantize(made.loaded.model, 32, 4)
    head = load_head(made.loaded, made.checkpoint)
    tokens, _ = pairs()
    out = head(tokens, made.text.model(tokens), head.make_cache())
    assert out.dtype == mx.bfloat16
    assert head.parts.projection.weight.dtype == mx.bfloat16
    assert head.parts.block.mlp.gate.e_score_correction_bias.dtype == mx.float32
    assert head.logits(out).dtype == mx.bfloat16


@pytest.mark.parametrize("q_bits", [None, 8])
@on_mlx_thread
def test_8_bit_floating_point_is_read_as_mlx_lm_reads_it(
    q_bits: int | None, tmp_path: Path
) -> None:
    made = Made(MLA, tmp_path)
    stored: Tensors = {}
    for name, tensor in made.head_tensors().items():
        if (tensor.ndim == 2 and "self_attn" in name) or "mlp.experts" in name:
            scale = mx.random.uniform(0.5, 2, [math.ceil(size / 128) for size in tensor.shape])
            stored |= {name: mx.to_fp8(tensor), f"{name}_scale_inv": scale}
        else:
            stored[name] = tensor
    made.write(stored)
    layer = "model.layers.1."
    read = made.text.sanitize({n.replace(MLA.prefix, layer): t for n, t in stored.items()})
    head = load_head(made.loaded, made.checkpoint)
    for name, weight in tree_flatten(head.parts.block.parameters()):
        assert mx.array_equal(weight, read[layer + name].astype(weight.dtype)).item(), name

    extract_mtp(made.checkpoint, made.converted, q_bits=q_bits, q_group_size=32)
    tokens, hidden = pairs()
    one, other = (h(tokens, hidden, h.make_cache()) for h in (head, load_head(made.loaded)))
    assert difference(one, other) < (EXACT if q_bits is None else 0.3)


# ── where a head is found ───────────────────────────────────────────────────────────────────


@on_mlx_thread
def test_only_the_shards_with_the_head_are_read(tmp_path: Path) -> None:
    made = Made(QWEN_NEXT, tmp_path)
    made.write(made.model_tensors() | made.head_tensors(), shards=3)
    extracted = extract_mtp(made.checkpoint, made.converted)
    assert (extracted.path, extracted.family) == (made.converted / "mtp.safetensors", "qwen")
    stored = tensors_of(extracted.path)
    assert extracted.tensors == len(stored)
    assert extracted.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert off(load_head(made.loaded), made) < EXACT

    index = made.checkpoint / "model.safetensors.index.json"
    names = {"mtp.fc.weight": "model-00009.safetensors", "x": "model-00001-of-00003.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelLoadError, match=r"model-00009.safetensors: missing or damaged"):
        extract_mtp(made.checkpoint, made.converted)
    del names["mtp.fc.weight"]  # an index that leaves the head out
    index.write_text(json.dumps({"weight_map": names}))
    assert extract_mtp(made.checkpoint, made.converted).tensors == len(stored)
    index.write_text("{")
    with pytest.raises(ModelLoadError, match=r"index\.json: broken"):
        extract_mtp(made.checkpoint, made.converted)


@on_mlx_thread
def test_a_head_nested_under_the_language_model_is_found(tmp_path: Path) -> None:
    made = Made(DENSE_QWEN, tmp_path)
    made.write({f"language_model.{name}": t for name, t in made.head_tensors().items()})
    assert off(load_head(made.loaded, made.checkpoint), made) < EXACT


@on_mlx_thread
def test_extracting_twice_starts_from_the_checkpoint(tmp_path: Path) -> None:
    made = Made(DENSE_QWEN, tmp_path)
    extract_mtp(made.checkpoint, made.checkpoint, q_bits=4)
    extract_mtp(made.checkpoint, made.checkpoint)
    assert off(load_head(made.loaded, made.checkpoint), made) < EXACT
    assert not [p for p in made.checkpoint.iterdir() if p.name.startswith(".")]
