"""A request that a ``FakeEngine`` got, for the assertions of a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal

from mlx_engine.checks import shown
from mlx_engine.other_attributes import WithAdvice
from mlx_engine.outputs import FinishReason, GenerationResult, Timings, Usage
from mlx_engine.params import SamplingParams
from mlx_engine.requests import ChatPrompt, GenerationRequest, TextPrompt

NOTHING = GenerationResult(
    text="",
    tokens=(),
    finish_reason="cancelled",
    usage=Usage(0, 0),
    timings=Timings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
)

Outcome = Literal["waiting", "running", "finished", "cancelled", "failed", "refused"]


class FakeRequest(WithAdvice):
    """A request that a ``FakeEngine`` got, and what has become of it.

    Attributes:
        request_id: the engine's name for it.
        prompt: text or token ids; ``None`` in a chat.
        messages: of a chat, with the text of each in one string; ``None`` otherwise.
        tools: of a chat; ``None`` if there are none.
        chat_template_kwargs: of a chat.
        tool_choice, parallel_tool_calls, thinking, max_reasoning_tokens, continue_final_message:
            of a chat.
        params: sampling parameters.
        priority: of the caller's choice; lower goes first.
        timeout, max_wait: seconds of the caller's choice; ``None`` without.
        outcome: what has become of it: ``waiting``, ``running``, ``finished``, ``cancelled``,
            ``failed``, or ``refused``, which is failed before its work began. Right as soon as its
            caller knows.
        prompt_tokens: token ids that its prompt is counted as, once its turn has come.
        error: what its caller got, if it failed or was refused.
        finish_reason: of its answer, ``"timeout"`` for one; ``None`` as long as it has none.
        options: all keyword arguments by name, those that were not given at their defaults:
            ``options["max_tokens"]``; ``output`` is a ``constraint``. Of one that was refused only
            those, as they were given; what else is told here of it is as it was given, too.
    """

    _parts: ClassVar = {"params": SamplingParams, "result()": GenerationResult}

    def __init__(
        self,
        asked: GenerationRequest,
        request_id: str = "",
        result: GenerationResult = NOTHING,
        so_far: Callable[[], GenerationResult | None] | None = None,
    ) -> None:
        source = asked.source
        chat = source if isinstance(source, ChatPrompt) else None
        self.request_id = request_id
        self.prompt = None if isinstance(source, ChatPrompt) else source.prompt
        # A test knows which it is; a union would have strict checkers ask for an assertion.
        self.messages: Any = None if chat is None else chat.messages
        self.tools = None if chat is None else chat.tools
        self.chat_template_kwargs: dict[str, Any] = {} if chat is None else chat.template_kwargs
        self.tool_choice = "auto" if chat is None else chat.tool_choice
        self.parallel_tool_calls = chat is None or chat.parallel_tool_calls
        self.thinking = None if chat is None else chat.thinking
        self.max_reasoning_tokens = None if chat is None else chat.max_reasoning_tokens
        self.continue_final_message = chat is not None and chat.continue_final_message
        self.params = asked.params
        self.priority = asked.priority
        self.timeout, self.max_wait = asked.timeout, asked.max_wait
        self.outcome: Outcome = "waiting"
        self.error: BaseException | None = None
        self.prompt_tokens: list[int] = []
        self._result = result
        self.options = _options(asked)
        self._unchecked = False
        self._so_far = so_far

    @classmethod
    def refused(
        cls,
        error: Exception,
        params: object,
        options: Mapping[str, Any],
        *,
        prompt: Any = None,
        messages: Any = None,
    ) -> FakeRequest:
        """One of which nothing was made, since what was given is not acceptable."""
        known = params if isinstance(params, SamplingParams) else SamplingParams()
        made = cls(GenerationRequest(TextPrompt("?"), known))
        made.prompt, made.messages, made.tools = prompt, messages, options.get("tools")
        made.outcome, made.error, made.options = "refused", error, dict(options)
        made._unchecked = True
        return made

    def __repr__(self) -> str:
        return f"<FakeRequest {self.request_id} {self.question!r} {self.outcome}>"

    @property
    def question(self) -> str | tuple[int, ...]:
        """Key by which answers are looked up: the prompt, or the text of a chat's last message."""
        if self._unchecked:
            return shown(self.messages if self.prompt is None else self.prompt)
        if self.messages is not None:
            return str(self.messages[-1].get("content") or "")
        assert self.prompt is not None
        return self.prompt if isinstance(self.prompt, str) else tuple(self.prompt)

    @property
    def finish_reason(self) -> FinishReason | None:
        """How its answer has ended: as in its result; ``None`` if it has not."""
        return self._result.finish_reason if self.outcome == "finished" else None

    def result(self) -> GenerationResult:
        """Result so far; final once it is over."""
        so_far = None if self._so_far is None else self._so_far()
        return so_far or self._result

    def _end(self, result: GenerationResult) -> None:
        """Keep the result: it is over."""
        self._result, self._so_far = result, None


def _options(asked: GenerationRequest) -> dict[str, Any]:
    """All options of a request, as its caller calls them."""
    source = asked.source
    found = {field.name: getattr(asked.params, field.name) for field in fields(asked.params)}
    found |= {field.name: getattr(asked, field.name) for field in fields(asked)[2:]}
    if isinstance(source, ChatPrompt):
        found |= {field.name: getattr(source, field.name) for field in fields(source)[1:]}
        found["chat_template_kwargs"] = found.pop("template_kwargs")
    return found
