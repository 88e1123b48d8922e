"""Rules of a grammar in llguidance's variant of Lark, as they are put together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

_META = re.compile(r"([\\.+*?()|\[\]{}^$#&\-~/])")
ANY = "/(?s:.*)/"
_PLACES = re.compile(r"(NAME|KEY|INDEX|IS_TEXT|\n\?)")
_RULES = {"INDEX": "/[0-9]{1,4}/", "\n?": "/\\n?/"}  # of what stands in frames


def literally(text: str) -> str:
    """A regular expression of just this text, for the slashes of a terminal."""
    escaped = _META.sub(r"\\\1", text)
    return escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


class Lark:
    """A grammar that grows; rules with the same text are one.

    Args:
        special: the ids of special tokens by their texts. Where a text has one of those, it is the
            token, and no token or text that only looks like it.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        found = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._tokens = re.compile(f"({found})" if found else r"((?!))")
        self._names: dict[str, str] = {}
        self._lines: list[str] = []

    def text(self, start: str) -> str:
        """All of the grammar, whose answers are those of a rule."""
        return "\n".join([f"start: {start}", *self._lines])

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a rule with this text."""
        return self._named("r", attributes, body)

    def terminal(self, body: str) -> str:
        """The name of a terminal with this text."""
        return self._named("T", "", body)

    def name(self) -> str:
        """A name for a rule that is given its text later, by ``define``."""
        name = f"n{len(self._names)}"
        self._names[name] = name
        return name

    def define(self, name: str, body: str) -> None:
        """Give such a rule its text."""
        self._lines.append(f"{name}: {body}")

    def _named(self, prefix: str, attributes: str, body: str) -> str:
        key = f"{prefix}{attributes}: {body}"
        if key not in self._names:
            name = self._names[key] = f"{prefix}{len(self._names)}"
            self._lines.append(f"{name}{attributes}: {body}")
        return self._names[key]

    def literal(self, text: str) -> str:
        """An expression for just this text, with special tokens where it has their texts."""
        parts = [self._part(part) for part in self._split(text)]
        return " ".join(parts) or '""'

    def spelled(self, text: str) -> str:
        """An expression for just this text, in which no special token is."""
        return json.dumps(text, ensure_ascii=False)

    def any_of(self, choices: Sequence[str]) -> str:
        """A rule that matches what one of these does."""
        return self.rule(" | ".join(choices))

    def until(self, marker: str, text: str = ANY, *, spelled: bool = False) -> str:
        """A rule for text up to a marker and with it; the first of them ends it.

        Args:
            text: what the text may be, as a terminal says it.
            spelled: where the marker is a special token, its text ends it too.
        """
        first = self.first_special(marker)
        if not first:
            if text != ANY:
                text = f"({self.without(marker, within=text)})"
            else:
                return self.rule(self.terminal(f"/(?s:.*){literally(marker)}/"), "[lazy]")
            return self.rule(self.terminal(f"{text} /{literally(marker)}/"), "[lazy]")
        at = marker.index(first)
        behind = f" /{literally(marker[:at])}/" if at else ""
        before = self.terminal(f"({self.without(first, within=text)}){behind}")
        token = self.rule(f"{before} {self.literal(marker[at:])}")
        if not spelled or first != marker:
            return token
        ended = self.rule(self.terminal(f"/(?s:.*){literally(marker)}/"), "[lazy]")
        return self.any_of([ended, token])

    def without(self, *texts: str, within: str = ANY) -> str:
        """A terminal for text that has none of these in it."""
        terms = [f"~/(?s:.*){literally(text)}(?s:.*)/" for text in texts]
        return self.terminal(" & ".join([within, *terms]))

    def first_special(self, text: str) -> str:
        """The first special token in a text; empty if there is none."""
        return next((part for part in self._split(text) if part in self._special), "")

    def _split(self, text: str) -> list[str]:
        return [part for part in self._tokens.split(text) if part]

    def _part(self, part: str) -> str:
        if part in self._special:
            return f"<[{self._special[part]}]>"
        return self.spelled(part)

    def template(self, text: str, **values: str) -> str:
        """An expression for the text of a frame, with values in their places."""
        parts, literal = list[str](), ""
        for piece in _PLACES.split(text):
            if piece in _RULES:
                parts += [self.literal(literal)] if literal else []
                parts.append(_RULES[piece])
                literal = ""
            else:
                literal += values.get(piece, piece)
        return " ".join(parts + ([self.literal(literal)] if literal or not parts else []))

    def members(self, items: Sequence[tuple[str, bool]], separator: str = "") -> str:
        """A rule for items in their order, with something between two.

        Args:
            items: rules, and whether each has to be there.
            separator: what matches that.
        """
        rest, first = '""', list[str]()
        suffixes = [rest]
        for item, must in reversed(items):
            each = f"{separator} {item}" if separator else item
            rest = self.rule(f"{each} {rest}" if must else f"({each})? {rest}")
            suffixes.append(rest)
        if not separator:
            return rest
        for at, (item, must) in enumerate(items):
            first.append(f"{item} {suffixes[len(items) - 1 - at]}")
            if must:
                break
        else:
            first.append('""')
        return self.any_of(first)
