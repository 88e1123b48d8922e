"""A model as trunk and head, and whether its MTP head understands it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_engine import InvalidRequest
from mlx_engine.generation.trials.mtp_head import agreement, check_head
from mlx_engine.models.loading import LoadedModel
from mlx_engine.models.mtp_heads import load_head
from mlx_engine.models.split import check_split, split
from tests.conftest import on_mlx_thread
from tests.models.mtp_checkpoints import (
    EXACT,
    GLM,
    KINDS,
    MIMO,
    D,
    Kind,
    Made,
    N,
    difference,
    load,
    pairs,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", KINDS, ids=str)
@on_mlx_thread
def test_a_split_model_is_the_model(kind: Kind, tmp_path: Path) -> None:
    made = Made(kind, tmp_path)
    parts = split(made.loaded.model)
    check_split(parts, list(range(2, 9)))
    tokens, _ = pairs()
    whole, halves = (make_prompt_cache(made.loaded.model) for _ in range(2))
    for chunk in (tokens[:, :4], tokens[:, 4:]):
        logits = parts.logits(parts.hidden(chunk, halves))
        assert difference(made.loaded.model(chunk, cache=whole), logits) < EXACT


@on_mlx_thread
def test_tied_embeddings_are_the_head(tiny_path: Path) -> None:
    loaded = load(tiny_path)
    parts = split(loaded.model)
    check_split(parts, [1, 2, 3])
    loaded.model.args.tie_word_embeddings = True
    del loaded.model["lm_head"]
    check_split(parts, [1, 2, 3])


class ScaledModel(nn.Module):  # type: ignore[misc]
    """Logits that its head alone does not give."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model_type = "scaled"
        self.model = loaded.model.model
        self.lm_head = loaded.model.lm_head
        self.layers = loaded.model.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.lm_head(self.model(tokens, cache=cache)) * 0.5
        return logits


@on_mlx_thread
def test_a_model_that_cannot_be_split_is_named(tiny_path: Path) -> None:
    loaded = load(tiny_path)
    with pytest.raises(InvalidRequest, match=r"^decode: a model of type 'scaled' cannot be split"):
        check_split(split(ScaledModel(loaded)), [1, 2, 3])
    with pytest.raises(InvalidRequest, match=r"^decode: a model of type 'Linear' cannot be split"):
        split(nn.Linear(2, 2))


@on_mlx_thread
def test_agreement_pairs_each_state_with_the_next_token(tmp_path: Path) -> None:
    made = Made(GLM, tmp_path)
    head = load_head(made.loaded, made.checkpoint)
    parts = split(made.loaded.model)
    tokens = pairs()[0][0].tolist()
    hidden = parts.hidden(mx.array([tokens]), make_prompt_cache(parts.model))
    target = parts.logits(hidden).argmax(-1)[0].tolist()
    expected = made.expected(mx.array([tokens[1:]]), hidden[:, :-1])
    draft = head.logits(expected).argmax(-1)[0].tolist()
    hits = [draft[i] == target[i + 1] for i in range(N - 1)]
    assert agreement(parts, head, tokens) == pytest.approx(sum(hits) / (N - 1))


@on_mlx_thread
def test_a_head_that_knows_the_next_token_agrees_and_one_read_wrongly_does_not(
    tmp_path: Path,
) -> None:
    made = Made(MIMO, tmp_path)
    _teach(made)
    head = load_head(made.loaded, made.checkpoint)
    assert check_head(made.loaded, split(made.loaded.model), head) > 0.9
    wrong = replace(head, embedding_first=True)
    assert check_head(made.loaded, split(made.loaded.model), wrong) < 0.2


def _teach(made: Made) -> None:
    """Let the model go by the last token alone, and the head do what the model does."""
    for block in (*made.loaded.model.layers, made.block):
        block.self_attn.o_proj.weight = mx.zeros_like(block.self_attn.o_proj.weight)
        block.mlp.down_proj.weight = mx.zeros_like(block.mlp.down_proj.weight)
    made.parts["norm_embedding"] = mx.ones((D,))
    made.parts["norm_out"] = made.text.model.norm.weight
    made.parts["projection"] = mx.concatenate([mx.zeros((D, D)), mx.eye(D)], axis=1)
    made.write(made.head_tensors())
