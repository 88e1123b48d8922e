"""The grammar of a whole answer, in the form of its family, and how such an answer is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_engine.chat.answer_format import AnswerFormat, ReasoningFormat, ToolFormat
from mlx_engine.chat.bound_answer import GAP, BoundAnswer
from mlx_engine.chat.call_grammar import CallGrammar
from mlx_engine.chat.frames import CONTENT, ContentFrame, Frame, frame_of
from mlx_engine.chat.lark import Lark, literally
from mlx_engine.chat.name_check import check_names
from mlx_engine.chat.tool_schemas import OfferedTool, offered_tools
from mlx_engine.constraints import AnyJSON, Constraint, JSONSchema
from mlx_engine.errors import InvalidRequest


def bound_answer(
    form: AnswerFormat,
    prefix: str,
    *,
    constraint: Constraint | None,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any],
    parallel: bool,
    special: Mapping[str, int],
) -> BoundAnswer | None:
    """An answer that is bound to a constraint, or to calls; ``None`` if it is free.

    Args:
        form: in which the model writes.
        prefix: what the template wrote behind the last message.
        constraint: on the content, behind reasoning.
        tools: those that the model may call, as the chat template gets them.
        tool_choice: ``auto``, ``none``, ``required``, or the one tool to call, as in OpenAI's API.
        parallel: whether it may make more than one call.
        special: the ids of the tokenizer's special tokens by their texts, as llguidance knows
            them: those that are marked as such, and those in angle brackets.

    Raises:
        InvalidRequest: it cannot be bound so.
    """
    if not is_bound(constraint, tools, tool_choice):
        return None
    writer = _Writer(form.bound_as or form, prefix, special)
    if tool_choice in ("auto", "none"):
        if constraint is not None:
            return writer.content(constraint)
        return writer.calls(offered_tools(tools or ()), parallel, required=False)
    if constraint is not None:
        raise InvalidRequest(
            "constraint", "is for content, and there is none where tool_choice asks for calls"
        )
    chosen, many = _chosen(offered_tools(tools or ()), tool_choice)
    return writer.calls(chosen, parallel and many, required=True)


def is_bound(
    constraint: Constraint | None,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any],
) -> bool:
    """Whether anything binds an answer; see ``bound_answer``."""
    if constraint is not None or tool_choice not in ("auto", "none"):
        return True
    return tool_choice == "auto" and any(tool.strict for tool in offered_tools(tools or ()))


def _chosen(
    tools: list[OfferedTool], choice: str | Mapping[str, Any]
) -> tuple[list[OfferedTool], bool]:
    """The tools that a choice leaves, and whether there may be several calls."""
    if not tools:
        raise InvalidRequest(
            "tool_choice", "there are no tools to call; give some, or leave it out"
        )
    if isinstance(choice, str):
        return tools, True
    name = choice["function"]["name"]
    for tool in tools:
        if tool.name == name:
            return [tool], False
    names = ", ".join(tool.name for tool in tools)
    raise InvalidRequest("tool_choice", f"there is no tool {name!r:.80}; there are {names:.400}")


class _Writer:
    """The writer of the grammar of an answer.

    Args:
        form: in which the model writes.
        prefix: what the template wrote behind the last message.
        special: the ids of special tokens by their texts.
    """

    def __init__(self, form: AnswerFormat, prefix: str, special: Mapping[str, int]) -> None:
        self._form = form
        self._lark = Lark(special)
        self._special = special
        self._frame = CONTENT.get(form.name, ContentFrame(()))
        self._rest = prefix  # behind reasoning that is closed
        self._reasoning: ReasoningFormat | None = form.reasoning
        self._in_reasoning = False
        self._repeats = form.structure == "harmony"
        if form.reasoning is not None:
            self._place(form.reasoning, prefix)

    def _place(self, form: ReasoningFormat, prefix: str) -> None:
        opened, closed = prefix.find(form.open.rstrip("\n")), prefix.rfind(form.close)
        self._in_reasoning = opened >= 0 and closed < opened
        if closed >= 0 and not self._in_reasoning:
            self._reasoning = None
            self._rest = prefix[closed + len(form.close) :]
        if not self._in_reasoning and any(each in self._rest for each in self._frame.openings):
            self._reasoning = None  # content has begun

    def content(self, constraint: Constraint) -> BoundAnswer:
        """An answer whose content a constraint binds."""
        lark = self._lark
        openings = self._openings()
        body = lark.rule(constraint.rule)
        if openings:
            body = lark.rule(f"{lark.any_of([lark.literal(each) for each in openings])} {body}")
        gaps = ("", "")
        if isinstance(constraint, JSONSchema | AnyJSON) and not openings and not self._frame.turn:
            gaps = (GAP, GAP)
        elif self._reasoning is not None and not self._frame.turn and not openings:
            end = self._form.reasoning_close()
            gaps = end[end.rindex(self._reasoning.close) + len(self._reasoning.close) :], ""
        return self._answer(body, self._frame.turn, gaps, openings=openings)

    def calls(self, tools: list[OfferedTool], parallel: bool, *, required: bool) -> BoundAnswer:
        """An answer with calls: some at least, or text in which those are bound that come.

        Raises:
            InvalidRequest: it is not known how this model writes calls.
        """
        found = frame_of(self._form, self._special)
        if found is None:
            raise InvalidRequest(
                "tool_choice",
                f"calls of this model's format {self._form.name!r} cannot be bound; the engine's "
                "option tool_format names another one",
            )
        frame, reads = found
        check_names(frame, reads, tools)
        lark = self._lark
        grammar = CallGrammar(lark, frame, reads, required)
        trigger = _trigger(frame, reads)
        # Text may follow calls that nothing ends, so that another has a marker of its own.
        many = parallel and (required or not trigger or bool(frame.close))
        behind = grammar.behind(trigger, tools, many=many)
        begun = trigger if trigger and self._rest.endswith(trigger) else ""
        marker = f"{lark.literal(trigger)} " if trigger and not begun else ""
        spaced = not frame.turn and not trigger[:1].isspace()
        gap = GAP if spaced and (required or not trigger) else ""
        heads = () if trigger else tuple(
            frame.open + frame.head.replace("NAME", tool.name) for tool in tools
        )  # fmt: skip
        openings = () if required else self._openings()
        if required:
            body = lark.rule(marker + behind)
        elif not trigger:
            body = lark.any_of([behind, self._other(heads)])
        elif self._frame.openings:
            body = self._content_or_calls(openings, trigger, marker + behind)
        else:
            body = self._mixed(trigger, behind, parallel)
        return self._answer(
            body, frame.turn, (gap, gap), calls=reads, trigger=trigger, begun=begun,
            openings=openings, heads=heads, is_free=not required, drop=self._form.drop,
        )  # fmt: skip

    def _other(self, heads: tuple[str, ...]) -> str:
        """Text that does not begin with a call."""
        begin = "|".join(map(literally, heads))
        return self._lark.terminal(rf"/(\S(?s:.*))?/ & ~/({begin})(?s:.*)/")

    def _content_or_calls(self, openings: tuple[str, ...], trigger: str, calls: str) -> str:
        """Calls, or content, which is told from them by its beginning."""
        lark = self._lark
        text = lark.without(lark.first_special(trigger) or trigger)
        if not openings:  # it has begun
            return text
        begin = lark.any_of(
            [
                f"{lark.literal(trigger)} {lark.literal(each.removeprefix(trigger))}"
                if each.startswith(trigger)
                else lark.literal(each)
                for each in openings
            ]
        )
        return lark.any_of([lark.rule(f"{begin} {text}"), lark.rule(calls)])

    def _mixed(self, trigger: str, behind: str, many: bool) -> str:
        """Text with calls in it."""
        lark = self._lark
        text = lark.without(lark.first_special(trigger) or trigger)
        call = lark.rule(f"{lark.until(trigger)} {behind}")
        return lark.rule(f"{call}{'*' if many else '?'} {text}")

    def _openings(self) -> tuple[str, ...]:
        openings = self._frame.openings
        if any(each in self._rest for each in openings):
            return ()
        for each in openings:
            for at in range(len(each), 0, -1):
                if self._rest.endswith(each[:at]):
                    return (each[at:],) if at < len(each) else ()
        return openings

    def _answer(self, body: str, turn: str, gaps: tuple[str, str], **fields: Any) -> BoundAnswer:
        lark, form = self._lark, self._reasoning
        behind, without = (f"/{gap}/ " if gap == GAP else f"{lark.literal(gap)} " if gap else ""
                           for gap in gaps)  # fmt: skip
        if form is None:
            start = without + body
        else:
            turned = f"{lark.literal(turn)} " if turn else ""
            thought = f"{lark.until(form.close, spelled=True)} {turned}"
            more = f"{lark.literal(form.open.rstrip(chr(10)))} {thought}"
            if self._in_reasoning:
                start = f"{thought} {f'({more})*' if self._repeats else ''} {behind}{body}"
            else:
                many = lark.rule(f"({more})+" if self._repeats else more)
                start = (
                    f"({many} {behind}| {without}) {body}"
                    if without
                    else f"({many} {behind})? {body}"
                )
        return BoundAnswer(
            lark.text(start), form, self._in_reasoning, self._repeats, turn, gaps, **fields
        )


def _trigger(frame: Frame, reads: ToolFormat) -> str:
    """The beginning of calls: a marker, or that of a call which shows by itself."""
    if frame.marker or not any(body.is_marked for body in reads.bodies):
        return frame.marker
    return frame.head[: frame.head.index("NAME")]
