"""Which replica gets a request."""

from __future__ import annotations

import pytest

from mlx_engine import SamplingParams
from mlx_engine.remote.replicas.routing import RequestCost, Router
from mlx_engine.requests import ChatPrompt, GenerationRequest, TextPrompt

LONG = "All work and no play makes Jack a dull boy. " * 200  # 8,800 characters, 2,200 tokens


def router(*names: str) -> Router:
    made = Router()
    for name in names:
        made.join(name)
    return made


def text(prompt: str | list[int], max_tokens: int | None = 16) -> RequestCost:
    return RequestCost.of(
        GenerationRequest(TextPrompt(prompt), SamplingParams(max_tokens=max_tokens))
    )


def chat(*contents: str, tools: list[dict[str, object]] | None = None) -> RequestCost:
    messages = [{"role": "user", "content": content} for content in contents]
    return RequestCost.of(
        GenerationRequest(ChatPrompt.of(messages, tools), SamplingParams(max_tokens=16))
    )


def cached(cost: RequestCost, other: RequestCost) -> int:
    """Tokens of ``cost`` that a replica is thought to have that was given ``other``."""
    shared = {prefix.digest for prefix in other.prefixes}
    return max((prefix.tokens for prefix in cost.prefixes if prefix.digest in shared), default=0)


@pytest.mark.parametrize(
    ("cost", "prompt", "answer"),
    [
        (text("x" * 400), 100, 16),
        (text([1] * 400), 400, 16),
        (text("x", None), 0, 256),
        (text("x" * 4, 1000), 1, 1000),
    ],
)
def test_the_size_of_a_request(cost: RequestCost, prompt: int, answer: int) -> None:
    assert (cost.prompt_tokens, cost.answer_tokens) == (prompt, answer)
    assert cost.tokens == prompt + answer


def test_a_chat_is_as_long_as_its_messages_and_tools() -> None:
    plain = chat("x" * 4000)
    assert 1000 <= plain.prompt_tokens <= 1020
    assert (
        chat(
            "x" * 4000, tools=[{"function": {"name": "y" * 200, "description": "y" * 4000}}]
        ).prompt_tokens
        > 2000
    )


@pytest.mark.parametrize(
    ("length", "tokens"),
    [(0, []), (255, []), (256, [64]), (511, [64]), (512, [64, 128]), (1100, [64, 128, 256])],
)
def test_prefixes_are_of_powers_of_two_of_blocks(length: int, tokens: list[int]) -> None:
    assert [prefix.tokens for prefix in text("é" * length or "x").prefixes] == tokens


def test_prefixes_of_token_ids() -> None:
    assert [prefix.tokens for prefix in text([1] * 300).prefixes] == [64, 128, 256]
    assert [prefix.tokens for prefix in text([2**62] * 300).prefixes] == [64, 128, 256]


def test_what_two_prompts_share() -> None:
    assert cached(text(LONG + "a"), text(LONG + "b")) == 2048
    assert cached(text(LONG[:2000] + "a" * 9000), text(LONG)) == 256
    assert cached(text("b" + LONG), text(LONG)) == 0
    assert cached(text([*range(200), 1]), text([*range(200), 2])) == 128


def test_a_text_a_chat_and_token_ids_share_nothing() -> None:
    assert cached(chat(LONG), text(LONG)) == 0
    assert cached(text([0] * 512), text("\0" * 4096)) == 0


def test_a_conversation_shares_its_earlier_turns() -> None:
    assert cached(chat(LONG, "and then?"), chat(LONG)) == 2048
    assert cached(chat(LONG, tools=[{"function": {"name": "f"}}]), chat(LONG)) == 0


def test_messages_that_no_json_can_hold_have_no_prefixes() -> None:
    ring: dict[str, object] = {"role": "user", "content": LONG}
    ring["self"] = ring
    assert chat(LONG).prefixes
    cost = RequestCost.of(GenerationRequest(ChatPrompt([ring], None, {}), SamplingParams()))
    assert cost.prefixes == ()


def test_text_that_is_no_unicode_is_left_to_the_engine() -> None:
    assert text("\ud800" * 300).prefixes


def test_without_replicas_there_is_no_choice() -> None:
    assert router().choose(text("x")) is None
    assert router("a").choose(text("x"), among=()) is None


def test_equals_take_turns() -> None:
    chosen = router("a", "b", "c")
    names = []
    for _ in range(7):
        cost = text("short")
        names.append(name := chosen.choose(cost))
        assert name is not None
        chosen.done(name, cost)
    assert names == ["a", "b", "c", "a", "b", "c", "a"]


def test_the_one_with_fewest_outstanding_tokens() -> None:
    chosen = router("a", "b")
    assert chosen.choose(text("x", 1000)) == "a"
    assert [chosen.choose(text("x", 100)) for _ in range(9)] == ["b"] * 9
    assert chosen.outstanding("b") == 900
    chosen.choose(text("x", 100))
    assert chosen.outstanding("b") == 1000
    assert chosen.choose(text("x", 100)) == "a"


def test_it_goes_where_its_beginning_has_been() -> None:
    chosen = router("a", "b", "c")
    names = [chosen.choose(cost := text(letter * 8800)) for letter in "xyz"]
    assert names == ["a", "b", "c"]
    for name, letter in zip("abc", "xyz", strict=True):
        chosen.done(name, text(letter * 8800))
    for name, letter in zip("cab", "zxy", strict=True):
        cost = text(letter * 8800 + "more")
        assert chosen.choose(cost) == name
        chosen.done(name, cost)


def test_load_that_costs_more_than_the_prefill_saved_wins() -> None:
    chosen = router("a", "b")
    cost = text(LONG)
    assert chosen.choose(cost) == "a"
    chosen.done("a", cost)
    # The prompt cache saves 2,048 tokens there: as many to wait behind are no gain any more.
    assert chosen.choose(text("x", 2047), among=("a",)) == "a"
    assert chosen.choose(cost) == "a"
    chosen.done("a", cost)
    chosen.choose(text("x", 1), among=("a",))
    assert chosen.choose(cost) == "b"


def test_one_that_leaves_is_forgotten() -> None:
    chosen = router("a", "b")
    cost = text(LONG)
    assert chosen.choose(cost) == "a"
    chosen.leave("a")
    chosen.leave("a")
    assert "a" not in chosen
    assert chosen.outstanding("a") == 0
    chosen.done("a", cost)
    assert chosen.choose(text("x")) == "b"
    chosen.join("a")
    assert chosen.outstanding("a") == 0
    chosen.done("a", cost)  # of its life before
    assert chosen.outstanding("a") == 0


def test_what_it_remembers_is_bounded() -> None:
    chosen = router("a", "b")
    first = text(LONG)
    assert chosen.choose(first) == "a"
    chosen.done("a", first)
    for number in range(200):
        cost = text(f"{number:04}" + LONG)
        assert chosen.choose(cost, among=("a",)) == "a"
        chosen.done("a", cost)
    assert chosen.choose(first) == "b"  # a has forgotten it, and b was chosen longer ago
