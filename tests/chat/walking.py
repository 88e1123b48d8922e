"""Answers that a grammar allows, found by chance, over one token a byte."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_END = "<end of the answer>"
_FREE = 120  # tokens that may come next, of which there are so many only in text
_SNIPPETS = [
    "null",
    "7",
    "true",
    '"',
    "'",
    "\\",
    "é😀",
    "\n",
    " ",
    "{}",
    "[1]",
    "`",
    "a b",
    "-",
    "<",
]


class ByteTokens:
    """One token a byte, and the special ones."""

    def __init__(self, special: Sequence[str] = ()) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({char: id for id, char in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (_END, *special)])
        self.fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)
        self.size = len(self.fast)
        self.end = int(self.fast.convert_tokens_to_ids(_END))
        self.trie: LLTokenizer = from_tokenizer(self.fast, self.size, [self.end])
        self.special: Mapping[str, int] = {
            text: id
            for text, id in self.fast.get_added_vocab().items()
            if self.trie.is_special_token(id) and id != self.end
        }
        self._matchers: dict[str, LLMatcher] = {}
        self._byte = [0] * 256
        for id in range(256):  # of which one is a byte that is nothing to the trie
            self._byte[self.trie.decode_bytes([id])[0] if self.trie.decode_bytes([id]) else 0] = id

    def matcher(self, lark: str) -> LLMatcher:
        if lark not in self._matchers:
            found = LLMatcher(self.trie, LLMatcher.grammar_from_lark(lark), log_level=0)
            assert not found.is_error(), f"{found.get_error()[:300]}\n{lark}"
            self._matchers[lark] = found
        return self._matchers[lark].deep_copy()

    def encode(self, text: str) -> list[int]:
        return list(self.fast.encode(text, add_special_tokens=False))

    def spell(self, text: str) -> list[int]:
        """The tokens of a text in which no special token is."""
        return [self._byte[byte] for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return (
            self.trie.decode_bytes(list(ids)).decode()
            if not self.special
            else "".join(self._text(ids))
        )

    def _text(self, ids: Sequence[int]) -> list[str]:
        parts, run = [], bytearray()
        names = {id: text for text, id in self.special.items()}
        for id in ids:
            if id in names:
                parts += [run.decode(), names[id]]
                run.clear()
            else:
                run += self.trie.decode_bytes([id])
        return [*parts, run.decode()]


def verdict(tokens: ByteTokens, lark: str, ids: Sequence[int]) -> str:
    """``complete``, ``incomplete``, or what is refused."""
    matcher = tokens.matcher(lark)
    taken = matcher.try_consume_tokens(list(ids))
    if taken < len(ids):
        return f"refused behind {tokens.trie.decode_str(list(ids[:taken]))!r}"
    return "complete" if matcher.is_accepting() else "incomplete"


def walk(
    tokens: ByteTokens, lark: str, chance: random.Random, texts: Sequence[str], most: int = 900
) -> str | None:
    """The text of an answer; ``None`` if it does not end within so many tokens.

    Args:
        texts: what is written now and then where there may be anything.
    """
    matcher, ids, pending = tokens.matcher(lark), list[int](), list[int]()
    for _ in range(most):
        mask = matcher.compute_logit_bias()
        allowed = [id for id in range(tokens.size) if mask[id] and id != tokens.end]
        rarely = 0.02 if len(allowed) > _FREE else 0.3
        if matcher.is_accepting() and (not allowed or chance.random() < rarely):
            return tokens.decode(ids)
        assert allowed, f"nothing may come behind {tokens.decode(ids)!r}"
        if pending and mask[pending[0]]:
            token = pending.pop(0)
        elif len(allowed) > _FREE and chance.random() < 0.6:
            written = chance.choice([*texts, *_SNIPPETS])
            pending = tokens.encode(written) if chance.random() < 0.5 else tokens.spell(written)
            token = pending.pop(0) if mask[pending[0]] else chance.choice(allowed)
        else:
            pending.clear()
            token = chance.choice(allowed)
        assert matcher.consume_token(token), matcher.get_error()
        ids.append(token)
    return None
