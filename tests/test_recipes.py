"""The recipes of the guide, each run, and read by a type checker."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import pty
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import httpx2
import pytest

import mlx_engine
from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    EngineBusy,
    EngineDead,
    EngineStopped,
    GenerationError,
    InvalidRequest,
)
from mlx_engine.testing import FakeAnswer, FakeEngine, FakeRequest, Gate
from tests.conftest import ROOT
from tests.test_types import _errors, mypy  # noqa: F401 - a fixture
from tests.waiting import until

pytestmark = pytest.mark.anyio

TEXT = (ROOT / "mlx_engine/guide/recipes.md").read_text("utf-8")
_BLOCK = re.compile(r"^## (.*?)\n.*?```python\n(.*?)```", re.DOTALL | re.MULTILINE)
RECIPES: dict[str, str] = dict(_BLOCK.findall(TEXT))
USER = {"role": "user", "content": "Hi"}


def recipe(title: str, **instead: object) -> Any:
    """A recipe as a module, that is not run; ``instead`` takes the place of what it imports."""
    module = types.ModuleType("recipe")
    sys.modules["recipe"] = module  # which dataclasses look for
    exec(compile(RECIPES[title], title, "exec"), vars(module))
    vars(module).update(instead)
    return module


def test_there_are_recipes_of_a_handy_length() -> None:
    assert len(RECIPES) == TEXT.count("```python") == 10
    for title, code in RECIPES.items():
        lines = [
            line for line in code.splitlines() if line and not line.startswith(("import", "from"))
        ]
        assert 10 <= len(lines) <= 40, f"{title}: {len(lines)}"
        assert ast.parse(code)


def test_a_type_checker_has_nothing_to_say(mypy: list[str], tmp_path: Path) -> None:  # noqa: F811
    assert not [error for code in RECIPES.values() for error in _errors(mypy, tmp_path, code)]


def test_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(
        "A script without await",
        SimpleEngine=lambda _: FakeEngine(
            {"The capital of France is": " Paris.", "Name three colours.": "Red."}
        ),
    )
    made.main()
    out = capsys.readouterr().out
    assert out.startswith(" Paris.\nRed.Usage(")


# The batch job


async def test_a_job_is_resumed_where_it_was(tmp_path: Path) -> None:
    job = recipe("A batch job that can be resumed")
    path = tmp_path / "answers.jsonl"
    prompts = {str(n): f"number {n}" for n in range(6)}
    failing = {
        **{text: text.upper() for text in prompts.values()},
        "number 3": [GenerationError("x")],
    }
    async with FakeEngine(failing, max_batch_size=2) as engine:
        await job.run_job(engine, prompts, path)
        assert sorted(ids(path)) == ["0", "1", "2", "4", "5"]
    with path.open("a") as file:
        file.write('{"id": "3", "te')  # the machine has lost its power
    async with FakeEngine("THREE") as engine:
        await job.run_job(engine, prompts, path)
        await job.run_job(engine, prompts, path)
    assert len(engine.requests) == 1
    assert sorted(ids(path)) == sorted(prompts)
    last = json.loads(path.read_text().splitlines()[-1])
    assert (last["id"], last["text"], last["finish_reason"]) == ("3", "THREE", "stop")


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


async def test_a_job_that_is_cancelled_keeps_what_is_done(tmp_path: Path, tiny_path: Path) -> None:
    job = recipe("A batch job that can be resumed")
    path, prompts = tmp_path / "answers.jsonl", {str(n): f"number {n}" for n in range(40)}
    async with BatchedEngine(tiny_path, max_batch_size=2) as engine:
        task = asyncio.create_task(job.run_job(engine, prompts, path))
        await until(lambda: path.exists() and len(path.read_text()) > 500)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        done = set(ids(path))
        assert 0 < len(done) < 40
        await job.run_job(engine, prompts, path)
    assert sorted(ids(path)) == sorted(prompts), "each once"


# The agent


async def test_an_agent_calls_tools_until_it_knows() -> None:
    made = recipe("An agent with tools")
    tools = {"weather": lambda city: {"Paris": "sunny"}[city]}

    def call(city: str) -> FakeAnswer:
        return FakeAnswer(tool_calls=[("weather", {"city": city})])

    async with FakeEngine.script(call("Rome"), call("Paris"), "It is sunny.") as engine:
        assert await made.agent(engine, "And?", [made.WEATHER], tools) == "It is sunny."
    told = [
        message["content"]
        for message in engine.requests[-1].messages or ()
        if message["role"] == "tool"
    ]
    assert told == ["error: KeyError('Rome')", "sunny"]
    async with FakeEngine(call("Paris")) as engine:
        said = await made.agent(engine, "And?", [made.WEATHER], tools, turns=2)
    assert (said, len(engine.requests)) == ("I have not found an answer.", 2)


# The terminal


async def test_streams_side_by_side_and_the_key_of_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe("Two streams side by side, and keys that cancel them")
    gates = [Gate(), Gate()]
    answers = {name: [name, gate, " more"] for name, gate in zip("ab", gates, strict=True)}
    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as terminal, os.fdopen(master, "w") as keys:
        monkeypatch.setattr(sys, "stdin", terminal)
        async with FakeEngine(answers, max_batch_size=2) as engine:
            streams = [engine.stream_generate(name) for name in "ab"]
            with made.cancelled_by_keys(streams):
                task = asyncio.create_task(made.show(streams))
                for gate in gates:
                    await gate.reached(by=task)
                keys.write("2")
                keys.flush()
                await until(lambda: engine.requests[1].outcome == "cancelled")
                gates[0].open()
                await task
            ends = [stream.result.finish_reason for stream in streams]
            assert ends == ["stop", "cancelled"]
            streams = [engine.stream_generate(name) for name in "bb"]
            with made.cancelled_by_keys(streams):
                task = asyncio.create_task(made.show(streams))
                await gates[1].reached(3, by=task)
                keys.write("q")
                keys.flush()
                await task
            assert [stream.result.finish_reason for stream in streams] == ["cancelled"] * 2
    line = capsys.readouterr().out.split("\r")
    assert f"{'a more':38} | {'b':38}" in line


# The service


@pytest.fixture
def service() -> Any:
    made = recipe("A web service")
    made.engine = FakeEngine({"Hi": "Hello there!"}, queue_limit=4)
    return made


async def test_a_service_streams_text_and_says_what_is_wrong(service: Any) -> None:
    transport = httpx2.ASGITransport(app=service.app)
    async with (
        service.lifespan(service.app),
        httpx2.AsyncClient(transport=transport, base_url="http://here") as http,
    ):
        for path in ("/chat", "/whole"):
            answer = await http.post(path, json=[USER])
            assert (answer.status_code, answer.text) == (200, "Hello there!")
            answer = await http.post(path, json=[{"role": "robot"}])
            assert (answer.status_code, answer.text[:8]) == (400, "messages")
        await service.engine.stop()
        for path in ("/chat", "/whole"):
            answer = await http.post(path, json=[USER])
            assert (answer.status_code, "stopped" in answer.text) == (503, True)


# Tests, extraction, retries, budgets, sessions


def test_the_tests_pass(tmp_path: Path) -> None:
    module = tmp_path / "test_application.py"
    module.write_text(RECIPES["Tests with the fake engine"], "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", module.name]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 passed" in ended.stdout, ended.stdout


async def test_an_extraction(tiny_path: Path) -> None:
    made = recipe("Structured extraction")
    text = '{"name": "Ada Lovelace", "born": 1815, "languages": ["English"]}'
    cut = FakeAnswer(text[:20], finish_reason="length")
    async with FakeEngine.script(text, cut) as engine:
        assert await made.extract(engine, "Ada") == made.Person("Ada Lovelace", 1815, ["English"])
        assert await made.extract(engine, "Ada") is None


async def test_retries() -> None:
    made = recipe("Trying again")
    busy, dead = EngineBusy("full", retry_after=0.0), EngineDead("gone")
    async with FakeEngine.script(busy, dead, "at last") as engine:
        result = await made.with_retries(engine, lambda: engine.generate("x"))
        assert result.text == "at last"
    for error in (busy, dead, GenerationError("boom")):
        async with FakeEngine([error]) as engine:
            with pytest.raises(type(error)):
                await made.with_retries(engine, lambda engine=engine: engine.generate("x"), 2)
        assert len(engine.requests) == 2
    async with FakeEngine() as engine:
        with pytest.raises(InvalidRequest):
            await made.with_retries(engine, lambda: engine.generate(""))
        assert len(engine.requests) == 1
    with pytest.raises(EngineStopped):
        await made.with_retries(engine, lambda: engine.generate("x"))


async def test_a_budget(tiny_path: Path) -> None:
    made = recipe("A budget of tokens")
    messages = [{"role": "system", "content": "Be brief."}]
    for number in range(8):
        messages += [{**USER, "content": f"Question {number}"}]
        messages += [{"role": "assistant", "content": f"Answer {number}"}]
    messages.append(USER)
    async with BatchedEngine(tiny_path) as engine:
        whole = await engine.count_tokens(messages)
        kept = await made.fitting(engine, messages, whole // 2)
        assert await engine.count_tokens(kept) <= whole // 2
        assert (kept[0], kept[-1]) == (messages[0], messages[-1])
        assert [message["role"] for message in kept[1:4]] == ["user", "assistant", "user"]
        assert await made.fitting(engine, messages, whole) == messages
        assert await made.fitting(engine, messages, 1) == [messages[0], messages[-1]]
    asked: list[FakeRequest] = []

    def answer(request: FakeRequest) -> str:
        asked.append(request)
        return "yes " * 500

    async with FakeEngine(answer) as engine:
        await made.reply(engine, messages, budget=60)
    assert len(asked[0].prompt_tokens) + (asked[0].params.max_tokens or 0) == 60


@pytest.mark.parametrize("kind", ["fake", "real"])
async def test_a_session_prefills_each_turn_once(kind: str, tiny_path: Path) -> None:
    made = recipe("A session")
    engine: BaseEngine
    engine = FakeEngine("A river.") if kind == "fake" else mlx_engine.SimpleEngine(tiny_path)
    async with engine:
        session = made.Session(engine, "You are brief. " * 20)
        for text in ("Name a river.", "Where is it?", "How long is it?"):
            await session.say(text)
        assert [message["role"] for message in session.messages] == [
            "system",
            *["user", "assistant"] * 3,
        ]
        whole = await engine.count_tokens(session.messages)
        assert session.prefilled < 1.2 * whole
        with pytest.raises(InvalidRequest):
            await session.say(5)
        assert len(session.messages) == 7
