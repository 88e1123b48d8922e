"""What comes of a schema by chance validates, whenever it ends."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine import JSONSchema
from mlx_engine.models.grammar_compiler import Grammars
from tests.constraints.schemas import SCHEMAS
from tests.constraints.walks import answer
from tests.generation.tokenizers import byte_level, fast
from tests.tiny import make_tokenizer

ANSWERS, LONGEST = 6, 250  # a schema; tokens


def bytewise() -> Grammars:
    tokenizer = TokenizerWrapper(make_tokenizer())
    return Grammars(tokenizer, len(tokenizer._tokenizer) + 9, frozenset({257, 256}))


def merged() -> Grammars:
    tokenizer = fast(byte_level())
    size = len(tokenizer._tokenizer)
    return Grammars(tokenizer, size, frozenset(tokenizer.eos_token_ids))


@pytest.fixture(scope="module", params=[bytewise, merged])
def compiler(request: pytest.FixtureRequest) -> Grammars:
    made: Grammars = request.param()
    return made


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_comes_of_a_schema_by_chance_validates(compiler: Grammars, name: str) -> None:
    schema: Any = SCHEMAS[name]
    grammar = compiler.compile(f"start: {JSONSchema(schema).rule}")
    kind = validator_for(schema, Draft202012Validator)
    kind.check_schema(schema)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    rng, ended = random.Random(name), 0
    for _ in range(ANSWERS):
        tokens = answer(grammar, rng, LONGEST)
        if tokens is not None:
            ended += 1
            text = str(compiler._tokenizer.decode(tokens))
            value = json.loads(text)
            validator.validate(value)
    assert ended
