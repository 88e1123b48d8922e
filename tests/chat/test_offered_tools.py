"""Whether tools show in a prompt: how much of it is looked at for that has a bound."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from mlx_engine import InvalidRequest
from mlx_engine.chat import offered_tools
from mlx_engine.chat.offered_tools import check_shown
from mlx_engine.core.stop import Interrupted, stoppable

LONG = "so it goes " * 10_000


class Looked(str):
    """A text that counts the characters of it that are looked at."""

    looked = 0

    def find(self, string: str, low: int = 0, high: int | None = None) -> int:  # type: ignore[override]
        high = len(self) if high is None else high
        at = super().find(string, low, high)
        self.looked += (high if at < 0 else at + len(string)) - low
        return at


def tool(number: int, about: str = "") -> dict[str, Any]:
    function = {"name": f"tool_{number:04}", "description": about or f"Does the {number:04}th."}
    return {"type": "function", "function": function}


def shown(tools: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(each) for each in tools)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_tools_are_looked_for_where_one_of_them_was_found(known: bool, behind: bool) -> None:
    tools = [tool(number) for number in range(1000)]
    there = random.Random(1).sample(tools, len(tools))
    text = Looked(LONG + shown(there) if behind else shown(there) + LONG)
    assert check_shown(tools, text, known) == []
    assert text.looked < len(shown(there)) * len(tools) + 20 * len(text)


@pytest.mark.parametrize("known", [True, False])
def test_what_is_not_there_is_looked_for_with_an_end(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offered_tools, "_MOST", 10 * len(LONG))
    tools = [tool(number) for number in range(1000)]
    text = Looked(LONG)
    with pytest.raises(InvalidRequest, match="does not show tools"):
        check_shown(tools, text, known)
    assert text.looked <= 11 * len(LONG)
    (note,) = check_shown(tools, text, known, begun=True)
    assert "tool_0000" in note
    assert "tool_0999" not in note, "the rest counts as shown"
    text = Looked(shown(tools[-1:]) + LONG)
    assert check_shown(tools[::-1], text, known)[0].count("tool_") < 20


def test_tools_that_do_not_show_are_named() -> None:
    tools = [tool(1), tool(2, 'Says "no".'), tool(3), tool(4, "Grüße")]
    for there in ([0, 2], [1], [3, 1], [2, 3]):
        text = LONG + shown([tools[n] for n in there]) + LONG
        for known in (True, False):
            (note,) = check_shown(tools, text, known) or [""]
            for n, each in enumerate(tools):
                escaped = n == 3 and not known  # of this one no template makes ASCII
                assert (each["function"]["name"] in note) == (n not in there or escaped)


def test_between_two_tools_it_may_stop() -> None:
    asked: list[None] = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) > 3

    tools = [tool(number) for number in range(10)]
    with stoppable(should_stop), pytest.raises(Interrupted):
        check_shown(tools, shown(tools), True)
    assert len(asked) == 4
