"""Questions about prompts, which an engine answers beside its requests: no turn, no MLX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest, renamed
from mlx_engine.limits import RequestLimits
from mlx_engine.outputs import GenerationResult
from mlx_engine.requests import ALL_DEFAULTS, ChatOptions, ChatPrompt, Message, TextPrompt

Subject = Literal["count_tokens", "render_chat", "encode", "decode"]


@dataclass(frozen=True, slots=True)
class PromptQuestion:
    """A question about a prompt.

    Attributes:
        subject: the engine's method that asks.
        source: what it asks about.
    """

    subject: Subject
    source: TextPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """The answer to a question, as far as it was asked.

    Attributes:
        count: tokens of the prompt.
        text: of the prompt.
        tokens: token ids of the prompt.
        cached_tokens: how many of the first ones are in the prompt cache now.
        notes: what would be done in another way than asked.
    """

    count: int = 0
    text: str = ""
    tokens: tuple[int, ...] = ()
    cached_tokens: int = 0
    notes: tuple[str, ...] = ()


def is_chat(
    prompt: object,
) -> TypeGuard[Sequence[Message | Mapping[str, Any] | GenerationResult]]:
    """Whether a prompt is meant as messages, and not as text or token ids."""
    if isinstance(prompt, Mapping | GenerationResult):  # no list, and the error says so
        return True
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence) or not len(prompt):
        return False
    return isinstance(prompt[0], Mapping | GenerationResult)


def check_plain(options: ChatOptions) -> None:
    """See that nothing of a chat is asked for with a plain prompt.

    Raises:
        InvalidRequest: something is.
    """
    for option, value in options.items():
        nothing = value is None or value == ALL_DEFAULTS[option] or value in ((), [], {})
        if not nothing:
            raise InvalidRequest(option, "is for messages, and this is a plain prompt")


def text_to_encode(text: object, limits: RequestLimits) -> TextPrompt | None:
    """A text that is to be made into tokens; ``None`` if there is nothing in it.

    Raises:
        InvalidRequest: it is no text, or too long.
    """
    if not isinstance(text, str):
        raise InvalidRequest("text", f"must be a string, not {shown(text)}")
    limits.check("text", "text_characters", len(text), "characters")
    return TextPrompt(text) if text else None


def tokens_to_decode(tokens: Any, limits: RequestLimits) -> TextPrompt | None:
    """Tokens that are to be made into text; ``None`` if there are none.

    Raises:
        InvalidRequest: they are no token ids, or too many.
    """
    if isinstance(tokens, str | bytes):
        raise InvalidRequest("tokens", f"must be a list of token ids, not {shown(tokens)}")
    try:
        if not len(tokens):
            return None
        limits.check("tokens", "prompt_tokens", len(tokens), "token ids")
        return TextPrompt(tokens)
    except TypeError as error:
        raise InvalidRequest(
            "tokens", f"must be a list of token ids, not {shown(tokens)}"
        ) from error
    except InvalidRequest as error:
        raise renamed(error, "tokens") from error
