"""The model runner: an engine's model, with what its requests share on the MLX thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.config import ModelConfig
from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.ledger import Account
from mlx_engine.core.sliced_job import Rest
from mlx_engine.core.stop import Interrupted, stoppable
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache import prompt_cache_file
from mlx_engine.generation.cache.cached_model import CachedModel
from mlx_engine.generation.cache.kv_cache import (
    Cache,
    KVFootprint,
    check_kv_options,
    grow,
    make_kv_cache,
    sample_kv_cache,
)
from mlx_engine.generation.cache.prompt_cache import Hit, PromptCache
from mlx_engine.generation.cache.snapshot import trimmable
from mlx_engine.generation.cache.sparse_cache import SparseKVCache
from mlx_engine.generation.cache.stored_prompts import StoredPrompts
from mlx_engine.generation.memory import prompt_cache_limit, share_out
from mlx_engine.generation.prefill import ChunkSize, settle
from mlx_engine.generation.request import Request
from mlx_engine.generation.sequence import Sequence
from mlx_engine.generation.sizing import fit_context
from mlx_engine.generation.sparse.chunk_choice import join
from mlx_engine.generation.sparse.specprefill import SparsePrefill
from mlx_engine.generation.speculative.decoder import Pending, SpeculativeDecoder
from mlx_engine.generation.speculative.depth import DepthChooser
from mlx_engine.generation.speculative.drafter import Drafter
from mlx_engine.generation.speculative.forward import Forward
from mlx_engine.generation.strategy_runtime import StrategyRuntime
from mlx_engine.generation.trials.rollback import check_rollback
from mlx_engine.models.loading import LoadedModel
from mlx_engine.strategies import Strategies

_NEAR = 64  # tokens; for fewer it is not worth while to store a cache again


class ModelRunner:
    """A model that is run for one engine: takes sequences into their KV caches, and keeps these.

    Made, used and dropped on the MLX thread.

    Args:
        loaded: the model, which has just been loaded.
        config: how it is to be run.
        counters: of the work done with it.
        drafts: other models that the strategies need, by name.
        strategies: how prompts are prefilled, and how it decodes.
        account: of the engine's memory.

    Raises:
        InvalidRequest: a strategy, or an option of the KV cache, does not suit the model.
        ModelLoadError: an MTP head cannot be loaded.
        Interrupted: it should stop.

    Attributes:
        prompt_cache: KV caches of earlier prompts.
        strategies: those at work.
        footprint: bytes of the KV cache that a request has.
        account: of the engine's memory, in which stored prompts are counted.
        chunk, draft_chunk: the size of prefill chunks, and of a draft's that scores a prompt.
        helpers: the modules of drafts, and of an MTP head.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: ModelConfig,
        counters: EngineCounters,
        drafts: Mapping[str, LoadedModel],
        strategies: Strategies,
        account: Account,
    ) -> None:
        check_kv_options(loaded.model, config)
        # With a cache that is bounded or quantised while a prompt goes in, what comes out depends
        # on where the chunks begin, so that a prefix may be used up to such a place only.
        exact = config.max_kv_size is None and config.kv_bits is None
        grid = None if exact else config.prefill_step_size
        self.chunk = ChunkSize(config.prefill_step_size, fixed=not exact)
        self.draft_chunk = ChunkSize(config.prefill_step_size, fixed=False)
        cache = PromptCache(0, grid=grid, quantized_from=config.quantized_kv_start)
        target = CachedModel.of(loaded, config, cache)
        others = {
            name: CachedModel.of(draft, config.for_draft(name), PromptCache(0))
            for name, draft in drafts.items()
        }
        self.loaded = loaded
        self.config = config
        self.counters = counters
        self.prompt_cache = cache
        self.footprint = target.footprint
        self.strategies = StrategyRuntime.of(strategies, target, others)
        self._verifies = True if self.strategies.speculation is not None else None  # once tried
        self.account = account
        head = None if self.strategies.speculation is None else self.strategies.speculation.weights
        models = [draft.loaded.model for draft in others.values()]
        self.helpers = models if head is None else [*models, head]

    def keep_prompts(self) -> None:
        """Keep prompts from now on: all else of the engine that stays is in its account by now."""
        caches = [(self.prompt_cache, self.footprint), *self.strategies.side_caches]
        StoredPrompts([cache for cache, _ in caches], self.account)
        share_out(prompt_cache_limit(self.config, self.account), caches)

    def footprints_of(self, sequence: Sequence) -> list[KVFootprint]:
        """Bytes of its KV cache, and of what its drafts keep, for so many tokens."""
        drafts = self.strategies.footprints
        scored = [drafts["prefill"]] if sequence.sparse is not None else []
        proposed = [drafts["decode"]] if sequence.drafter is not None else []
        return [self.footprint, *scored, *proposed]

    def fit_context(self, room: int | None) -> None:
        """Shorten the context to what fits into so many bytes, as ``sizing.fit_context`` does."""
        footprints = [self.footprint, *self.strategies.footprints.values()]
        self.loaded = fit_context(self.loaded, footprints, room)

    def start(self, sequence: Sequence) -> None:
        """Give a sequence its KV cache, what is stored of its source in it, and its strategies.

        What was chosen when it was started first stays as it is.

        Raises:
            Exception: MLX failed; the sequence may be started again.
        """
        request, source = sequence.request, sequence.source
        asked, strategies = request.strategies, self.strategies
        first = not sequence.started
        usable = source if sequence.dense is None else source[: sequence.dense + 1]
        hit = self.prompt_cache.fetch(usable, request.request_id, counted=first)
        cache = hit.cache or make_kv_cache(self.loaded.model, self.config)
        if first:
            self.counters.prompt_tokens += len(source)
            self.counters.cached_tokens += hit.cached
            request.prefill_begins(hit.cached)
        sequence.held = sequence.cached = hit.cached
        sequence.places = () if sequence.returns else self._places(request, hit)
        for option, note in strategies.notes.items():
            if getattr(asked, option) is not None:
                request.note(note)
        if asked.decode is not None and strategies.speculation is not None:
            sequence.drafter = strategies.speculation.make_drafter()
            sequence.drafter.begin(source, hit.cached)
        sequence.forces = sequence.grammar is not None and self._can_verify(request)
        sequence.cache = cache
        if first and asked.prefill is not None and strategies.sparse is not None:
            reason = strategies.sparse.why_in_full(asked.prefill, source, hit.cached)
            if reason is None:
                sequence.dense = hit.cached
            else:
                request.note(reason)
        if sequence.dense is not None:
            self._start_sparse(sequence, sequence.dense)
        sequence.started = True

    def _start_sparse(self, sequence: Sequence, dense: int) -> None:
        asked, sparse = sequence.request.strategies.prefill, self.strategies.sparse
        assert asked is not None
        assert sparse is not None
        assert sequence.cache is not None
        sequence.sparse = SparsePrefill(
            partial(self._forward, sequence.source, sequence.drafter),
            sparse,
            asked,
            sequence.source,
            sequence.cache,
            sequence.held,
            dense=dense,
            ranges=sequence.kept,
        )
        sequence.cache, sequence.places, sequence.alone = sequence.sparse.cache, (), True

    def chunk_of(self, sequence: Sequence) -> ChunkSize:
        """The size of a sequence's next prefill chunk."""
        scoring = sequence.sparse is not None and sequence.sparse.scoring
        return self.draft_chunk if scoring else self.chunk

    def prefill_step(self, sequence: Sequence, size: int) -> int:
        """Prefill at most ``size`` tokens more; a step also ends at each of ``places``.

        Returns:
            Tokens that went through a model.

        Raises:
            Exception: MLX failed; what is in the sequence's cache is not known then.
        """
        source = sequence.source
        self.counters.step("prefill")
        if (sparse := sequence.sparse) is not None:
            went = sparse.step(size)
            sequence.progress(sparse.done, "score" if sparse.scoring else "prefill")
            if not sparse.left:
                if not sequence.returns:
                    sequence.ranges = join([*sparse.ranges, (len(source) - 1, len(source))])
                    sequence.request.kept(sequence.ranges)
                sequence.held, sequence.sparse = len(source) - 1, None
            return went
        assert sequence.cache is not None
        end = min(sequence.held + size, len(source) - 1)
        if sequence.stop is not None:
            end = min(end, sequence.stop)
        went = end - sequence.held
        if went:
            with mx.stream(generation_stream):
                grow(sequence.cache, went)
                self._forward(
                    source,
                    sequence.drafter,
                    mx.array([source[sequence.held : end]]),
                    sequence.cache,
                    starts=[sequence.held],
                )
                settle(sequence.cache, self.config)
            sequence.held = end
            sequence.progress(end)
        return went

    def store(self, sequence: Sequence, cache: Cache) -> bool:
        """Keep what a sequence has computed; whether MLX did not fail at that.

        Nobody's answer depends on it: if it fails, the prompt cache is emptied. A cache that
        lacks tokens of its prompt is not kept, nor one that has tokens which were not used and
        cannot be taken back out.

        Args:
            cache: its own, or what was taken out of a batch.
        """
        if any(isinstance(entry, SparseKVCache) and entry.stored < entry.offset for entry in cache):
            return True
        tokens, prefilled = sequence.in_cache, len(sequence.request.prompt) - 1
        if len(tokens) < sequence.held and not trimmable(cache):
            return True
        whole = [e.dense() if isinstance(e, SparseKVCache) else e for e in cache]
        try:
            places = sequence.request.places
            self.prompt_cache.store(tokens, whole, prefilled=prefilled, places=places)
        except Exception:  # noqa: BLE001 - the border: MLX raises anything
            self.prompt_cache.clear()
            return False
        return True

    @property
    def stored_bytes(self) -> int:
        """Bytes of stored prompts, the drafts' too."""
        return sum(cache.nbytes for cache in self._stored)

    @property
    def _stored(self) -> list[PromptCache]:
        return [self.prompt_cache, *(cache for cache, _ in self.strategies.side_caches)]

    def shrink_stored(self, limit: int) -> None:
        """Drop stored prompts, the drafts' too, until they take at most ``limit`` bytes."""
        total = self.stored_bytes
        if total > limit:
            for cache in self._stored:
                cache.shrink(limit * cache.nbytes // total)

    def try_mlx(self) -> Exception | None:
        """The error of MLX if it does not work any more, asked after one; ``None`` if it does."""
        try:
            mx.clear_cache()
            sample_kv_cache(self.loaded.model, self.config)
        except Exception as error:  # noqa: BLE001 - the border: MLX raises anything
            return error
        try:
            mx.eval(mx.random.state)
        except Exception:  # noqa: BLE001 - it hung on what has failed
            mx.random.seed(time.time_ns())
        return None

    def save_prompt_cache(self, path: Path) -> Rest[int]:
        """Begin to write the prompt cache to a file, as ``prompt_cache_file.save`` does."""
        model = prompt_cache_file.fingerprint(self.loaded)
        return prompt_cache_file.save(path, self.prompt_cache, model, self.counters.piece)

    def load_prompt_cache(self, path: Path, stored: Callable[[], None]) -> Rest[int]:
        """Begin to add what a file has, as ``prompt_cache_file.load`` does."""
        model = prompt_cache_file.fingerprint(self.loaded)
        template = sample_kv_cache(self.loaded.model, self.config)
        beat = self.counters.piece
        return prompt_cache_file.load(path, self.prompt_cache, model, template, beat, stored)

    def speculative_decoder(
        self, sequence: Sequence, cache: Cache, pending: Pending | None = None
    ) -> SpeculativeDecoder:
        """The decoder of a sequence for which tokens are proposed.

        Args:
            pending: the sequence's next token, if it has been sampled already.
        """
        speculation = self.strategies.speculation
        if sequence.drafter is None or speculation is None:
            forward, chooser = Forward(self.loaded.model), DepthChooser(0)
        else:
            forward, chooser = speculation.forward, speculation.chooser
        return SpeculativeDecoder(
            sequence.request, forward, cache, sequence.drafter, chooser, self.counters, pending
        )

    def _can_verify(self, request: Request) -> bool:
        """Whether the model can verify proposals, which is tried when some come first."""
        if self._verifies is None:
            try:
                with stoppable(lambda: request.should_stop):
                    check_rollback(self.loaded.model, self.config)
            except Interrupted:  # its next look at that ends the request
                return False
            except InvalidRequest:
                self._verifies = False
            else:
                self._verifies = True
        return self._verifies

    def _places(self, request: Request, hit: Hit) -> tuple[int, ...]:
        """Places where the cache of a request is to be stored on its way, ascending."""
        if not self.prompt_cache.limit:
            return ()
        step = self.prompt_cache.grid or 1
        places = {place // step * step for place in request.places}
        checkpoint = hit.checkpoint
        if checkpoint is not None and not any(0 <= checkpoint - p < _NEAR for p in places):
            places.add(checkpoint)
        return tuple(sorted(place for place in places if place > hit.cached))

    def _forward(
        self,
        prompt: list[int],
        drafter: Drafter | None,
        tokens: mx.array,
        cache: Cache,
        starts: list[int],
    ) -> None:
        """Tokens of shape (rows, n), whose first ones are at ``starts``; a drafter may watch."""
        speculation = self.strategies.speculation
        if drafter is None or speculation is None:
            self.loaded.model(tokens, cache=cache)
            return
        hidden = speculation.forward.prefill(tokens, cache)
        if hidden is not None:
            for start, states in zip(starts, hidden, strict=True):
                drafter.observe(prompt, start, states)
