"""Vocabulary of a loaded model: all of it that needs no MLX."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.chat.answer_format import AnswerFormat
from mlx_engine.chat.template import ChatTemplate
from mlx_engine.models.grammar_compiler import Grammars

_ALL_IS_TEXT = AnswerFormat()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer of a model, and the numbers that prompts are measured by. From any thread.

    It holds no arrays: what prepares prompts on other threads may hold it, and no model.

    Attributes:
        tokenizer: mlx_lm's wrapper with its streaming detokenizer.
        eos: token ids that end an answer, by the model's configuration and tokenizer.
        vocab_size: tokens that the logits cover.
        context_length: tokens of prompt and answer together; ``None`` if the model names
            no limit.
        longest_token: characters of the longest token.
        newline_tokens: what the tokenizer makes of a line break.
        grammars: what compiles constraints for it.
        answer_format: how it marks reasoning and writes calls of tools.
        cuttable: whether the model's KV caches can be cut back to any number of tokens, at any
            length.
    """

    tokenizer: TokenizerWrapper
    eos: frozenset[int]
    vocab_size: int
    context_length: int | None
    longest_token: int
    newline_tokens: tuple[int, ...]
    grammars: Grammars
    answer_format: AnswerFormat = _ALL_IS_TEXT
    cuttable: bool = True

    @property
    def supports_tools(self) -> bool:
        """Whether the model is shown tools, and its calls of them can be read."""
        if not (self.tokenizer.has_chat_template and self.answer_format.has_calls):
            return False
        return ChatTemplate.of(self.tokenizer).shows_tools

    def special_tokens(self) -> dict[str, int]:
        """The ids of tokens that are no text, by their names, without those that end an answer.

        As llguidance tells them: those that are marked so, and those in angle brackets.
        """
        found: dict[str, int] = {}
        for token, added in getattr(self.tokenizer, "added_tokens_decoder", {}).items():
            name = str(added)
            bracketed = name.startswith("<") and name.endswith(">")
            if (added.special or bracketed) and token not in self.eos:
                found[name] = token
        return found
