"""Finding the first of several strings in a text that comes in parts."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection


class _Node:
    """A beginning: the first ``depth`` characters of all strings from ``low`` to ``high``.

    Attributes:
        match: the longest string that these characters end with, if there is one.
        shorter: the node of the longest end of these characters that is one; the root has none.
        after: by the next character, the node of the longest end that is one then.
    """

    __slots__ = ("after", "depth", "high", "low", "match", "shorter")

    def __init__(self, low: int, high: int, depth: int, shorter: _Node | None) -> None:
        self.low, self.high, self.depth, self.shorter = low, high, depth, shorter
        self.match: str | None = shorter.match if shorter is not None else None
        self.after: dict[str, _Node] = {}


class StringSet:
    """Strings to look for.

    An Aho-Corasick automaton that is made as far as texts need it: strings cost their sorting,
    and nothing more until a text contains a part of them.

    Args:
        strings: any number, of any length; empty ones are never found.
    """

    def __init__(self, strings: Collection[str]) -> None:
        self._strings = sorted(string for string in strings if string)
        self.root = _Node(0, len(self._strings), 0, None)

    def step(self, node: _Node, char: str) -> _Node:
        """The node after one more character."""
        path = []
        place: _Node | None = node
        while place is not None and char not in place.after:
            path.append(place)
            place = place.shorter
        found = self.root if place is None else place.after[char]
        for each in reversed(path):
            found = each.after[char] = self._child(each, char, found) or found
        return found

    def _child(self, node: _Node, char: str, shorter: _Node) -> _Node | None:
        def key(string: str) -> str:
            return string[node.depth : node.depth + 1]

        low = bisect_left(self._strings, char, node.low, node.high, key=key)
        high = bisect_right(self._strings, char, low, node.high, key=key)
        if low == high:
            return None
        child = _Node(low, high, node.depth + 1, shorter)
        if len(self._strings[low]) == child.depth:
            child.match = self._strings[low]
        return child


class StringSearch:
    """A search in one text, part by part.

    The string that is complete first is found; of those that end at the same character, the
    longest. However the text is cut, the same one is found. Held back is only what may be the
    beginning of one: the longest end of the text that one of the strings begins with.

    Args:
        strings: to look for.
    """

    def __init__(self, strings: StringSet) -> None:
        self._strings = strings
        self._node = strings.root
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None, str]:
        """Take the next part of the text.

        Returns:
            The text that is before any string to be found, the string if one was found, and
            what follows it, which has not been searched. The search is over then.
        """
        node = self._node
        before = len(self._held)
        for place, char in enumerate(text, before + 1):
            node = node.after.get(char) or self._strings.step(node, char)
            if node.match is not None:
                whole = self._held + text
                self._node, self._held = self._strings.root, ""
                return whole[: place - len(node.match)], node.match, whole[place:]
        self._node = node
        whole = self._held + text
        clear = len(whole) - node.depth
        self._held = whole[clear:]
        return whole[:clear], None, ""

    def finish(self) -> str:
        """The text that was held back, since no more comes."""
        held, self._node, self._held = self._held, self._strings.root, ""
        return held
