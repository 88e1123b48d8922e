"""Regular expressions, looked at before they are compiled: how much text they demand.

Whether one is well formed is the compiler's to say. It takes them apart lazily, so that what may
repeat a million times costs nothing; but text that must come is gone through at once, and takes
seconds where some ten thousand characters must.
"""

from __future__ import annotations

import re

from mlx_engine.checks import shown
from mlx_engine.grammars.problem import problem

LONGEST = 8_192
MOST_DEMANDED = 1_000  # characters that must come

_COUNT = re.compile(r"\{\s*(\d{0,18})\s*(?:,\s*(\d{0,18})\s*)?\}")
_OPTIONAL = re.compile(r"[*?]|\{\s*0*\s*[,}]")
_GROUP = re.compile(r"\?(?:P?<\w+>|[a-zA-Z-]*:|[a-zA-Z-]+\))")
_ESCAPED = re.compile(r"\\(?:[pPux]\{[^}]*\}|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)

_UNSUPPORTED = {
    **dict.fromkeys(("(?=", "(?!"), "lookahead"),
    **dict.fromkeys(("(?<=", "(?<!"), "lookbehind"),
    **dict.fromkeys((r"\b", r"\B"), "word boundary"),
    **dict.fromkeys(("(?P=", r"\k", *(f"\\{digit}" for digit in range(1, 10))), "backreference"),
}


def checked_regex(pattern: str) -> str:
    """The same, if it may be enforced.

    Raises:
        InvalidRequest: it may not.
    """
    if not pattern:
        raise problem((), "a regular expression must not be empty")
    if len(pattern) > LONGEST:
        raise problem((), f"has {len(pattern)} characters; {LONGEST} are the most")
    if (found := unsupported(pattern)) is not None:
        raise problem((), f"{found} in {shown(pattern)} cannot be enforced")
    if re.search(r"(?<!\\)(?:\\\\)*\\\Z", pattern):
        raise problem((), f"ends with half of an escape: {shown(pattern)}")
    if demanded(pattern) > MOST_DEMANDED:
        raise problem((), f"demands text of more than {MOST_DEMANDED} characters by its counts")
    try:
        pattern.encode()
    except UnicodeEncodeError as error:
        raise problem((), f"is not valid Unicode text ({error})") from error
    return pattern


def literally(text: str) -> str:
    """The regular expression of a text."""
    return "".join(
        each if each.isalnum() or not each.isascii() else f"\\x{ord(each):02x}" for each in text
    )


class Demand:
    """Characters that must come, added up from left to right.

    It never tells too few; of alternatives it tells those of the longest.
    """

    def __init__(self) -> None:
        self._groups = [(0, 0)]  # of each open one: of the best alternative, and of this one
        self._last = 0  # of what a count behind it would repeat

    @property
    def total(self) -> int:
        """Characters of all that was read; groups that are still open count as closed."""
        return sum(max(best, here) for best, here in self._groups)

    def add(self, characters: int) -> None:
        """Something that comes once."""
        best, here = self._groups[-1]
        self._groups[-1] = best, here + characters
        self._last = characters

    def repeat(self, least: int) -> None:
        """A count behind it: at least that often."""
        best, here = self._groups[-1]
        more = self._last * (max(least, 1) - 1)
        self._groups[-1] = best, here + more
        self._last += more

    def begin(self) -> None:
        """A group."""
        self._groups.append((0, 0))

    def otherwise(self) -> None:
        """Another alternative of the group."""
        best, here = self._groups[-1]
        self._groups[-1] = max(best, here), 0

    def end(self) -> None:
        """The end of a group, if one is open."""
        if len(self._groups) > 1:
            best, here = self._groups.pop()
            self.add(max(best, here))


def demanded(pattern: str) -> int:
    """The characters that a regular expression demands by its counts, or a few more.

    Text that is written out counts a sixteenth: it is gone through quickly.
    """
    demand, place = Demand(), 0
    while place < len(pattern):
        char = pattern[place]
        place += 1
        if char == "\\":
            found = _ESCAPED.match(pattern, place - 1)
            place = found.end() if found else place
            demand.add(1)
        elif char == "[":
            place = class_end(pattern, place)
            demand.add(1)
        elif char == "(":
            demand.begin()
            place = found.end() if (found := _GROUP.match(pattern, place)) else place
            if pattern[place - 1] == ")":  # flags alone
                demand.end()
        elif char == ")":
            demand.end()
        elif char == "|":
            demand.otherwise()
        elif char == "{" and (found := _COUNT.match(pattern, place - 1)):
            place = found.end()
            demand.repeat(int(found[1] or 0))
        elif char not in "*+?^$":
            demand.add(1)
    return max(demand.total - len(pattern), written_out(len(pattern)))


def nullable(pattern: str) -> bool:
    """Whether a regular expression is found in the empty text; in doubt, it is."""
    # Of each open group: whether an alternative is that, and whether this one is so far.
    groups, place = [(False, True)], 0
    while place < len(pattern):
        char = pattern[place]
        place += 1
        if char == "(":
            groups.append((False, True))
            place = found.end() if (found := _GROUP.match(pattern, place)) else place
            if pattern[place - 1] != ")":  # or they are flags alone
                continue
            char = ")"
        best, here = groups[-1]
        last = False
        if char == ")":
            last = best or here
            groups = groups[:-1] or [(False, True)]
            best, here = groups[-1]
        elif char == "|":
            groups[-1] = best or here, True
            continue
        elif found := _COUNT.match(pattern, place - 1):
            place = found.end()
            continue
        elif char in "^$+*?":
            continue
        elif char == "\\":
            found = _ESCAPED.match(pattern, place - 1)
            place = found.end() if found else place
        elif char == "[":
            place = class_end(pattern, place)
        if not last and not _OPTIONAL.match(pattern, place):
            groups[-1] = best, False
    return any(best or here for best, here in groups)


def written_out(characters: int) -> int:
    """The demand of text that is written out."""
    return characters // 16 + 1


def unsupported(pattern: str) -> str | None:
    """The part of a regular expression that no automaton has, in words, if there is one."""
    place = 0
    while place < len(pattern):
        char = pattern[place]
        if char == "[":
            place = class_end(pattern, place + 1)
            continue
        for start, name in _UNSUPPORTED.items():
            if pattern.startswith(start, place):
                return f"the {name} {start!r}"
        place += 2 if char == "\\" else 1
    return None


def class_end(pattern: str, place: int) -> int:
    """The place behind a class of characters, of which the bracket has been read."""
    depth, first = 1, True
    while place < len(pattern) and depth:
        char = pattern[place]
        place += 1
        if char == "^" and first:
            continue
        if char == "\\":
            place += 1
        elif char == "[":
            depth, first = depth + 1, True
            continue
        elif char == "]" and not first:
            depth -= 1
        first = False
    return place


def lettered(pattern: str) -> bool:
    """Whether what it matches depends on which letters and digits one has in mind."""
    return any(each in _WIDE for each in _ESCAPED.findall(pattern))


def from_ecma(pattern: str, *, wide: bool = False) -> str:
    """A schema's pattern in the syntax of Rust's ``regex`` crate.

    What would be operators in a class of characters there is text. Letters and digits are those of
    ASCII by the standard, and of every alphabet for some validators: it matches what both take
    for them, or with ``wide`` what one of both does.
    """
    classes = _WIDE if wide else _NARROW
    out: list[str] = []
    inside = first = False
    place = 0
    while place < len(pattern):
        char = pattern[place]
        if char == "\\":
            found = _ESCAPED.match(pattern, place)
            escaped = found[0] if found else char
            place += len(escaped)
            out.append(classes.get(escaped, escaped))
            first = False
            continue
        place += 1
        if not inside:
            inside = first = char == "["
            out.append(char)
            continue
        if char == "]" and not first:
            inside = False
        elif char in "[&~" or (char == "-" and out[-1] == "-"):
            char = "\\" + char
        first = first and char == "^"
        out.append(char)
    return "".join(out)


_NARROW = {r"\W": r"[^\p{L}\p{M}\p{N}\p{Pc}]", r"\D": r"[^\p{N}]"}
_WIDE = {
    r"\w": r"[\p{L}\p{M}\p{N}\p{Pc}]",
    r"\d": r"\p{N}",
    r"\W": "[^a-zA-Z0-9_]",
    r"\D": "[^0-9]",
}
