"""An answer that is bound to a grammar: how it is written, and how it is read. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_engine.chat.answer_format import ReasoningFormat, ToolFormat

# A pattern of white space that may stand before content or calls.
LONGEST_GAP = 8
GAP = rf"[ \t\r\n]{{0,{LONGEST_GAP}}}"


@dataclass(frozen=True, slots=True)
class BoundAnswer:
    """An answer that a grammar binds, as it is read: the first of each marker counts.

    Attributes:
        lark: the grammar, in llguidance's variant of Lark.
        reasoning: what reasoning stands between; ``None`` if none can come.
        in_reasoning: the prompt ends in it.
        repeats: there may be more than one piece of it.
        turn: what is written between reasoning and what follows.
        gaps: white space that is no content, behind reasoning and without it: ``GAP``, or a text.
        openings: of content, of which one is written; none if content has no beginning.
        calls: how calls are written; ``None`` if there are none.
        trigger: what begins calls; empty if the content begins with them.
        heads: without a trigger, what the first may begin with.
        begun: the trigger, if the prompt ends with it.
        is_free: there may be text, which is not bound, in the place of calls and between them.
        drop: markers around such text, and between calls.
    """

    lark: str = ""
    reasoning: ReasoningFormat | None = None
    in_reasoning: bool = False
    repeats: bool = False
    turn: str = ""
    gaps: tuple[str, str] = ("", "")
    openings: tuple[str, ...] = ()
    calls: ToolFormat | None = None
    trigger: str = ""
    heads: tuple[str, ...] = ()
    begun: str = ""
    is_free: bool = False
    drop: tuple[str, ...] = ()

    def reasoning_close(self) -> str:
        """The text that ends reasoning so that the answer goes on; empty if there is none."""
        form = self.reasoning
        if form is None:
            return ""
        before, _, behind = (form.end or form.close).partition(form.close)
        if self.turn or self.openings:
            behind = self.turn + ("" if self.calls else self.openings[0])
        elif not self.is_free and self.gaps[0] != GAP:
            behind = self.gaps[0]
        elif behind.strip():  # the beginning of content
            behind = ""
        return before + form.close + behind
