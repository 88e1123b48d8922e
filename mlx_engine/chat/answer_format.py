"""How a family of models writes its answers: values, which the parser is driven by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_engine.chat.call_syntax import (
    BARE_JSON,
    BARE_PYTHON,
    Body,
    JSONCall,
    PythonCall,
)
from mlx_engine.chat.tagged_call import TaggedCall
from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest

_BODIES: dict[str, tuple[Body, ...]] = {
    "json": (JSONCall(),),
    "python": (PythonCall(),),
    "xml": (
        TaggedCall(
            head=r"<function=(?P<name>[^<>\n]{1,256})>",
            argument=r"<parameter={key}>",
            close="</parameter>",
            end="</function>",
            newlines=True,
            is_marked=True,
        ),
    ),
}
_BARE = {**_BODIES, "json": (BARE_JSON,), "python": (BARE_PYTHON,)}


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The markers around reasoning.

    Attributes:
        open: its beginning, unless the prompt ends with it.
        close: its end.
        end: all that is written to end it early and go on with the answer; ``close`` if empty.
        others: markers of what follows it, which end it too.
    """

    open: str
    close: str
    end: str = ""

    def __post_init__(self) -> None:
        for name in ("open", "close", "end"):
            if not isinstance(given := getattr(self, name), str):
                raise InvalidRequest("reasoning_format", f"{name} must be text, not {shown(given)}")
        if not self.close:
            raise InvalidRequest("reasoning_format", "close must not be empty")

    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The markers around tool calls, and how each call is written.

    Attributes:
        open: what begins a call, or a section of calls. Empty if nothing does: then an answer
            that begins with a call of one of the request's tools is one.
        close: what ends it; empty if nothing does.
        body: ``"json"`` (``{"name": "f", "arguments": {}}``, one or a list of them), ``"python"``
            (``[f(a=1)]``), ``"xml"`` (``<function=f><parameter=a>1</parameter></function>``).
        may_be_empty: there may be no call between the two.
        only_with: names of tools of which the request must have one.
    """

    open: str
    close: str = ""
    body: Literal["json", "python", "xml"] | tuple[Body, ...] = "json"
    may_be_empty: bool = False
    only_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("open", "close"):
            if not isinstance(given := getattr(self, name), str):
                raise InvalidRequest("tool_format", f"{name} must be text, not {shown(given)}")
        if isinstance(self.body, str) and self.body not in _BODIES:
            known = ", ".join(map(repr, _BODIES))
            raise InvalidRequest("tool_format", f"body must be one of {known}, not {self.body!r}")
        object.__setattr__(self, "only_with", tuple(self.only_with))  # the wire makes it a list

    @property
    def bodies(self) -> tuple[Body, ...]:
        """The ways in which one call may be written."""
        if not isinstance(self.body, str):
            return self.body
        return (_BODIES if self.open else _BARE)[self.body]


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How answers are written, as the parser follows it.

    Attributes:
        name: of the family; ``"none"`` if all is text.
        chosen_by: what told: ``template``, ``response_template``, ``option`` or ``none``.
        reasoning: what reasoning stands between; ``None`` if there is none.
        calls: what calls stand between, of which any may be used.
        drop: markers around the content, which are no part of it.
        structure: ``tagged`` is text with markers in it; ``harmony`` is a row of messages;
            ``response_template`` is described by the model.
        described: that description, as JSON.
        bound_as: the format of the table in which a model that describes its answers itself
            writes those that a grammar binds; ``None`` is this one.
    """

    name: str = "none"
    chosen_by: Literal["template", "response_template", "option", "none"] = "none"
    reasoning: ReasoningFormat | None = None
    calls: tuple[ToolFormat, ...] = ()
    drop: tuple[str, ...] = ()
    structure: Literal["tagged", "harmony", "response_template"] = "tagged"
    described: str = ""
    bound_as: AnswerFormat | None = None

    @property
    def has_reasoning(self) -> bool:
        """Whether answers may have reasoning that is told from their content."""
        return self.reasoning is not None

    @property
    def has_calls(self) -> bool:
        """Whether answers may have tool calls."""
        return bool(self.calls)

    def reasoning_close(self) -> str:
        """The text that ends reasoning so that the answer goes on; empty if there is none."""
        return (self.reasoning.end or self.reasoning.close) if self.reasoning else ""
