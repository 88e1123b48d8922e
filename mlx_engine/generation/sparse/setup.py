"""SpecPrefill, set up for an engine: the draft that scores prompts, tried with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_engine.checks import path_text
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.cached_model import CachedModel
from mlx_engine.generation.cache.kv_cache import KVFootprint, check_unbounded
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.sparse.chunk_choice import keeps_all
from mlx_engine.generation.sparse.importance import cannot_score
from mlx_engine.generation.trials.sparse import check_sparse
from mlx_engine.strategies import SpecPrefill


@dataclass(frozen=True, slots=True)
class SparsePrefilling:
    """How an engine leaves out parts of prompts.

    Attributes:
        draft: scores them; it may be the engine's own model.
        rows: whether chunks may go in as rows of a batch.
    """

    draft: CachedModel
    rows: bool

    @property
    def prompt_cache(self) -> PromptCache:
        """Prompts that the draft has scored."""
        return self.draft.prompt_cache

    @property
    def footprint(self) -> KVFootprint:
        """Bytes that the draft keeps of a request while it scores it."""
        return self.draft.footprint

    def why_in_full(self, asked: SpecPrefill, prompt: list[int], held: int) -> str | None:
        """The reason why nothing of a prompt with ``held`` tokens is left out; else ``None``."""
        most, needed = self.draft.loaded.context_length, len(prompt) + asked.lookahead
        new = len(prompt) - held
        if new < asked.threshold:
            return (
                f"prefilled in full: the prompt has {new} new tokens, fewer than SpecPrefill's "
                f"threshold of {asked.threshold}"
            )
        if most is not None and needed > most:
            return (
                f"prefilled in full: the draft would have to read {needed} tokens, and can {most}"
            )
        if keeps_all(len(prompt) - 1, asked.keep, start=held):
            return f"prefilled in full: keep={asked.keep} leaves out nothing of {new} new tokens"
        return None


def set_up(
    asked: SpecPrefill, target: CachedModel, drafts: Mapping[str, CachedModel]
) -> SparsePrefilling:
    """SpecPrefill for the engine's model ``target``. On the MLX thread.

    Raises:
        InvalidRequest: it does not suit the model, or the draft cannot score its prompts.
        Interrupted: it should stop.
    """
    draft = target if asked.draft is None else drafts[path_text(asked.draft)]
    check_unbounded("prefill", target.config)
    support = check_sparse(target.loaded.model)
    if support.reason is not None:
        raise InvalidRequest("prefill", f"SpecPrefill does not suit this model: {support.reason}")
    target.check_draft("prefill", draft)
    if (reason := cannot_score(draft.loaded.model)) is not None:
        raise InvalidRequest("prefill", f"the draft cannot score prompts: {reason}")
    return SparsePrefilling(draft, support.rows)
