"""When a request came how far."""

from __future__ import annotations

import time

from mlx_engine.outputs import Timings


class RequestTimer:
    """Moments of a request, by ``time.perf_counter``; 0 has not come."""

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.started = 0.0
        self.prefilled = 0.0
        self.first_token = 0.0
        self.last_token = 0.0
        self.ended = 0.0

    def timings(self, prefilled_tokens: int, completion_tokens: int) -> Timings:
        """Durations between them; of a request that is not over, until now."""
        end = self.ended or time.perf_counter()
        prefill = self.prefilled - self.started if self.prefilled else 0.0
        decode = self.last_token - self.first_token
        return Timings(
            queued=(self.started or end) - self.submitted,
            prefill=prefill,
            time_to_first_token=self.first_token - self.submitted if self.first_token else 0.0,
            decode=decode,
            total=end - self.submitted,
            prompt_tokens_per_second=prefilled_tokens / prefill if prefill else 0.0,
            tokens_per_second=(completion_tokens - 1) / decode if decode else 0.0,
        )
