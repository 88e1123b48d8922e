"""An MTP head from a model's original checkpoint into a file of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_engine.checks import choice
from mlx_engine.errors import InvalidRequest, ModelLoadError
from mlx_engine.models.mtp_families import family_of
from mlx_engine.models.mtp_weights import SIDECAR, Tensors, in_one_form, read_checkpoint
from mlx_engine.models.whole_file import replace_safetensors

_BITS = (2, 3, 4, 5, 6, 8)
_GROUP_SIZES = (32, 64, 128)
# Routers choose: an error there is not a small one. The last is split before it is used.
_NEVER_QUANTIZED = ("mlp.gate", "shared_expert_gate", "self_attn.kv_b_proj")


@dataclass(frozen=True, slots=True)
class ExtractedHead:
    """A head that ``extract_mtp`` wrote.

    Attributes:
        path: the file.
        family: of models with such heads.
        tensors: how many there are.
        bytes: of the tensors.
    """

    path: Path
    family: str
    tensors: int
    bytes: int


def extract_mtp(
    checkpoint: Path, out: Path, *, q_bits: int | None = None, q_group_size: int = 64
) -> ExtractedHead:
    """Write the head of an original checkpoint to a file for ``load_head``. On the MLX thread.

    Reads only the head's tensors, and those of the model that some may be copies of. The old
    file stays if this fails.

    Args:
        checkpoint: the folder with config.json and model*.safetensors.
        out: a file, or the folder of the converted model: there it is ``mtp.safetensors``.
        q_bits: quantise linear layers but routers, 2, 3, 4, 5, 6 or 8; ``None`` does not.
        q_group_size: values that share a scale then: 32, 64 or 128.

    Raises:
        InvalidRequest: an argument is not acceptable, the model is of no known family, or
            ``out`` cannot be written.
        ModelLoadError: there is no head, or files or tensors are missing or damaged.
    """
    if q_bits is not None:
        q_bits = choice("q_bits", q_bits, _BITS)
    q_group_size = choice("q_group_size", q_group_size, _GROUP_SIZES)
    out = _sidecar(out)
    family = family_of(_read_config(checkpoint))
    tensors = in_one_form(read_checkpoint(checkpoint, family), family)
    if not tensors:
        raise ModelLoadError(f"{checkpoint}: there is no MTP head in it ({family.prefixes[0]}*)")
    if q_bits is not None:
        tensors = _quantized(tensors, q_bits, q_group_size)
    _write(
        out,
        {family.prefixes[0] + name: tensor for name, tensor in tensors.items()},
        {"format": "mlx", "mtp": family.name, "norms": "plain"},
    )
    size = sum(tensor.nbytes for tensor in tensors.values())
    return ExtractedHead(out, family.name, len(tensors), size)


def _sidecar(out: Path) -> Path:
    if out.is_dir():
        return out / SIDECAR
    if out.suffix != ".safetensors" or out.name.startswith("model"):
        raise InvalidRequest(
            "out",
            f"{out}: must be a folder or a *.safetensors file not named model*, "
            "which would be taken for weights of the model itself",
        )
    return out


def _read_config(checkpoint: Path) -> dict[str, object]:
    file = checkpoint / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file}: missing or broken ({error})") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{file}: broken, download it again")
    return config


def _quantized(tensors: Tensors, bits: int, group_size: int) -> Tensors:
    """Quantise matrices one by one, so that only one is in memory at full size."""
    result: Tensors = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        layer = name.removesuffix(".weight")
        if (
            tensor.ndim < 2
            or layer.endswith(_NEVER_QUANTIZED)
            or not mx.issubdtype(tensor.dtype, mx.floating)
            or tensor.shape[-1] % group_size
            or not name.endswith(".weight")
        ):
            result[name] = tensor
            continue
        weight, scales, biases = mx.quantize(tensor, group_size, bits)
        mx.eval(weight, scales, biases)
        result |= {name: weight, f"{layer}.scales": scales, f"{layer}.biases": biases}
    return result


def _write(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    try:
        replace_safetensors(path, tensors, metadata)
    except (OSError, RuntimeError) as error:
        raise InvalidRequest("out", f"{path} cannot be written ({error})") from error
