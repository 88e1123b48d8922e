"""A model's own multi-token-prediction head, which mlx-lm leaves behind when it loads a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.utils import infer_quant_config

from mlx_engine.errors import InvalidRequest, ModelLoadError
from mlx_engine.models.loading import LoadedModel
from mlx_engine.models.mtp_families import Family, family_of
from mlx_engine.models.mtp_weights import Tensors, in_one_form, read_head
from mlx_engine.models.split import SplitModel, split


@dataclass(frozen=True, slots=True)
class MTPHead:
    """Predicts token i+2 from the model's hidden state of position i and token i+1.

    Fed with its own output in place of the model's hidden state it predicts further ahead.

    Attributes:
        family: of models with heads like this one.
        parts: the head's weights; the model's own stay with the model.
        trunk: the model that it belongs to.
        layer: the model's layer that the head's is like.
        embedding_first: whether the projection reads the embedding before the hidden state.
        array_mask: the decoder layer needs its mask as an array.
    """

    family: str
    parts: nn.Module
    trunk: SplitModel
    layer: int
    embedding_first: bool
    array_mask: bool

    def make_cache(self) -> list[Any]:
        """An empty cache for the head, with one entry: its history is not the model's."""
        return [make_prompt_cache(self.trunk.model)[self.layer]]

    def __call__(self, tokens: mx.array, hidden: mx.array, cache: list[Any]) -> mx.array:
        """Continue the sequence in ``cache`` with n pairs.

        Args:
            tokens: t[i+1], of shape (1, n).
            hidden: h[i] of the model or of this head, of shape (1, n, D).
            cache: by ``make_cache``; it grows by n.

        Returns:
            Hidden states of shape (1, n, D), after the head's last norm.
        """
        parts, entry = self.parts, cache[0]
        embed = parts.embed_tokens if "embed_tokens" in parts else self.trunk.embed
        inputs = [parts.norm_embedding(embed(tokens)), parts.norm_hidden(hidden)]
        if not self.embedding_first:
            inputs.reverse()
        x = parts.projection(mx.concatenate(inputs, axis=-1))
        keys = entry[0] if isinstance(entry, CacheList) else entry
        mask = create_attention_mask(x, keys, return_array=self.array_mask)
        output: mx.array = parts.norm_out(parts.block(x, mask, entry))
        return output

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states of shape (1, n, D) as logits of shape (1, n, vocabulary)."""
        if "lm_head" not in self.parts:
            return self.trunk.logits(hidden)
        logits: mx.array = self.parts.lm_head(hidden)
        return logits


def load_head(loaded: LoadedModel, path: Path | None = None) -> MTPHead:
    """Load the model's head. On the MLX thread.

    Args:
        path: a file that ``extract_mtp`` wrote, or a folder; by default the model's own. In a
            folder, ``mtp.safetensors`` is read, or else what the weights hold of a head.

    Raises:
        InvalidRequest: there is no head, or no support for those of such models.
        ModelLoadError: files or tensors are missing, damaged or not of this model.
    """
    family = family_of(loaded.config)
    trunk = split(loaded.model)
    tensors, source = _read(path or loaded.path, family)
    layer = _layer_alike(trunk, "block.mlp.switch_mlp.up_proj.weight" in tensors, source)
    tensors = _split_mla(tensors, trunk, layer, family, source)
    parts = _make_parts(trunk, layer, family, tensors)
    try:
        _quantize(parts, tensors)
    except (ValueError, ZeroDivisionError) as error:
        raise ModelLoadError(f"{source}: {error}") from error
    _check_tensors(parts, tensors, family, source)
    _fill(parts, tensors, trunk)
    return MTPHead(family.name, parts, trunk, layer, family.embedding_first, family.array_mask)


def _read(source: Path, family: Family) -> tuple[Tensors, Path]:
    """The head's tensors under our names, not yet read, and where they are."""
    stored = read_head(source, family)
    if not stored.tensors:
        raise InvalidRequest(
            "decode",
            f"{stored.source} has no MTP head; converted checkpoints have lost it: "
            "'mlx-engine extract-mtp CHECKPOINT OUT' takes it from the original one",
        )
    return {family.part(n): t for n, t in in_one_form(stored, family).items()}, stored.source


