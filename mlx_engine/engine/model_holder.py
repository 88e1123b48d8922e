"""Where an engine keeps its model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from mlx_engine.config import ModelConfig, Strategies
from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.stop import Interrupted, checkpoint, stoppable
from mlx_engine.errors import EngineDead, MLXEngineError, ModelLoadError, describe, drop_frames
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.warm_up import warm_up
from mlx_engine.models.loading import LoadedModel, load_model
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.outputs import ProgressCallback, PromptCacheStats


def _leave_mlx() -> None:
    """The MLX thread's last job. Without it mlx 0.32.4 aborts the process at its exit."""
    mx.synchronize()
    mx.clear_streams()


mlx_thread.at_exit(_leave_mlx)


class ModelHolder:
    """Holds the model of one engine, and what belongs to it.

    Filled, used and emptied on the MLX thread.

    Attributes:
        meter: counters of the work done with it. From any thread.
        batched: whether its requests share a batch.
    """

    batched = False

    def __init__(self) -> None:
        self._space: ModelRunner | None = None
        self.meter = EngineCounters()

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
                self._equip(self.space())
                warm_up(self.space(), batched=self.batched)
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
        self._space = ModelRunner(loaded, config, self.meter, drafts, strategies)

    def _equip(self, space: ModelRunner) -> None:
        """Make what else the engine needs; raises what the start then raises."""

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

    def empty(self) -> None:
        """Drop the model. On the MLX thread."""
        self._space = None
        self.meter.kv_bytes = self.meter.batch_size = 0
        mlx_thread.remove_exit_job(self.empty)
        with contextlib.suppress(Exception):  # the model is gone, and that is what counts
            mx.clear_cache()
