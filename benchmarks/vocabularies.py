"""Random models with vocabularies of any size, whose tokens look like those of real ones.

    python -m benchmarks.vocabularies FOLDER SIZE LAYERS

A vocabulary is made by merging: bytes first, then pieces of words, words behind a space, and what
JSON is made of. It depends on its size alone.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.setting import ROOT
from tests.tiny import CHAT_TEMPLATE, SPECIAL, make_model

_LETTERS = "etaoinshrdlucmfwygpbvkxqjz"
_JSON = [
    '{"',
    '":',
    '":"',
    '",',
    '","',
    '"}',
    "},",
    '},{"',
    "[{",
    "}]",
    ': "',
    ', "',
    "null",
    "true",
]
_LONGEST = 12  # characters of a token


def make_vocabulary(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``size`` tokens."""
    chooser = random.Random(size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {char: i for i, char in enumerate(alphabet)}
    room = size - len(SPECIAL)
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if left in ids and right in ids and left + right not in ids and len(ids) < room:
            ids[left + right] = len(ids)
            merges.append((left, right))

    for text in _JSON:
        for end in range(2, len(text) + 1):
            merge(text[: end - 1].replace(" ", "Ġ"), text[end - 1].replace(" ", "Ġ"))
    for letter in _LETTERS:
        merge("Ġ", letter)
    pieces = [*_LETTERS, *(f"Ġ{letter}" for letter in _LETTERS)]
    while len(ids) < room:
        left = pieces[int(len(pieces) * chooser.random() ** 2)]
        right = pieces[int(len(_LETTERS) * chooser.random() ** 2)]
        if len(left + right) <= _LONGEST and left + right not in ids:
            merge(left, right)
            pieces.append(left + right)
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@contextmanager
def model_of(size: int, layers: int) -> Iterator[str]:
    """A random model's folder. It is made in a process of its own, since that is MLX work."""
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "model"))
        program = [sys.executable, "-m", "benchmarks.vocabularies", folder, str(size), str(layers)]
        subprocess.run(program, cwd=ROOT, check=True)
        yield folder


def main() -> None:
    folder, size, layers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    tokenizer = make_vocabulary(size)
    ends = {"vocab_size": size, "eos_token_id": tokenizer.eos_token_id}
    make_model(folder, layers=layers, other=ends)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(tokenizer)


if __name__ == "__main__":
    main()
