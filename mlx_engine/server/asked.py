"""A request, whichever API it came by."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_engine.checks import flag, integer, shown
from mlx_engine.core.stream import GenerationStream
from mlx_engine.engine.interface import Engine
from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import ProgressCallback
from mlx_engine.params import SamplingParams

MOST_CHOICES = 64  # of one request
_LONGEST = 64  # characters of the name of a field that is ignored

# Reasoning effort, and the tokens after which reasoning is closed.
EFFORTS: dict[str, int | None] = {
    "minimal": 512,
    "low": 2_048,
    "medium": 8_192,
    "high": None,
    "xhigh": None,
    "max": None,
}
# What other servers have -1 for: no limit, any seed.
_OPEN: dict[str, int | None] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "seed")),
    "top_k": 0,
}
_TEMPLATE_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}  # templates know three


class Fields:
    """Fields of a body. Each is taken by whoever understands it; the others are ignored.

    ``None`` is a field that is not there.

    Attributes:
        form: the name of the field that asks for the answer's form, which is the engine's
            ``constraint``; that which is read, while they are.

    Raises:
        InvalidRequest: the body is no JSON object.
    """

    def __init__(self, body: object) -> None:
        if not isinstance(body, dict):
            raise InvalidRequest("body", f"must be a JSON object, not {shown(body)}")
        self._left: dict[str, Any] = {k: v for k, v in body.items() if v is not None}
        self.form = ""

    def take(self, name: str, default: Any = None) -> Any:
        """A field, whatever it is."""
        return self._left.pop(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that is true or false."""
        return flag(name, self.take(name, default))

    def integer(self, name: str, default: int, *, low: int, high: int) -> int:
        """A field that is an integer in this range."""
        return integer(name, self.take(name, default), low=low, high=high)

    def text(self, name: str) -> str | None:
        """A field that is text; ``None`` if it is not there."""
        value = self.take(name)
        if not isinstance(value, str | None):
            raise InvalidRequest(name, f"must be text, not {shown(value)}")
        return value

    def user(self) -> str:
        """For whom a client of OpenAI's APIs asks."""
        named = self.take("safety_identifier"), self.take("user")
        return next((name for name in named if isinstance(name, str)), "")

    def mapping(self, name: str) -> dict[str, Any]:
        """A field that is an object; empty if it is not there."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise InvalidRequest(name, f"must be an object, not {shown(value)}")
        return value

    def options(self, names: Sequence[str]) -> dict[str, Any]:
        """Some fields, as far as they are there, for the engine to check."""
        given = {name: self._left.pop(name) for name in names if name in self._left}
        return {n: _OPEN[n] if n in _OPEN and v == -1 else v for n, v in given.items()}

    def copies(self, names: Sequence[str]) -> dict[str, Any]:
        """Some fields, as far as they are there; somebody else may still take them."""
        return {name: self._left[name] for name in names if name in self._left}

    def ignored(self, meaningless: Collection[str]) -> tuple[str, ...]:
        """Names of what nobody has taken, but for what would change nothing."""
        return tuple(name[:_LONGEST] for name in self._left if name not in meaningless)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, as one of the engine's.

    Attributes:
        model: the name of the model; empty for the only one.
        options: keyword arguments that are fields of ``SamplingParams``; the engine checks them.
        messages: a conversation, as ``stream_chat`` takes it; ``None`` for plain prompts.
        chat: keyword arguments of ``stream_chat`` beside that.
        prompts: plain prompts, texts or token ids.
        n: answers to each.
        stream: whether the client wants it as it is made.
        usage: whether a stream is to end with token counts, where an API leaves that open.
        user: for whom the client asks, as it says itself.
        ignored: names of fields that mean something, and nothing here.
        extra: what the API itself needs again for its answer.
    """

    model: str
    options: Mapping[str, Any]
    messages: Sequence[Any] | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[Any] = ()
    n: int = 1
    stream: bool = False
    usage: bool = True
    user: str = ""
    ignored: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def agreed(self) -> Asked:
        """This request, with its tools or the form of its answer, where it has both.

        Text has a form. Where calls are asked for there is none; and text that must have one has
        no calls in it.
        """
        if "constraint" not in self.options or not self.chat.get("tools"):
            return self
        choice = self.chat.get("tool_choice", "auto")
        if choice in ("auto", "none"):
            left_out = ("tools",) if choice == "auto" else ()
            return replace(self, ignored=(*self.ignored, *left_out))
        options = {name: value for name, value in self.options.items() if name != "constraint"}
        return replace(self, options=options)

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n * (1 if self.messages is not None else len(self.prompts))

    def begin(
        self,
        engine: Engine,
        index: int,
        defaults: SamplingParams,
        options: Mapping[str, Any],
        on_progress: ProgressCallback | None,
    ) -> GenerationStream:
        """Ask the engine for one of its answers, with these options in the place of its own.

        Raises:
            InvalidRequest: the engine does not take it.
        """
        if self.messages is None:
            prompt = self.prompts[index // self.n]
            return engine.stream_generate(prompt, defaults, on_progress=on_progress, **options)
        chat = self.chat_options(engine)
        return engine.stream_chat(
            self.messages, defaults, on_progress=on_progress, **chat, **options
        )

    def chat_options(self, engine: Engine) -> dict[str, Any]:
        """``chat``, as far as the model has a use for it."""
        chat = dict(self.chat)
        if chat.get("thinking") and not engine.supports_reasoning:
            del chat["thinking"]  # asked for by clients that ask every model for it
        return chat


def switched(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``stream_chat`` for ``thinking``, as Anthropic's API has it.

    Raises:
        InvalidRequest: there is no such type.
    """
    kind = given.get("type", "disabled")
    if kind == "disabled":
        return {"thinking": False}
    if kind not in ("enabled", "adaptive"):
        said = f"its type must be 'enabled', 'adaptive' or 'disabled', not {shown(kind)}"
        raise InvalidRequest("thinking", said)
    chat: dict[str, Any] = {"thinking": True}
    if (budget := given.get("budget_tokens")) is not None:
        chat["max_reasoning_tokens"] = integer("thinking.budget_tokens", budget, low=0)
    return chat


def reasoning(effort: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``stream_chat`` for a reasoning effort.

    Args:
        effort: ``None`` leaves it to the model.
        given: those that were given otherwise, which go first.

    Raises:
        InvalidRequest: there is no such effort.
    """
    if effort is None:
        return dict(given)
    if effort == "none":
        return {"thinking": False, **given}
    if not isinstance(effort, str) or effort not in EFFORTS:
        known = ", ".join(map(repr, ["none", *EFFORTS]))
        raise InvalidRequest("reasoning_effort", f"must be one of {known}, not {shown(effort)}")
    variables = {"reasoning_effort": _TEMPLATE_EFFORTS.get(effort, effort)}
    made = {"thinking": True, "max_reasoning_tokens": EFFORTS[effort], **given}
    return {**made, "chat_template_kwargs": variables | dict(made.get("chat_template_kwargs", {}))}
