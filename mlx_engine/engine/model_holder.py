"""The model of an engine, and what belongs to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.config import ModelConfig
from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.ledger import ledger
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.sliced_job import Rest
from mlx_engine.core.stop import Interrupted, checkpoint, stoppable
from mlx_engine.core.turns import Turns
from mlx_engine.core.weight_size import stored_bytes
from mlx_engine.engine.engine_memory import EngineMemory
from mlx_engine.engine.late import mlx_work
from mlx_engine.errors import (
    EngineDead,
    GenerationError,
    MLXEngineError,
    ModelLoadError,
    describe,
    drop_frames,
)
from mlx_engine.generation.request import Request
from mlx_engine.memory_stats import MemoryStats
from mlx_engine.outputs import (
    GenerationResult,
    ProgressCallback,
)
from mlx_engine.questions import PromptFacts, PromptQuestion
from mlx_engine.strategies import Strategies

if TYPE_CHECKING:
    from mlx_engine.generation.runner import ModelRunner
    from mlx_engine.models.loading import LoadedModel
    from mlx_engine.models.vocabulary import Vocabulary

T = TypeVar("T")


class ModelHolder:
    """Holds the model of one engine, and what belongs to it.

    Loaded, used and unloaded on the MLX thread.

    Attributes:
        counters: of the work done with it. From any thread.
        memory: what it has, and may have. From any thread.
        batched: whether its requests share a batch.
    """

    batched = False

    def __init__(self) -> None:
        self._runner: ModelRunner | None = None
        self.counters = EngineCounters()
        self.memory = EngineMemory()

    @property
    def loaded(self) -> bool:
        """Whether there is a model in it. From any thread."""
        return self._runner is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether the model in it has a chat template. From any thread."""
        runner = self._runner
        return runner is not None and bool(runner.loaded.tokenizer.has_chat_template)

    @property
    def supports_tools(self) -> bool:
        """Whether the model is shown tools, and its calls can be read. From any thread."""
        runner = self._runner
        return runner is not None and runner.loaded.vocabulary.supports_tools

    @property
    def supports_reasoning(self) -> bool:
        """Whether reasoning can be told from the answer. From any thread."""
        runner = self._runner
        return runner is not None and runner.loaded.vocabulary.answer_format.has_reasoning

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together, if limited. From any thread."""
        runner = self._runner
        return None if runner is None else runner.loaded.context_length

    def prompt_cache_stats(self) -> PromptCacheStats:
        """Counters of the prompt cache. From any thread."""
        runner = self._runner
        return PromptCacheStats() if runner is None else runner.prompt_cache.stats()

    def memory_stats(self) -> MemoryStats:
        """A snapshot of what it has. From any thread."""
        return self.memory.stats()

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
                sources[model.model] = mlx_work.find_model(model, on_progress, should_stop)
        return sources

    def load(
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
            NotEnoughMemory: the weights do not fit; nothing has been loaded then.
        """
        load = functools.partial(
            mlx_work.load_model, on_progress=on_progress, should_stop=should_stop
        )
        try:
            with stoppable(should_stop):
                self._load_models(config, strategies, sources, load)
                mlx_thread.at_exit(self.unload)
                checkpoint()
                self._settle_memory(config, self.runner())
                if config.context_length == "auto":
                    self.runner().fit_context(self._kv_limit())
                self.runner().keep_prompts()
                self._equip(self.runner())
                mlx_work.warm_up(self.runner(), batched=self.batched)
        except BaseException as error:
            drop_frames(error)  # this frame stays: nothing here may hold a model
            if self._runner is None:
                self.memory.close()  # else with the model
            if not isinstance(error, Exception):
                raise
            if isinstance(error, MLXEngineError | Interrupted):
                raise error from error.__cause__
            raise ModelLoadError(
                f"{config.model} is loaded, but does not work: {describe(error)}"
            ) from error

    def _load_models(
        self,
        config: ModelConfig,
        strategies: Strategies,
        sources: Mapping[str, Path],
        load: Callable[[ModelConfig, Path], LoadedModel],
    ) -> None:
        self.memory.open(
            config.model,
            config.memory,
            stored_bytes(sources[config.model]),
            sum(stored_bytes(sources[name]) for name in strategies.drafts),
        )
        loaded = load(config, sources[config.model])
        drafts = {name: load(config.for_draft(name), sources[name]) for name in strategies.drafts}
        self._runner = mlx_work.ModelRunner(
            loaded, config, self.counters, drafts, strategies, self.memory.account
        )

    def _settle_memory(self, config: ModelConfig, runner: ModelRunner) -> None:
        """Claim what the weights and those of all drafts take, now that they are there."""
        weights = mlx_work.loaded_bytes(runner.loaded.model)
        drafts = mlx_work.loaded_bytes(runner.loaded.model, *runner.helpers) - weights
        self.memory.correct(config.model, weights, drafts)
        mlx_work.RESIDENCY.keep(self.memory.part)

    def _kv_limit(self) -> int | None:
        """Bytes that the KV caches of requests may take; ``None`` if there is no known bound."""
        return self.memory.account.room("live", "stored")

    def _equip(self, runner: ModelRunner) -> None:
        """Make what else the engine needs; raises what the start then raises."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary that prompts are made into tokens with. From any thread.

        Raises:
            EngineDead: there is no model.
        """
        return self.runner().loaded.vocabulary

    def model(self) -> LoadedModel:
        """The model. On the MLX thread, in a request that was admitted."""
        return self.runner().loaded

    def runner(self) -> ModelRunner:
        """The model and what belongs to it. On the MLX thread, in a request that was admitted.

        Raises:
            EngineDead: there is no model.
        """
        if self._runner is None:
            raise EngineDead("the engine has no model any more")
        return self._runner

    def prepare(self, request: Request) -> MLXEngineError | None:
        """Make its prompt into tokens; the error if that fails. On any thread, without MLX."""
        try:
            mlx_work.prepare(request, self.vocabulary)
            if request.prompt:  # else it was cancelled meanwhile
                self._check(request)
        except Interrupted:
            pass  # its turn, if it still gets one, ends it
        except BaseException as error:  # noqa: BLE001 - the border: templates raise anything
            return request.failed(error)
        return None

    def _check(self, request: Request) -> None:
        """Refuse a request, with both numbers, that could never have what it needs."""
        runner = self.runner()
        drafts = runner.strategies.footprints
        mlx_work.check_prompt(runner.account, runner.footprint, request, drafts)

    def answer(self, question: PromptQuestion) -> PromptFacts:
        """Answer a question about a prompt. On any thread, without MLX.

        Raises:
            EngineDead: there is no model.
            Exception: as ``answer_question`` does.
        """
        stored = self.runner().prompt_cache.index
        return mlx_work.answer_question(question, self.vocabulary, stored)

    def generate(self, request: Request) -> GenerationResult:
        """Do a prepared request by itself. On the MLX thread."""
        return mlx_work.generate_single(request, self.runner())

    def save_prompt_cache(self, path: Path) -> Rest[int]:
        """Begin to write the prompt cache into a file. On the MLX thread.

        Returns:
            The rest, which gives the number of prompts.
        """
        return _told("saving the prompt cache", lambda: self.runner().save_prompt_cache(path))

    def load_prompt_cache(self, path: Path) -> Rest[int]:
        """Begin to add the prompts of a file to the prompt cache. On the MLX thread.

        Returns:
            The rest, which gives their number.
        """
        stored = self._prompt_loaded
        return _told(
            "loading the prompt cache", lambda: self.runner().load_prompt_cache(path, stored)
        )

    def _prompt_loaded(self) -> None:
        """A prompt of a file was added. On the MLX thread."""

    def unload(self) -> None:
        """Drop the model. On the MLX thread."""
        self._runner = None
        self.counters.kv_bytes = self.counters.batch_size = 0
        mlx_thread.remove_exit_job(self.unload)
        mlx_work.clear_cache()
        self.memory.close()
        if not ledger().use.models:
            mlx_work.RESIDENCY.give_up()


def _told(what: str, begin: Callable[[], Rest[int]]) -> Rest[int]:
    """A beginning and its rest, of which errors of MLX become ours, without their frames."""
    begun = _in_our_words(what, begin)

    def rest(turns: Turns) -> int:
        return _in_our_words(what, lambda: begun(turns))

    return rest


def _in_our_words(what: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except (MLXEngineError, Interrupted) as error:
        drop_frames(error)  # which hold arrays
        raise
    except Exception as error:
        drop_frames(error)
        raise GenerationError(f"{what} failed: {describe(error)}") from error
