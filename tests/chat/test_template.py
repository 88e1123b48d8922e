"""Prompts: byte for byte what transformers makes of them, in few renders, and nothing is lost."""

from __future__ import annotations

import copy
import datetime
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine import InvalidRequest
from mlx_engine.chat import template as chat_template
from mlx_engine.chat.parser import AnswerParser
from mlx_engine.chat.template import ChatTemplate, RenderedPrompt
from mlx_engine.requests import ChatPrompt
from tests.chat.test_messages import HELLO, WEATHER, call, rendered, result, system
from tests.chat.traits import SAY, TEMPLATES, THINKS, TOOLS, loop, wrapped
from tests.chat_models import TEMPLATE as REASONS
from tests.tiny import CHAT_TEMPLATE

LONG = "So it goes. " * 50
ANSWER = {"role": "assistant", "content": "Hi."}
PLAIN: dict[str, list[dict[str, Any]]] = {
    "user": [HELLO],
    "system": [system("Be brief."), HELLO],
    "turns": [system("Be brief."), HELLO, ANSWER, {"role": "user", "content": "Why?"}],
    "calls": [HELLO, call({"city": "Tokyo"}, "aBc456789"), result("Sunny", "aBc456789")],
    "more": [
        HELLO,
        call({"city": "Tokyo", "days": 3, "more": [1, None, True, "a\n\tb"]}, "aBc456789"),
        result("Sunny", "aBc456789"),
        ANSWER,
        {"role": "user", "content": "  And tomorrow?\n"},
    ],
}


def by_transformers(
    tokenizer: TokenizerWrapper, messages: list[Any], tools: Any = None, **options: Any
) -> str | None:
    given = {"add_generation_prompt": True, **options}
    try:
        text: str = tokenizer._tokenizer.apply_chat_template(
            copy.deepcopy(messages), tools=tools, tokenize=False, **given
        )
    except Exception:
        return None
    return text


