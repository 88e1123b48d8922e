"""Prompts on their way into a batch, one slice at a time."""

from __future__ import annotations

import contextlib
import time

from mlx_engine.generation.cache.kv_cache import Cache, merge
from mlx_engine.generation.cache.stored_prompt import common_prefix
from mlx_engine.generation.course import advance, take_up
from mlx_engine.generation.prefill import padded_prefill
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sequence import Sequence
from mlx_engine.generation.sparse.sparse_cache import sparse
from mlx_engine.generation.trials.batch import may_pad

_CAUTIOUS = 64  # tokens of the first slice beside running rows, before any was measured
_SMALLEST = 16  # tokens of a slice, however slow the prefill is
_SMOOTHING = 0.5  # weight of the newest slice in the average


class _Pace:
    """How fast a model prefills.

    Attributes:
        token_seconds: seconds a token; 0 is not known yet.
    """

    def __init__(self) -> None:
        self.token_seconds = 0.0

    def measured(self, seconds: float, tokens: int) -> None:
        """So many tokens took so long."""
        if tokens < _SMALLEST:
            return
        latest, known = seconds / tokens, self.token_seconds
        # Slower at once, faster by and by: a token takes longer the more there are before it.
        self.token_seconds = max(latest, known + _SMOOTHING * (latest - known))


class PrefillQueue:
    """Rows whose prompts are not yet in their KV caches. On the MLX thread.

    Args:
        space: the model, and what belongs to it.
        max_pause: seconds that a slice may take while others decode, roughly; ``None`` is no
            bound.

    Attributes:
        rows: by priority, then in the order of arrival.
    """

    def __init__(self, space: ModelRunner, max_pause: float | None) -> None:
        self._space = space
        self._max_pause = max_pause
        self._pace, self._draft_pace = _Pace(), _Pace()
        self._first_next = True
        self._may_pad = may_pad(space.loaded.model, space.config)
        self.rows: list[Sequence] = []

    def add(self, row: Sequence) -> None:
        """Put a row behind those of the same priority."""
        self.rows.append(row)
        self.rows.sort(key=lambda row: row.request.priority)  # stable

    def choose(self) -> Sequence:
        """Whose slice is next: every other one is of the first row, the others of the shortest.

        So a long prompt does not hold up short ones, and is not held up by them for ever.
        """
        first = self.rows[0]
        self._first_next = not self._first_next
        if not self._first_next or len(self.rows) == 1:
            return first
        shortest = min(self.rows, key=lambda row: row.left)
        if shortest.cache is None and shortest is not first:
            # What they have in common is stored once the first one is done.
            common = common_prefix(shortest.request.prompt, first.request.prompt)
            if common > first.left:
                return first
        return shortest

    def slice(self, row: Sequence, *, beside_others: bool) -> tuple[list[Sequence], Cache | None]:
        """Prefill a slice of ``row``, or all of it together with others if that is no more.

        Args:
            beside_others: whether rows that decode wait for it.

        Returns:
            The rows that are in the cache now but for their last tokens, and their batch
            caches if they have no caches of their own. They stay in ``rows``.

        Raises:
            Exception: MLX failed; only ``row`` is concerned.
        """
        self._begin(row)
        pace = self._draft_pace if row.sparse is not None and row.sparse.scoring else self._pace
        size = self._tokens(pace) if beside_others else self._space.config.prefill_step_size
        group = self._group(row, size)
        before = sum(each.held for each in group)
        began = time.perf_counter()
        merged: Cache | None = None
        if len(group) > 1:
            merged = self._together(group)
            tokens = sum(each.held for each in group) - before
        else:
            tokens = advance(self._space, row, size)
        seconds = time.perf_counter() - began
        self._space.meter.prefill_seconds += seconds
        pace.measured(seconds, tokens)
        return [each for each in group if not each.left], merged

    def _tokens(self, pace: _Pace) -> int:
        """Of the next slice, while running rows wait for it."""
        most = self._space.config.prefill_step_size
        if self._max_pause is None:
            return most
        if not pace.token_seconds:
            return min(_CAUTIOUS, most)
        return min(most, max(_SMALLEST, int(min(most, self._max_pause / pace.token_seconds))))

    def _begin(self, row: Sequence) -> None:
        if row.cache is not None:
            return
        try:
            take_up(self._space, row)
        except Exception:
            row.cache = row.sparse = row.drafter = None  # its own turn begins anew
            raise
        assert row.cache is not None
        if self._space.equipment.sparse is not None:  # caches of one kind can be merged
            row.cache = sparse(row.cache)

    def _group(self, row: Sequence, size: int) -> list[Sequence]:
        """The row, and others that can be prefilled with it in one slice."""
        group, longest = [row], row.left
        if not self._may_pad or row.alone or row.stop or longest > size or not longest:
            return group
        for other in self.rows:
            left = max(longest, other.left)
            if other is row or other.alone or left * (len(group) + 1) > size:
                continue
            try:
                self._begin(other)
            except Exception:  # noqa: BLE001 - told to its caller when its own turn comes
                other.alone = True
                continue
            if other.left and not other.stop and not other.alone:
                group.append(other)
                longest = max(longest, other.left)
        return group

    def _together(self, group: list[Sequence]) -> Cache | None:
        """All that is left of some rows, padded on the right to the same length.

        If MLX fails, nothing has happened, but that each of them will be alone from now on:
        so it shows which one is at fault.
        """
        with contextlib.suppress(Exception):
            merged = merge([row.cache for row in group if row.cache is not None])
            prompts = [row.request.prompt[row.held : -1] for row in group]
            padded_prefill(self._space.loaded.model, merged, prompts)
            for row in group:
                row.held += row.left
                row.request.progress(row.held)
            return merged
        for row in group:
            row.alone = True
        return None
