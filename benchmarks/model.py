"""A random model whose tokens cost about what a benchmark wants them to.

Run as a program it writes one, in a process of its own, since making a model is MLX work and
the benchmark's own belongs to the MLX thread: ``python -m benchmarks.model FOLDER LAYERS``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from tests.tiny import make_model


def make_deeper(folder: Path, layers: int) -> None:
    """The tests' tiny model with ``layers`` layers; 2 are 0.7 ms a token, 3 about 1 ms."""
    make_model(folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "num_hidden_layers": layers}
    path.write_text(json.dumps(config, indent=1))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = {
        name: value if "norm" in name else mx.random.normal(value.shape) * 0.25
        for name, value in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


if __name__ == "__main__":
    make_deeper(Path(sys.argv[1]), int(sys.argv[2]))
