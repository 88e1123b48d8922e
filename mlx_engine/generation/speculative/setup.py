"""Speculative decoding, set up for an engine: who proposes, and whether the model can verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_engine.checks import path_text
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.cached_model import CachedModel
from mlx_engine.generation.cache.kv_cache import KVFootprint, footprint_of, make_kv_cache
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.cache.rollback import cannot_roll_back
from mlx_engine.generation.speculative.depth import DepthChooser
from mlx_engine.generation.speculative.drafter import Drafter, ModelDrafter
from mlx_engine.generation.speculative.forward import Forward
from mlx_engine.generation.speculative.mtp import MTPDrafter
from mlx_engine.generation.trials.mtp_head import check_head
from mlx_engine.generation.trials.rollback import check_rollback
from mlx_engine.models.mtp_heads import load_head
from mlx_engine.strategies import MTP, DraftModel

_DOUBTFUL = 0.05  # agreement of an MTP head with its model, below which something is wrong


@dataclass(frozen=True, slots=True)
class Speculation:
    """How an engine proposes tokens.

    Attributes:
        make_drafter: one for each request.
        chooser: how many to propose; it learns as long as the engine runs.
        forward: of the model, with hidden states where the drafter wants them.
        prompt_cache: what the drafters of earlier requests kept.
        footprint: bytes that a request's drafter keeps.
        note: for each result, what is wrong with it; ``None`` if nothing is.
        weights: the module of an MTP head, if it is one that proposes.
    """

    make_drafter: Callable[[], Drafter]
    chooser: DepthChooser
    forward: Forward
    prompt_cache: PromptCache
    footprint: KVFootprint
    note: str | None = None
    weights: nn.Module | None = None


def set_up_draft(
    asked: DraftModel, target: CachedModel, drafts: Mapping[str, CachedModel]
) -> Speculation:
    """A draft model for the engine's model ``target``. On the MLX thread.

    Raises:
        InvalidRequest: the model cannot verify proposals, or the draft cannot take them back
            or has another tokenizer.
        Interrupted: it should stop.
    """
    check_rollback(target.loaded.model, target.config)
    draft = drafts[path_text(asked.model)]
    target.check_draft("decode", draft)
    if (reason := cannot_roll_back(make_kv_cache(draft.loaded.model, draft.config))) is not None:
        raise InvalidRequest("decode", f"the draft model cannot take proposals back: {reason}")

    def make() -> Drafter:
        return ModelDrafter(draft, target.loaded.vocab_size)

    chooser = DepthChooser(asked.num_draft_tokens)
    forward = Forward(target.loaded.model)
    return Speculation(make, chooser, forward, draft.prompt_cache, draft.footprint)


def set_up_head(asked: MTP, target: CachedModel, _drafts: Mapping[str, CachedModel]) -> Speculation:
    """The MTP head of the engine's model ``target``. On the MLX thread.

    Raises:
        InvalidRequest: the model cannot verify proposals, or has no head.
        ModelLoadError: the head cannot be loaded.
        Interrupted: it should stop.
    """
    loaded = target.loaded
    check_rollback(loaded.model, target.config)
    head = load_head(loaded, None if asked.head is None else Path(asked.head).expanduser())
    share = check_head(loaded, head.trunk, head)
    note = None
    if share < _DOUBTFUL:
        note = (
            f"the MTP head agrees with the model on {share:.0%} of the model's own text, so it "
            "does not speed decoding up; is it this model's?"
        )
    chooser, histories = DepthChooser(asked.depth), PromptCache(0)
    trial = head.make_cache()
    hidden = head.trunk.hidden(mx.array([[0]]), make_prompt_cache(loaded.model))
    mx.eval(head(mx.array([[0]]), hidden, trial))

    def make() -> Drafter:
        return MTPDrafter(head, chooser, histories)

    forward = Forward(loaded.model, head.trunk)
    return Speculation(make, chooser, forward, histories, footprint_of(trial), note, head.parts)
