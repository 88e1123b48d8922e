"""The guide: a file for each topic, in the package beside the code."""

from __future__ import annotations

import re
from difflib import SequenceMatcher, get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable

_SUFFIX = ".md"
_SECTION = re.compile(r"^(?=## )", re.MULTILINE)
_ALIKE = 0.7  # of two words, one of which may be a slip


def topics() -> list[str]:
    """The names of all topics, sorted."""
    names = (page.name for page in _folder().iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def text(topic: str) -> str:
    """One of the guide's topics, in Markdown."""
    return _folder().joinpath(topic + _SUFFIX).read_text("utf-8")


def title(topic: str) -> str:
    """The first line of a topic."""
    return text(topic).partition("\n")[0].removeprefix("# ")


def nearest(word: str) -> str:
    """The topic that was meant: it is spelled nearly so, or has the word, most often of all."""
    word = word.lower()

    def nearness(topic: str) -> tuple[float, bool, int, float]:
        alike = SequenceMatcher(None, word, topic).ratio()
        named, mentions = (
            len(re.findall(rf"\b{re.escape(word)}", where.lower()))
            for where in (title(topic), text(topic))
        )
        return alike if alike > _ALIKE else 0.0, named > 0, mentions, alike

    return max(topics(), key=nearness)


def meant(word: str) -> list[str]:
    """Topics of which the word may be another name: the one that is spelled nearly so, or those
    that have it in their title, or else in a heading.
    """
    if best := get_close_matches(word.lower(), topics(), n=1, cutoff=_ALIKE):
        return best
    for of in (lambda topic: [title(topic)], headings):
        if found := [topic for topic in topics() if any(_has(line, word) for line in of(topic))]:
            return found
    return []


def part(topic: str, word: str) -> str:
    """The sections of a topic that have the word in their heading; all of it, if none has, or if
    the word is the topic's own.
    """
    if not _has(title(topic), word):
        _, *sections = _SECTION.split(text(topic))
        found = [section for section in sections if _has(section.partition("\n")[0], word)]
        if found:
            return "".join(found)
    return text(topic)


def headings(topic: str) -> list[str]:
    """The headings of a topic's sections."""
    return [section.partition("\n")[0] for section in _SECTION.split(text(topic))[1:]]


def _has(line: str, word: str) -> bool:
    return bool(word) and re.search(rf"\b{re.escape(word)}", line, re.IGNORECASE) is not None


def _folder() -> Traversable:
    return files("mlx_engine") / "guide"
