"""Prompts and chats -> token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.core.stop import checkpoint
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.chat_places import ChatPlaces, EncodedText
from mlx_engine.generation.template_names import split_kwargs
from mlx_engine.generation.tokenize import check_text
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.requests import ChatPrompt, TextPrompt

# Where a chat template's own last marker is looked for when it cannot be told apart.
_TAIL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the model gets it.

    Attributes:
        tokens: token ids, at least one.
        initial_state: state of mlx_lm's text state machine in which the answer begins;
            ``None`` if the answer is raw text.
        notes: what was asked for and had no effect.
        places: numbers of its first tokens with which other prompts are likely to begin too,
            ascending; none where the model's KV cache can be cut back to any.
        text: of a conversation in the chat template.
    """

    tokens: list[int]
    initial_state: str | None = None
    notes: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    text: str = ""


def encode(source: TextPrompt | ChatPrompt, vocabulary: Vocabulary) -> Encoded:
    """The token ids of a prompt or chat. On any thread, without MLX.

    A plain text gets the tokenizer's special tokens unless it has them; a conversation is put
    into the model's chat template, up to where the answer begins.

    Raises:
        InvalidRequest: a token id is not in the vocabulary; or the model has no chat template,
            or it refuses the conversation, or does not know of tools.
        ContextLengthExceeded: the text is too long, by far.
        Interrupted: it should stop, and did between two steps.
    """
    if isinstance(source, ChatPrompt):
        return _Chat(source).encode(vocabulary)
    return _encode_text(source, vocabulary)


def _encode_text(source: TextPrompt, vocabulary: Vocabulary) -> Encoded:
    prompt = source.prompt
    if isinstance(prompt, str):
        check_text(prompt, vocabulary, "prompt")
        bos = vocabulary.tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        tokens: list[int] = vocabulary.tokenizer.encode(prompt, add_special_tokens=special)
        if not tokens:
            raise InvalidRequest("prompt", "has no tokens in this model's vocabulary")
        return Encoded(tokens)
    if max(prompt) >= vocabulary.vocab_size:
        token = next(token for token in prompt if token >= vocabulary.vocab_size)
        raise InvalidRequest(
            "prompt", f"token id {token} is not in the vocabulary of {vocabulary.vocab_size} tokens"
        )
    return Encoded(prompt)


class _Chat:
    """A conversation on its way through a chat template."""

    def __init__(self, source: ChatPrompt) -> None:
        self._messages = source.messages
        self.tools = source.tools
        self._kwargs = source.template_kwargs

    def encode(self, vocabulary: Vocabulary) -> Encoded:
        tokenizer = vocabulary.tokenizer
        if not tokenizer.has_chat_template:
            raise InvalidRequest(
                "messages",
                "this model's tokenizer has no chat template; use generate() with a prompt "
                "in the form that the model was trained on",
            )
        self._kwargs, unread = split_kwargs(self._kwargs, tokenizer)
        text = self._render(tokenizer)
        check_text(text, vocabulary, "messages")
        notes: list[str] = []
        chat = ChatPlaces(
            tokenizer, self._messages, self.tools, self._kwargs, partial(self._render, tokenizer)
        )
        if self.tools and not self._shows_tools(tokenizer, chat, text):
            raise InvalidRequest(
                "tools",
                "this model's chat template does not show tools to it (some do only if there is "
                "a system message)",
            )
        if self.tools and not tokenizer.has_tool_calling:
            notes.append("tools: mlx-lm has no parser for this model's tool calls; see the text")
        if unread:
            names = ", ".join(unread)
            notes.append(f"chat_template_kwargs: this chat template does not look at {names}")
        checkpoint()
        encoded = EncodedText(tokenizer, text)
        tokens = encoded.tokens
        if not tokens:
            raise InvalidRequest("messages", "the chat template made an empty prompt of them")
        known = tokenizer.response_initial_state is not None or not tokenizer.has_thinking
        without: str | None = None
        if not (known and vocabulary.cuttable):
            try:
                without = self._render(tokenizer, add_generation_prompt=False)
            except InvalidRequest:
                if not known:
                    raise
        places = () if vocabulary.cuttable else chat.find(text, without, encoded)
        state = self._initial_state(tokenizer, text, without, tokens)
        return Encoded(tokens, state, tuple(notes), places, text)

    def _render(
        self,
        tokenizer: TokenizerWrapper,
        messages: list[dict[str, Any]] | None = None,
        *,
        tools: Any = ...,
        add_generation_prompt: bool = True,
    ) -> str:
        checkpoint()
        try:
            return str(
                tokenizer.apply_chat_template(
                    self._messages if messages is None else messages,
                    tools=self.tools if tools is ... else tools,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **self._kwargs,
                )
            )
        except Exception as error:
            raise InvalidRequest(
                "messages", f"the model's chat template refuses them: {error}"
            ) from error

    def _shows_tools(self, tokenizer: TokenizerWrapper, chat: ChatPlaces, text: str) -> bool:
        """Whether the template shows them to the model, as far as that can be known."""
        described = (tool.get("function", tool) for tool in self.tools or ())
        names = [each.get("name") for each in described if isinstance(each, Mapping)]
        if chat.head().shows_tools and names and all(str(name) in text for name in names):
            return True
        return text != self._render(tokenizer, tools=None)

    def _initial_state(
        self, tokenizer: TokenizerWrapper, text: str, without: str | None, tokens: list[int]
    ) -> str:
        """Whether the answer begins as reasoning: the template may have opened it."""
        if tokenizer.response_initial_state is not None:
            return str(tokenizer.response_initial_state)
        if not tokenizer.has_thinking:
            return "normal"
        # Markers in what a user wrote do not count, so only the template's own end does.
        if without is not None and text.startswith(without):
            tail = text[len(without) :]
        else:
            tail = str(tokenizer.decode(tokens[-_TAIL_TOKENS:]))
        opened, closed = tail.rfind(tokenizer.think_start), tail.rfind(tokenizer.think_end)
        return "reasoning" if opened > closed else "normal"
