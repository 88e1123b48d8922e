"""Answers over all schemas, as random as a model can make them: every finished one validates.

    python -m tests.constraints.validity FOLDER [ROUNDS]

draws more of them than there is time for in the tests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema

from mlx_engine import BaseEngine, BatchedEngine, DraftModel, SimpleEngine
from mlx_engine.constraints import JSONSchema
from tests.constraints.schemas import SCHEMAS

# Of a random model, most texts would go on until they are cut.
_CLOSERS = {'"': 5.0, "}": 4.0, "]": 4.0, ",": -1.0}
_WHITE = ("Ġ", "Ċ", "ĉ", "č")
TEMPERATURES = (1.0, 1.5)
MOST = 160  # tokens


@dataclass
class Drawn:
    """What came out.

    Attributes:
        answers: by finish reason.
        schemas: those of which an answer was finished.
    """

    answers: Counter[str] = field(default_factory=Counter)
    schemas: set[str] = field(default_factory=set)


async def draw(
    engine: BaseEngine, names: Sequence[str], seeds: Sequence[int], at_once: int = 16
) -> Drawn:
    """Draw an answer of each schema for each seed, and check every one that is finished."""
    tokenizer = engine._holder.model().tokenizer  # type: ignore[attr-defined]
    bias = {tokenizer.convert_tokens_to_ids(text): more for text, more in _CLOSERS.items()}
    bias |= {tokenizer.convert_tokens_to_ids(text): -6.0 for text in _WHITE}
    bias.pop(None, None)
    drawn, places = Drawn(), asyncio.Semaphore(at_once)

    async def one(name: str, seed: int) -> None:
        async with places:
            result = await engine.generate(
                [1 + seed % 200, 2, 3],
                constraint=JSONSchema(SCHEMAS[name]),
                temperature=TEMPERATURES[seed % len(TEMPERATURES)],
                seed=seed,
                logit_bias=bias,
                max_tokens=MOST,
            )
        drawn.answers[result.finish_reason] += 1
        if result.finish_reason == "length":
            return
        assert result.finish_reason == "stop"
        check(name, result.text)
        drawn.schemas.add(name)

    await asyncio.gather(*itertools.starmap(one, itertools.product(names, seeds)))
    return drawn


def check(name: str, text: str) -> None:
    """Raise unless a text is what a schema says."""
    schema = SCHEMAS[name]
    try:
        validator = jsonschema.validators.validator_for(
            schema, default=jsonschema.Draft202012Validator
        )
        validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))
    except Exception as error:
        error.add_note(f"{name}: {text!r}")
        raise


async def main(folder: Path, rounds: int) -> None:
    for kind, decode in itertools.product(
        (BatchedEngine, SimpleEngine), (None, DraftModel(folder, 2))
    ):
        async with kind(folder, decode=decode) as engine:
            drawn = await draw(engine, list(SCHEMAS), range(rounds))
            missing = set(SCHEMAS) - drawn.schemas
            print(kind.__name__, decode, dict(drawn.answers), "never finished:", sorted(missing))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 17))
