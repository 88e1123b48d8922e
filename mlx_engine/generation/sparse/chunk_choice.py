"""Chunks of a prompt that are worth a prefill, by how much attention they get."""

from __future__ import annotations

import itertools
import math

import numpy as np

Range = tuple[int, int]  # tokens [a, b) of the prompt

CHUNK = 32  # tokens that are kept or dropped together
_POOL = 13  # tokens over which a score is averaged, so that its neighbours count
_FREE = 4  # chunks chosen by their score, however few are to be kept


def choose_chunks(
    scores: np.ndarray, keep: float, *, chunk: int = CHUNK, start: int = 0
) -> list[Range]:
    """The parts of tokens ``start`` to ``len(scores)`` that should be prefilled.

    The last chunk is always among them, and the first one of the prompt, on which attention
    rests that has nowhere else to go (arXiv 2309.17453).

    Args:
        scores: importance of each token of the prompt, of shape (tokens,).
        keep: the part of the chunks to keep, from 0 to 1; a few are kept in any case.
        chunk: tokens a chunk; the last one may be shorter.
        start: the first token that may be dropped.

    Returns:
        Sorted ranges with gaps between them.
    """
    borders = [*range(start, len(scores), chunk), len(scores)]
    chunks = len(borders) - 1
    if chunks < 1:
        return []
    always = {chunks - 1} | ({0} if start < chunk else set())
    most = _most(chunks, len(always), keep)
    pooled = average_pool(scores, _POOL)
    value = np.array([pooled[a:b].mean() for a, b in itertools.pairwise(borders)])
    value[list(always)] = np.inf
    kept = sorted(np.argsort(-value, kind="stable")[:most].tolist())
    return join([(borders[i], borders[i + 1]) for i in kept])


def keeps_all(tokens: int, keep: float, *, chunk: int = CHUNK, start: int = 0) -> bool:
    """Whether ``choose_chunks`` drops nothing, whatever the scores are."""
    chunks = -(-(tokens - start) // chunk)
    return _most(chunks, 1 + (start < chunk), keep) >= chunks


def _most(chunks: int, always: int, keep: float) -> int:
    return max(math.ceil(keep * chunks), always + _FREE)


def average_pool(scores: np.ndarray, width: int) -> np.ndarray:
    """The mean of up to ``width`` (odd) tokens around each; at the ends, of those there are."""
    half = width // 2
    total = np.concatenate([[0.0], np.cumsum(scores, dtype=np.float64)])
    at = np.arange(len(scores))
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(scores))
    pooled: np.ndarray = (total[end] - total[first]) / (end - first)
    return pooled


def join(ranges: list[Range]) -> list[Range]:
    """Sorted ranges of the same tokens, those that touch made one."""
    joined: list[Range] = []
    for a, b in ranges:
        if joined and joined[-1][1] == a:
            joined[-1] = (joined[-1][0], b)
        elif a < b:
            joined.append((a, b))
    return joined
