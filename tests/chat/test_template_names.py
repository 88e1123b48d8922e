"""What of a request's chat_template_kwargs reaches the model's chat template."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest
from mlx_lm.chat_templates import deepseek_v32
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from mlx_engine import InvalidRequest, SimpleEngine
from mlx_engine.chat.renderer import Renderer
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "hi"}]
OF_THE_CALL = [
    name
    for name in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    if name not in ("self", "kwargs", "documents")
]


@pytest.fixture
async def engine(tiny_engine: SimpleEngine) -> AsyncIterator[SimpleEngine]:
    async with tiny_engine as engine:
        yield engine


def read(template: Any, *names: str) -> list[str]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(TokenizerWrapper(tokenizer))
    read = renderer.names(False) | renderer.names(True)
    return [name for name in names if name in read]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ a }}", ["a"]),
        ("{% if a is defined %}{% endif %}", ["a"]),
        ("{% if not a is defined %}{% set a = 1 %}{% endif %}{{ a }}", ["a"]),
        ("{% set a = a | default(true) %}{{ a }}", ["a"]),
        ("{% set a = 1 %}{{ a }}", []),
        ("{% for a in messages %}{{ a }}{% endfor %}", []),
        ("{% macro m(x) %}{{ x }}{{ b }}{% endmacro %}{{ m(1) }}", ["b"]),
        ("{% generation %}{{ a }}{% endgeneration %}", ["a"]),
        (
            "{% for m in messages %}{% if a %}{% continue %}{% endif %}{% endfor %}{{ b }}",
            ["a", "b"],
        ),
        ("{{ raise_exception('x') }}{{ strftime_now('x') }}{{ range(3) }}", []),
        ("{{ documents }}", ["documents"]),
        ("".join(f"{{{{ {name} }}}}" for name in OF_THE_CALL), []),
        ({"default": "{{ a }}", "tool_use": "{{ b }}"}, ["a", "b"]),
        ("{% nonsense %}{{ a }}", []),
    ],
)
def test_only_what_a_template_reads_is_passed(template: Any, expected: list[str]) -> None:
    names = ["a", "b", "documents", "range", "raise_exception", "strftime_now", *OF_THE_CALL]
    assert sorted(read(template, *names)) == sorted(expected)


def test_a_function_in_the_place_of_a_template_gets_its_own_arguments() -> None:
    def render(messages: Any, thinking: bool = False, padding: bool = False, **rest: Any) -> str:
        return ""

    tokenizer = TokenizerWrapper(make_tokenizer(), chat_template=render)
    assert Renderer(tokenizer).names(False) == {"thinking"}


def test_a_function_that_passes_on_what_it_gets_reads_what_it_names() -> None:
    tokenizer = TokenizerWrapper(make_tokenizer(), chat_template=deepseek_v32.apply_chat_template)
    assert "enable_thinking" in Renderer(tokenizer).names(False)


PROGRAM = "{% for i in range(10 ** 9) %}{% endfor %}"


async def test_a_request_does_not_bring_its_own_template(engine: SimpleEngine) -> None:
    with pytest.raises(InvalidRequest, match="'chat_template' is set by the engine"):
        engine.stream_chat(USER, chat_template_kwargs={"chat_template": PROGRAM})


@pytest.mark.parametrize(
    "name",
    sorted(
        set(OF_THE_CALL)
        - {
            "conversation",
            "tools",
            "chat_template",
            "tokenize",
            "add_generation_prompt",
            "return_dict",
        }
    ),
)
async def test_what_is_for_the_call_has_no_effect_and_is_noted(
    engine: SimpleEngine, name: str
) -> None:
    expected = await engine.chat(USER, max_tokens=4)
    result = await engine.chat(USER, max_tokens=4, chat_template_kwargs={name: True})
    assert result.tokens == expected.tokens
    assert result.usage.prompt_tokens == expected.usage.prompt_tokens
    assert result.notes == (f"chat_template_kwargs: this chat template does not look at {name}",)


async def test_a_template_with_tags_of_its_own_is_rendered_as_often_as_any_other(
    engine: SimpleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = engine._holder.model().tokenizer
    monkeypatch.setattr(
        tokenizer._tokenizer,
        "chat_template",
        "{% generation %}{{ messages[0].content }}{{ a }}{% endgeneration %}",
    )
    renders = 0
    inner = PreTrainedTokenizerBase.apply_chat_template

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal renders
        renders += args[1] == USER
        return inner(*args, **kwargs)

    async def count(kwargs: dict[str, Any]) -> int:
        nonlocal renders
        renders = 0
        with monkeypatch.context() as patch:
            patch.setattr(
                tokenizer._tokenizer,
                "apply_chat_template",
                counted.__get__(tokenizer._tokenizer),
                raising=False,
            )
            result = await engine.chat(USER, max_tokens=1, chat_template_kwargs=kwargs)
        names = [name for name in kwargs if name != "a"]
        assert bool(result.notes) == bool(names)
        return renders

    assert await count({f"x{i}": i for i in range(20)} | {"a": 1}) == await count({})
