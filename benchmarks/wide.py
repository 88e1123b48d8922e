"""A random model with steps of 2 ms for one row and 40 ms for 32 on a CPU of two cores.

The tests' model takes 0.7 and 3 ms there, so that Python's share of a step is as big as MLX's.
This one has the same tokenizer and family of architecture, and is wide enough for MLX's share
to be what counts, as it is with a model that somebody uses.

Run as a program it writes one: ``python -m benchmarks.wide FOLDER [LAYERS]``; ``wide_folder``
does that in a process of its own, since making it is MLX work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from tests.tiny import CONTEXT, make_tokenizer

HIDDEN = 192
LAYERS = 3
_ROOT = Path(__file__).resolve().parent.parent


def make_wide_model(folder: Path, layers: int = LAYERS, seed: int = 0) -> None:
    """Write config, weights (float32) and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
    }
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    # As in tests.tiny, scaled to the width: larger than usual, so that no loop begins at once.
    scale = 2.0 / HIDDEN**0.5
    weights = {
        name: value if "norm" in name else mx.random.normal(value.shape) * scale
        for name, value in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(folder)


@contextmanager
def wide_folder(layers: int = LAYERS) -> Iterator[str]:
    """Such a model, which lives as long as the ``with`` block."""
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "wide"))
        program = [sys.executable, "-m", "benchmarks.wide", folder, str(layers)]
        subprocess.run(program, cwd=_ROOT, check=True)
        yield folder


if __name__ == "__main__":
    make_wide_model(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
