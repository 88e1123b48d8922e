"""A sparse prefill with the draft that scores it, and what the draft's prompt cache has."""

from __future__ import annotations

from mlx_engine.generation.cache.kv_cache import Cache, make_kv_cache
from mlx_engine.generation.equipment import Draft, SparsePrefilling
from mlx_engine.generation.sparse.chunk_choice import Range, keeps_all
from mlx_engine.generation.sparse.specprefill import Forward, SparsePrefill
from mlx_engine.strategies import SpecPrefill


class ScoredPrefill:
    """One prompt's.

    Args:
        forward: runs the large model.
        sparse: how the engine does it.
        asked: the request's own options.
        prompt: token ids.
        cache: with ``held`` tokens of the prompt in it. It must not be used any more.
    """

    def __init__(
        self,
        forward: Forward,
        sparse: SparsePrefilling,
        asked: SpecPrefill,
        prompt: list[int],
        cache: Cache,
        held: int,
    ) -> None:
        self._draft: Draft | None = sparse.draft
        self._prompt = prompt
        hit = sparse.draft.prompt_cache.fetch(prompt, counted=asked.draft is not None)
        self._draft_cache = hit.cache or make_kv_cache(
            sparse.draft.loaded.model, sparse.draft.config
        )
        self._work = SparsePrefill(
            forward=forward,
            draft=sparse.draft.loaded.model,
            draft_cache=self._draft_cache,
            draft_held=hit.cached,
            cache=cache,
            prompt=prompt,
            held=held,
            keep=asked.keep,
            lookahead=asked.lookahead,
            draft_vocab_size=sparse.draft.loaded.vocab_size,
            rows=sparse.rows,
        )

    @property
    def cache(self) -> Cache:
        """The large model's."""
        return self._work.cache

    @property
    def scoring(self) -> bool:
        """Whether the draft is still at work."""
        return self._work.phase == "score"

    @property
    def ranges(self) -> list[Range]:
        """What is kept of the prompt, once that is known."""
        return self._work.ranges

    @property
    def done(self) -> int:
        """Tokens of the prompt that the draft has read, or that are gone through after that."""
        return self._work.scored if self.scoring else self._work.position

    @property
    def left(self) -> int:
        """Tokens that are still to be read, roughly while the draft is at work."""
        if not self.scoring:
            return self._work.left
        return 2 * len(self._prompt) - self._work.scored

    def step(self, size: int) -> int:
        """Do a forward of at most ``size`` tokens, of the draft or of the large model.

        Returns:
            Tokens that went through it.

        Raises:
            Exception: MLX failed; neither cache can be used.
        """
        before = self._work.scored + self._work.done
        self._work.step(size)
        if not self.scoring:
            self.keep_scored()
        return self._work.scored + self._work.done - before

    def keep_scored(self) -> None:
        """What the draft has read goes into its prompt cache, once."""
        draft, self._draft = self._draft, None
        if draft is not None and self._work.draft_held:
            draft.prompt_cache.store(self._prompt[: self._work.draft_held], self._draft_cache)
            self._draft_cache = []


def why_in_full(
    sparse: SparsePrefilling, asked: SpecPrefill, prompt: list[int], held: int
) -> str | None:
    """Why nothing of a prompt is left out, ``held`` tokens of which are there; else ``None``."""
    most, needed = sparse.draft.loaded.context_length, len(prompt) + asked.lookahead
    new = len(prompt) - held
    if new < asked.threshold:
        return (
            f"prefilled in full: the prompt has {new} new tokens, fewer than SpecPrefill's "
            f"threshold of {asked.threshold}"
        )
    if most is not None and needed > most:
        return f"prefilled in full: the draft would have to read {needed} tokens, and can {most}"
    if keeps_all(len(prompt) - 1, asked.keep, start=held):
        return f"prefilled in full: keep={asked.keep} leaves out nothing of {new} new tokens"
    return None
