"""What type checkers say of an application: nothing where it is right, and much where it is not."""

from __future__ import annotations

import ast
import builtins
import collections.abc
import inspect
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

import mlx_engine
import mlx_engine.testing
from mlx_engine import BaseEngine, Engine
from mlx_engine.engine.chat_interface import ChatEngine
from mlx_engine.engine.map_interface import MapEngine
from tests.conftest import ROOT
from tests.waiting import PATIENCE

RIGHT = """
from collections.abc import AsyncIterator
from typing import Any, TypedDict, Unpack

from mlx_engine import (
    BatchedEngine,
    ChatRequestOptions,
    Choice,
    Constraint,
    Decode,
    DraftModel,
    Engine,
    EngineDefault,
    EngineManager,
    EngineState,
    GenerationError,
    GenerationResult,
    LogitsProcessor,
    Message,
    Outcome,
    Outcomes,
    ProcessEngine,
    Prompt,
    RayEngine,
    RemoteEngine,
    RenderedChat,
    SimpleEngine,
    SyncEngine,
    ToolCallDelta,
)
from mlx_engine.testing import Answers, FakeAnswer, FakeEngine, Gate, Load, Piece


def engines() -> list[Engine]:
    simple: Engine = SimpleEngine("demo", decode=DraftModel("draft"))
    batched: Engine = BatchedEngine("demo", max_batch_size=4)
    process: Engine = ProcessEngine("demo")
    remote: Engine = RemoteEngine("socket")
    ray: Engine = RayEngine("demo")
    manager: Engine = EngineManager("demo", replicas=2)
    return [simple, batched, process, remote, ray, manager]


class Order(TypedDict):
    number: int


class Wrapped:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def chat(self, text: str, **options: Unpack[ChatRequestOptions]) -> GenerationResult:
        return await self.engine.chat([{"role": "user", "content": text}], **options)


class Remembering:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.known: dict[str, GenerationResult] = {}

    async def ask(self, text: str) -> str:
        if text not in self.known:
            self.known[text] = await self.engine.generate(text, max_tokens=5)
        return self.known[text].text


async def talk(engine: Engine) -> None:
    await engine.chat([{"role": "user", "content": "Hi"}])
    plain = [{"role": "user", "content": "Hi"}]
    await engine.chat(plain)
    messages: list[Message] = [{"role": "system", "content": "Be brief."}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "Weather?"}]})
    call = {"id": "1", "function": {"name": "weather", "arguments": "{}"}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": "1", "name": "weather", "content": "sun"})
    async with engine.stream_chat(messages, max_tokens=5) as stream:
        async for chunk in stream:
            print(chunk.text, chunk.content, chunk.reasoning)
            delta: ToolCallDelta | None = chunk.tool_call
            print(delta and delta.arguments)
    plain.append((await engine.chat(plain, thinking=False, tool_choice="none")).message())
    messages.append(stream.result.message())
    messages += [call.reply(21) for call in stream.result.tool_calls if call.ok]
    await engine.chat([*messages, stream.result], max_reasoning_tokens=5)
    async for text in engine.stream_chat(messages, parallel_tool_calls=False).text():
        print(text.upper())
    rendered: RenderedChat = await engine.render_chat(messages, continue_final_message=True)
    count = await engine.count_tokens(messages) + await engine.count_tokens("x") + 1
    count += await engine.count_tokens([1, 2]) + rendered.cached_tokens
    print(await engine.decode(await engine.encode("x")), count, engine.model, engine.supports_tools)
    default: EngineDefault = "default"
    await engine.generate("Hi", decode=default)
    await engine.chat(messages, output=Order, constraint=None)
    bound: Constraint = Choice(["yes", "no"])
    await engine.generate("Hi", constraint=bound)
    async with engine.stream_generate("Hi", output={"type": "object"}) as filling:
        print(filling.partial, [filling.partial async for _ in filling])
    order: Order = (await engine.generate("Hi", output=Order)).parsed
    print(order["number"])
    await jobs(engine, messages)
    if engine.state is EngineState.RUNNING and engine.stats().state == "running":
        await engine.stop()


async def jobs(engine: Engine, messages: list[Message]) -> None:
    plain: Outcomes[int] = engine.map(["a", [1, 2], messages], timeout=30, max_wait=5)
    named: Outcomes[str] = engine.map({"a": "b", "c": "d"}, retries=2, temperature=0.5)
    pairs = engine.map(zip(["a"], [messages]), ordered=True, concurrency=4)
    outcome: Outcome[str]
    async with named:
        async for outcome in named:
            print(outcome.id.upper(), outcome.unwrap().text, outcome.attempts + 1)
    for outcome in [one async for one in pairs] + pairs.unread:
        error = outcome.error
        if error is not None and error.retryable:
            await engine.restart()
        elif outcome.result is not None:
            print(outcome.result.text, outcome.to_dict()["attempts"])
    async for numbered in plain:
        print(numbered.id + 1)

    async def later() -> AsyncIterator[tuple[int, Prompt]]:
        yield 1, messages

    print([one.id + 1 async for one in engine.map(later())])
    results = await engine.generate_batch([messages, "a"], tools=None, timeout=5)
    print(len(results), (await engine.warm(messages, tools=[])).cached_tokens, engine.width)


def without_await(engine: Engine) -> None:
    with SimpleEngine("demo").sync() as llm:
        result: GenerationResult = llm.generate("Hi", max_tokens=5, timeout=3)
        messages: list[Message] = [{"role": "user", "content": "Hi"}, result.message()]
        with llm.stream_chat(messages, thinking=False) as stream:
            for text in stream.text():
                print(text.upper(), stream.partial)
        for chunk in llm.stream_generate([1, 2]):
            print(chunk.content)
        whole: GenerationResult = llm.stream_chat(messages).collect()
        print(whole.to_dict()["text"], llm.engine.limits)
        for outcome in llm.map({"a": "Hi"}, concurrency=2):
            print(outcome.id.upper(), outcome.unwrap().text)
        number: int = llm.run_blocking(lambda: 5) + llm.count_tokens(messages)
        print(number, llm.stats().running, llm.run(llm.engine.failed))
    front: SyncEngine[Engine] = SyncEngine(engine)
    print(front.encode("x")[0] + 1)
    any_front: SyncEngine = front  # both may be said without what they are of
    any_outcomes: list[Outcome] = list(any_front.map(["a"]))
    print(any_front.engine.state, any_outcomes[0].id)


def scripts() -> None:
    FakeEngine.script("one", FakeAnswer("two"), GenerationError("boom"), ["a", Gate()], model="m")
    with FakeEngine.script("one").sync() as llm:
        print(llm.engine.requests[0].outcome)
    gate = Gate()
    answers = {"Hi": ["Hel", gate, "lo"]}
    FakeEngine(answers)
    mixed = {"Hi": "Hello", "Bye": ["By", gate, "e"], "Oh": FakeAnswer("!", reasoning="?")}
    FakeEngine(mixed)
    FakeEngine({"Hi": ["Hel", gate, "lo"]})
    pieces = ["Hel", gate, GenerationError("out of memory")]
    FakeEngine(pieces)
    FakeEngine(FakeAnswer(pieces))
    FakeEngine(iter([pieces, "again"]))
    FakeEngine(lambda request: request.params.stop and "a" or "b")
    load = [gate, GenerationError("no")]
    FakeEngine(load=load)
    typed: list[Piece] = ["a", gate]
    given: Answers = typed
    loading: Load = gate
    FakeEngine(given, load=loading)


def processor(tokens: Any, logits: Any) -> Any:
    return logits


chosen: LogitsProcessor = processor
decode: Decode = "auto"
"""

