"""Many requests at once, by continuous batching."""

from __future__ import annotations

import functools
import os
from typing import Unpack

from mlx_engine.config import DEFAULTS, BatchedOptions, EngineConfig
from mlx_engine.core.scheduler import BatchScheduler
from mlx_engine.engine.batch_holder import BatchHolder
from mlx_engine.engine.local import LocalEngine
from mlx_engine.generation.request import Request
from mlx_engine.outputs import ProgressCallback
from mlx_engine.signatures import spelled_out


class BatchedEngine(LocalEngine):
    """Serves many requests at once: each decode step gives all of them a token.

    Requests join and leave at any step. The MLX thread works in batch runs, each of which is one
    job: it goes on until there is nothing to do, or others have waited for as long as they let the
    batch wait.
    """

    _holder: BatchHolder
    takes_priority = True

    @spelled_out(BatchedOptions, DEFAULTS)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[BatchedOptions],
    ) -> None:
        """Make an engine; nothing is loaded before it is started.

        Args:
            model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``, a
                small model that is fetched once (93 MB; 4 to 10 tokens/s on a CPU).
            on_progress: told of download and loading, in the event loop that starts the
                engine.
            max_batch_size: requests in work at once, 32 by default; others wait in the queue.
            max_decode_pause_ms: milliseconds of prefill between two decode steps, roughly, 200
                by default, so that a long prompt that joins does not freeze running streams: the
                chunk is made as small as that takes, by the speed measured so far. ``None`` lets
                each chunk have ``prefill_step_size`` tokens.
            kv_cache_memory_bytes: bytes that the KV caches of the requests in work and the
                prompt cache may take together. What is reserved for a request is its prompt,
                the tokens that it has and some that come soon, not all that it may have. When
                memory gets short, stored prompts go first, then nobody is let in, then the
                youngest request of the lowest priority (the highest number) is preempted: its
                stream pauses until there is room, and goes on with the same tokens;
                ``result.timings.preempted`` says for how long, ``result.notes`` how often. The
                oldest one always goes on. A request that could never come to its end, even
                alone, is refused; with ``max_tokens=None`` it gets as many tokens as fit.
                A share of ``memory``; ``None`` is 90 % of what the models leave of it.
            options: those of ``SimpleEngine``, but for ``kv_bits`` and ``max_kv_size``, which
                mlx-lm cannot batch.

        Raises:
            InvalidRequest: an argument is of the wrong type, out of its range, or cannot be
                honoured in a batch.
        """
        super().__init__(EngineConfig.of("batched", model, options), on_progress)

    def _new_holder(self) -> BatchHolder:
        return BatchHolder(self._config.batch)

    def _new_scheduler(self) -> BatchScheduler[Request]:
        run = functools.partial(self._holder.run_batch, self._lifecycle.fail)
        return BatchScheduler(
            self._lifecycle,
            self.queue_limits,
            self._holder.prepare,
            self._config.batch.max_batch_size,
            run,
        )
