"""Starts an engine with a model, then serves first requests where nothing can be compiled.

Run as a program, with an empty folder for MLX's compiled programs:
``python -m tests.engine.first_request MODEL KIND TMP`` prints how many there are after the start
and how many after the requests.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mlx_engine import BatchedEngine, SimpleEngine

KINDS = {"simple": SimpleEngine, "batched": BatchedEngine}
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "top_k": 30, "xtc_probability": 0.5},
    {"seed": 3, "temperature": 1.0, "repetition_penalty": 1.1, "logit_bias": {3: 1.0}},
    {"logprobs": 4},
]


def compiled(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


async def main(model: Path, kind: str, folder: Path) -> None:
    async with KINDS[kind](model) as engine:
        before = compiled(folder)
        asked = [
            engine.generate(
                [1 + (i * 7 + n) % 200 for i in range(3 + 40 * n)],
                max_tokens=6,
                ignore_eos=True,
                **options,  # type: ignore[arg-type]
            )
            for n, options in enumerate(OPTIONS)
        ]
        for result in await asyncio.gather(*asked):
            assert len(result.tokens) == 6
        print(before, compiled(folder))


if __name__ == "__main__":
    os.environ["TMPDIR"] = sys.argv[3]
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
