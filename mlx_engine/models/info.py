"""Facts of a model from its files, without loading its weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_engine.config import ModelConfig
from mlx_engine.errors import InvalidRequest, ModelLoadError
from mlx_engine.models.loading import answer_format, check_files, context_length, vocab_size


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's facts.

    Attributes:
        model: as it was asked for.
        path: the folder that it is in.
        bytes_on_disk: of all files in the folder.
        model_type: mlx-lm's name of the architecture.
        parameters: stored ones, quantised weights counted one by one.
        quantization: as in config.json; ``None`` if there is none.
        context_length: tokens; ``None`` if the model names no limit.
        vocabulary: tokens.
        chat_template: whether there is one.
        answer_format: how it writes calls of tools and marks reasoning, by its name.
        format_by: what that was chosen by.
        tool_calls: whether its calls can be read.
        thinking: whether the model marks reasoning.
    """

    model: str
    path: str
    bytes_on_disk: int
    model_type: str
    parameters: int
    quantization: dict[str, Any] | None
    context_length: int | None
    vocabulary: int
    chat_template: bool
    answer_format: str
    format_by: str
    tool_calls: bool
    thinking: bool


def describe(config: ModelConfig, folder: Path) -> ModelInfo:
    """Read the files in ``folder``.

    Raises:
        ModelLoadError: a file is missing or damaged.
        InvalidRequest: an option names a format that does not exist.
    """
    check_files(folder)
    try:
        facts = json.loads((folder / "config.json").read_text("utf-8"))
        tokenizer = load_tokenizer(folder, {"trust_remote_code": config.trust_remote_code})
        quantization = facts.get("quantization")
        form = answer_format(config, tokenizer)
        return ModelInfo(
            model=config.model,
            path=str(folder),
            bytes_on_disk=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            model_type=str(facts.get("model_type", "unknown")),
            parameters=sum(
                count_parameters(_read_header(file), quantization or {})
                for file in sorted(folder.glob("model*.safetensors"))
            ),
            quantization=quantization,
            context_length=context_length(facts),
            vocabulary=vocab_size(facts, tokenizer),
            chat_template=bool(tokenizer.has_chat_template),
            answer_format=form.name,
            format_by=form.chosen_by,
            tool_calls=form.has_calls,
            thinking=form.has_reasoning,
        )
    except InvalidRequest:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"{folder}: the files cannot be read ({type(error).__name__}: {error})"
        ) from error


def _read_header(file: Path) -> dict[str, Any]:
    """Names, types and shapes of the tensors in a safetensors file."""
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header: dict[str, Any] = json.loads(data.read(length))
    header.pop("__metadata__", None)
    return header


def count_parameters(header: dict[str, Any], quantization: dict[str, Any]) -> int:
    """How many parameters the tensors of one file stand for.

    Quantised weights are packed: their number is that of the groups times their size.
    """
    sizes = {name: math.prod(tensor["shape"]) for name, tensor in header.items()}
    total = 0
    for name, size in sizes.items():
        layer, _, kind = name.rpartition(".")
        if f"{layer}.scales" not in sizes or kind == "bias":
            total += size
        elif kind == "scales":
            own = quantization.get(layer)
            group = own if isinstance(own, dict) else quantization
            total += size * int(group.get("group_size", 64))
    return total
