"""Prompts and chats -> token ids, without MLX; it can be left between steps, and is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_engine.chat.parser import AnswerParser
from mlx_engine.chat.template import ChatTemplate, RenderedPrompt
from mlx_engine.core.stop import checkpoint
from mlx_engine.errors import ContextLengthExceeded, InvalidRequest
from mlx_engine.generation.chat_places import ChatPlaces, EncodedText
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.requests import ChatPrompt, TextPrompt

# Unicode normalisation in a tokenizer may shorten text, though never by more than this.
_SHRINK = 4
_TYPICAL = 8  # characters a token that hardly any real text exceeds
_SAMPLE = 2**12  # characters from each of three places by which tokens are estimated
_SLICE = 2**16  # characters tokenized between two looks whether to go on
_SEAM = 64  # tokens that a slice may have more than its part of the whole


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the model gets it.

    Attributes:
        tokens: token ids, at least one.
        notes: what was done in another way than asked.
        places: numbers of its first tokens with which other prompts are likely to begin too,
            ascending; none where the model's KV cache can be cut back to any.
        chat: the conversation that it was made of; ``None`` if the answer is raw text.
        text: the prompt; empty if it came as token ids.
    """

    tokens: list[int]
    notes: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    chat: RenderedPrompt | None = None
    text: str = ""

    def parser(self) -> AnswerParser | None:
        """A parser of the answer; ``None`` if that is raw text."""
        return None if self.chat is None else self.chat.parser()


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
        return _encode_chat(source, vocabulary)
    return _encode_text(source, vocabulary)


def chat_template(vocabulary: Vocabulary) -> ChatTemplate:
    """The chat template of a model.

    Raises:
        InvalidRequest: it has none.
    """
    tokenizer = vocabulary.tokenizer
    if not tokenizer.has_chat_template:
        raise InvalidRequest(
            "messages",
            "this model's tokenizer has no chat template; use generate() with a prompt "
            "in the form that the model was trained on",
        )
    return ChatTemplate.of(tokenizer)


def _encode_text(source: TextPrompt, vocabulary: Vocabulary) -> Encoded:
    prompt = source.prompt
    if isinstance(prompt, str):
        check_text(prompt, vocabulary, "prompt")
        bos = vocabulary.tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        tokens: list[int] = vocabulary.tokenizer.encode(prompt, add_special_tokens=special)
        if not tokens:
            raise InvalidRequest("prompt", "has no tokens in this model's vocabulary")
        return Encoded(tokens, text=prompt)
    if max(prompt) >= vocabulary.vocab_size:
        token = next(token for token in prompt if token >= vocabulary.vocab_size)
        raise InvalidRequest(
            "prompt", f"token id {token} is not in the vocabulary of {vocabulary.vocab_size} tokens"
        )
    return Encoded(prompt)


def _encode_chat(source: ChatPrompt, vocabulary: Vocabulary) -> Encoded:
    tokenizer = vocabulary.tokenizer
    chat = chat_template(vocabulary).render(source)
    check_text(chat.text, vocabulary, "messages")
    checkpoint()
    encoded = EncodedText(tokenizer, chat.text)
    if not encoded.tokens:
        raise InvalidRequest("messages", "the chat template made an empty prompt of them")
    places: tuple[int, ...] = ()
    if not vocabulary.cuttable:
        turns = ChatPlaces(tokenizer, chat.messages, chat.tools, chat.variables, chat.render)
        places = turns.find(chat.text, chat.end, encoded)
    return Encoded(encoded.tokens, chat.notes, places, chat, chat.text)


def check_text(text: str, vocabulary: Vocabulary, option: str) -> None:
    """Refuse text that cannot fit, without tokenizing megabytes of it first, or is no text.

    Text that is long for its context is tokenized slice by slice until it is known not to fit;
    only what may fit is worth tokenizing whole.

    Raises:
        ContextLengthExceeded: it has more tokens than the context.
        InvalidRequest: it has surrogates, as bytes that are no UTF-8 become in arguments.
        Interrupted: it should stop.
    """
    limit = vocabulary.context_length
    if limit is not None and len(text) > _SHRINK * limit * vocabulary.longest_token:
        raise _too_long(f"{len(text)} characters of {option} cannot", limit, option)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(option, f"is not valid Unicode text ({error})") from error
    checkpoint()
    if limit is None or len(text) <= max(limit, _SLICE):
        return
    if len(text) <= _TYPICAL * limit and _estimate(text, vocabulary) <= limit:
        return
    at_least = done = 0
    for part in _slices(text):
        at_least += max(0, _count(part, vocabulary) - _SEAM)
        done += len(part)
        if at_least > limit:
            raise _too_long(
                f"the first {done} of {len(text)} characters of {option} have more than "
                f"{at_least} tokens, which cannot",
                limit,
                option,
            )
        checkpoint()


def _estimate(text: str, vocabulary: Vocabulary) -> float:
    """Tokens of a text, estimated by its beginning, middle and end."""
    places = (0, len(text) // 2, len(text) - _SAMPLE)
    found = sum(_count(text[place : place + _SAMPLE], vocabulary) for place in places)
    return found / (len(places) * _SAMPLE) * len(text)


def _count(text: str, vocabulary: Vocabulary) -> int:
    """Tokens of a text, without the special ones that are added at its ends."""
    return len(vocabulary.tokenizer.encode(text, add_special_tokens=False))


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), _SLICE):
        yield text[start : start + _SLICE]


def _too_long(what: str, limit: int, option: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"{what} fit into the model's context of {limit} tokens; shorten it",
        prompt_tokens=None,
        max_tokens=None,
        context_length=limit,
        option=option,
    )
