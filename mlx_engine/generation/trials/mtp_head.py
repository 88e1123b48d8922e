"""Trial of an MTP head: does it understand its model? A wrong convention changes nothing else.

What is generated stays right with a head that is read wrongly, only slow, since no draft
is accepted. So its predictions are compared with the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_engine.core.stop import checkpoint
from mlx_engine.models.loading import LoadedModel
from mlx_engine.models.mtp_heads import MTPHead
from mlx_engine.models.split import SplitModel, check_split

# How this goes on is plain to any language model, trained for chat or not.
_PROMPT = "The months of the year are January, February, March,"
_NEW_TOKENS = 48


def check_head(loaded: LoadedModel, parts: SplitModel, head: MTPHead) -> float:
    """The agreement of head and model on a text that the model writes. On the MLX thread.

    A head that works agrees on half of the tokens or more, one that is read wrongly on a few
    in a hundred. Costs a prefill of a few dozen tokens and 48 decode steps.

    Raises:
        InvalidRequest: the model cannot be split into trunk and head.
        Interrupted: it should stop.
    """
    prompt = list(loaded.tokenizer.encode(_PROMPT))
    checkpoint()
    check_split(parts, prompt)
    return agreement(parts, head, prompt + _greedy(parts, prompt, loaded.vocabulary.eos))


def agreement(parts: SplitModel, head: MTPHead, tokens: Sequence[int]) -> float:
    """The share of positions at which head and model predict the same token.

    Both read ``tokens``, three or more of them. At each position the head lacks the hidden
    state of the last token, which the model has.
    """
    sequence = mx.array([list(tokens)])
    hidden = parts.hidden(sequence, make_prompt_cache(parts.model))
    target = parts.logits(hidden[:, 1:]).argmax(axis=-1)
    ahead = head(sequence[:, 1:], hidden[:, :-1], head.make_cache())
    draft = head.logits(ahead).argmax(axis=-1)
    share: Any = (draft == target).astype(mx.float32).mean().item()
    return float(share)


def _greedy(parts: SplitModel, prompt: Sequence[int], eos: frozenset[int]) -> list[int]:
    """Tokens that the model says next, up to the end of its answer."""
    cache = make_prompt_cache(parts.model)
    tokens: list[int] = []
    step = list(prompt)
    while len(tokens) < _NEW_TOKENS:
        checkpoint()
        token = int(parts.model(mx.array([step]), cache=cache)[0, -1].argmax().item())
        if token in eos:
            break
        tokens.append(token)
        step = [token]
    return tokens
