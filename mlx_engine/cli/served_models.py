"""The models of ``serve``: their names, what makes their engines, and how large they are."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from mlx_engine.cli.options import engine_options
from mlx_engine.config import DEMO_MODEL
from mlx_engine.core.machine import this_machine
from mlx_engine.core.weight_size import stored_bytes
from mlx_engine.engine.base import BaseEngine
from mlx_engine.engine.batched import BatchedEngine
from mlx_engine.engine.simple import SimpleEngine
from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import ProgressCallback
from mlx_engine.remote.replicas.manager import EngineManager
from mlx_engine.server.served import ServedModel, name_of

_NAMED = re.compile(r"([^/=\s]+)=(.+)", re.DOTALL)
_SHARE = 0.5  # of the memory for engines, for the weights of all models; the rest has more uses


def served_models(
    args: argparse.Namespace, on_progress: ProgressCallback
) -> dict[str, ServedModel]:
    """Models to be served, by their names; the only one is loaded at once.

    Args:
        on_progress: told of the load of the only model.

    Raises:
        InvalidRequest: an option is not acceptable, or two models have the same name.
    """
    given: list[str] = vars(args).get("models") or [DEMO_MODEL]
    names: list[str] = vars(args).get("served_names") or []
    alone = len(given) == 1
    if names and not alone:
        raise InvalidRequest("served_name", "is for one model; name several by NAME=MODEL")
    served: dict[str, ServedModel] = {}
    for each in given:
        named = None if Path(each).exists() else _NAMED.fullmatch(each)
        model = each if named is None else named[2]
        options = argparse.Namespace(**{**vars(args), "model": model})
        make = _maker(options, on_progress if alone else None)
        make()  # what is wrong with its options is told now
        one = ServedModel(make, partial(weight_bytes, model), preload=alone)
        for name in names or [name_of(model) if named is None else named[1]]:
            if name in served:
                raise InvalidRequest("model", f"two are named {name!r}; give one as NAME=MODEL")
            served[name] = one
    return served


def _maker(
    args: argparse.Namespace, on_progress: ProgressCallback | None
) -> Callable[[], BaseEngine]:
    options = engine_options(args)
    if not args.in_process:
        return partial(EngineManager, **options, engine=args.engine, on_progress=on_progress)
    kind = BatchedEngine if args.engine == "batched" else SimpleEngine
    return partial(kind, **options, on_progress=on_progress)


def weight_bytes(model: str) -> int | None:
    """Bytes of a model's weights, if they are on this machine."""
    folder = Path(model)
    if not folder.is_dir():
        snapshots = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}", "snapshots")
        try:
            folder = max(snapshots.iterdir(), key=lambda one: one.stat().st_mtime)
        except (OSError, ValueError):
            return None
    try:
        return stored_bytes(folder) or None
    except OSError:
        return None


def memory_for_weights() -> int | None:
    """Bytes that the models may take together; ``None`` where nobody tells of the memory."""
    size = this_machine().size()
    return None if size is None else int(_SHARE * size)
