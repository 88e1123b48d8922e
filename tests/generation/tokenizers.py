"""Small tokenizers of every kind, for what is to hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

WORDS = ["a", "b", ".", ",", "'", "s", "n't", "?", "\n", "é", "日", "\ufffd", "Ġ", ""]
ADDED = ["<end>", "<｜sep｜>", " x "]
TRAINING = ["it's a naïve test, isn't it? 日本語 🙂🙂 ok\n\n  def f(x): return x ** 2"] * 3
SENTENCEPIECE = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def fast(tokenizer: Tokenizer, **options: Any) -> TokenizerWrapper:
    """As mlx_lm loads it from a folder, with its own choice of a streaming detokenizer."""
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ADDED[:2]])
    tokenizer.add_tokens([AddedToken(ADDED[2], normalized=False)])
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **options)
    with TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        return load(Path(folder))


def byte_level(decoder: Any = None) -> Tokenizer:
    """Trained merges over all bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def byte_fallback(*steps: Any) -> Tokenizer:
    """Words, and single bytes for the rest."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for word in [*WORDS, "▁", "▁▁", "▁a", "▁日", "<0x41", "-"]:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(list(steps))
    return tokenizer


def words(decoder: Any, *more: str) -> Tokenizer:
    """Nothing but a vocabulary, and a decoder."""
    vocabulary = {word: n for n, word in enumerate([*WORDS, "[UNK]", *more])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def wordpiece(*, cleanup: bool) -> Tokenizer:
    """BERT's."""
    vocabulary = [*WORDS, "[UNK]", "##a", "##.", "##", "do", "not", "ve", "m"]
    tokenizer = Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece's other model."""
    pieces = [*dict.fromkeys(["<unk>", *WORDS, "▁", "▁a", "▁.", "▁'", "▁s", "▁▁"])]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - n) for n, piece in enumerate(pieces)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python: words with spaces between them."""

    WORDS = (*WORDS, "[UNK]", "do", "n", "t", "ve")

    def __init__(self, **options: Any) -> None:
        self._ids = {word: n for n, word in enumerate(self.WORDS)}
        super().__init__(unk_token="[UNK]", eos_token="b", **options)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["[UNK]"])

    def _convert_id_to_token(self, index: int) -> str:
        return self.WORDS[index]  # and IndexError for ids that there are not


class WordParts(Slow):
    """A word goes on after ``@@``, so that a token changes the text of the one before."""

    WORDS = (*WORDS, "[UNK]", "he@@", "l@@", "lo")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace("@@ ", "").strip()


class Counting(Slow):
    """A text that is another one with each token."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return f"{len(tokens)}: " + " ".join(tokens)


def slow(kind: type[PreTrainedTokenizer], **options: Any) -> TokenizerWrapper:
    """One in Python."""
    return TokenizerWrapper(kind(**options))


SPM = SENTENCEPIECE
KINDS: dict[str, Callable[[], TokenizerWrapper]] = {
    "byte-level": lambda: fast(byte_level()),
    "byte-level in a sequence": lambda: fast(byte_level(decoders.Sequence([decoders.ByteLevel()]))),
    "byte-level, the decoder of SentencePiece": lambda: fast(byte_level(decoders.Sequence(SPM))),
    "byte fallback": lambda: fast(byte_fallback(*SPM)),
    "byte fallback, first space kept": lambda: fast(byte_fallback(*SPM[:3])),
    "byte fallback, then Metaspace": lambda: fast(byte_fallback(SPM[1], decoders.Metaspace())),
    "replaced in the whole text": lambda: fast(
        byte_fallback(*SPM[:3], decoders.Replace("a a", "-"), decoders.Strip(" ", 2, 0))
    ),
    "Metaspace, never prepended": lambda: fast(
        words(decoders.Metaspace(prepend_scheme="never"), "▁", "▁a")
    ),
    "a pattern in each token": lambda: fast(words(decoders.Replace(Regex("[ab]"), "-"))),
    "WordPiece": lambda: fast(wordpiece(cleanup=False)),
    "WordPiece, cleaned up twice": lambda: fast(
        wordpiece(cleanup=True), clean_up_tokenization_spaces=True
    ),
    "Unigram": lambda: fast(unigram()),
    "Unigram, cleaned up": lambda: fast(unigram(), clean_up_tokenization_spaces=True),
    "BPE with an end of word": lambda: fast(words(decoders.BPEDecoder(), "a</w>", "</w>")),
    "no decoder": lambda: fast(words(None)),
    "repeated tokens are one": lambda: fast(words(decoders.CTC(), "<pad>", "|")),
    "slow": lambda: slow(Slow),
    "slow, cleaned up": lambda: slow(Slow, clean_up_tokenization_spaces=True),
    "slow, bytes": lambda: slow(ByT5Tokenizer),
    "slow, a token changes the one before": lambda: slow(WordParts),
    "slow, a token changes all": lambda: slow(Counting),
}
