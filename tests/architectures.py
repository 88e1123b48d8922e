"""Tiny random models of many architectures, made without files. MLX work."""

from __future__ import annotations

import random
from importlib import import_module
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

VOCABULARY = 64
# One set of entries for all: each architecture takes those that it knows.
CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "partial_rotary_factor": 1.0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "state_size": 8,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "n_embd": 32,
    "n_layer": 2,
    "n_inner": 48,
    "n_head": 2,
    "n_ctx": 4096,
    "n_positions": 4096,
    "layer_norm_epsilon": 1e-5,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
    "mamba_d_ssm": 32,
    "mamba_d_head": 16,
    "mamba_n_heads": 2,
    "mamba_d_state": 8,
    "hidden_dim": 32,
    "num_layers": 2,
    "num_kv_reuse_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
}
# What differs, where the same name means something else.
OTHER: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": False, "head_dim": None},
    "deepseek_v41": {
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_ratios": [1, 4, 4, 4],
        "kv_source_layer_ids": [0, 1, 2, 3],
        "index_source_layer_ids": [0, 1, 2, 3],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 16,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
    },
    "llama": {"sliding_window": None},
    "nemotron-nas": {
        "num_hidden_layers": 4,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
        ],
    },
    "minimax_m3_vl": {
        "text_config": {
            **CONFIG,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 16,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "mlp_layer_types": ["dense", "sparse"],
            "sparse_attention_freq": [0, 1],
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 16,
            "index_topk_blocks": 2,
        }
    },
    "phi3": {"head_dim": None},
    "plamo2": {"hidden_size_per_head": 16, "mamba_num_heads": 4, "mamba_d_state": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3_5": {"text_config": {**CONFIG, "num_experts": 0, "rope_parameters": None}},
}


def make(model_type: str, seed: int = 0, **other: Any) -> Any:
    """A model whose logits depend much on each token and on its position."""
    family = import_module(f"mlx_lm.models.{model_type}")
    config = {"model_type": model_type, **CONFIG, **OTHER.get(model_type, {}), **other}
    mx.random.seed(seed)
    model = family.Model(family.ModelArgs.from_dict(config))
    model.update(
        tree_unflatten([(name, _random(name, v)) for name, v in tree_flatten(model.parameters())])
    )
    mx.eval(model.parameters())
    model.eval()
    return model


def _random(name: str, value: mx.array) -> mx.array:
    if value.ndim < 2 or "norm" in name:
        return value
    fan = 1 if "embed" in name else value.shape[-1]
    return mx.random.normal(value.shape) * (1.5 / fan**0.5)


def words(seed: int, count: int) -> list[int]:
    """Random token ids."""
    draw = random.Random(seed)
    return [draw.randrange(1, VOCABULARY) for _ in range(count)]
