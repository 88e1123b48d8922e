"""The tests' trained models, drafts for them, and text for them to go on with.

There is no smaller model with their tokenizer. What comes closest is a few of the model's own
layers without any further training, and those were chosen that agree with it most often.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.unpack import unpack

KINDS = ("plain", "hybrid")
LAYERS = 8  # of each
# The layers of a draft, for the smallest one that is worth anything and for one of three. In
# the hybrid model every n-th layer has attention, so that 0, 4, 7 is recurrent, recurrent, full.
SMALL = {"plain": (0,), "hybrid": (0, 7)}
MEDIUM = {"plain": (0, 3, 7), "hybrid": (0, 4, 7)}

# Modules that training left out (every twentieth file of Python 3.11's library). Another
# version's text differs a little, and may have been seen.
_MODULES = ("difflib", "ipaddress", "tarfile", "weakref", "optparse", "hashlib")
_SKIPPED = 100  # tokens at a module's beginning, which is prose rather than code
_VOCABULARY = 1024
_PROJECTIONS = ("mtp.fc.weight", "mtp_layers.0.input_proj.weight")
_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def trained_folder(kind: str) -> Iterator[Path]:
    """``model``, ``small``, ``medium`` and ``wrong_head.safetensors`` in a folder that lives as
    long as the ``with`` block.
    """
    with tempfile.TemporaryDirectory() as parent:
        # In a process of its own, since making them is MLX work.
        program = [sys.executable, "-m", "benchmarks.trained", kind, parent]
        subprocess.run(program, cwd=_ROOT, check=True)
        yield Path(parent)


def code_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Token ids from modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    prompts = []
    for name in _MODULES[:count]:
        text = (library / f"{name}.py").read_text("utf-8")[: 8 * (_SKIPPED + length)]
        prompts.append(list(tokenizer.encode(text))[_SKIPPED : _SKIPPED + length])
    return prompts


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Token ids that mean nothing."""
    chooser = random.Random(0)
    return [[chooser.randrange(1, _VOCABULARY) for _ in range(length)] for _ in range(count)]


def make_all(kind: str, folder: Path) -> None:
    """Write what ``trained_folder`` gives."""
    unpack(kind, folder / "model")
    for name, layers in (("small", SMALL[kind]), ("medium", MEDIUM[kind])):
        _keep_layers(folder / "model", folder / name, layers)
    _spoil_head(folder / "model" / "mtp.safetensors", folder / "wrong_head.safetensors")


def _keep_layers(source: Path, folder: Path, layers: tuple[int, ...]) -> None:
    """A model of these layers of another one, and all that it has beside layers."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] = len(layers)
    if kinds := text.get("layer_types"):
        text["layer_types"] = [kinds[layer] for layer in layers]
        text["full_attention_interval"] = len(layers)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    weights, metadata = _load(source / "model.safetensors")
    kept = {}
    for name, value in weights.items():
        found = re.search(r"\blayers\.(\d+)\.", name)
        if found is None:
            kept[name] = value
        elif int(found[1]) in layers:
            place = layers.index(int(found[1]))
            kept[f"{name[: found.start(1)]}{place}{name[found.end(1) :]}"] = value
    mx.save_safetensors(str(folder / "model.safetensors"), kept, metadata)


def _spoil_head(source: Path, target: Path) -> None:
    """A head that is hardly ever right: it takes embeddings for hidden states, and these for
    embeddings, as one does that is read by another family's rule.
    """
    weights, metadata = _load(source)
    for name, value in weights.items():
        if name.endswith(_PROJECTIONS):
            weights[name] = mx.roll(value, value.shape[1] // 2, 1)
    mx.save_safetensors(str(target), weights, metadata)


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    loaded: Any = mx.load(str(path), return_metadata=True)
    weights, metadata = loaded
    return dict(weights), dict(metadata)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    make_all(options.kind, options.folder)
