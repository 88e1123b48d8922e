"""Real agents, with a model that reads a file by whatever tool it is offered, and then answers.

They need npm's packages: ``npm install --prefix FOLDER @anthropic-ai/claude-code @openai/codex
@mariozechner/pi-coding-agent``, and ``MLX_ENGINE_AGENTS=FOLDER``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mlx_engine.agents import AGENTS
from mlx_engine.errors import ContextLengthExceeded
from mlx_engine.server import create_app
from mlx_engine.testing import FakeAnswer, FakeEngine, FakeRequest, Gate
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.agents]

FOLDER = Path(os.environ.get("MLX_ENGINE_AGENTS", "no folder"), "node_modules", ".bin")
PROMPT = "Read the file hello.py in this folder with your tool and say what it does."
FILE = "print('a greeting')  # 7f3a\n"
SAID = "It prints a greeting, as 7f3a says."
HEADLESS = {
    "claude": ["-p", PROMPT, "--allowedTools", "Read"],
    "codex": ["exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", PROMPT],
    "pi": ["-p", PROMPT],
}
SECONDS = 120  # that an agent has


@pytest.fixture(params=HEADLESS)
def name(request: pytest.FixtureRequest) -> str:
    agent: str = request.param
    if not (FOLDER / AGENTS[agent].command).exists():
        pytest.skip(f"{agent} is not installed: {__doc__}")
    return agent


@contextlib.asynccontextmanager
async def served(engine: FakeEngine) -> AsyncIterator[str]:
    """The address of a server with this engine, on the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        config = uvicorn.Config(create_app(engine), lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        serving = asyncio.create_task(server.serve(sockets=[door]))
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await serving


@contextlib.asynccontextmanager
async def running(name: str, base: str, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent at its work, in a folder of its own and with no way to other machines."""
    agent, work = AGENTS[name], folder / "work"
    work.mkdir()
    (work / "hello.py").write_text(FILE)
    places = {
        "base": base,
        "model": "fake",
        "context": "200000",
        "key": "local",
        "folder": str(folder),
    }
    agent.write_files(**places)
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "NO_PROXY": "127.0.0.1,localhost",
        **nowhere,
        **agent.environ_for(**places),
        **dict.fromkeys(("DISABLE_AUTOUPDATER", "PI_OFFLINE"), "1"),
    }
    process = await asyncio.create_subprocess_exec(
        str(FOLDER / agent.command),
        *agent.arguments_for(**places),
        *HEADLESS[name],
        cwd=work,
        env=environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def finished(process: asyncio.subprocess.Process) -> str:
    """What it has said, once it has come to its end."""
    out, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode == 0, out.decode()
    return out.decode()


# Tools that agents offer, and what makes them read a file.
_READERS = {
    "read": (("path", "file_path"), "{}"),
    "exec_command": (("cmd",), "cat {}"),
    "shell_command": (("command",), "cat {}"),
}


def reads(work: Path, *pieces: Any) -> Callable[[FakeRequest], FakeAnswer]:
    """Answers: a call of the tool that reads files, then what was asked for."""
    gates = iter(pieces)

    def answer(request: FakeRequest) -> FakeAnswer:
        assert request.messages is not None
        held = list(gates)
        if FILE.strip() in str(request.messages[-1].get("content")):
            return FakeAnswer(SAID, reasoning=[*held, "There it is."])
        for tool in request.tools or ():
            function = tool["function"]
            fields = function.get("parameters", {}).get("properties", {})
            wanted, value = _READERS.get(function["name"].lower(), ((), ""))
            if named := fields.keys() & {*wanted}:
                call = (function["name"], {named.pop(): value.format(work / "hello.py")})
                return FakeAnswer("Let me look.", [*held, "I shall read it."], [call])
        return FakeAnswer([*held, "Agents and files"])  # a title, or the like

    return answer


async def test_it_reads_a_file_and_answers(name: str, tmp_path: Path) -> None:
    """And its second turn finds all of its first in the prompt cache."""
    async with FakeEngine(reads(tmp_path / "work"), max_batch_size=4) as engine:
        async with served(engine) as base, running(name, base, tmp_path) as process:
            assert SAID in await finished(process)
        turns = [request for request in engine.requests if request.tools]
        assert [request.outcome for request in turns] == ["finished"] * 2
        first, second = (request.result().usage for request in turns)
        assert second.cached_tokens >= first.prompt_tokens > 100


@pytest.mark.parametrize("where", ["prefill", "decode"])
async def test_it_is_interrupted_and_the_engine_is_free(
    name: str, tmp_path: Path, where: str
) -> None:
    gate = Gate()
    pieces = [gate] if where == "prefill" else ["Let", gate]
    async with (
        FakeEngine(reads(tmp_path / "work", *pieces)) as engine,
        served(engine) as base,
        running(name, base, tmp_path) as process,
    ):
        await asyncio.wait_for(gate.reached(), SECONDS)
        assert engine.stats().running == 1
        process.send_signal(signal.SIGINT)
        await until(lambda: engine.requests[0].outcome == "cancelled")
        await until(lambda: engine.stats().running == 0)


async def test_it_comes_again_while_the_engine_is_busy(name: str, tmp_path: Path) -> None:
    gate = Gate()

    def answer(request: FakeRequest) -> Any:
        return [gate, "done"] if request.prompt else reads(tmp_path / "work")(request)

    async with FakeEngine(answer, queue_limit=0) as engine:
        other = asyncio.create_task(engine.generate("something long"))
        await gate.reached()
        async with served(engine) as base, running(name, base, tmp_path) as process:
            await until(lambda: engine.stats().rejected > 0, limit=SECONDS)
            gate.open()
            assert SAID in await finished(process)
        await other


async def test_it_comes_again_when_the_engine_was_gone(name: str, tmp_path: Path) -> None:
    """Its end in the middle of an answer is an error that agents take for one that passes."""
    gate = Gate()
    answers = reads(tmp_path / "work", "Let", gate)
    async with (
        FakeEngine(answers) as engine,
        served(engine) as base,
        running(name, base, tmp_path) as process,
    ):
        await asyncio.wait_for(gate.reached(), SECONDS)
        engine.die()
        await engine.stop()
        await engine.start()
        assert SAID in await finished(process)


async def test_it_shortens_a_context_that_is_too_long(name: str, tmp_path: Path) -> None:
    """By the words in which it is told of that; and goes on."""
    if name == "codex":
        pytest.skip("it says that it has no room any more, and ends")
    plain, errors = reads(tmp_path / "work"), list[Exception]()

    def answer(request: FakeRequest) -> FakeAnswer:
        assert request.messages is not None
        found = plain(request)
        if request.messages[-1]["role"] == "tool" and not errors:
            long = {"prompt_tokens": 210_000, "max_tokens": None, "context_length": 200_000}
            errors.append(ContextLengthExceeded("it does not fit", **long))
            return FakeAnswer([errors[0]])
        return found if found.tool_calls and not errors else FakeAnswer(SAID)

    async with FakeEngine(answer, max_batch_size=4) as engine:
        async with served(engine) as base, running(name, base, tmp_path) as process:
            said = await finished(process)
        assert [request.outcome for request in engine.requests].count("failed") == 1
        assert engine.requests[-1].result().text == SAID
        assert SAID in said or name == "pi"  # which does not print what it gets then
