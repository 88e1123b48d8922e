"""Tokens -> text, token by token, with the text that the tokenizer's ``decode`` gives.

mlx_lm's streaming detokenizers are close to ``decode``, but not equal: they drop the first
space of a text, decode an added token's characters as bytes, or go by the tokenizer's file
where its behaviour is another. ``tokenizers.decoders.DecodeStream`` raises at bytes that are
no text. Here the decoder of a fast tokenizer is taken apart into its steps, each of which
streams exactly; other tokenizers are decoded in a window. Which of them is right is tried.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import decoders
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_engine.models.fast_decoder import (
    CLEAN_UP,
    ByteFallback,
    MakeStage,
    Replace,
    Stage,
    TokenStrings,
    stages_of,
)
from mlx_engine.models.window_detokenizer import Whole, Window

_log = logging.getLogger("mlx_engine.models")

# What tokenizers split in different ways: digits, spaces, contractions, scripts.
SAMPLE_TEXT = "It's 31,415  tokens:\n\tdef f(x): return x**2  # naïve, 你好, \U0001f680"
_SAMPLES = (
    SAMPLE_TEXT,
    " I can't say: 'so ' , we 've seen 日本語\U0001f642\U0001f44d\U0001f3fd ? \n\n No . ",
)
_LAGS = (0, 1, 3)
_PROBES = 48  # tokens from all over the vocabulary that are tried


class Source(Protocol):
    """The first step: from a token to strings."""

    def feed(self, token: int) -> list[str]:
        """The strings that this token gives."""

    def finish(self) -> list[str]:
        """The text that is still held."""


class Detokenizer:
    """The text of one answer, whose tokens come one after another.

    All that is given out, joined, is what the tokenizer's ``decode`` gives for the tokens, and
    what has been given out never changes. Only what a later token can still change is held
    back: the parts of a character, as a rule. A token that the tokenizer does not have has no
    text: a model's matrix may be padded to more rows.

    Args:
        source: gives the strings of each token.
        stages: make text of them.
    """

    def __init__(self, source: Source, stages: Sequence[Stage]) -> None:
        self._source = source
        self._stages = stages
        self._run = next((s for s in stages if isinstance(s, ByteFallback)), None)

    @property
    def ahead(self) -> list[str]:
        """The text that is held though it is complete, part by part, if it is any.

        The list grows with the tokens, and is another one when they have been decided on.
        """
        return self._run.held if self._run is not None else []

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        items = self._source.feed(token)
        for stage in self._stages:
            items = stage.feed(items)
        return "".join(items)

    def finish(self) -> str:
        """The text that is still held, since no more tokens come."""
        items = self._source.finish()
        for stage in self._stages:
            items = stage.feed(items) + stage.finish()
        return "".join(items)

    def preview(self) -> str:
        """The text that ``finish`` would give."""
        stages = [copy.copy(stage) for stage in self._stages]
        return Detokenizer(copy.copy(self._source), stages).finish()


Recipe = Callable[[], Detokenizer]

_recipes: WeakKeyDictionary[TokenizerWrapper, Recipe] = WeakKeyDictionary()


def make_detokenizer(tokenizer: TokenizerWrapper) -> Detokenizer:
    """A detokenizer for one more answer; the first of a tokenizer takes some milliseconds.

    From any thread.
    """
    recipe = _recipes.get(tokenizer)
    if recipe is None:
        recipe = _recipes[tokenizer] = _choose(tokenizer)
    return recipe()


def mend_decoder(tokenizer: TokenizerWrapper) -> bool:
    """Replace the decoder of a byte-level tokenizer that shows bytes; whether it was so.

    Mistral's tekken tokenizers, as converted by some, have SentencePiece's decoder, so that
    ``decode`` itself writes spaces as ``Ġ`` and line breaks as ``Ċ``.
    """
    if not isinstance(tokenizer._tokenizer, PreTrainedTokenizerFast):
        return False
    backend, byte_level = tokenizer.backend_tokenizer, decoders.ByteLevel()
    try:
        tokens = tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
        right = byte_level.decode([backend.id_to_token(token) for token in tokens])
        texts = right.removeprefix(" "), tokenizer.decode(tokens).removeprefix(" ")
    except Exception:  # noqa: BLE001 - the border: a text that it cannot take tells nothing
        return False
    if texts[0] != SAMPLE_TEXT or texts[1] == SAMPLE_TEXT:
        return False
    backend.decoder = byte_level
    _recipes.pop(tokenizer, None)
    return True


def _choose(tokenizer: TokenizerWrapper) -> Recipe:
    plain = tokenizer._tokenizer
    known = _known_tokens(plain)
    trials = [_Trial(plain, tokens) for tokens in _sample_tokens(plain, known)]
    for recipe in _candidates(plain, known):
        if all(trial.passes(recipe) for trial in trials):
            return recipe
    _log.warning(
        "the text of this model's tokenizer (%s) changes with later tokens: answers come whole "
        "at their end, and no stop string is found before",
        type(plain).__name__,
    )
    return partial(_assemble, partial(Whole, plain.decode, known), [])


def _candidates(plain: Any, known: Callable[[int], bool]) -> Iterator[Recipe]:
    """Detokenizers to be tried, from the best to the worst."""
    clean = [partial(Replace, *pair) for pair in CLEAN_UP] if _cleans_up(plain) else []
    if isinstance(plain, PreTrainedTokenizerFast) and _inherits(plain, "decode", "_decode"):
        backend = plain.backend_tokenizer
        stages = stages_of(backend)
        if stages is not None:
            yield partial(_assemble, partial(TokenStrings, backend), [*stages, *clean])
    if clean:
        decode = partial(plain.decode, clean_up_tokenization_spaces=False)
        yield partial(_assemble, partial(Window, decode, known), clean)
    for lag in _LAGS:
        yield partial(_assemble, partial(Window, plain.decode, known, lag), [])


def _assemble(source: Callable[[], Source], stages: Sequence[MakeStage]) -> Detokenizer:
    return Detokenizer(source(), [stage() for stage in stages])


def _inherits(plain: Any, *methods: str) -> bool:
    """Whether it has transformers' own methods, and none of its family or its file."""
    own = (PreTrainedTokenizerFast, PreTrainedTokenizer, PreTrainedTokenizerBase)
    return all(
        any(getattr(type(plain), name) is getattr(base, name, None) for base in own)
        for name in methods
    )


