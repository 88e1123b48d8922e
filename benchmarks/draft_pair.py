"""Two random models for prefills: a target, and a draft of about a fourteenth of its cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.setting import random_model

LAYERS, DRAFT_LAYERS = 15, 2  # a prefill does hardly anything in the last one: 14 to 1


def widths(hidden: int) -> dict[str, int]:
    """Of both models, by what config.json calls them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
    }


@contextmanager
def draft_pair(hidden: int) -> Iterator[tuple[str, str]]:
    """Folders of target and draft, which live as long as the ``with`` block."""
    wide = widths(hidden)
    with random_model(LAYERS, **wide) as target, random_model(DRAFT_LAYERS, **wide) as draft:
        yield target, draft
