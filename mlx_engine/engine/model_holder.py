"""Where an engine keeps its model, and all that it does with it: the engines' half with MLX.

Nothing imports it at the top of a file: ``late.py`` does when an engine starts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from mlx_engine.config import BatchConfig, ModelConfig, Strategies
from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.stop import Interrupted, checkpoint, stoppable
from mlx_engine.errors import (
    EngineDead,
    GenerationError,
    MLXEngineError,
    ModelLoadError,
    describe,
    drop_frames,
)
from mlx_engine.generation.batch import Batch
from mlx_engine.generation.budget import MemoryBudget
from mlx_engine.generation.cache import prompt_cache_file
from mlx_engine.generation.cache.kv_cache import measure_kv, sample_kv_cache
from mlx_engine.generation.prepare import prepare
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner, make_runner, memory_for_caches
from mlx_engine.generation.single import generate_single
from mlx_engine.generation.trials.batch import check_batchable
from mlx_engine.generation.trials.warm_up import warm_up
from mlx_engine.models.loading import LoadedModel, find_model, load_model
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.outputs import GenerationResult, ProgressCallback, PromptCacheStats


def _leave_mlx() -> None:
    """The MLX thread's last job. Without it mlx 0.32.4 aborts the process at its exit."""
    mx.synchronize()
    mx.clear_streams()


mlx_thread.at_exit(_leave_mlx)


