"""Whether all that a caller has sent shows in a prompt, found by looking for it there.

Nothing is rendered for it. In a prompt that has all of it, one is found behind the other. Only if
not, all are looked for where they can be, so that a word that stands in somebody else's message as
well is not taken for the one that is missing.
"""

from __future__ import annotations

import bisect
import html
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_engine.chat.messages import LEADING, Entry, Source
from mlx_engine.core.stop import checkpoint

_MOST = 2**28  # characters that are looked at in vain; then the rest counts as shown
_LEAVES = 256  # values of one call that are looked for
_NAMED = 20  # messages that a note names
_CLOSE = "</think>"  # templates take what is before it in an old answer for reasoning


@dataclass(frozen=True, slots=True)
class Item:
    """Something that must show.

    Attributes:
        place: in the conversation; the same for parts whose order does not matter.
        source: the message that it is from.
        what: it is, for a note.
        text: to look for.
        anywhere: whether it may show before what it comes behind, as a system message may.
        is_name: whether it is the name of a tool, which stands in the list of tools as well.
    """

    place: int
    source: Source
    what: str
    text: str
    anywhere: bool = False
    is_name: bool = False


def missing(
    text: str, entries: Iterable[Entry], shows_calls: bool = True, shows_results: bool = True
) -> list[str]:
    """The messages that do not show in a prompt, and what of them.

    Args:
        text: the prompt.
        entries: of the conversation in it.
        shows_calls: whether the template shows calls before the user's last message.
        shows_results: whether it shows their results.
    """
    items = list(_items(entries))
    last = max((item.source.number for item in items if item.source.role == "user"), default=0)
    lost: set[int] = set()
    for item in items:
        is_result, is_call = item.source.role == "tool", item.what != "content"
        if (is_call and not shows_calls) or (is_result and not shows_results):
            lost |= {id(item)} if item.source.number < last else set()
    rest = [item for item in items if id(item) not in lost]
    lost.update(id(item) for item in _lost(text, rest))
    found: dict[str, None] = {}
    for item in items:
        if id(item) in lost:
            found[f"{item.source}: its {item.what}"] = None
    return list(found)


def note_of(found: list[str]) -> str:
    """A sentence that names messages which do not show."""
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"messages: this model's chat template does not show {', '.join(found[:_NAMED])}{more}"


def end_of(text: str, entry: Entry) -> int | None:
    """Where the last message of a conversation ends in its prompt, as far as it can be found."""
    items = list(_items([entry]))
    ends = []
    for item in items:
        for form in _forms(item.text):
            if (at := text.rfind(form)) >= 0:
                ends.append(at + len(form))
                break
    return max(ends, default=None)


def _items(entries: Iterable[Entry]) -> Iterator[Item]:
    place = 0
    for entry in entries:
        for source in entry.sources:
            # Some templates have calls and results before the text of their message.
            anywhere = source.role in LEADING or bool(source.calls)
            place += 1
            if source.text.strip():
                yield Item(place, source, "content", source.text, anywhere)
            for call in source.calls:
                place += 1
                what = f"call of {call.get('name')}"
                if name := str(call.get("name") or ""):
                    yield Item(place, source, what, name, is_name=True)
                for leaf in _leaves(call.get("arguments")):
                    yield Item(place, source, what, leaf)


def _leaves(arguments: object) -> Iterator[str]:
    """Texts that the values of arguments show as."""
    left: list[Any] = [arguments]
    count = 0
    while left and count < _LEAVES:
        value = left.pop()
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, str) and value.strip():
            count += 1
            yield value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            count += 1
            yield json.dumps(value)


def _lost(text: str, items: list[Item]) -> list[Item]:
    """Items that do not show: none if all are found one behind the other."""
    finder = _Finder(text)
    at = end = place = 0
    for item in items:
        if item.place != place and not item.anywhere:
            place, at = item.place, end
        found = finder.find(item, 0 if item.anywhere else at, len(text))
        if found is None:
            break
        end = end if item.anywhere else max(end, found[1])
    else:
        return []
    return finder.look_closely(items)


class _Finder:
    """Looks for items in a text, and remembers in which form those of a kind are there."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._kinds: dict[tuple[str, bool], _Form] = {}
        self._budget = _MOST
        self._places: list[int] = []  # of what has its place, ascending
        self._spans: list[tuple[int, int]] = []  # where that begins and ends

    def find(self, item: Item, low: int, high: int) -> tuple[int, int] | None:
        """Where an item first is within these characters."""
        kind = (item.source.role, item.what == "content")
        for form, string in _tries(item.text, self._kinds.get(kind)):
            at = self._text.find(string, low, high)
            if at >= 0:
                self._kinds[kind] = form
                return at, at + len(string)
            self._budget -= high - low
            if self._budget < 0:
                return None
        return None

    def look_closely(self, items: list[Item]) -> list[Item]:
        """The items that are not there, as far as that can be told with some effort.

        What is there once has its place at once, longer texts first, each between those before and
        behind it that have theirs; the rest go where there is room for them.
        """
        lost: list[Item] = []
        unclear: list[Item] = []
        for item in sorted(items, key=lambda each: -len(each.text)):
            checkpoint()
            low, high = (0, len(self._text)) if item.anywhere else self._window(item)
            found = self.find(item, low, high)
            if self._budget < 0:
                return lost
            if found is None:
                lost.append(item)
            elif not item.anywhere:
                again = self._text.find(self._text[slice(*found)], found[0] + 1, high)
                self._budget -= (high if again < 0 else again) - found[0]
                if again < 0 and not item.is_name:
                    self._keep(item, found)
                else:
                    unclear.append(item)
        for item in sorted(unclear, key=lambda each: each.place):
            found = self.find(item, *self._window(item))
            if self._budget < 0:
                return lost
            if found is None:
                lost.append(item)
            else:
                self._keep(item, found)
        return lost

    def _window(self, item: Item) -> tuple[int, int]:
        before = bisect.bisect_left(self._places, item.place)
        behind = bisect.bisect_right(self._places, item.place)
        low = self._spans[before - 1][1] if before else 0
        high = self._spans[behind][0] if behind < len(self._spans) else len(self._text)
        return low, high

    def _keep(self, item: Item, found: tuple[int, int]) -> None:
        where = bisect.bisect_left(self._places, item.place)
        if where < len(self._places) and self._places[where] == item.place:
            begin, end = self._spans[where]
            self._spans[where] = min(begin, found[0]), max(end, found[1])
        else:
            self._places.insert(where, item.place)
            self._spans.insert(where, found)


_Form = Callable[[str], str]


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


_FORMS: tuple[_Form, ...] = (
    str,
    str.strip,
    _escaped,
    lambda text: json.dumps(text)[1:-1],
    lambda text: _escaped(text.strip()),
    lambda text: _escaped(_escaped(text)),
    lambda text: repr(text)[1:-1],
    html.escape,
    lambda text: text.rpartition(_CLOSE)[2].strip() or text,
)


def _tries(text: str, first: _Form | None) -> Iterator[tuple[_Form, str]]:
    """The forms that a text may have in a prompt, likely ones first; each once."""
    seen = set()
    for form in ((first,) if first else ()) + _FORMS:
        string = form(text)
        if string not in seen:
            seen.add(string)
            yield form, string


def _forms(text: str) -> Iterator[str]:
    return (string for _, string in _tries(text, None))
