"""Whether all that a caller has sent shows in a prompt, found by looking for it there.

Nothing is rendered for it. Longer texts are looked for first, each between those that come before
and behind it in the conversation and are found already: a word that stands in somebody else's
message as well is not taken for that.
"""

from __future__ import annotations

import bisect
import html
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_engine.chat.messages import Entry, Source
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
    """

    place: int
    source: Source
    what: str
    text: str
    anywhere: bool = False


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
    lost = {id(item) for item in _lost(text, items)}
    users = [item.source.number for item in items if item.source.role == "user"]
    for item in items:
        if item.source.number > max(users, default=0):
            continue
        is_call = item.what != "content"
        if (is_call and not shows_calls) or (item.source.role == "tool" and not shows_results):
            lost.add(id(item))
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
            anywhere = source.role in ("system", "developer")
            place += 1
            if source.text.strip():
                yield Item(place, source, "content", source.text, anywhere)
            for call in source.calls:
                place += 1
                what = f"call of {call.get('name')}"
                for leaf in _leaves(call):
                    yield Item(place, source, what, leaf)


def _leaves(call: Mapping[str, Any]) -> Iterator[str]:
    """Texts that a call shows as: its name, and the values of its arguments."""
    yield str(call.get("name") or "")
    left: list[Any] = [call.get("arguments")]
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


def _lost(text: str, items: list[Item]) -> Iterator[Item]:
    budget = _MOST
    places: list[int] = []  # of what has been found, ascending, with where it begins and ends
    spans: list[tuple[int, int]] = []
    kinds: dict[tuple[str, bool], _Form] = {}  # the form in which such texts were last found
    for item in sorted((each for each in items if each.text), key=lambda each: -len(each.text)):
        checkpoint()
        low, high = 0, len(text)
        if not item.anywhere:
            before = bisect.bisect_left(places, item.place)
            behind = bisect.bisect_right(places, item.place)
            low = spans[before - 1][1] if before else 0
            high = spans[behind][0] if behind < len(spans) else len(text)
        kind = (item.source.role, item.what == "content")
        at, length = -1, 0
        for form, string in _tries(item.text, kinds.get(kind)):
            at = text.find(string, low, high)
            if at >= 0:
                kinds[kind], length = form, len(string)
                break
            budget -= high - low
        if at >= 0 and not item.anywhere:
            where = bisect.bisect_left(places, item.place)
            if where < len(places) and places[where] == item.place:
                begin, end = spans[where]
                spans[where] = min(begin, at), max(end, at + length)
            else:
                places.insert(where, item.place)
                spans.insert(where, (at, at + length))
        elif at < 0 and budget > 0:
            yield item


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
