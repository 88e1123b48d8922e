"""A two-layer random llama with a byte-level tokenizer, in mlx-lm's folder layout.

Run as a program it writes one: ``python -m tests.tiny FOLDER [SEED]``. The tests do that on the
MLX thread, since making a model is MLX work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTEXT = 16384
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
CHAT_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\ntools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}<tool_call>{{ {'name': call.function.name, "
    "'arguments': call.function.arguments} | tojson }}</tool_call>{# </think> #}"
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking == 'open' %}<think>\n{% endif %}"
    "{%- endif %}"
)


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, then the special ones; id 257 ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def inner(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is of the text model."""
    part: dict[str, Any] = config.get("text_config") or config
    return part


def make_model(
    folder: Path,
    seed: int = 0,
    *,
    chat: bool = True,
    layers: int = 2,
    other: dict[str, object] | None = None,
) -> None:
    """Write config, weights (float32) and tokenizer; ``other`` changes entries of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(chat=chat)
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        **(other or {}),
    }
    mx.random.seed(seed)
    family = import_module(f"mlx_lm.models.{config['model_type']}")
    model = family.Model(family.ModelArgs.from_dict(config))
    # Larger than usual weights: greedy output then does not fall into a loop at once.
    scale = 2 / inner(config)["hidden_size"] ** 0.5
    weights = {
        name: value if "norm" in name else mx.random.normal(value.shape) * scale
        for name, value in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model that the arguments ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--no-chat", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--other", type=json.loads, metavar="JSON", help="config entries")
    options = parser.parse_args(arguments)
    make_model(
        options.folder,
        options.seed,
        chat=not options.no_chat,
        layers=options.layers,
        other=options.other,
    )


if __name__ == "__main__":
    main()
