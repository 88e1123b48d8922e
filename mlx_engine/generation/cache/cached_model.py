"""A model together with the prompts that it has seen."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_engine.config import ModelConfig
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.kv_cache import KVFootprint, measure_kv
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.models.loading import LoadedModel, other_tokenizer


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A loaded model, of an engine or of one of its drafts, with its prompt cache.

    Attributes:
        loaded: the model.
        config: how to prefill it.
        prompt_cache: KV caches of its earlier prompts.
        footprint: bytes of the KV cache that it has of a request.
    """

    loaded: LoadedModel
    config: ModelConfig
    prompt_cache: PromptCache
    footprint: KVFootprint

    @classmethod
    def of(cls, loaded: LoadedModel, config: ModelConfig, prompt_cache: PromptCache) -> CachedModel:
        """A model whose KV cache is measured with one token. On the MLX thread."""
        return cls(loaded, config, prompt_cache, measure_kv(loaded.model, config))

    def check_draft(self, option: str, draft: CachedModel) -> None:
        """Refuse a draft that reads other tokens than this model.

        Raises:
            InvalidRequest: names ``option`` and the difference.
        """
        if (difference := other_tokenizer(self.loaded, draft.loaded)) is not None:
            raise InvalidRequest(
                option,
                f"the draft {draft.loaded.path} has another tokenizer than the model "
                f"({difference})",
            )