def _cleans_up(plain: Any) -> bool:
    """Whether ``decode`` takes spaces out of the text, by the rules of transformers 5."""
    if not getattr(plain, "clean_up_tokenization_spaces", False):
        return False
    if not _inherits(plain, "decode", "_decode", "clean_up_tokenization"):
        return False
    if not isinstance(plain, PreTrainedTokenizerFast):
        return True
    anyhow = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(plain.backend_tokenizer.model).__name__ != "BPE" or getattr(plain, anyhow, False)


def _known_tokens(plain: Any) -> Callable[[int], bool]:
    """Tells whether the tokenizer has a token; ids may have gaps, and lie beyond its length."""
    if isinstance(plain, PreTrainedTokenizerFast):
        string = plain.backend_tokenizer.id_to_token
        return lambda token: string(token) is not None
    return frozenset(plain.get_vocab().values()).__contains__


def _sample_tokens(plain: Any, known: Callable[[int], bool]) -> Iterator[list[int]]:
    """Tokens of texts, and from all over the vocabulary, the added ones among them."""
    for text in _SAMPLES:
        with contextlib.suppress(Exception):  # not every tokenizer takes every text
            yield list(plain.encode(text, add_special_tokens=False))
    size = len(plain)
    spread = (*range(0, size, max(1, size // _PROBES)), *range(max(0, size - 8), size))
    yield [token for token in spread if known(token)]


class _Trial:
    """Whether tokens, one by one, give at each of them the text that ``decode`` gives."""

    def __init__(self, plain: Any, tokens: list[int]) -> None:
        self._tokens = tokens
        try:
            self._texts = [plain.decode(tokens[: n + 1]) for n in range(len(tokens))]
        except Exception:  # noqa: BLE001 - the border; what cannot be decoded tells nothing
            self._tokens, self._texts = [], []

    def passes(self, recipe: Recipe) -> bool:
        detokenizer, given = recipe(), ""
        try:
            for token, text in zip(self._tokens, self._texts, strict=True):
                given += detokenizer.add(token)
                if given + detokenizer.preview() != text:
                    return False
        except Exception:  # noqa: BLE001 - the border: what fails is not right
            return False
        return True
