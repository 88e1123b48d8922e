"""Tiny random models whose caches cannot be cut back, with chat templates that reason.

``python -m tests.chat_models FOLDER`` writes them all, each into a folder of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from tests.architectures import CONFIG, OTHER, make
from tests.tiny import make_tokenizer

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "qwen3_5": {"text_config": {**OTHER["qwen3_5"]["text_config"], "head_dim": 32}},
    "gemma3_text": {"num_hidden_layers": 4},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 48,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "expand": 2,
        "n_groups": 1,
        "chunk_size": 8,
        "time_step_limit": [0.001, 100.0],
    },
    "falcon_h1": {},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "num_experts": 2,
    },
}
# Reasoning is dropped before the last query, and kept between calls of tools, as in Qwen3's.
TEMPLATE = """\
{%- if tools or messages[0].role == 'system' %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- if tools %}{{ '\\n\\n# Tools' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{%- endif %}{{ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>tool\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and m.reasoning_content %}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ {'name': call.function.name, \
'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- else %}{{ '<think>\\n' }}{% endif %}{% endif %}"""


def write(folder: Path, architecture: str) -> None:
    """Config, weights (float32) and tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    given = {
        **CONFIG,
        **OTHER.get(architecture, {}),
        **ARCHITECTURES[architecture],
        "vocab_size": len(tokenizer),
    }
    if "text_config" in given:
        given["text_config"] = {**given["text_config"], "vocab_size": len(tokenizer)}
    model = make(
        architecture, **{key: given[key] for key in given if given[key] != CONFIG.get(key)}
    )
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    given = {name: value for name, value in given.items() if name != "rope_scaling"}
    config = {"model_type": architecture, **given, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    for architecture in sys.argv[2:] or ARCHITECTURES:
        write(Path(sys.argv[1]) / architecture, architecture)