WRONG = """
import mlx_engine
from mlx_engine import Engine, Message, SimpleEngin  # error: attr-defined

mlx_engine.SimplEngine("demo")  # error: attr-defined
engine: Engine = object()  # error: assignment


async def ask(engine: Engine) -> None:
    await engine.generate("Hi", max_token=5)  # error: call-arg
    await engine.generat("Hi")  # error: attr-defined
    await engine.chat([{"role": "user"}, 5])  # error: list-item
    await engine.chat([{"role": "user"}], tool_choice="sometimes")  # error: arg-type
    await engine.count_tokens(5)  # error: arg-type
    engine.map(["a"], concurency=5)  # error: call-overload
    await engine.map(["a"])  # error: misc
    await engine.stream_chat([])  # error: misc
    await engine.generate("Hi", time_out=5)  # error: call-arg


message: Message = {"rol": "user"}  # error: typeddict-unknown-key
llm = mlx_engine.SimpleEngine("demo").sync()
llm.generate("Hi", max_token=5)  # error: call-arg
llm.generat("Hi")  # error: attr-defined
text: int = llm.generate("Hi").text  # error: assignment
llm.stream_chat([], tool_choice="sometimes")  # error: arg-type
llm.map(["Hi"], concurency=3)  # error: call-overload
"""


# The package is what an installed one is: what is wrong inside is for its own check. To read
# transformers, of which an application sees nothing, would take five times as long as all else.
CONFIG = """
[mypy]
strict = true
enable_error_code = ignore-without-code, truthy-bool
[mypy-mlx_engine.*]
follow_imports = silent
[mypy-transformers.*,mlx_lm.*,mlx.nn.*,mlx.utils.*,ray.*,regex]
ignore_missing_imports = true
follow_imports = skip
"""


@pytest.fixture(scope="module")
def mypy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the type checker, which remembers between two runs what it has read."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("mypy")
    config = folder / "mypy.ini"
    config.write_text(CONFIG)
    options = [f"--config-file={config}", f"--cache-dir={folder}", "--hide-error-context"]
    return [sys.executable, "-m", "mypy", *options]


