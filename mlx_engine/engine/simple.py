"""One request at a time."""

from __future__ import annotations

import os
from typing import Unpack

from mlx_engine.config import DEFAULTS, EngineConfig, EngineOptions
from mlx_engine.core.scheduler import SimpleScheduler
from mlx_engine.engine.local import LocalEngine
from mlx_engine.engine.model_holder import ModelHolder
from mlx_engine.generation.request import Request
from mlx_engine.outputs import ProgressCallback
from mlx_engine.signatures import spelled_out


class SimpleEngine(LocalEngine):
    """Serves one request at a time, in the order in which they come.

    A request is one call on the MLX thread, from its first prefill chunk to its last token; its
    prompt is made into tokens before, on another thread.
    """

    @spelled_out(EngineOptions, DEFAULTS)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Make an engine; nothing is loaded before it is started.

        Args:
            model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``, a
                small model that is fetched once (93 MB; 4 to 10 tokens/s on a CPU).
            on_progress: told of download and loading, in the event loop that starts the
                engine.
            revision: branch, tag or commit of the repository.
            adapter_path: folder of LoRA adapters to apply.
            trust_remote_code: run Python code that the model brings along, and so do draft
                models, of which the newest revision is taken.
            tool_format: how the model writes calls of tools: the name of a format, ``"none"``
                for no calls at all, or a format of your own; ``None`` takes it from the model's
                chat template.
            reasoning_format: the same for how it marks what it thinks aloud.
            context_length: tokens that prompt and answer may have together; ``None`` takes
                it from the model's configuration, ``"auto"`` too, or as many as the memory
                beside the model holds for one request, if those are fewer.
            max_kv_size: tokens that the KV cache keeps at most (the first 4 and the latest
                ones), and one prefill chunk more while a prompt goes in; ``None`` is unbounded.
                What a longer prompt gives then depends on ``prefill_step_size``.
            kv_bits: bits of the quantised KV cache (2, 3, 4, 5, 6 or 8); ``None`` keeps full
                precision.
            kv_group_size: values that share a scale in it (32, 64 or 128), 64 by default; only
                with ``kv_bits``.
            quantized_kv_start: tokens in the cache from which on it is quantised, 0 by default;
                only with ``kv_bits``.
            prefill_step_size: tokens per prefill chunk, 512 by default; a cancelled request
                leaves MLX after the chunk that it is in. Chunks have fewer tokens where those
                would take more than a second, unless the KV cache is bounded or quantised.
            prompt_cache_bytes: bytes that earlier prompts and answers may take, so that they
                need no second prefill; 0 switches that off, ``None`` is a quarter of what the
                models leave of ``memory``, and on Linux 1 GiB at most unless that is given.
            memory: what the engine may have in all, weights, drafts and KV caches: bytes (an
                integer, or a text such as ``"8GB"``), or a part of the machine's memory (a float
                up to 1.0); ``"auto"`` by default: as much as other engines of this process
                leave. ``stats().memory`` tells who has what.
            prefill: ``SpecPrefill(...)`` leaves parts of long prompts out; ``None`` prefills
                all of them.
            decode: ``DraftModel(...)`` or ``MTP()`` proposes tokens, several of which the
                model verifies together; ``"auto"`` is ``MTP()`` where the model has a head;
                ``None`` decodes one token after another. In ``BatchedEngine`` it is for
                requests that are alone at the time.
            queue_limit: requests that may wait for their turn before ``EngineBusy`` is
                raised, and as many questions, such as ``count_tokens``; ``None`` is no limit.
            max_wait: seconds that a request may wait for its turn before ``EngineBusy`` is
                raised, and a question; ``None`` is no limit.
            limits: how large a request may be; see ``RequestLimits``.

        Raises:
            InvalidRequest: an argument is of the wrong type, out of its range, or
                contradicts another one.
        """
        super().__init__(EngineConfig.of("simple", model, options), on_progress)

    def _new_holder(self) -> ModelHolder:
        return ModelHolder()

    def _new_scheduler(self) -> SimpleScheduler[Request]:
        holder = self._holder
        return SimpleScheduler(self._lifecycle, self.queue_limits, holder.prepare, holder.generate)
