"""One fault at a time, at a chosen call into MLX, mlx-lm or other people's code.

Every such call on the MLX thread, or where a prompt cache is saved or loaded, is counted under the
name of its hook; the one that is aimed at raises instead of being done. Calls on other threads are
left alone.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, TokenBuffer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.generation import sampler, sampling
from mlx_engine.generation.cache import prompt_cache, stored_prompt
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.sampler import Sampler
from mlx_engine.generation.sparse.specprefill import SparsePrefill
from mlx_engine.generation.speculative.drafter import ModelDrafter
from mlx_engine.generation.speculative.mtp import MTPDrafter
from mlx_engine.generation.string_search import StringSearch
from mlx_engine.models import whole_file
from mlx_engine.models.detokenizer import Detokenizer
from tests.guard import GUARD

Place = tuple[str, str]  # a module's name and a function in it

_HOOKS: list[tuple[Any, str, tuple[str, ...]]] = [  # whose, what it is called here, its methods
    (mx, "mx.", ("clear_cache", "concatenate", "contiguous", "logsumexp", "zeros", "argmax")),
    (mx, "mx.", ("save_safetensors", "load", "minimum", "softmax")),
    (mx.random, "mx.random.", ("uniform", "split")),
    (mx.fast, "mx.fast.", ("scaled_dot_product_attention",)),
    (nn.Module, "Module.", ("parameters", "load_weights")),
    (mlx_lm, "mlx_lm.", ("load",)),
    (KVCache, "KVCache.", ("update_and_fetch", "trim", "make_mask", "merge", "state")),
    (BatchKVCache, "BatchKVCache.", ("update_and_fetch", "make_mask", "prepare", "finalize")),
    (BatchKVCache, "BatchKVCache.", ("filter", "extend", "extract", "merge", "state")),
    (TokenBuffer, "TokenBuffer.", ("update_and_fetch",)),
    (TokenizerWrapper, "tokenizer.", ("apply_chat_template",)),
    (PreTrainedTokenizerFast, "tokenizer.", ("encode", "get_vocab")),
    (Detokenizer, "detokenizer.", ("add", "finish")),
    (StringSearch, "text.", ("feed",)),
    (Sampler, "sampler.", ("__call__",)),
    (sampling, "sampling.", ("make_logits_processors",)),
    (sampler, "sampling.", ("_key", "_nucleus")),
    (PromptCache, "PromptCache.", ("fetch", "store")),
    (prompt_cache, "PromptCache.", ("packed",)),
    (stored_prompt, "PromptCache.", ("snapshot", "cut_to", "state_beside")),
    (ModelDrafter, "draft.", ("begin", "catch_up", "propose", "verified", "finish")),
    (MTPDrafter, "mtp.", ("begin", "observe", "catch_up", "propose", "verified", "finish")),
    (SparsePrefill, "sparse.", ("step",)),
    (whole_file.os, "os.", ("open", "fsync", "replace")),
]


class Faults:
    """Counts calls, and raises at one of them.

    Calls of models and heads, ``mx.eval`` and the like are seen through the guard's hook.

    Attributes:
        calls: by hook, since the last ``arm``.
        raised: what has been raised, if the call that was aimed at has come.
        where: on whose behalf: the functions of this library that were on the stack then.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.raised: BaseException | None = None
        self.where: frozenset[Place] = frozenset()
        self._armed = False
        self._target: tuple[str, int] | None = None
        self._error: Callable[[], BaseException] = RuntimeError

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the hooks in place, until ``patch`` is undone."""
        patch.setattr(GUARD, "hook", self.enter)
        for holder, prefix, names in _HOOKS:
            for name in names:
                patch.setattr(holder, name, self._hooked(holder, name, prefix + name))

    def arm(
        self,
        hook: str | None = None,
        n: int = 0,
        error: Callable[[], BaseException] = RuntimeError,
    ) -> None:
        """Count from now on, and raise at the ``n``-th call of ``hook``, once."""
        self.calls.clear()
        self.raised, self.where = None, frozenset()
        self._target = None if hook is None else (hook, n)
        self._error = error
        self._armed = True

    def disarm(self) -> None:
        """Count no more."""
        self._armed = False

    def enter(self, hook: str) -> None:
        """A call of this hook is about to be made."""
        files = threading.current_thread().name in ("save", "load")
        if not self._armed or not (files or mlx_thread.is_current()):
            return
        self.calls[hook] += 1
        if self._target == (hook, self.calls[hook]) and self.raised is None:
            self.where = _stack()
            self.raised = self._error()
            raise self.raised

    def _hooked(self, holder: Any, name: str, hook: str) -> Any:
        plain = vars(holder).get(name) if isinstance(holder, type) else None
        if isinstance(plain, property):
            assert plain.fget is not None
            return property(self._calling(plain.fget, hook), plain.fset)
        if isinstance(plain, classmethod | staticmethod):
            return type(plain)(self._calling(plain.__func__, hook))
        return self._calling(getattr(holder, name), hook)

    def _calling(self, func: Callable[..., Any], hook: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(hook)
            return func(*args, **kwargs)

        return functools.update_wrapper(call, func)


def _stack() -> frozenset[Place]:
    places: set[Place] = set()
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "mlx_engine" in path.parts:
            places.add((path.stem, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return frozenset(places)


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and all that it came from."""
    found: list[BaseException] = []
    left = [error]
    while left:
        link = left.pop()
        if link is not None and not any(link is each for each in found):
            found.append(link)
            left += [link.__cause__, link.__context__]
    return found
