"""Where the turns of a chat lie in its tokens, and what it costs to find out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_engine.errors import InvalidRequest
from mlx_engine.generation import chat_places
from mlx_engine.generation.chat_places import ChatPlaces, EncodedText
from mlx_engine.generation.tokenize import encode
from mlx_engine.requests import ChatPrompt
from tests.chat_models import TEMPLATE
from tests.tiny import make_tokenizer

SYSTEM = {"role": "system", "content": "You are brief."}
USER = {"role": "user", "content": "Name a river."}
CALLS = [
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I have to look.",
        "tool_calls": [{"function": {"name": "read", "arguments": {}}}],
    },
    {"role": "tool", "content": "The Rhine."},
]
TOOLS = [{"type": "function", "function": {"name": "read"}}]


def merging() -> PreTrainedTokenizerFast:
    """Merges a line break with what follows it, so that tokens lie across borders."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "N"), ("r", ":"), ("r:", "Ġ")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class WithoutOffsets(PreTrainedTokenizerFast):
    """Its tokens cannot be found in its text, as in a tokenizer written in Python."""

    def encode(self, *given: Any, **options: Any) -> list[int]:
        return super().encode(*given, **options)


def without_offsets(of: PreTrainedTokenizerFast) -> TokenizerWrapper:
    return TokenizerWrapper(WithoutOffsets(tokenizer_object=of.backend_tokenizer))


