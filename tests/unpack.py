"""Two small trained models with MTP heads, stored in 4 bits and unpacked to float32.

On MLX's CPU back end quantised matrices are far slower than plain ones. Run as a program it
unpacks one: ``python -m tests.unpack {plain,hybrid} FOLDER``. ``benchmarks/train_fixture.py``
has made them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

_STORED = Path(__file__).parent / "trained"


def unpack(kind: str, folder: Path) -> None:
    """Write the model and its head in float32."""
    source = _STORED / kind
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    packing = config.pop("quantization")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    for file in ("model.safetensors", "mtp.safetensors"):
        packed, metadata = mx.load(str(source / file), return_metadata=True)  # type: ignore[misc]
        plain = _plain(dict(packed), packing["group_size"], packing["bits"])
        mx.save_safetensors(str(folder / file), plain, metadata)


def _plain(packed: dict[str, mx.array], group_size: int, bits: int) -> dict[str, mx.array]:
    plain: dict[str, mx.array] = {}
    for name, value in packed.items():
        layer, _, part = name.rpartition(".")
        scales: Any = packed.get(f"{layer}.scales")
        if scales is None:
            plain[name] = value.astype(mx.float32)
        elif part == "weight":
            biases = packed[f"{layer}.biases"]
            plain[name] = mx.dequantize(
                value,
                scales.astype(mx.float32),
                biases.astype(mx.float32),
                group_size=group_size,
                bits=bits,
            )
        elif part == "bias":
            plain[name] = value.astype(mx.float32)
    return plain


if __name__ == "__main__":
    unpack(sys.argv[1], Path(sys.argv[2]))