def _layer_alike(trunk: SplitModel, moe: bool, source: Path) -> int:
    """A layer of the model with full attention, which is MoE or dense as the head's is."""
    for index, layer in enumerate(trunk.model.layers):
        if not getattr(layer, "is_linear", False) and ("switch_mlp" in layer.mlp) == moe:
            return index
    raise ModelLoadError(
        f"{source}: the head is {'a MoE' if moe else 'dense'}, and no layer of the model is"
    )


def _split_mla(
    tensors: Tensors, trunk: SplitModel, layer: int, family: Family, source: Path
) -> Tensors:
    """MLA's joint projection is split as the model does it, by passing it off as that layer's."""
    ours, theirs = "block.self_attn.", f"model.layers.{layer}.self_attn."
    joint = {n: t for n, t in tensors.items() if n.startswith(f"{ours}kv_b_proj.")}
    if not joint:
        return tensors
    try:
        halves = trunk.text.sanitize({n.replace(ours, theirs): t for n, t in joint.items()})
    except (ValueError, KeyError) as error:
        name = family.stored(f"{ours}kv_b_proj.weight")
        raise ModelLoadError(f"{source}: {name} does not fit ({error})") from error
    return {n: t for n, t in tensors.items() if n not in joint} | {
        name.replace(theirs, ours): tensor for name, tensor in halves.items()
    }


def _make_parts(trunk: SplitModel, layer: int, family: Family, tensors: Tensors) -> nn.Module:
    """The head with random weights, which are never computed."""
    args = trunk.text.args
    size = args.hidden_size
    kind = type(trunk.model.layers[layer])
    parts = nn.Module()
    for norm in ("norm_embedding", "norm_hidden", "norm_out"):
        parts[norm] = nn.RMSNorm(size, eps=args.rms_norm_eps)
    parts.projection = nn.Linear(2 * size, size, bias=False)
    parts.block = kind(args, layer) if family.numbered_layers else kind(args)
    if "lm_head.weight" in tensors:
        parts.lm_head = nn.Linear(size, args.vocab_size, bias=False)
    if "embed_tokens.weight" in tensors:
        parts.embed_tokens = nn.Embedding(args.vocab_size, size)
    return parts


def _quantize(parts: nn.Module, tensors: Tensors) -> None:
    """Make the modules quantised whose tensors are, with what their shapes tell."""

    def how(path: str, module: nn.Module) -> dict[str, Any] | bool:
        if f"{path}.scales" not in tensors or not hasattr(module, "to_quantized"):
            return False
        settings: dict[str, Any] = infer_quant_config(path, module, tensors)
        return settings

    nn.quantize(parts, class_predicate=how)


def _check_tensors(parts: nn.Module, tensors: Tensors, family: Family, source: Path) -> None:
    """Refuse tensors unless there is one of the right shape for each weight, and no other."""
    needed = dict(tree_flatten(parts.parameters()))
    for name in sorted(needed.keys() | tensors.keys()):
        stored = family.stored(name)
        if name not in tensors:
            raise ModelLoadError(f"{source}: {stored} is missing")
        if name not in needed:
            raise ModelLoadError(f"{source}: {stored} has no place in the head of this model")
        if tensors[name].shape != needed[name].shape:
            raise ModelLoadError(
                f"{source}: {stored} has the shape {tensors[name].shape} "
                f"instead of {needed[name].shape}"
            )


def _fill(parts: nn.Module, tensors: Tensors, trunk: SplitModel) -> None:
    """Load the weights, in the model's own type but for those that it keeps in theirs."""
    dtype = trunk.embed(mx.zeros((1, 1), mx.int32)).dtype
    may_cast = getattr(trunk.text, "cast_predicate", lambda name: True)
    parts.load_weights(
        [
            (name, t.astype(dtype) if mx.issubdtype(t.dtype, mx.floating) and may_cast(name) else t)
            for name, t in tensors.items()
        ]
    )
    parts.eval()
    mx.eval(parts.parameters())