def named(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the names of tools, which a caller may leave out."""
    return [m | ({"name": "get_weather"} if m["role"] == "tool" else {}) for m in messages]


@pytest.mark.parametrize("talk", PLAIN)
@pytest.mark.parametrize("tools", [None, [WEATHER]])
@pytest.mark.parametrize("trait", [*TEMPLATES, "thinks", "reasons", "tiny"])
def test_what_needs_no_change_is_what_transformers_renders(
    trait: str, tools: Any, talk: str
) -> None:
    others = {"thinks": THINKS, "reasons": REASONS, "tiny": CHAT_TEMPLATE}
    tokenizer = wrapped({**TEMPLATES, **others}[trait])
    messages = PLAIN[talk]
    expected = by_transformers(tokenizer, named(messages), tools)
    if expected is None:  # with arguments as text, without a system message, with tools
        return
    found = rendered(tokenizer, messages, tools)
    assert found.text == expected
    assert (
        found.notes == ()
        or not any("messages" in note for note in found.notes)
        or (trait in ("hides calls and results", "arguments as text"))
    )


@pytest.mark.parametrize("value", [True, False, None])
def test_thinking_is_the_variable_that_is_read(value: bool | None) -> None:
    for name in ("enable_thinking", "thinking"):
        tokenizer = wrapped(THINKS.replace("enable_thinking", name))
        given = {} if value is None else {name: value}
        found = rendered(tokenizer, [HELLO], thinking=value)
        assert found.text == by_transformers(tokenizer, [HELLO], **given)
        assert found.notes == ()


def test_thinking_is_left_to_the_template() -> None:
    template = loop(
        "{{ m.content }}", after="{% if enable_thinking %}<think>\n{% else %}</think>{% endif %}"
    )
    assert rendered(template, [HELLO]).text.endswith("</think>")
    assert rendered(template, [HELLO], thinking=True).text.endswith("<think>\n")


def test_a_callers_own_variable_goes_before_thinking() -> None:
    found = rendered(THINKS, [HELLO], thinking=True, template_kwargs={"enable_thinking": False})
    assert found.text.endswith("</think>\n\n")


def test_thinking_that_cannot_be_had_is_refused_or_noted() -> None:
    with pytest.raises(InvalidRequest, match="no reasoning to switch on") as caught:
        rendered("{{ messages[0].content }}", [HELLO], thinking=True)
    assert caught.value.option == "thinking"
    assert rendered("{{ messages[0].content }}", [HELLO], thinking=False).notes == ()
    always = loop("{{ m.content.split('</think>')[-1] }}", after="{{ '<think>\\n' }}")
    assert rendered(always, [HELLO], thinking=True).notes == ()
    (note,) = rendered(always, [HELLO], thinking=False).notes
    assert "cannot switch reasoning off" in note


def test_efforts_are_thinking_as_well() -> None:
    template = loop(
        "{{ m.content }}</think>",
        after="{{ reasoning_effort | default('none') }}{{ 'high' if false }}<think>",
    )
    assert "high<think>" in rendered(template, [HELLO], thinking=True).text
    assert "none<think>" in rendered(template, [HELLO], thinking=False).text


@pytest.mark.parametrize("trait", TEMPLATES)
@pytest.mark.parametrize("text", ["```python\n", "Once", " upon", "\n\ta", "  ", "a  \n\n"])
def test_a_continued_message_ends_as_it_ends(trait: str, text: str) -> None:
    tools = [WEATHER] if trait == "needs tools" else None
    messages = [HELLO, {"role": "assistant", "content": text}]
    found = rendered(TEMPLATES[trait], messages, tools, continue_final_message=True)
    assert found.text.endswith(f"<|im_start|>assistant\n{text}")
    assert found.prefix.endswith(text)
    if text == text.strip() or text == "```python\n":
        tokenizer = wrapped(TEMPLATES[trait])
        expected = by_transformers(
            tokenizer, messages, tools, add_generation_prompt=False, continue_final_message=True
        )
        assert expected is None or found.text.rstrip() == expected.rstrip()


def test_reasoning_alone_is_continued_open() -> None:
    thought = {"role": "assistant", "reasoning_content": "Let me see: "}
    found = rendered(THINKS, [HELLO, thought], continue_final_message=True)
    assert found.text.endswith("<|im_start|>assistant\n<think>\nLet me see: ")
    opens = loop("{{ m.content.split('</think>')[-1] + ';' }}", after="{{ '<think>\\n' }}")
    assert rendered(opens, [HELLO, thought], continue_final_message=True).text.endswith(
        "Hello there.;<think>\nLet me see: "
    )
    with pytest.raises(InvalidRequest, match=r"number 1 \('assistant'\)") as caught:
        rendered("{{ messages[0].content }}", [HELLO, thought], continue_final_message=True)
    assert caught.value.option == "continue_final_message"


def test_reasoning_that_the_template_drops_is_continued_in_the_familys_markers() -> None:
    drops = (
        "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    thought = {"role": "assistant", "content": "", "reasoning_content": "I wonder "}
    found = rendered(drops, [HELLO, thought], continue_final_message=True)
    assert found.text.endswith("assistant:<think>I wonder ")
    assert AnswerParser(found.format, None, found.prefix).in_reasoning


def test_a_renderer_that_wants_reasoning_continues_behind_its_header() -> None:
    from mlx_lm.chat_templates import deepseek_v32

    tokenizer = wrapped(None, chat_template=deepseek_v32.apply_chat_template)
    messages = [HELLO, {"role": "assistant", "content": "Once"}]
    found = rendered(tokenizer, messages, continue_final_message=True, thinking=False)
    assert found.text.endswith("</think>Once")


@pytest.mark.parametrize(
    ("messages", "words"),
    [([HELLO], "not the assistant's"), ([HELLO, call()], "has tool calls")],
)
def test_only_an_answer_is_continued(messages: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"number .*{words}") as caught:
        ChatPrompt.of(messages, continue_final_message=True)
    assert caught.value.option == "continue_final_message"


@pytest.mark.parametrize("trait", TEMPLATES)
def test_the_prefix_is_the_generation_prompt(trait: str) -> None:
    tools = [WEATHER] if trait == "needs tools" else None
    for messages in PLAIN.values():
        found = rendered(TEMPLATES[trait], messages, tools)
        if "add_generation_prompt" in TEMPLATES[trait]:
            assert found.prefix == "<|im_start|>assistant\n"
            assert found.end == len(found.text) - len(found.prefix)


def test_a_prefix_that_depends_on_the_conversation_is_found() -> None:
    template = loop(
        "{{ m.content + '<|im_end|>' }}",
        after="{% if '/no' in messages[0].content %}<think></think>{% else %}<think>{% endif %}",
    )
    assert rendered(template, [system("/no"), HELLO]).prefix == "<|im_end|><think></think>"
    assert rendered(template, [HELLO]).prefix == "<|im_end|><think>"


class Counted:
    """The renders of a tokenizer, by the messages in them."""

    def __init__(self, tokenizer: TokenizerWrapper, patch: pytest.MonkeyPatch) -> None:
        self.given: list[str] = []
        inner = tokenizer._tokenizer
        render = inner.apply_chat_template

        def counted(messages: Any, **options: Any) -> Any:
            self.given.append(json.dumps(messages))
            return render(messages, **options)

        patch.setattr(inner, "apply_chat_template", counted)

    def of(self, text: str) -> int:
        """How many there were with this text, since the last question."""
        count = sum(text in given for given in self.given)
        self.given.clear()
        return count


@pytest.mark.parametrize("trait", [*TEMPLATES, "thinks"])
def test_a_conversation_is_rendered_once(trait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = wrapped({**TEMPLATES, "thinks": THINKS}[trait])
    counted = Counted(tokenizer, monkeypatch)
    for talk in (*PLAIN.values(), *PLAIN.values()):
        rendered(tokenizer, talk, [WEATHER])
        assert counted.of("Hello there.") <= 1 + (trait == "parameters unlooked")
        rendered(tokenizer, [*talk, ANSWER], [WEATHER], continue_final_message=True)
        assert counted.of("Hello there.") <= 2
    for talk in PLAIN.values():
        rendered(tokenizer, talk, [WEATHER])
        assert len(counted.given) <= 2, "what the template takes is known by now"
        counted.given.clear()


@pytest.mark.parametrize(
    "of_request",
    [
        lambda n: {"documents": [{"title": f"Title {n}", "text": LONG} for _ in range(n)]},
        lambda n: {"date": f"{n:02} Jul 2026", "now": 1_700_000_000 + n, "score": n / 7},
        lambda n: {"notes": LONG * n},
        lambda n: {"extra": {"more": {"rows": [[n, str(n)]] * n}}},
    ],
)
def test_what_is_known_of_a_template_outlives_variables_that_change(
    of_request: Callable[[int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "documents", "date", "now", "score", "notes", "extra"
    template = loop(SAY, before="".join(f"{{{{ {name} or '' }}}}" for name in names) + TOOLS)
    tokenizer = wrapped(template)
    counted = Counted(tokenizer, monkeypatch)
    for n in range(20, 60):
        variables = of_request(n)
        found = rendered(tokenizer, PLAIN["calls"], [WEATHER], template_kwargs=variables)
        assert found.text == by_transformers(
            tokenizer, named(PLAIN["calls"]), [WEATHER], **variables
        )
        tiny = counted.given if n == 20 else counted.given[:-2]
        assert n == 20 or not tiny, "what the template takes is known by now"
        counted.given.clear()
    variants = ChatTemplate.of(tokenizer)._variants
    assert sum(len(key) for _, key in variants) < 1000


def test_variables_by_which_a_template_branches_are_told_apart() -> None:
    after = (
        "{% if mode == 'deep7' %}A{% elif mode %}B{% else %}C{% endif %}"
        "{% if documents %}D{% endif %}{% if budget == 512 %}E{% elif budget %}F{% endif %}"
    )
    asked = "{% if add_generation_prompt %}" + after + "{% endif %}"
    tokenizer = wrapped(loop(SAY, after=asked))
    for mode, m in (("deep7", "A"), ("deep8", "B"), ("", "C"), (True, "B"), (None, "C")):
        for documents, d in (([], ""), ([{"text": "a"}], "D"), (None, "")):
            for budget, b in ((512, "E"), (513, "F"), (0, ""), (0.0, ""), (-1, "F")):
                given = {"mode": mode, "documents": documents, "budget": budget}
                found = rendered(tokenizer, [HELLO], template_kwargs=given)
                assert found.prefix == m + d + b


def test_objects_of_a_type_are_alike() -> None:
    tokenizer = wrapped(loop(SAY, before="{{ day }}"))
    for year in range(1990, 2026):
        given = {"day": datetime.date(year, 1, 1), "unread": object()}
        rendered(tokenizer, [system("Be brief."), HELLO], template_kwargs=given)
    assert len(ChatTemplate.of(tokenizer)._variants) <= 3


def test_what_is_known_of_a_template_goes_with_it_and_with_its_tokenizer() -> None:
    tokenizer = wrapped(TEMPLATES["plain"])
    first = ChatTemplate.of(tokenizer)
    assert ChatTemplate.of(tokenizer) is first
    tokenizer.chat_template = TEMPLATES["turns"]
    assert ChatTemplate.of(tokenizer) is not first
    for n in range(100):
        rendered(tokenizer, [HELLO], template_kwargs={"colour": n})
    assert len(ChatTemplate.of(tokenizer)._variants) <= chat_template._VARIANTS
    before = len(chat_template._templates)
    del tokenizer
    assert len(chat_template._templates) == before - 1


WORDS = [f"{word}{n}" for n in range(6) for word in ("amber", "brook", "crane", "dune", "elm")]


def conversation(seed: int) -> list[dict[str, Any]]:
    """A small one, of which each text is of its own."""
    chance = random.Random(seed)
    words = iter(chance.sample(WORDS, len(WORDS)))
    messages: list[dict[str, Any]] = []
    for _ in range(chance.randint(1, 6)):
        kind = chance.choice(["system", "developer", "user", "user", "assistant", "calls"])
        if kind != "calls":
            messages.append({"role": kind, "content": next(words)})
            continue
        made = [call({"city": next(words)}, f"c{len(messages)}{n}") for n in range(2)]
        count = chance.randint(1, 2)
        calls = [each["tool_calls"][0] for each in made[:count]]
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        answers = [result({"is": next(words)}, each["id"]) for each in calls]
        messages += chance.sample(answers, len(answers))
    return [*messages, {"role": "user", "content": next(words)}]


def said(messages: list[dict[str, Any]]) -> dict[str, int]:
    """Each word, and the number of its message."""
    text = {n: json.dumps(message) for n, message in enumerate(messages)}
    return {
        word: n
        for word in WORDS
        for n, each in text.items()
        if f'"{word}' in each or f'{word}\\"' in each or f'{word}"' in each
    }


@pytest.mark.parametrize("trait", TEMPLATES)
def test_nothing_vanishes(trait: str) -> None:
    tokenizer = wrapped(TEMPLATES[trait])
    taken, refused = 0, list[str]()
    for seed in range(60):
        messages = conversation(seed)
        try:
            found: RenderedPrompt = rendered(tokenizer, messages, [WEATHER])
        except InvalidRequest as error:
            refused.append(str(error))
            continue
        taken += 1
        for word, number in said(messages).items():
            shows = word in found.text
            told = any(f"number {number} (" in n and "does not show" in n for n in found.notes)
            assert shows != told, (word, messages, found)
    assert all("number " in error for error in refused), "it names the message"
    assert taken > 20
