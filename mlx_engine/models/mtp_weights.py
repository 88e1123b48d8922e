"""The tensors of MTP heads: found in the files, and brought into one form.

In that form, experts are stacked as mlx-lm stacks them, 8-bit floating point is bfloat16, and
the weights of norms are what the normed values are multiplied with.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_engine.errors import ModelLoadError
from mlx_engine.models.mtp_families import Family

SIDECAR = "mtp.safetensors"
_BLOCK = 128  # rows and columns that share a scale in 8-bit floating point
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(.+)")
# The norms that tell how all are stored; those before the projection may have any mean.
_TELLING_NORMS = ("q_norm", "k_norm", "input_layernorm", "post_attention_layernorm")

Tensors = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """Tensors of a head as the files hold them.

    Attributes:
        tensors: by the checkpoint's names without their prefix, not yet read.
        source: the file or folder.
        plain_norms: the file says that the weights of norms are not stored less one.
    """

    tensors: Tensors
    source: Path
    plain_norms: bool = False


def read_head(source: Path, family: Family) -> HeadTensors:
    """The head in a sidecar file or in a model's folder; ``tensors`` is empty if there is none.

    Raises:
        ModelLoadError: a file is missing, damaged or of another model.
    """
    sidecar = source / SIDECAR if source.is_dir() else source
    if not sidecar.is_file() and source.is_dir():
        return read_checkpoint(source, family)
    tensors, metadata = _open(sidecar)
    head = _with_prefix(tensors, family.prefixes)
    if not head:
        raise ModelLoadError(
            f"{sidecar}: not a head of this model, whose tensors are {family.prefixes[0]}*"
        )
    return HeadTensors(head, sidecar, metadata.get("norms") == "plain")


def read_checkpoint(folder: Path, family: Family) -> HeadTensors:
    """The head among the weights of a model, without what is only a copy of the model's.

    Raises:
        ModelLoadError: a file is missing or damaged.
    """
    head = _find(folder, family.prefixes)
    for copy, original in family.copies.items():
        own = {name: head[name] for name in head if name.startswith(f"{copy}.")}
        if own and _same(_with_prefix(own, (f"{copy}.",)), _find(folder, (f"{original}.",))):
            for name in own:
                del head[name]
    return HeadTensors(head, folder)


def _find(folder: Path, prefixes: tuple[str, ...]) -> Tensors:
    """The tensors in a model's folder whose names begin so, under the rest of their names."""
    found: Tensors = {}
    for file in _files(folder, prefixes):
        found |= _with_prefix(_open(file)[0], prefixes)
    return found


def _files(folder: Path, prefixes: tuple[str, ...]) -> list[Path]:
    """The files that may hold them: those that the index names, or all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            entries = json.loads(index.read_text("utf-8"))["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{index}: broken ({error}); download it again") from error
        if named := {file for name, file in entries if name.startswith(prefixes)}:
            return [folder / file for file in sorted(named)]
    return sorted(folder.glob("model*.safetensors"))


def _open(file: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file, not yet read, and its metadata."""
    try:
        loaded: Any = mx.load(str(file), format="safetensors", return_metadata=True)
    except RuntimeError as error:
        raise ModelLoadError(f"{file}: missing or damaged ({error})") from error
    tensors, metadata = loaded
    return tensors, metadata


def _with_prefix(tensors: Tensors, prefixes: tuple[str, ...]) -> Tensors:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }


def _same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and mx.array_equal(ours[name], theirs[name]).item()
        for name in ours
    )


def in_one_form(head: HeadTensors, family: Family) -> Tensors:
    """The head's tensors in the form that is described above, not yet computed.

    Raises:
        ModelLoadError: an expert or a scale does not fit; the message names the tensor.
    """
    where = f"{head.source}: {family.prefixes[0]}"  # an error's beginning, up to the name
    tensors = _stack_experts(_split_experts(_dequantize(head.tensors, where)), where)
    if family.shifted_norms and not head.plain_norms and _are_shifted(tensors):
        return {name: t + 1 if _is_norm(name, t) else t for name, t in tensors.items()}
    return tensors


def _dequantize(tensors: Tensors, where: str) -> Tensors:
    """8-bit floating point, with a scale for each block of a matrix, as bfloat16."""
    scales = {n.removesuffix("_scale_inv"): t for n, t in tensors.items() if "_scale_inv" in n}
    plain = {name: t for name, t in tensors.items() if "_scale_inv" not in name}
    for name, scale in scales.items():
        weight = plain.get(name)
        if weight is None:
            raise ModelLoadError(f"{where}{name} is missing")
        blocks = tuple(-(-size // _BLOCK) for size in weight.shape)
        if scale.shape != blocks:
            raise ModelLoadError(
                f"{where}{name}_scale_inv has the shape {scale.shape} instead of {blocks}"
            )
        for axis, size in enumerate(weight.shape):
            scale = mx.take(mx.repeat(scale, _BLOCK, axis), mx.arange(size), axis)
        plain[name] = (mx.from_fp8(weight, dtype=mx.bfloat16) * scale).astype(mx.bfloat16)
    return plain


def _split_experts(tensors: Tensors) -> Tensors:
    """Gate and up projections of all experts may be one tensor."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            gate, up = mx.split(tensor, 2, axis=-2)
            result[f"{layer}.switch_mlp.gate_proj.weight"] = gate
            result[f"{layer}.switch_mlp.up_proj.weight"] = up
        elif kind == "down_proj":
            result[f"{layer}.switch_mlp.down_proj.weight"] = tensor
        else:
            result[name] = tensor
    return result


def _stack_experts(tensors: Tensors, where: str) -> Tensors:
    """Experts may be stored one by one."""
    result: Tensors = {}
    experts: dict[tuple[str, str], dict[int, mx.array]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
        else:
            result[name] = tensor
    for (layer, kind), numbered in experts.items():
        for number in range(max(numbered) + 1):
            name = f"{layer}.experts.{number}.{kind}"
            if number not in numbered:
                raise ModelLoadError(f"{where}{name} is missing")
            if numbered[number].shape != numbered[0].shape:
                raise ModelLoadError(f"{where}{name} has not the shape of the other experts'")
        result[f"{layer}.switch_mlp.{kind}"] = mx.stack([numbered[i] for i in sorted(numbered)])
    return result


def _are_shifted(tensors: Tensors) -> bool:
    """Whether the weights of norms are near 0, so stored less one, and not near 1."""
    means = [
        tensor.astype(mx.float32).mean()
        for name, tensor in tensors.items()
        if _is_norm(name, tensor) and name.removesuffix(".weight").endswith(_TELLING_NORMS)
    ]
    return bool(means) and bool((mx.stack(means).mean() < 0.5).item())


def _is_norm(name: str, tensor: mx.array) -> bool:
    return tensor.ndim == 1 and "norm" in name and name.endswith(".weight")
