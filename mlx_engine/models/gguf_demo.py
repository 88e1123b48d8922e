"""The GGUF file of the demo model, as a folder that ``mlx_lm.load`` takes.

It knows what this one file needs (llama, byte-level BPE with the ``smollm`` pre-tokenizer),
and refuses any other kind rather than converting it wrongly.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_engine.errors import ModelLoadError
from mlx_engine.outputs import Progress, ProgressCallback

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MODEL_FILES = (CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG)

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def write_model_folder(
    gguf: Path,
    folder: Path,
    on_progress: ProgressCallback | None,
    check_stop: Callable[[], None],
) -> None:
    """Write config, weights and tokenizer of ``gguf`` into the existing ``folder``.

    The weights keep the quantization and the types of the file. MLX runs here.

    Args:
        on_progress: is told of the phase ``convert``, in bytes of weights.
        check_stop: called between pieces of a fraction of a second; what it raises ends the
            work, and the folder is then incomplete.

    Raises:
        ModelLoadError: MLX cannot read the file, or it is not a GGUF of this kind.
        OSError: the folder cannot be written.
    """
    try:
        # MLX types the result as anything that any format may hold.
        loaded: Any = mx.load(str(gguf), format="gguf", return_metadata=True)
    except RuntimeError as exc:
        raise ModelLoadError(f"MLX cannot read the GGUF file {gguf}: {exc}") from exc
    check_stop()
    arrays, metadata = loaded
    try:
        # The norms stay float32, and with them all activations: in float16 MLX's
        # CPU back end writes nonsense with this model, 30 times slower (mlx 0.32.4).
        weights = {_mlx_name(name): array for name, array in arrays.items()}
        config = _config(metadata, weights)
        tokenizer = _tokenizer(metadata)
        tokenizer_config = _tokenizer_config(metadata)
    except (KeyError, ValueError) as exc:
        raise ModelLoadError(f"{gguf} is not the kind of GGUF that is expected: {exc}") from exc

    total = sum(array.nbytes for array in weights.values())
    _report(on_progress, 0, total)
    for name, content in (
        (CONFIG, config),
        (TOKENIZER, tokenizer),
        (TOKENIZER_CONFIG, tokenizer_config),
    ):
        check_stop()
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    check_stop()
    try:
        mx.save_safetensors(str(folder / WEIGHTS), weights, {"format": "mlx"})
    except RuntimeError as exc:
        # MLX has one error for everything; here the disk is full, or not to be written to.
        raise OSError(f"MLX cannot write {WEIGHTS}: {exc}") from exc
    _report(on_progress, total, total)


def _report(on_progress: ProgressCallback | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(Progress("convert", done, total))


def _mlx_name(name: str) -> str:
    """``blk.3.attn_q.scales`` -> ``model.layers.3.self_attn.q_proj.scales``."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_TENSORS[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_TENSORS[part]}.{kind}"


def _config(metadata: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, Any]:
    _expect(metadata, "general.architecture", "llama")
    heads = _int(metadata, "llama.attention.head_count")
    hidden = _int(metadata, "llama.embedding_length")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": _int(metadata, "llama.block_count"),
        "intermediate_size": _int(metadata, "llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _int(metadata, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"].item(),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": _int(metadata, "llama.context_length"),
        "rope_theta": metadata["llama.rope.freq_base"].item(),
        # GGUF stores the rows of q and k in the order of interleaved rotary pairs.
        "rope_traditional": True,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": _int(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _int(metadata, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _int(metadata, "tokenizer.ggml.padding_token_id"),
    }
    if quantization := _quantization(weights):
        config["quantization"] = quantization
    return config


def _quantization(weights: dict[str, mx.array]) -> dict[str, Any]:
    """The commonest packing, and by name each layer that is packed otherwise; {} if none is."""
    packings: dict[str, tuple[int, int]] = {}
    for name, scales in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind == "scales":
            # MLX reads each quantized GGUF type in groups of 32 weights, packed in uint32.
            bits = weights[f"{layer}.weight"].shape[-1] // scales.shape[-1]
            packings[layer] = (32, bits)
    if not packings:
        return {}
    [(common, _)] = Counter(packings.values()).most_common(1)
    quantization: dict[str, Any] = {"group_size": common[0], "bits": common[1]}
    for layer, (group_size, bits) in packings.items():
        if (group_size, bits) != common:
            quantization[layer] = {"group_size": group_size, "bits": bits}
    return quantization


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json as Hugging Face builds it for SmolLM2: digits one by one, then GPT-2."""
    _expect(metadata, "tokenizer.ggml.model", "gpt2")
    _expect(metadata, "tokenizer.ggml.pre", "smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"add_prefix_space": False},
            ],
        },
        "post_processor": None,
        # mlx_lm picks its streaming BPE detokenizer by this type.
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]

    def special(role: str) -> str:
        return str(tokens[_int(metadata, f"tokenizer.ggml.{role}_token_id")])

    return {
        # Upstream says GPT2Tokenizer, but for it transformers 5 builds a pre-tokenizer of its
        # own in place of the one in tokenizer.json: other tokens around digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special("bos"),
        "eos_token": special("eos"),
        "unk_token": special("unknown"),
        "pad_token": special("padding"),
        "model_max_length": _int(metadata, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _expect(metadata: dict[str, Any], key: str, value: str) -> None:
    if metadata[key] != value:
        raise ValueError(f"{key} is {metadata[key]!r}, not {value!r}")


def _int(metadata: dict[str, Any], key: str) -> int:
    return int(metadata[key].item())
