"""Requests that are too large are refused before anything is built from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    Choice,
    EngineManager,
    InvalidRequest,
    JSONSchema,
    ProcessEngine,
    RemoteEngine,
    RequestLimits,
    SamplingParams,
    SimpleEngine,
)
from mlx_engine.cli.options import engine_options, parse
from mlx_engine.config import EngineConfig
from mlx_engine.remote.wire.options import options_from_wire, options_to_wire
from mlx_engine.testing import FakeEngine

NONE = RequestLimits(**{field.name: None for field in fields(RequestLimits)})

ENGINES: dict[str, Callable[..., BaseEngine]] = {
    "fake": FakeEngine,
    "simple": lambda **options: SimpleEngine("demo", **options),
    "batched": lambda **options: BatchedEngine("demo", **options),
    "process": lambda **options: ProcessEngine("demo", **options),
    "manager": lambda **options: EngineManager("demo", **options),
    "remote": lambda **options: RemoteEngine("/tmp/nobody-is-there", **options),
}


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def calling(arguments: Any, count: int = 1, name: str = "f") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call] * count}


def tool(parameters: Any = None, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}


def nested(depth: int) -> Any:
    inner: Any = {}
    for level in range(depth):
        inner = {"properties": inner} if level % 2 else [inner]
    return inner


def text(prompt: Any = "hi", **options: Any) -> Callable[[BaseEngine], object]:
    return lambda engine: engine.stream_generate(prompt, **options)


def chat(*messages: Any, **options: Any) -> Callable[[BaseEngine], object]:
    return lambda engine: engine.stream_chat(list(messages) or [user()], **options)


# The limit, the option that the error names, and a request that is too large by it.
LARGE: list[tuple[str, str, Callable[[BaseEngine], object]]] = [
    ("stop", "stop", text(stop=["x"] * 400_000)),
    ("stop", "stop", text(stop=("x",) * 65)),
    ("stop", "stop", text(params=SamplingParams(stop=["x"] * 65))),
    ("stop_characters", "stop", text(stop="x" * 8_000_000)),
    ("stop_characters", "stop", text(stop=["x" * 1000] * 9)),
    ("stop_token_ids", "stop_token_ids", text(stop_token_ids=range(10**12))),
    ("stop_token_ids", "stop_token_ids", text(stop_token_ids=[1] * 1025)),
    ("logit_bias", "logit_bias", text(logit_bias=dict.fromkeys(range(500_000), 1.0))),
    ("logits_processors", "logits_processors", text(logits_processors=["a:b"] * 65)),
    ("constraint_characters", "constraint", text(constraint=JSONSchema({"enum": ["x" * 300_000]}))),
    ("choices", "constraint", text(constraint=Choice([f"{n}" for n in range(2_000)]))),
    ("name_characters", "logits_processors", text(logits_processors=["a:" + "b" * 300])),
    ("text_characters", "prompt", text(prompt="x" * 20_000_000)),
    ("prompt_tokens", "prompt", text(prompt=range(10**12))),
    ("prompt_tokens", "prompt", text(prompt=[5] * 2_200_000)),
    ("messages", "messages", chat(*[user()] * 300_000)),
    ("messages", "messages", chat(*[user("")] * 10_001)),
    ("text_characters", "messages", chat(user("x" * 20_000_000))),
    ("text_characters", "messages", chat(*[user("x" * 10_000)] * 2000)),
    ("text_characters", "messages", chat(user([{"type": "text", "text": "x" * 20_000_000}]))),
    ("text_characters", "messages", chat(user(), calling({"a": "x" * 20_000_000}))),
    ("values", "messages", chat(user([{"type": "text", "text": ""}] * 200_000))),
    ("values", "messages", chat(user(), calling({"a": [0] * 300_000}))),
    ("values", "messages", chat(user(), calling('{"a": [' + "0," * 300_000 + "0]}"))),
    ("values", "messages", chat(user(), calling("[" + "[]," * 300_000 + "[]]"))),
    ("nesting", "messages", chat(user(), calling({"a": nested(1500)}))),
    ("nesting", "messages", chat(user(), calling('{"a": ' + "[" * 150 + "]" * 150 + "}"))),
    ("tool_calls", "messages", chat(user(), calling("{}", count=1025))),
    ("name_characters", "messages", chat(user(), calling("{}", name="f" * 257))),
    ("name_characters", "messages", chat({"role": "r" * 257, "content": ""})),
    ("tools", "tools", chat(tools=[{}] * 1_500_000)),
    ("tools", "tools", chat(tools=[tool()] * 1025)),
    ("tool_characters", "tools", chat(tools=[tool(name="f") | {"x": "y" * 5_000_000}])),
    ("values", "tools", chat(tools=[tool({"x": [0] * 300_000})])),
    ("nesting", "tools", chat(tools=[tool(nested(1500))])),
    ("nesting", "tools", chat(tools=[tool(nested(150_000))])),
    ("name_characters", "tools", chat(tools=[tool(name="f" * 257)])),
    (
        "template_kwargs",
        "chat_template_kwargs",
        chat(chat_template_kwargs=dict.fromkeys(map(str, range(65)))),
    ),
    ("template_characters", "chat_template_kwargs", chat(chat_template_kwargs={"a": "x" * 2**21})),
    ("nesting", "chat_template_kwargs", chat(chat_template_kwargs={"a": nested(1500)})),
    ("values", "chat_template_kwargs", chat(chat_template_kwargs={"a": [0] * 300_000})),
    ("name_characters", "chat_template_kwargs", chat(chat_template_kwargs={"a" * 257: 1})),
]


def test_every_limit_is_tried() -> None:
    assert {limit for limit, _, _ in LARGE} == {field.name for field in fields(RequestLimits)}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("limit", "option", "ask"), LARGE)
def test_a_request_that_is_too_large_is_refused_when_it_is_made(
    name: str, limit: str, option: str, ask: Callable[[BaseEngine], object]
) -> None:
    engine = ENGINES[name]()
    began = time.thread_time()
    with pytest.raises(InvalidRequest, match=rf"^{option}: .*\d+ .*{limit}\)$") as caught:
        ask(engine)
    # Generous: what is refused by counting takes a thousandth, or some tenths at most. It is the
    # time of this thread: others of a busy machine do not count.
    assert time.thread_time() - began < 5
    assert caught.value.option == option
    assert str(getattr(RequestLimits(), limit)) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_coding_agent_sends_is_taken(name: str) -> None:
    engine = ENGINES[name]()
    properties = {f"option_{i}": {"type": "string", "description": "d" * 200} for i in range(12)}
    tools = [tool({"properties": properties}, f"tool_{i}") for i in range(300)]
    turn = [user("u" * 300), calling('{"path": "a/b", "n": 12345678901234567890123}'), user("r")]
    engine.stream_chat(turn * 1000, tools=tools, stop=["</done>"] * 16)
    engine.stream_generate("word " * 200_000, logit_bias=dict.fromkeys(range(10_000), -100))
    engine.stream_generate([1] * 1_000_000)


@pytest.mark.parametrize("name", ENGINES)
def test_limits_are_an_option_of_the_engine(name: str) -> None:
    engine = ENGINES[name](limits=RequestLimits(messages=2, stop=None, stop_characters=None))
    engine.stream_generate("hi", stop=["x"] * 100)
    with pytest.raises(InvalidRequest, match=r"^messages: has 3 messages; 2 are the most"):
        engine.stream_chat([user()] * 3)
    with pytest.raises(InvalidRequest, match=r"^limits: must be RequestLimits"):
        ENGINES[name](limits={"messages": 2})
    engine = ENGINES[name](limits=NONE)
    engine.stream_chat([user("")] * 20_000, tools=[tool()] * 2000)


@pytest.mark.parametrize("limit", [field.name for field in fields(RequestLimits)])
def test_a_limit_that_is_none_is_refused(limit: str) -> None:
    for bad in (-1, "5", 1.5, True, 10**400):
        with pytest.raises(InvalidRequest, match=f"^{limit}: must be an integer"):
            RequestLimits(**{limit: bad})


def test_a_limit_counts_exactly() -> None:
    # A list with a mapping: 6 values, two levels, and 15 characters but for those of the content.
    engine = FakeEngine(limits=RequestLimits(text_characters=23, values=6, nesting=2))
    engine.stream_chat([user("12345678")])
    with pytest.raises(InvalidRequest, match=r"24 characters; 23 are the most"):
        engine.stream_chat([user("123456789")])
    with pytest.raises(InvalidRequest, match=r"7 values; 6 are the most"):
        engine.stream_chat([user("") | {"": 1}])
    engine = FakeEngine(limits=RequestLimits(nesting=2))
    with pytest.raises(InvalidRequest, match=r"3 levels; 2 are the most"):
        engine.stream_chat([user() | {"x": []}])


def test_what_refers_to_itself_is_too_deep() -> None:
    ring: dict[str, Any] = {"role": "user", "content": "hi"}
    ring["self"] = ring
    with pytest.raises(InvalidRequest, match=r"^messages: .* levels"):
        FakeEngine().stream_chat([ring])


def test_counting_ends_at_the_limit() -> None:
    class Endless(Mapping[str, Any]):
        seen = 0

        def __getitem__(self, key: str) -> Any:
            type(self).seen += 1
            return 1

        def __iter__(self) -> Iterator[str]:
            return map(str, range(10**12))

        def __len__(self) -> int:
            return 10**12

    with pytest.raises(InvalidRequest, match=r"^tools: .* values"):
        FakeEngine().stream_chat([user()], tools=[Endless()])
    assert Endless.seen < 300_000


def test_integers_that_nobody_writes_out_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^messages: .*(digits|JSON)"):
        FakeEngine().stream_chat([user(), calling({"n": 10**5000})])


@pytest.mark.anyio
async def test_an_integer_that_a_model_has_written_out_stays_text() -> None:
    async with FakeEngine() as engine:
        shown = await engine.render_chat([user(), calling('{"n": ' + "9" * 5000 + "}")])
    assert "9" * 5000 in shown.text


@pytest.mark.parametrize(
    ("option", "ask"),
    [
        ("stop", text(stop=["a\ud800"])),
        ("messages", chat(user("a\ud800"))),
        ("messages", chat(user(), calling({"\udfff": 1}))),
        ("tools", chat(tools=[tool({"d": "\ud83d"})])),
        ("chat_template_kwargs", chat(chat_template_kwargs={"a": ["\ud800"]})),
    ],
)
def test_text_that_is_none_is_refused_by_name(
    option: str, ask: Callable[[BaseEngine], object]
) -> None:
    for make in ENGINES.values():
        with pytest.raises(
            InvalidRequest, match=rf"^{option}: (number \d \(.*\) )?is not valid Unicode"
        ):
            ask(make())


def test_limits_travel() -> None:
    limits = RequestLimits(messages=None, tools=7)
    config = EngineConfig.of("simple", "demo", {"limits": limits})
    assert config.limits == limits
    assert options_from_wire(options_to_wire(config)) == {"limits": limits}


def test_limits_of_a_host_are_given_on_the_command_line() -> None:
    line = ["host", "--socket", "s", "--limit", "messages=7", "--limit", "stop=none"]
    assert engine_options(parse(line))["limits"] == RequestLimits(messages=7, stop=None)
    for bad in ("nonsense=3", "messages", "messages=x"):
        with pytest.raises(SystemExit):
            parse([*line, "--limit", bad])


def test_the_table_says_what_the_defaults_are() -> None:
    table = RequestLimits.__doc__ or ""
    for field in fields(RequestLimits):
        row = next(line for line in table.splitlines() if f"``{field.name}``" in line)
        assert f" {field.default:,} " in row