class ModelHolder:
    """Holds the model of one engine, and what belongs to it.

    Filled, used and emptied on the MLX thread.

    Args:
        batching: how its requests share a batch; ``None`` if they do not.

    Attributes:
        meter: counters of the work done with it. From any thread.
    """

    def __init__(self, batching: BatchConfig | None = None) -> None:
        self.meter = EngineCounters()
        self._batching = batching
        self._space: ModelRunner | None = None
        self._batch: Batch | None = None
        self._budget: MemoryBudget | None = None

    @property
    def filled(self) -> bool:
        """Whether there is a model in it. From any thread."""
        return self._space is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether the model in it has a chat template. From any thread."""
        space = self._space
        return space is not None and bool(space.loaded.tokenizer.has_chat_template)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together, if limited. From any thread."""
        space = self._space
        return None if space is None else space.loaded.context_length

    def prompt_cache_stats(self) -> PromptCacheStats:
        """Of its prompt cache. From any thread."""
        space = self._space
        return PromptCacheStats() if space is None else space.prompt_cache.stats()

    def find(
        self,
        config: ModelConfig,
        strategies: Strategies,
        on_progress: ProgressCallback | None,
        should_stop: Callable[[], bool],
    ) -> dict[str, Path]:
        """Where the model and those that help it are, by name. On any thread but the MLX thread.

        Raises:
            ModelLoadError, InvalidRequest, Interrupted: as ``find_model`` does.
        """
        sources: dict[str, Path] = {}
        for model in (config, *map(config.for_draft, strategies.drafts)):
            if model.model not in sources:  # else it is its own draft, of the same revision
                sources[model.model] = find_model(model, on_progress, should_stop)
        return sources

    def fill(
        self,
        config: ModelConfig,
        strategies: Strategies,
        sources: Mapping[str, Path],
        on_progress: ProgressCallback | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Load the model, and those that help it. On the MLX thread.

        Args:
            sources: where each of them is, by name.

        Raises:
            ModelLoadError, InvalidRequest, Interrupted: as ``load_model`` does.
        """
        load = functools.partial(load_model, on_progress=on_progress, should_stop=should_stop)
        try:
            with stoppable(should_stop):
                self._load(config, strategies, sources, load)
                mlx_thread.at_exit(self.empty)
                checkpoint()
                if self._batching is not None:
                    self._make_batch(self.space(), self._batching)
                warm_up(self.space(), batched=self._batching is not None)
        except Exception as error:
            drop_frames(error)  # this frame stays: nothing here may hold a model
            if isinstance(error, MLXEngineError | Interrupted):
                raise error from error.__cause__
            raise ModelLoadError(
                f"{config.model} is loaded, but does not work: {describe(error)}"
            ) from error

    def _load(
        self,
        config: ModelConfig,
        strategies: Strategies,
        sources: Mapping[str, Path],
        load: Callable[[ModelConfig, Path], LoadedModel],
    ) -> None:
        loaded = load(config, sources[config.model])
        drafts = {name: load(config.for_draft(name), sources[name]) for name in strategies.drafts}
        self._space = make_runner(loaded, config, self.meter, drafts, strategies)

    def _make_batch(self, space: ModelRunner, batching: BatchConfig) -> None:
        model, pause = space.loaded.model, batching.max_decode_pause_ms
        check_batchable(model, space.config)
        memory = batching.kv_cache_memory_bytes
        limit = memory_for_caches() if memory is None else memory
        self._budget = MemoryBudget(
            measure_kv(model, space.config), limit, space.equipment.footprints
        )
        self._batch = Batch(space, self._budget, None if pause is None else pause / 1000)

    @property
    def vocabulary(self) -> Vocabulary:
        """What prompts are made into tokens with. From any thread.

        Raises:
            EngineDead: there is no model.
        """
        return self.space().loaded.vocabulary

    def get(self) -> LoadedModel:
        """The model. On the MLX thread, in a request that was admitted."""
        return self.space().loaded

    def space(self) -> ModelRunner:
        """The model and what belongs to it. On the MLX thread, in a request that was admitted."""
        if self._space is None:
            raise EngineDead("the engine has no model any more")
        return self._space

    def batch(self) -> Batch:
        """The batch. On the MLX thread."""
        if self._batch is None:
            raise EngineDead("the engine has no model any more")
        return self._batch

    def prepare(self, request: Request) -> None:
        """Make a request ready for its turn. On any thread, without MLX work.

        Raises:
            Exception: what its caller is told.
        """
        prepare(request, self.vocabulary)
        if self._budget is not None and request.prompt:
            self._budget.check(request)

    def generate(self, request: Request) -> GenerationResult:
        """Do a request by itself. On the MLX thread."""
        return generate_single(request, self.space())

    def save_prompt_cache(self, path: Path) -> int:
        """Write the prompt cache into a file; how many prompts. On the MLX thread."""
        return self._at_the_border("saving the prompt cache", _save, path)

    def load_prompt_cache(self, path: Path) -> int:
        """Add the prompts of a file; how many. On the MLX thread."""
        loaded = self._at_the_border("loading the prompt cache", _load, path)
        if self._batch is not None:
            self._batch.make_room()
        return loaded

    def _at_the_border(
        self, what: str, work: Callable[[ModelRunner, Path], int], path: Path
    ) -> int:
        """What MLX raises inside is told in an error of ours, without frames that hold arrays."""
        try:
            return work(self.space(), path)
        except MLXEngineError as error:
            drop_frames(error)
            raise
        except Exception as error:
            drop_frames(error)
            raise GenerationError(f"{what} failed: {describe(error)}") from error

    def empty(self) -> None:
        """Drop the model and all that belongs to it. On the MLX thread."""
        self._space = self._batch = self._budget = None
        self.meter.kv_bytes = self.meter.batch_size = 0
        mlx_thread.remove_exit_job(self.empty)
        with contextlib.suppress(Exception):  # the model is gone, and that is what counts
            mx.clear_cache()


def _save(space: ModelRunner, path: Path) -> int:
    return prompt_cache_file.save(
        path, space.prompt_cache, prompt_cache_file.fingerprint(space.loaded)
    )


def _load(space: ModelRunner, path: Path) -> int:
    return prompt_cache_file.load(
        path,
        space.prompt_cache,
        prompt_cache_file.fingerprint(space.loaded),
        sample_kv_cache(space.loaded.model, space.config),
    )
