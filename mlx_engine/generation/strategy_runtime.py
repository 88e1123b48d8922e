"""The strategies of an engine at work, each set up by its own folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.cached_model import CachedModel
from mlx_engine.generation.cache.kv_cache import KVFootprint
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.sparse.setup import SparsePrefilling, set_up
from mlx_engine.generation.speculative.setup import Speculation, set_up_draft, set_up_head
from mlx_engine.strategies import MTP, DraftModel, SpecPrefill, Strategies

# A strategy is a folder and a line: what was asked for -> set_up(asked, target, drafts).
_SET_UP: Mapping[type, Callable[..., Any]] = {
    SpecPrefill: set_up,
    DraftModel: set_up_draft,
    MTP: set_up_head,
}
_INSTEAD = {"prefill": "prompts are prefilled in full", "decode": "decoded one token at a time"}


@dataclass(frozen=True, slots=True)
class StrategyRuntime:
    """Strategies of one engine: what it prefills and decodes with beside its model.

    Attributes:
        sparse: ``None`` prefills in full.
        speculation: ``None`` decodes one token after another.
        notes: what was asked for and cannot be done, by option, for each result.
        side_caches: the prompt caches beside the engine's own, and what a request takes there.
    """

    sparse: SparsePrefilling | None = None
    speculation: Speculation | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    side_caches: tuple[tuple[PromptCache, KVFootprint], ...] = ()

    @classmethod
    def of(
        cls, strategies: Strategies, target: CachedModel, drafts: Mapping[str, CachedModel]
    ) -> StrategyRuntime:
        """The runtime of these strategies. On the MLX thread.

        Args:
            target: the engine's own model.
            drafts: the other models, by name.

        Raises:
            InvalidRequest: a strategy cannot be had with this model, and does not allow for that.
            ModelLoadError: the MTP head cannot be loaded.
            Interrupted: it should stop.
        """
        notes: dict[str, str] = {}
        made: dict[str, Any] = {}
        for option, instead in _INSTEAD.items():
            asked = getattr(strategies, option)
            if asked is None:
                continue
            try:
                made[option] = _SET_UP[type(asked)](asked, target, drafts)
            except InvalidRequest as error:
                if not asked.fallback:
                    raise
                notes[option] = f"{error}; {instead}"
        sparse: SparsePrefilling | None = made.get("prefill")
        speculation: Speculation | None = made.get("decode")
        if speculation is not None and speculation.note is not None:
            notes["decode"] = speculation.note
        parts = [part for part in (sparse, speculation) if part is not None]
        side = {id(part.prompt_cache): (part.prompt_cache, part.footprint) for part in parts}
        side.pop(id(target.prompt_cache), None)
        return cls(sparse, speculation, notes, tuple(side.values()))

    @property
    def footprints(self) -> dict[str, KVFootprint]:
        """Bytes that a request may take beside its own KV cache, by option."""
        parts = {"prefill": self.sparse, "decode": self.speculation}
        nothing = KVFootprint(0, ())
        return {option: part.footprint if part else nothing for option, part in parts.items()}
