"""The guide: a file for each topic, in the package beside the code."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from importlib.resources import files
from importlib.resources.abc import Traversable

_SUFFIX = ".md"
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


def _folder() -> Traversable:
    return files("mlx_engine") / "guide"
