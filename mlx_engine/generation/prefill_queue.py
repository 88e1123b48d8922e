"""Prompts on their way into a batch, one slice at a time."""

from __future__ import annotations

import contextlib
import time

from mlx_engine.generation.cache.joint_cache import merge
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.sparse_cache import sparse
from mlx_engine.generation.cache.stored_prompt import common_prefix
from mlx_engine.generation.prefill import may_pad, padded_prefill
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sequence import Sequence

_WORTH_WAITING = 64  # tokens in common; fewer are prefilled together sooner than one by one


class PrefillQueue:
    """Sequences whose prompts are not yet in their KV caches. On the MLX thread.

    Args:
        runner: the model, and what belongs to it.
        max_pause: seconds that a slice may take while others decode, roughly; ``None`` is no
            bound.

    Attributes:
        sequences: by priority, then in the order of arrival at the batch.
    """

    def __init__(self, runner: ModelRunner, max_pause: float | None) -> None:
        self._runner = runner
        self._max_pause = max_pause
        self._first_next = True
        self._may_pad = may_pad(runner.loaded.model, runner.config)
        self.sequences: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Put a sequence behind those of its priority that came before it."""
        for other in self.sequences:
            if other.cache is not None:
                self._follow(sequence, other)
        self.sequences.append(sequence)
        self.sequences.sort(key=lambda each: each.rank)

    def choose(self) -> Sequence:
        """The sequence whose slice is next: by turns the first, and the one with least left.

        So a long prompt does not hold up short ones, and is not held up by them for ever. Of those
        that begin alike one goes ahead, and the others wait until it has what they share.
        """
        self._first_next = not self._first_next
        if not self._first_next or len(self.sequences) == 1:
            chosen = self.sequences[0]
        else:
            chosen = min(self.sequences, key=lambda each: each.left)
        return self._leader(chosen) or chosen

    def _shared(self, one: Sequence, other: Sequence) -> int:
        """Tokens with which both begin, and of which one can have the other's; 0 if too few."""
        cache = self._runner.prompt_cache
        strategies = one.request.strategies, other.request.strategies
        if not cache.limit or any(each.prefill is not None for each in strategies):
            return 0
        step = cache.grid or 1
        ends = len(one.source) - 1, len(other.source) - 1
        common = min(common_prefix(one.source, other.source), *ends)
        common = common // step * step
        return common if common >= _WORTH_WAITING else 0

    def _follow(self, sequence: Sequence, leader: Sequence) -> None:
        """Let a sequence that has not begun wait until ``leader``, which has, has what they share
        and has stored it, if that saves enough.
        """
        place = self._shared(sequence, leader)
        if leader.sparse is not None or place - leader.held < _WORTH_WAITING:
            return
        if self._leader(sequence) is None or sequence.leads[1] < place:
            leader.places = tuple(sorted({*leader.places, place}))
            sequence.leads = leader, place

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """Whom a sequence waits for, if it waits."""
        leader, place = sequence.leads
        if leader is not None and (leader not in self.sequences or leader.held >= place):
            sequence.leads = None, 0
        return sequence.leads[0]

    def slice(
        self, sequence: Sequence, *, beside_others: bool
    ) -> tuple[list[Sequence], Cache | None]:
        """Prefill a slice of ``sequence``, or all of it together with others if that is no more.

        Args:
            beside_others: whether sequences that decode wait for it.

        Returns:
            The sequences that are in the cache now but for their last tokens, and their batch
            caches if they have no caches of their own. They stay in ``sequences``.

        Raises:
            Exception: MLX failed; only ``sequence`` is concerned.
        """
        self.begin(sequence)
        chunk = self._runner.chunk_of(sequence)
        size = chunk.within(self._max_pause if beside_others else None)
        group = self._group(sequence, size)
        before = sum(each.held for each in group)
        began = time.perf_counter()
        merged: Cache | None = None
        if len(group) > 1:
            merged = self._together(group)
            tokens = sum(each.held for each in group) - before
        else:
            tokens = self._runner.prefill_step(sequence, size)
        seconds = time.perf_counter() - began
        self._runner.counters.prefill_seconds += seconds
        chunk.took(seconds, tokens)
        return [each for each in group if not each.left], merged

    def begin(self, sequence: Sequence) -> None:
        """Give a sequence its cache, if it has none, with what is stored of its tokens.

        Raises:
            Exception: MLX failed; it may begin again.
        """
        if sequence.cache is not None:
            return
        try:
            self._runner.start(sequence)
        except Exception:
            sequence.cache = sequence.sparse = sequence.drafter = None  # its own slice begins anew
            raise
        assert sequence.cache is not None
        if self._runner.strategies.sparse is not None:  # caches of one kind can be merged
            sequence.cache = sparse(sequence.cache)
        for other in self.sequences:
            if other.cache is None:
                self._follow(other, sequence)

    def _group(self, sequence: Sequence, size: int) -> list[Sequence]:
        """The sequence, and others that can be prefilled with it in one slice."""
        group, longest = [sequence], sequence.left
        shared = self._may_pad and not sequence.stop and self._is_cheap(sequence)
        if not shared or not 0 < longest <= size:
            return group
        for other in self.sequences:
            left = max(longest, other.left)
            if other is sequence or left * (len(group) + 1) > size or not self._is_cheap(other):
                continue
            if self._leader(other) is not None:
                continue
            try:
                self.begin(other)
            except Exception:  # noqa: BLE001 - told to its caller with its own slice
                other.alone = True
                continue
            if other.left and not other.stop and not other.alone:
                group.append(other)
                longest = max(longest, other.left)
        return group

    def _is_cheap(self, sequence: Sequence) -> bool:
        """Whether its KV cache may be merged while it is kept: it shares most with a stored one."""
        new = sequence.held - sequence.cached
        return not sequence.alone and new <= self._runner.config.prefill_step_size

    def _together(self, group: list[Sequence]) -> Cache | None:
        """Prefill all that is left of some sequences, padded on the right to the same length.

        If MLX fails, nothing has happened, but that each of them will be alone from now on:
        so it shows which one is at fault.
        """
        with contextlib.suppress(Exception):
            merged = merge([each.cache for each in group if each.cache is not None])
            prompts = [each.source[each.held : -1] for each in group]
            padded_prefill(self._runner.loaded.model, merged, prompts)
            for sequence in group:
                sequence.held += sequence.left
                sequence.progress(sequence.held)
            return merged
        for sequence in group:
            sequence.alone = True
        return None
