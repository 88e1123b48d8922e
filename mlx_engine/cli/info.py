"""``mlx-engine info``: what a model is, from its files, without loading its weights."""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from mlx_engine import checks
from mlx_engine.cli import interrupts, memory_table
from mlx_engine.cli.options import engine_options
from mlx_engine.cli.output import ProgressBar
from mlx_engine.config import ModelConfig
from mlx_engine.core.bridge import in_this_loop, off_loop
from mlx_engine.core.ledger import ledger
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.work import ThreadJob
from mlx_engine.engine.late import import_mlx
from mlx_engine.engine.simple import SimpleEngine
from mlx_engine.generation.sizing import ModelSize, size_unread
from mlx_engine.models.info import ModelInfo, describe
from mlx_engine.models.loading import find_model


def run(args: argparse.Namespace) -> int:
    """Describe a model; the exit code."""
    bar = ProgressBar()
    config = ModelConfig(**engine_options(args))
    size: tuple[ModelSize, int | None] | None = None
    try:
        with asyncio.Runner() as runner:
            folder = interrupts.run(runner, _find(config, bar))
            info = describe(config, folder)
            if args.memory_table:
                given = vars(args).get("memory_bytes")
                size = interrupts.run(runner, _size(config, folder, info.context_length, given))
    finally:
        bar.clear()
    if args.json:
        facts = asdict(info) | ({} if size is None else {"memory": memory_table.facts(*size)})
        json.dump(facts, sys.stdout, ensure_ascii=False, default=str)
        sys.stdout.write("\n")
        return 0
    for name, value in _table(info):
        sys.stdout.write(f"{name:<15} {value}\n")
    if size is not None:
        sys.stdout.write("\n" + "\n".join(memory_table.lines(*size)) + "\n")
    return 0


async def _size(
    config: ModelConfig, folder: Path, context_length: int | None, given: int | None
) -> tuple[ModelSize, int | None]:
    """The size of the model, and the memory that there is."""
    memory = None if given is None else checks.integer("memory_bytes", given, low=1)

    def look() -> tuple[ModelSize, int | None]:
        import_mlx()
        size = size_unread(config, folder, context_length)
        return size, ledger().total if memory is None else memory

    sized: tuple[ModelSize, int | None] = await mlx_thread.run(ThreadJob(look))
    return sized


async def _find(config: ModelConfig, bar: ProgressBar) -> Path:
    """The model's folder, downloaded if need be."""
    stop = threading.Event()
    find = functools.partial(find_model, config, in_this_loop(bar), stop.is_set)
    source = await off_loop(find, stop)
    if source.is_file():  # the demo before its conversion, which is an engine's work
        async with SimpleEngine(config.model, on_progress=bar):
            pass
        source = await off_loop(find, stop)
    return source


def _table(info: ModelInfo) -> list[tuple[str, str]]:
    quantization = info.quantization or {}
    plain = ", ".join(f"{k} {v}" for k, v in quantization.items() if not isinstance(v, dict))
    return [
        ("model", info.model),
        ("type", info.model_type),
        ("parameters", f"{info.parameters:,}"),
        ("quantization", plain.replace("_", " ") or "none"),
        ("context", "no limit" if info.context_length is None else f"{info.context_length} tokens"),
        ("vocabulary", f"{info.vocabulary} tokens"),
        ("chat template", "yes" if info.chat_template else "no"),
        ("answer format", f"{info.answer_format} (by {info.format_by})"),
        ("tool calls", "yes" if info.tool_calls else "no"),
        ("thinking", "yes" if info.thinking else "no"),
        ("path", info.path),
        ("size on disk", f"{info.bytes_on_disk / 1e6:,.1f} MB"),
    ]
