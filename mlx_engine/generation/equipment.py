"""What the strategies of an engine need beside its model: made and checked when it loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_engine.checks import path_text
from mlx_engine.config import ModelConfig
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.kv_cache import (
    KVFootprint,
    check_unbounded,
    footprint_of,
    make_kv_cache,
    measure_kv,
)
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.sparse.importance import cannot_score
from mlx_engine.generation.speculative.depth import DepthChooser
from mlx_engine.generation.speculative.drafter import Drafter, ModelDrafter
from mlx_engine.generation.speculative.forward import Forward
from mlx_engine.generation.speculative.mtp import MTPDrafter
from mlx_engine.generation.speculative.rollback import cannot_roll_back
from mlx_engine.generation.trials.rollback import check_rollback
from mlx_engine.generation.trials.sparse import check_sparse
from mlx_engine.models.loading import LoadedModel, other_tokenizer
from mlx_engine.models.mtp_check import check_head
from mlx_engine.models.mtp_heads import load_head
from mlx_engine.strategies import MTP, DraftModel, Strategies

_DOUBTFUL = 0.05  # agreement of an MTP head with its model, below which something is wrong
_TYPICAL = 8192  # tokens of a request, for dividing memory


@dataclass(slots=True)
class Draft:
    """A small model beside the large one, with the prompts that it has seen.

    Attributes:
        loaded: the small model.
        config: how to prefill it.
        prompt_cache: of its own.
        footprint: of the KV cache that it has of a request.
    """

    loaded: LoadedModel
    config: ModelConfig
    prompt_cache: PromptCache
    footprint: KVFootprint


@dataclass(frozen=True, slots=True)
class Speculation:
    """How an engine proposes tokens.

    Attributes:
        make_drafter: one for each request.
        chooser: how many to propose; it learns as long as the engine runs.
        forward: of the model, with hidden states where the drafter wants them.
        footprint: what a request's drafter keeps.
    """

    make_drafter: Callable[[], Drafter]
    chooser: DepthChooser
    forward: Forward
    footprint: KVFootprint


@dataclass(frozen=True, slots=True)
class SparsePrefilling:
    """How an engine leaves out parts of prompts.

    Attributes:
        draft: scores them.
        rows: whether chunks may go in as rows of a batch.
    """

    draft: Draft
    rows: bool

    @property
    def footprint(self) -> KVFootprint:
        """What the draft keeps of a request while it scores it."""
        return self.draft.footprint


@dataclass(frozen=True, slots=True)
class StrategyRuntime:
    """All of it.

    Attributes:
        speculation: ``None`` decodes one token after another.
        sparse: ``None`` prefills in full.
        notes: what was asked for and cannot be done, by option, for each result.
        side_caches: the prompt caches beside the engine's own, and what a token takes there.
    """

    speculation: Speculation | None = None
    sparse: SparsePrefilling | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    side_caches: tuple[tuple[PromptCache, KVFootprint], ...] = ()

    @property
    def footprints(self) -> dict[str, KVFootprint]:
        """What a request may take beside its own KV cache, by option."""
        parts = {"prefill": self.sparse, "decode": self.speculation}
        nothing = KVFootprint(0, ())
        return {option: part.footprint if part else nothing for option, part in parts.items()}


def make_runtime(
    loaded: LoadedModel,
    drafts: Mapping[str, LoadedModel],
    strategies: Strategies,
    config: ModelConfig,
    prompt_cache: PromptCache,
) -> StrategyRuntime:
    """What these strategies need. On the MLX thread.

    Args:
        drafts: the other models, by name.
        prompt_cache: the engine's own.

    Raises:
        InvalidRequest: a strategy cannot be had with this model, and does not allow for that.
        ModelLoadError: the MTP head cannot be loaded.
    """
    notes: dict[str, str] = {}
    side = {
        name: _as_draft(draft, config.for_draft(name), PromptCache(0))
        for name, draft in drafts.items()
    }
    used: set[str] = set()  # drafts, by name
    histories: list[tuple[PromptCache, KVFootprint]] = []
    sparse: SparsePrefilling | None = None
    speculation: Speculation | None = None
    prefill, decode = strategies.prefill, strategies.decode
    if prefill is not None:
        try:
            if prefill.draft is None:
                itself = _as_draft(loaded, config, prompt_cache)
                sparse = _sparse_prefilling(loaded, itself, config)
            else:
                name = path_text(prefill.draft)
                sparse = _sparse_prefilling(loaded, side[name], config)
                used.add(name)
        except InvalidRequest as error:
            notes["prefill"] = _fallback(error, prefill.fallback, "prompts are prefilled in full")
    if decode is not None:
        try:
            check_rollback(loaded.model, config)
            if isinstance(decode, DraftModel):
                name = path_text(decode.model)
                speculation = _with_draft(loaded, side[name], decode)
                used.add(name)
            else:
                speculation, history, doubt = _with_head(loaded, decode)
                histories.append((history, speculation.footprint))
                if doubt:
                    notes["decode"] = doubt
        except InvalidRequest as error:
            notes["decode"] = _fallback(error, decode.fallback, "decoded one token at a time")
    side_caches = [(side[name].prompt_cache, side[name].footprint) for name in sorted(used)]
    return StrategyRuntime(speculation, sparse, notes, (*side_caches, *histories))


def share_out(limit: int, caches: Sequence[tuple[PromptCache, KVFootprint]]) -> None:
    """Divide bytes among prompt caches so that all hold about as many tokens."""
    sizes = [footprint.nbytes(_TYPICAL) for _, footprint in caches]
    for (cache, _), size in zip(caches, sizes, strict=True):
        cache.limit = limit * size // max(sum(sizes), 1)


def _fallback(error: InvalidRequest, allowed: bool, instead: str) -> str:
    if not allowed:
        raise error
    return f"{error}; {instead}"


def _as_draft(loaded: LoadedModel, config: ModelConfig, prompt_cache: PromptCache) -> Draft:
    return Draft(loaded, config, prompt_cache, measure_kv(loaded.model, config))


def _sparse_prefilling(loaded: LoadedModel, draft: Draft, config: ModelConfig) -> SparsePrefilling:
    check_unbounded("prefill", config)
    support = check_sparse(loaded.model)
    if support.reason is not None:
        raise InvalidRequest("prefill", f"SpecPrefill does not suit this model: {support.reason}")
    _check_tokenizer("prefill", loaded, draft.loaded)
    if (reason := cannot_score(draft.loaded.model)) is not None:
        raise InvalidRequest("prefill", f"the draft cannot score prompts: {reason}")
    return SparsePrefilling(draft, support.rows)


def _with_draft(loaded: LoadedModel, draft: Draft, decode: DraftModel) -> Speculation:
    _check_tokenizer("decode", loaded, draft.loaded)
    if (reason := cannot_roll_back(make_kv_cache(draft.loaded.model, draft.config))) is not None:
        raise InvalidRequest("decode", f"the draft model cannot take proposals back: {reason}")

    def make() -> Drafter:
        return ModelDrafter(draft.loaded, draft.config, draft.prompt_cache, loaded.vocab_size)

    chooser = DepthChooser(decode.num_draft_tokens)
    return Speculation(make, chooser, Forward(loaded.model), draft.footprint)


def _with_head(loaded: LoadedModel, decode: MTP) -> tuple[Speculation, PromptCache, str | None]:
    head = load_head(loaded, None if decode.head is None else Path(decode.head).expanduser())
    share = check_head(loaded, head.trunk, head)
    doubt = None
    if share < _DOUBTFUL:
        doubt = (
            f"the MTP head agrees with the model on {share:.0%} of the model's own text, so it "
            "does not speed decoding up; is it this model's?"
        )
    chooser, histories = DepthChooser(decode.depth), PromptCache(0)
    trial = head.make_cache()
    hidden = head.trunk.hidden(mx.array([[0]]), make_prompt_cache(loaded.model))
    mx.eval(head(mx.array([[0]]), hidden, trial))

    def make() -> Drafter:
        return MTPDrafter(head, chooser, histories)

    forward = Forward(loaded.model, head.trunk)
    return Speculation(make, chooser, forward, footprint_of(trial)), histories, doubt


def _check_tokenizer(option: str, loaded: LoadedModel, draft: LoadedModel) -> None:
    if (difference := other_tokenizer(loaded, draft)) is not None:
        raise InvalidRequest(
            option, f"the draft {draft.path} has another tokenizer than the model ({difference})"
        )
