"""Answers of a ``FakeEngine``: pieces, gates and errors, in order."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

from mlx_engine.checks import choice, shown
from mlx_engine.constraints import Constraint
from mlx_engine.errors import InvalidRequest, MLXEngineError, describe
from mlx_engine.outputs import Segment, ToolCall
from mlx_engine.requests import ChatPrompt, TextPrompt
from mlx_engine.testing.fake_call import raw_call
from mlx_engine.testing.fake_constraint import check_calls, check_content
from mlx_engine.testing.fake_gate import Gate
from mlx_engine.testing.fake_request import FakeRequest
from mlx_engine.testing.fake_tokens import words
from mlx_engine.testing.script_error import ScriptError, mistake

Piece = str | Gate | Exception


@dataclass(frozen=True, slots=True)
class FakeAnswer:
    """One answer. Each piece of text is a token, and a chunk of a stream.

        FakeAnswer("It is sunny.", reasoning="I know that.")
        FakeAnswer(["It", " is", gate, GenerationError("out of memory")])
        FakeAnswer(tool_calls=[("weather", {"city": "Paris"})])

    Attributes:
        text: the content. A string is cut into words. In a list each string is a token; at a
            ``Gate`` the work is held, and an exception is raised there: an ``MLXEngineError``
            as it is, others as the cause of a ``GenerationError``. ``EngineDead`` is the end of
            the engine.
        reasoning: what comes before, in the same form; in chats only.
        tool_calls: what comes after, each as ``(name, arguments)``, a mapping of these or, for
            malformed ones, a ``ToolCall``; in chats only, and only of tools that the request has.
            Each gets an id, and is cut into tokens: the name first, then the arguments.
        finish_reason: ``stop`` ends with one more token, of the end of the sequence and without
            text, as models do; ``length`` ends without it, as if the context were used up, and
            ``timeout`` as if the request's ``timeout`` were over.

    Raises:
        InvalidRequest: a value is of the wrong type.
    """

    text: str | Sequence[object] = ""
    reasoning: str | Sequence[object] = ""
    tool_calls: Sequence[ToolCall | tuple[str, Mapping[str, Any]] | Mapping[str, Any]] = ()
    finish_reason: Literal["stop", "length", "timeout"] = "stop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _pieces("text", self.text))
        object.__setattr__(self, "reasoning", _pieces("reasoning", self.reasoning))
        object.__setattr__(self, "tool_calls", _calls(self.tool_calls))
        choice("finish_reason", self.finish_reason, ("stop", "length", "timeout"))

    @classmethod
    def of(cls, answer: object) -> FakeAnswer:
        """An answer from its text, its pieces, or the only one of them that is no text."""
        if isinstance(answer, FakeAnswer):
            return answer
        return cls((answer,) if isinstance(answer, Gate | Exception) else answer)  # type: ignore[arg-type]

    def check(self, source: TextPrompt | ChatPrompt, constraint: Constraint | None = None) -> None:
        """See that a model could give this answer.

        Raises:
            InvalidRequest: the constraint cannot be followed.
            ScriptError: none could: it is a mistake of the script.
        """
        self._check_calls(source)
        text, whole = self._content()
        if isinstance(source, ChatPrompt):
            check_calls(self.tool_calls, bool(text), whole, source)  # type: ignore[arg-type]
        if constraint is None:
            return
        if self.tool_calls:
            raise ScriptError("tool calls are scripted, but the request's constraint allows none")
        check_content(constraint, text, whole)

    def _content(self) -> tuple[str, bool]:
        """Its text as far as it is made, and whether the answer comes to its own end."""
        made = list(takewhile(lambda piece: not isinstance(piece, Exception), self.text))
        ends = len(made) == len(self.text) and self.finish_reason == "stop"
        whole = ends and not any(isinstance(piece, Exception) for piece in self.reasoning)
        return "".join(piece for piece in made if isinstance(piece, str)), whole

    def _check_calls(self, source: TextPrompt | ChatPrompt) -> None:
        if not (self.reasoning or self.tool_calls):
            return
        if not isinstance(source, ChatPrompt):
            raise ScriptError("reasoning and tool calls are of chats; this is a plain prompt")
        if self.tool_calls and not source.offered:
            raise ScriptError("tool calls are scripted, but the request has no tools to be called")
        known = [tool["function"]["name"] for tool in source.offered or ()]
        for call in self.tool_calls:
            if isinstance(call, ToolCall) and call.ok and call.name not in known:
                raise ScriptError(
                    f"a call of {call.name!r} is scripted; the tools of the request are {known} "
                    f"(a model that makes one up: ToolCall(name={call.name!r}, error=...))"
                )

    def __iter__(self) -> Iterator[tuple[Segment, Piece | ToolCall]]:
        """All of it in order, each with the segment that it belongs to."""
        yield from (("reasoning", piece) for piece in self.reasoning)  # type: ignore[misc]
        yield from (("content", piece) for piece in self.text)  # type: ignore[misc]
        yield from (("tool_call", call) for call in self.tool_calls)  # type: ignore[misc]


# Pieces and answers are objects where they are in something: a variable that holds two kinds of
# them is, to mypy, a list or a mapping of objects. What they are is checked when they are given.
AnswerLike = str | Sequence[object] | FakeAnswer | Gate | Exception
Answers = AnswerLike | Mapping[Any, object] | Iterator[object] | Callable[[FakeRequest], AnswerLike]


def checked_answers(answers: Answers) -> Answers:
    """``answers``, if they can be some, as far as that can be known now.

    Raises:
        InvalidRequest: it, or one of them, is of the wrong type.
    """
    if isinstance(answers, Mapping):
        for answer in answers.values():
            FakeAnswer.of(answer)
        return answers
    if isinstance(answers, Iterator):
        return answers
    if callable(answers):
        if inspect.iscoroutinefunction(answers):
            raise InvalidRequest("answers", "the engine's thread calls it: no coroutine functions")
        return answers
    return FakeAnswer.of(answers)


class Script(Iterator[FakeAnswer]):
    """Answers in order, each for one request. Used on the engine's thread, read from any.

    Args:
        answers: those.

    Attributes:
        left: answers that nobody has asked for.

    Raises:
        InvalidRequest: one of them is of the wrong type.
    """

    def __init__(self, answers: Sequence[object]) -> None:
        self.left = deque(map(FakeAnswer.of, answers))
        self._count = len(self.left)

    def __next__(self) -> FakeAnswer:
        if not self.left:
            raise ScriptError(
                f"this is more than the {self._count} requests that are scripted (a list is the "
                "answer to one, in pieces)"
            )
        return self.left.popleft()

    def check_used(self) -> None:
        """Raise ``ScriptError`` if there are answers left."""
        if self.left:
            first = shown("".join(map(str, self.left[0].text)))
            raise ScriptError(
                f"{len(self.left)} of {self._count} scripted answers were not asked for; the "
                f"first of them is {first}"
            )


def choose(answers: Answers, request: FakeRequest) -> FakeAnswer:
    """The answer to a request.

    Raises:
        ScriptError: nothing is scripted for this request, or what makes the answers has failed.
        MLXEngineError: a function of the test raises it, in the place of an answer.
    """
    if isinstance(answers, Mapping):
        if request.question not in answers:
            asked, known = shown(request.question), ", ".join(map(shown, answers))
            raise ScriptError(f"no answer is scripted for {asked}, but for {known:.400}")
        return FakeAnswer.of(answers[request.question])
    try:
        if not isinstance(answers, Iterator):
            if callable(answers) and not isinstance(answers, type):
                return FakeAnswer.of(answers(request))
            return FakeAnswer.of(answers)
        for answer in answers:
            return FakeAnswer.of(answer)
    except InvalidScript as error:
        raise mistake(str(error), error) from error
    except (ScriptError, MLXEngineError):
        raise
    except Exception as error:
        raise mistake(f"what makes the answers has failed: {describe(error)}", error) from error
    raise ScriptError("there are more requests than scripted answers")


class InvalidScript(InvalidRequest):
    """An answer of a script is of the wrong type."""


def _pieces(option: str, given: object) -> tuple[Piece, ...]:
    if isinstance(given, str):
        return tuple(words(given))
    if isinstance(given, type) and issubclass(given, Exception):
        raise InvalidScript(option, f"must be an exception, not its class: {given.__name__}(...)")
    if not isinstance(given, Sequence) or not all(isinstance(p, Piece) for p in given):
        several = not isinstance(given, str | bytes) and isinstance(given, Sequence)
        raise InvalidScript(
            option,
            f"must be text, or a list of strings, gates and exceptions, not {shown(given)}"
            + ("; for an answer to each request, see FakeEngine.script(...)" if several else ""),
        )
    if any(isinstance(piece, Exception) for piece in given[:-1]):
        raise InvalidScript(
            option,
            "a list is one answer in pieces, and nothing comes behind an exception in it: for one "
            "answer after another, FakeEngine.script(...)",
        )
    return tuple(given)


def _calls(given: object) -> tuple[ToolCall, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InvalidScript("tool_calls", f"must be a list of calls, not {shown(given)}")
    return tuple(map(_call, given))


def _call(given: object) -> ToolCall:
    try:
        match given:
            case ToolCall():
                made = raw_call(given.name, given.arguments) if given.ok else ""
                return given if given.raw else replace(given, raw=made)
            case (str() as name, Mapping() as arguments) | {
                "name": str() as name,
                "arguments": Mapping() as arguments,
            }:
                plain = dict(arguments)
                return ToolCall(name, plain, raw_call(name, plain))
    except (TypeError, ValueError) as error:
        raise InvalidScript(
            "tool_calls", f"arguments must have a form in JSON, not {shown(given)} ({error})"
        ) from error
    raise InvalidScript(
        "tool_calls",
        f"each must be (name, arguments), a mapping of these, or a ToolCall, not {shown(given)}",
    )