def _errors(mypy: list[str], tmp_path: Path, program: str) -> list[str]:
    path = tmp_path / "application.py"
    path.write_text(program)
    done = subprocess.run(
        [*mypy, str(path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 4,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    return [line for line in done.stdout.splitlines() if ": error:" in line]


def test_an_application_that_is_right_passes(mypy: list[str], tmp_path: Path) -> None:
    assert _errors(mypy, tmp_path, RIGHT) == []


def test_mistakes_are_found(mypy: list[str], tmp_path: Path) -> None:
    found = _errors(mypy, tmp_path, WRONG)
    said = [re.search(r":(\d+): error: .*\[([\w-]+)\]", line) for line in found]
    lines = enumerate(WRONG.splitlines(), 1)
    expected = {number: line.split("# error: ")[1] for number, line in lines if "# error" in line}
    assert {int(one[1]): one[2] for one in said if one} == expected


def test_type_checkers_do_not_see_what_gives_any_name() -> None:
    """Or a mistake in a name would be of any type."""
    tree = ast.parse((ROOT / "mlx_engine/__init__.py").read_text("utf-8"))
    seen = [node for node in tree.body if not isinstance(node, ast.If)]
    assert not [n for node in seen for n in ast.walk(node) if isinstance(n, ast.FunctionDef)]
    hidden = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    assert hidden == ["TYPE_CHECKING", "not TYPE_CHECKING"]


def test_the_names_for_type_checkers_are_those_of_the_package() -> None:
    tree = ast.parse((ROOT / "mlx_engine/__init__.py").read_text("utf-8"))
    (checking,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    named = {
        alias.name: node.module
        for node in checking.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert named == {name: home for home, names in mlx_engine._HOMES.items() for name in names}
    assert sorted(named) == sorted(mlx_engine.__all__)


ENGINES = [getattr(mlx_engine, name) for name in mlx_engine.__all__]
ENGINES = [e for e in ENGINES if inspect.isclass(e) and issubclass(e, BaseEngine)]
ENGINES.append(mlx_engine.testing.FakeEngine)
METHODS = [
    name
    for protocol in (Engine, ChatEngine, MapEngine)
    for name in vars(protocol)
    if not name.startswith("_") or name in ("__aenter__", "__aexit__")
]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_every_engine_has_the_signatures_of_the_protocol(engine: type, name: str) -> None:
    asked, given = inspect.getattr_static(Engine, name), inspect.getattr_static(engine, name)
    assert isinstance(given, property) is isinstance(asked, property)
    if not isinstance(asked, property):
        assert inspect.signature(given) == inspect.signature(asked)
        assert inspect.iscoroutinefunction(given) is inspect.iscoroutinefunction(asked)
    assert inspect.getdoc(getattr(engine, name)) or name.startswith("_")


def _annotations(thing: object) -> dict[str, str]:
    """What is written in the signatures, and the fields, of a public thing; and where."""
    found: dict[str, str] = {}
    if isinstance(thing, type):
        for name, text in getattr(thing, "__annotations__", {}).items():
            if not name.startswith("_"):
                found[f"{thing.__module__}:{name}"] = str(text)
        # Of the methods those that other rooms call are not meant for users.
        names = dir(thing) if thing in OPEN else ["__init__", *METHODS]
        for name in names:
            value = inspect.getattr_static(thing, name, None)
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, types.FunctionType):
                for number, text in enumerate(function.__annotations__.values()):
                    found[f"{function.__module__}:{name} {number}"] = str(text)
    elif isinstance(thing, types.FunctionType):
        for number, text in enumerate(thing.__annotations__.values()):
            found[f"{thing.__module__}:{thing.__name__} {number}"] = str(text)
    return found


# All of which is for users.
OPEN = {
    mlx_engine.GenerationStream,
    mlx_engine.Engine,
    mlx_engine.testing.FakeRequest,
    mlx_engine.testing.Gate,
}
# What applications do not name: what is made, or said, for them.
INNER = {
    "Body",
    "Channel",
    "Do",
    "Drains",
    "Front",
    "Future",
    "GenerationRequest",
    "InProcessEngine",
    "PartialAnswer",
    "Phase",
    "Producer",
    "QueueConfig",
    "Signals",
    "Take",
}


def test_what_is_in_a_signature_is_exported() -> None:
    public = {*mlx_engine.__all__, *mlx_engine.testing.__all__}
    known = {*dir(builtins), *dir(typing), *dir(collections.abc), *dir(types), "PathLike", "K", "T"}
    missing = set()
    for package in (mlx_engine, mlx_engine.testing):
        for name in package.__all__:
            for where, text in _annotations(getattr(package, name)).items():
                words = set(re.findall(r"[A-Za-z_][\w]*", re.sub(r"'[^']*'|\"[^\"]*\"", "", text)))
                words = {
                    word
                    for word in words - public - known - INNER
                    if word[0].isupper() and "_" not in word
                }
                missing |= {(name, where, word) for word in words}
    assert not missing
