"""How the families of models store their MTP heads: one row of a table each.

All heads have the same form (arXiv 2412.19437): the embedding of token i+1 and the hidden
state of position i are normed, joined and projected, one decoder layer follows, then a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from mlx_engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Family:
    """Names and conventions of one family.

    Attributes:
        name: of the family.
        prefixes: what the names of the head's tensors begin with, the usual one first;
            ``{layers}`` stands for the number of layers of the model.
        parts: of the head, the checkpoint's name -> ours.
        block: what the names of the decoder layer's tensors begin with, after the prefix.
        embedding_first: whether the projection reads the embedding before the hidden state.
        shifted_norms: whether checkpoints store the weights of norms less one.
        copies: tensors that may be copies of the model's own, by their names there.
        array_mask: the decoder layer needs its mask as an array.
        numbered_layers: the decoder layer is made with its index.
    """

    name: str
    prefixes: tuple[str, ...]
    parts: Mapping[str, str]
    block: str = ""
    embedding_first: bool = True
    shifted_norms: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)
    array_mask: bool = False
    numbered_layers: bool = True

    def part(self, name: str) -> str:
        """Our name of a tensor, from the checkpoint's without its prefix."""
        layer, _, kind = name.rpartition(".")
        if layer in self.parts:
            return f"{self.parts[layer]}.{kind}"
        return f"block.{name.removeprefix(self.block)}" if name.startswith(self.block) else name

    def stored(self, part: str) -> str:
        """The checkpoint's name of a tensor, with the usual prefix, from ours."""
        layer, _, kind = part.rpartition(".")
        for stored, ours in self.parts.items():
            if ours == layer:
                return f"{self.prefixes[0]}{stored}.{kind}"
        in_block = part.startswith("block.")
        return self.prefixes[0] + (self.block + part.removeprefix("block.") if in_block else part)


_DEEPSEEK = Family(
    name="deepseek",
    prefixes=("model.layers.{layers}.",),
    parts={
        "enorm": "norm_embedding",
        "hnorm": "norm_hidden",
        "eh_proj": "projection",
        "shared_head.norm": "norm_out",
        "shared_head.head": "lm_head",
        "embed_tokens": "embed_tokens",
    },
    copies={"shared_head.head": "lm_head", "embed_tokens": "model.embed_tokens"},
)
_DEEPSEEK_MLA = replace(_DEEPSEEK, array_mask=True)
_QWEN = Family(
    name="qwen",
    prefixes=("mtp.", "language_model.mtp."),
    parts={
        "pre_fc_norm_embedding": "norm_embedding",
        "pre_fc_norm_hidden": "norm_hidden",
        "fc": "projection",
        "norm": "norm_out",
    },
    block="layers.0.",
    shifted_norms=True,
)
_MIMO = Family(
    name="mimo",
    prefixes=("model.mtp_layers.0.",),
    parts={
        "token_layernorm": "norm_embedding",
        "hidden_layernorm": "norm_hidden",
        "input_proj": "projection",
        "final_layernorm": "norm_out",
    },
    embedding_first=False,
    numbered_layers=False,
)
FAMILIES = {
    "deepseek_v3": _DEEPSEEK_MLA,
    "deepseek_v32": _DEEPSEEK_MLA,
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK_MLA,
    "glm_moe_dsa": _DEEPSEEK_MLA,
    "qwen3_next": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "mimo": _MIMO,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of the model with this config.json.

    Raises:
        InvalidRequest: it is not in the table.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(MODEL_REMAPPING.get(kind, kind))
    if family is None:
        known = ", ".join(FAMILIES)
        raise InvalidRequest(
            "decode", f"MTP heads of models of type {kind!r} are not supported; of {known} they are"
        )
    layers = str(config.get("num_hidden_layers"))
    return replace(family, prefixes=tuple(p.replace("{layers}", layers) for p in family.prefixes))
