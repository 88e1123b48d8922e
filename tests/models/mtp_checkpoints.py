"""Tiny random models with MTP heads, in the layout of the original checkpoints.

A head is made in mlx-lm's form: plain norms, stacked experts. ``original`` undoes for it, and
for the model, what mlx-lm does to a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask

from mlx_engine.config import ModelConfig
from mlx_engine.models.loading import LoadedModel, load_model
from mlx_engine.models.mtp_heads import MTPHead
from tests.tiny import make_tokenizer

Tensors = dict[str, mx.array]
D = 64

_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_DEEPSEEK = dict(
    **_MOE,
    n_shared_experts=1,
    n_routed_experts=4,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.5,
    norm_topk_prob=True,
    num_attention_heads=2,
    num_key_value_heads=2,
    rope_scaling=None,
)
_GLM = {"head_dim": 32, "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5}
_MLA = dict(
    **_DEEPSEEK,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=32,
    v_head_dim=64,
)
_INDEXED = dict(**_MLA, index_head_dim=16, index_n_heads=2, index_topk=4)
_DSA = {
    "rope_parameters": {"rope_theta": 10000.0},
    "attention_bias": False,
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_HYBRID = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "partial_rotary_factor": 0.5,
}
_QWEN_MOE = dict(**_HYBRID, **_MOE, num_experts=4, shared_expert_intermediate_size=32)

_QWEN_NAMES = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
_DEEPSEEK_NAMES = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
_MIMO_NAMES = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")


@dataclass(frozen=True)
class Kind:
    """One type of model, and how its checkpoints store the head."""

    model_type: str
    config: dict[str, object]
    layer: str  # class of its layers
    names: tuple[str, str, str, str] = _DEEPSEEK_NAMES
    prefix: str = "model.layers.2."
    block: str = ""
    experts: str = "single"  # or "fused", "stacked"
    module: str = ""
    head_first: bool = False
    loads_original: bool = True
    shifted: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shifted", self.names is _QWEN_NAMES)

    def __str__(self) -> str:
        return f"{self.model_type}-{self.experts}"

    @cached_property
    def lm(self) -> Any:
        return import_module(f"mlx_lm.models.{self.module or self.model_type}")


_QWEN: dict[str, Any] = {"names": _QWEN_NAMES, "prefix": "mtp.", "block": "layers.0."}
DENSE_QWEN = Kind("qwen3_5", _HYBRID, "DecoderLayer", **_QWEN)
MIMO = Kind("mimo", {}, "TransformerBlock", _MIMO_NAMES, "model.mtp_layers.0.", head_first=True)
GLM = Kind("glm4_moe", {**_DEEPSEEK, **_GLM}, "DecoderLayer")
MLA = Kind("deepseek_v3", _MLA, "DeepseekV3DecoderLayer", loads_original=False)
QWEN_NEXT = Kind("qwen3_next", _QWEN_MOE, "Qwen3NextDecoderLayer", **_QWEN)
KINDS = [
    MLA,
    Kind("deepseek_v32", _INDEXED, "DeepseekV32DecoderLayer"),
    Kind("glm_moe_dsa", {**_INDEXED, **_DSA}, "DeepseekV32DecoderLayer", module="deepseek_v32"),
    GLM,
    Kind("glm4_moe_lite", _MLA, "Glm4MoeLiteDecoderLayer"),
    QWEN_NEXT,
    DENSE_QWEN,
    Kind("qwen3_5_moe", _QWEN_MOE, "DecoderLayer", module="qwen3_5", **_QWEN),
    Kind("qwen3_5_moe", _QWEN_MOE, "DecoderLayer", module="qwen3_5", experts="fused", **_QWEN),
    Kind("glm4_moe", {**_DEEPSEEK, **_GLM}, "DecoderLayer", experts="stacked"),
    MIMO,
]


class Made:
    """A tiny model in mlx-lm's layout, and an original checkpoint of it with a head."""

    def __init__(self, kind: Kind, folder: Path, seed: int = 1) -> None:
        self.kind = kind
        self.converted = folder / "converted"
        self.checkpoint = folder / "checkpoint"
        _make_model(kind, self.converted, seed)
        self.loaded: LoadedModel = load(self.converted)
        self.text: Any = getattr(self.loaded.model, "language_model", self.loaded.model)
        self.block = getattr(kind.lm, kind.layer)(
            *([self.text.args] if kind.head_first else [self.text.args, 1])
        )
        _randomize(self.block)
        norms = ("norm_embedding", "norm_hidden", "norm_out")
        self.parts = {name: 1 + mx.random.normal((D,)) * 0.2 for name in norms}
        self.parts["projection"] = mx.random.normal((D, 2 * D)) * 0.2
        mx.eval(self.block.parameters(), self.parts)
        shutil.copytree(self.converted, self.checkpoint)
        self.write(self.model_tensors() | self.head_tensors())

    def model_tensors(self) -> Tensors:
        tensors: Any = mx.load(str(self.converted / "model.safetensors"))
        return self.original(dict(tensors), whole=True)

    def head_tensors(self) -> Tensors:
        """In the checkpoint's form and under its names."""
        kind = self.kind
        ours = ("norm_embedding", "norm_hidden", "projection", "norm_out")
        parts = {
            f"{name}.weight": self.parts[our] for name, our in zip(kind.names, ours, strict=True)
        }
        block = {f"{kind.block}{n}": t for n, t in tree_flatten(self.block.parameters())}
        return {kind.prefix + n: t for n, t in self.original(parts | block).items()}

    def original(self, tensors: Tensors, *, whole: bool = False) -> Tensors:
        kind = self.kind
        experts = "fused" if whole and kind.model_type == "qwen3_5_moe" else kind.experts
        result: Tensors = {}
        for name, tensor in tensors.items():
            layer, _, rest = name.partition("switch_mlp.")
            if kind.shifted and tensor.ndim == 1 and _is_shifted_norm(name):
                tensor = tensor - 1
            if "conv1d" in name:
                tensor = tensor.moveaxis(2, 1)
            if rest and experts == "single":
                result |= {f"{layer}experts.{i}.{rest}": t for i, t in enumerate(tensor)}
            elif rest.startswith("up_proj") and experts == "fused":
                gate = tensors[name.replace("up_proj", "gate_proj")]
                result[f"{layer}experts.gate_up_proj"] = mx.concatenate([gate, tensor], axis=1)
            elif rest.startswith("down_proj") and experts == "fused":
                result[f"{layer}experts.down_proj"] = tensor
            elif "embed_q" in name:
                out = tensors[name.replace("embed_q", "unembed_out")]
                joint = mx.concatenate([tensor.swapaxes(1, 2), out], axis=1).flatten(0, 1)
                result[name.replace("embed_q", "kv_b_proj")] = joint
            elif "unembed_out" not in name and not (rest and experts == "fused"):
                result[name.removeprefix("language_model.") if whole else name] = tensor
        return result

    def write(self, tensors: Tensors, shards: int = 1) -> None:
        for old in self.checkpoint.glob("model*"):
            old.unlink()
        if shards == 1:
            mx.save_safetensors(str(self.checkpoint / "model.safetensors"), tensors)
            return
        files: dict[str, str] = {}
        for i in range(shards):
            names = sorted(tensors)[i::shards]
            files |= dict.fromkeys(names, f"model-0000{i + 1}-of-0000{shards}.safetensors")
            mx.save_safetensors(
                str(self.checkpoint / files[names[0]]), {n: tensors[n] for n in names}
            )
        index = self.checkpoint / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))

    def expected(self, tokens: mx.array, hidden: mx.array) -> mx.array:
        """What the head gives for n pairs at once, computed from its definition."""
        embedded = self.text.model.embed_tokens.weight[tokens]
        e = self._normed(embedded, "norm_embedding")
        h = self._normed(hidden, "norm_hidden")
        x = mx.concatenate([h, e] if self.kind.head_first else [e, h], -1)
        y = self.block(x @ self.parts["projection"].T, create_causal_mask(tokens.shape[1]), None)
        return self._normed(y, "norm_out")

    def _normed(self, x: mx.array, name: str) -> mx.array:
        eps = self.text.args.rms_norm_eps
        return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + eps) * self.parts[name]