class Rendered:
    """A chat with the places that were found in it, and the renders that it took."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        messages: list[dict[str, Any]],
        tools: Any = None,
        refuse: Any = lambda messages: False,
    ) -> None:
        self._tokenizer, self._refuse = tokenizer, refuse
        self._tools = tools
        self.text = self.render(messages, add_generation_prompt=True)
        without = self.render(messages)
        self.renders = 0
        self.encoded = EncodedText(tokenizer, self.text)
        chat = ChatPlaces(tokenizer, messages, tools, {}, self.render)
        self.places = chat.find(self.text, len(without), self.encoded)
        self.head = chat.head()
        unknown = chat.find(self.text, None, self.encoded)
        assert refuse(messages) or unknown == self.places, "it is found out if it is not known"
        self.renders -= 1

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        self.renders = getattr(self, "renders", 0) + 1
        if self._refuse(messages):
            raise ValueError("not like that")
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=self._tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return text

    @property
    def beginnings(self) -> list[str]:
        tokens = self.encoded.tokens
        return [self._tokenizer.decode(tokens[:place]) for place in self.places]


def wrapped(template: str = TEMPLATE) -> TokenizerWrapper:
    fast = make_tokenizer()
    fast.chat_template = template
    return TokenizerWrapper(fast)


def test_places_are_the_head_the_last_messages_end_and_the_answers_beginning() -> None:
    chat = Rendered(wrapped(), [SYSTEM, USER], TOOLS)
    head, end, begun = chat.beginnings
    assert head.endswith("}<|im_end|>\n<|im_start|>user\n")
    assert end.endswith("river.<|im_end|>\n")
    assert begun == end + "<|im_start|>assistant\n"
    assert chat.text == begun + "<think>\n"
    assert chat.head == head


def test_the_end_of_the_last_query_stays_a_place_while_tools_are_called() -> None:
    tokenizer = wrapped()
    first = Rendered(tokenizer, [SYSTEM, USER], TOOLS)
    calls = Rendered(tokenizer, [SYSTEM, USER, *CALLS], TOOLS)
    assert calls.renders == 0, "all of it was known"
    assert set(first.places) < set(calls.places)
    assert len(calls.places) == len(first.places) + 2
    for place in first.places:
        assert calls.encoded.tokens[:place] == first.encoded.tokens[:place]
    elsewhere = wrapped()
    cold = Rendered(elsewhere, [SYSTEM, USER, *CALLS], TOOLS)
    assert cold.renders == 2, "the head, and the prompt up to the query"
    assert set(first.places[:2]) < set(cold.places)
    assert Rendered(elsewhere, [SYSTEM, USER, *CALLS, *CALLS], TOOLS).renders == 0


def test_a_template_that_refuses_a_part_of_a_conversation_costs_that_place_only() -> None:
    messages = [SYSTEM, USER, *CALLS]
    whole = Rendered(wrapped(), messages)
    for refuse in (
        lambda given: given[-1]["content"] == chat_places._MARK,
        lambda given: given == [SYSTEM, USER],
        lambda given: given != messages,
    ):
        chat = Rendered(wrapped(), messages, refuse=refuse)
        assert set(chat.places) < set(whole.places)
        assert set(whole.places[-2:]) <= set(chat.places)
    assert chat.head == ""


def test_without_a_generation_prompt_or_a_system_message_there_are_fewer_places() -> None:
    tokenizer = wrapped("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    chat = Rendered(tokenizer, [USER])
    assert chat.places == (len(chat.encoded.tokens) - 1,)


@pytest.mark.parametrize("exact", [True, False], ids=["offsets", "no offsets"])
def test_a_token_across_a_border_is_behind_it(exact: bool) -> None:
    fast = merging()
    tokenizer = TokenizerWrapper(fast) if exact else without_offsets(fast)
    text = "system\nNo weather.\nuser: Naïve 🙂 question?\nNext\nuser: \nNo.\n"
    encoded = EncodedText(tokenizer, text)
    assert encoded.tokens == fast.encode(text, add_special_tokens=False)
    for index in range(len(text) + 1):
        before = encoded.before(index)
        held = fast.decode(encoded.tokens[:before])
        assert text[:index].startswith(held.rstrip("�")), (index, held)
        assert index - len(held.rstrip("�")) <= 3, "at most the token that lies across it is lost"


def test_what_is_remembered_is_bounded_and_goes_with_its_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_places, "_HEADS", 3)
    monkeypatch.setattr(chat_places, "_TURNS", 4)
    monkeypatch.setattr(chat_places, "_HEAD_CHARACTERS", 1000)
    tokenizer = wrapped()
    for n in range(10):
        system = {"role": "system", "content": f"You are number {n}. " * n}
        assert Rendered(tokenizer, [system, USER]).renders == 1
        assert Rendered(tokenizer, [system, USER]).renders == 0
    memory = chat_places._memories[tokenizer]
    assert (len(memory.heads), len(memory.turns)) == (3, 4)
    assert memory.characters == sum(len(head) for head in memory.heads.values()) <= 1000
    Rendered(tokenizer, [{"role": "system", "content": "long " * 300}, USER])
    assert memory.characters == sum(len(head) for head in memory.heads.values()) <= 1000
    before = len(chat_places._memories)
    del tokenizer
    assert len(chat_places._memories) == before - 1


@pytest.mark.parametrize("cuttable", [True, False])
def test_a_request_renders_its_conversation_at_most_twice(
    cuttable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = make_tokenizer()
    fast.chat_template = TEMPLATE
    render, renders = fast.apply_chat_template, 0

    def counted(messages: list[dict[str, Any]], **options: Any) -> Any:
        nonlocal renders
        renders += len(messages) > 2 and messages[0] == SYSTEM
        return render(messages, **options)

    monkeypatch.setattr(fast, "apply_chat_template", counted)
    loaded: Any = SimpleNamespace(
        tokenizer=TokenizerWrapper(fast),
        context_length=None,
        longest_token=20,
        cuttable=cuttable,
    )
    messages = [SYSTEM, USER]
    for _ in range(5):
        messages = [*messages, *CALLS]
        renders = 0
        encoded = encode(ChatPrompt.of(messages, TOOLS), loaded)
        assert renders == 1 if cuttable else renders <= 2
        parser = encoded.parser()
        assert parser is not None
        assert parser.in_reasoning
        assert bool(encoded.places) is not cuttable
    with pytest.raises(InvalidRequest, match="does not show tools"):
        fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        encode(ChatPrompt.of([USER, *CALLS[1:]], TOOLS), loaded)