def _make_model(kind: Kind, folder: Path, seed: int) -> None:
    """A random model with two layers, in mlx-lm's layout."""
    tokenizer = make_tokenizer()
    config = {
        "model_type": kind.model_type,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **kind.config,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    mx.random.seed(seed)
    family = import_module(f"mlx_lm.models.{kind.model_type}")
    model = family.Model(family.ModelArgs.from_dict(config))
    _randomize(model)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def load(folder: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(folder)), folder)


def _is_shifted_norm(name: str) -> bool:
    return "norm" in name and "linear_attn.norm" not in name


def _randomize(module: Any) -> None:
    """Weights large enough that a mistake shows; those of norms near 1."""

    def draw(name: str, value: mx.array) -> mx.array:
        noise = mx.random.normal(value.shape) * 0.2
        return 1 + noise if "norm" in name and name.endswith("weight") else noise

    flat = tree_flatten(module.parameters())
    module.load_weights([(name, draw(name, value)) for name, value in flat])


N = 7
EXACT = 1e-5
DIFFERENT = 1e-2


def pairs() -> tuple[mx.array, mx.array]:
    """Tokens and hidden states for a head."""
    mx.random.seed(7)
    return mx.random.randint(0, 262, (1, N)), mx.random.normal((1, N, D))


def difference(one: mx.array, other: mx.array) -> float:
    assert one.shape == other.shape
    return float(mx.abs(one - other).max().item())


def off(head: MTPHead, made: Made) -> float:
    """How far the head is from its definition, for n tokens at once."""
    tokens, hidden = pairs()
    return difference(head(tokens, hidden, head.make_cache()), made.expected(tokens, hidden))
