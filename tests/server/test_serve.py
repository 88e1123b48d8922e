"""``mlx-engine serve``: a real process, a real model, real sockets and signals."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from mlx_engine.cli import http_server, serve
from mlx_engine.cli.options import parse, sampling_params
from mlx_engine.cli.served_models import memory_for_weights, served_models, weight_bytes
from mlx_engine.errors import InvalidRequest
from mlx_engine.server import create_app
from mlx_engine.testing import FakeEngine, Gate
from tests.remote.test_host_command import IN_BACKGROUND, started_as
from tests.server.asgi import CHAT
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio

HELLO: Any = [{"role": "user", "content": "Hello"}]


async def test_it_serves_and_drains(tiny_path: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    arguments = ("--port", "0", "--api-key-file", str(keys), "--model", str(tiny_path))
    async with (
        started_as("-m", "mlx_engine", "serve", *arguments) as command,
        asyncio.timeout(PATIENCE),
    ):
        line = await command.line()
        found = re.search(r"on (http://127.0.0.1:\d+) \(with one of 2 keys\)", line)
        assert found, line
        base = f"{found[1]}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="second", max_retries=0) as client:
            answer = await client.chat.completions.create(
                model=tiny_path.name, messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=2
            )
            assert answer.usage is not None
            assert answer.choices[0].logprobs is not None
            assert answer.choices[0].logprobs.content is not None
            again = await client.chat.completions.create(
                model=tiny_path.name,
                messages=HELLO,
                max_tokens=100_000,
                stop=answer.choices[0].message.content or "x",
                n=2,
            )
            assert again.usage is not None
            assert again.usage.prompt_tokens_details is not None
            assert again.usage.prompt_tokens_details.cached_tokens
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="third").models.list()
            assert re.search(r"completions: 200, \d+ prompt tokens", await command.line())
            assert re.search(r"completions: 200, \d+ prompt tokens", await command.line())
            stream = await client.chat.completions.create(
                model=tiny_path.name,
                messages=HELLO,
                max_tokens=1_000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            chunks, asked = 0, False
            async for chunk in stream:
                chunks += bool(chunk.choices[0].delta.content)
                if not asked:
                    command.send(signal.SIGTERM)
                    asked = True
            assert chunk.choices[0].finish_reason == "length"
        code, said = await command.end()
        assert code == 0
        assert re.search(r"completions: 200, \d+ prompt tokens", said)
        assert "waiting up to 30 s for requests in flight (1)" in said
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(base)


@pytest.mark.parametrize("in_process", [(), ("--in-process",)], ids=["process", "in-process"])
async def test_a_server_in_the_background_takes_ctrl_c(
    tiny_path: Path, in_process: tuple[str, ...]
) -> None:
    arguments = ("serve", str(tiny_path), "--port", "0", "--quiet", *in_process)
    async with started_as("-c", IN_BACKGROUND, *arguments) as command:
        assert "serving" in await command.line()
        command.send(signal.SIGINT)
        assert await command.end() == (130, "")


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("serve --host 0.0.0.0 --port 0", "host"),
        ("serve --host no.such.host.invalid --port 0", "host"),
        ("serve --port 123456", "port"),
        ("serve --port 0 --api-key-file /there/is/none", "api_key_file"),
    ],
)
def test_arguments_that_are_not_acceptable(
    line: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "invalid" in line:
        monkeypatch.setenv(serve.KEYS_VARIABLE, "key")
    with pytest.raises(InvalidRequest) as caught:
        serve.run(parse(line.split()))
    assert caught.value.option == option


def test_an_address_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_server.bound("127.0.0.1", 0) as door:
        door.listen()
        port = door.getsockname()[1]
        with pytest.raises(InvalidRequest, match="cannot listen"):
            serve.run(parse(["serve", "--port", str(port)]))


def test_what_requests_leave_open_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "serve --temperature 0.7 --top-p 0.9 --served-name a --served-name b"
    args = parse(line.split())
    assert sampling_params(args).temperature == 0.7
    assert args.served_names == ["a", "b"]
    served = served_models(args, print)
    assert set(served) == {"a", "b"}
    assert served["a"] is served["b"]
    assert served["a"].preload
    assert list(served_models(parse(["serve"]), print)) == ["demo"]
    monkeypatch.setenv(serve.KEYS_VARIABLE, "one, two,three")
    assert serve._keys(None) == ["one", "two", "three"]
    assert serve._keys(None) == [], "what was read is no more in the environment"


@pytest.mark.parametrize(
    ("line", "hosts"),
    [
        ("serve", ["localhost", "127.0.0.1", "::1", "127.0.0.1"]),
        ("serve --allow-host x.org", ["localhost", "127.0.0.1", "::1", "127.0.0.1", "x.org"]),
        ("serve --host 0.0.0.0", None),
        ("serve --host ::1", ["localhost", "127.0.0.1", "::1", "::1"]),
    ],
)
def test_names_of_the_host(line: str, hosts: list[str] | None) -> None:
    assert serve._hosts(parse(line.split())) == hosts


def test_several_models_have_names(tiny_path: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    given = ["--model", "org/x", "--model", f"small={tiny_path}", "--model", str(odd)]
    served = served_models(parse(["serve", *given]), print)
    assert list(served) == ["org/x", "small", "a=b"]
    assert not any(model.preload for model in served.values())
    assert served["small"].weight_bytes() == weight_bytes(str(tiny_path))
    assert (weight_bytes(str(tiny_path)) or 0) > 1_000
    assert weight_bytes("nobody/has-this") is None
    assert (memory_for_weights() or 2**40) > 2**28


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("serve --model a --model b --served-name c", "served_name"),
        ("serve --model x=a --model x=b", "model"),
        ("serve --model /p/a --model /q/a", "model"),
        ("serve --model a --model b --max-batch-size 0", "max_batch_size"),
        ("serve --port 0 --max-models 0", "max_models"),
        ("serve --port 0 --idle-timeout 0", "idle_timeout"),
    ],
)
def test_models_that_are_not_acceptable(line: str, option: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        serve.run(parse(line.split()))
    assert caught.value.option == option


async def test_it_serves_several_and_unloads_them(tiny_path: Path) -> None:
    models = [f"--model={name}={tiny_path}" for name in ("one", "two")]
    arguments = ("--port", "0", "--max-models", "1", "--idle-timeout", "600", *models)
    async with (
        started_as("-m", "mlx_engine", "serve", *arguments) as command,
        asyncio.timeout(PATIENCE),
    ):
        found = re.search(r"serving one and two on (\S+) ", await command.line())
        assert found
        async with openai.AsyncOpenAI(base_url=f"{found[1]}/v1", api_key="any") as client:
            for name in ("one", "two", "one"):
                answer = await client.chat.completions.create(
                    model=name, messages=HELLO, max_tokens=5
                )
                assert answer.model == name
                states = {model.id: model.state async for model in client.models.list()}  # type: ignore[attr-defined]
                assert states == {**dict.fromkeys(("one", "two"), "unloaded"), name: "running"}
        command.send(signal.SIGTERM)
        code, _ = await command.end()
        assert code == 0


async def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    async with (
        started_as("-m", "mlx_engine", "serve", "--port", "0", "--model", str(tmp_path)) as command,
        asyncio.timeout(PATIENCE),
    ):
        code, said = await command.end()
        assert code == 1
        assert str(tmp_path) in said


async def test_a_head_that_does_not_come_to_its_end_and_an_answer_that_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "_HEAD_SECONDS", 0.2)
    gate = Gate()
    async with FakeEngine([gate, "Hi."]) as engine:
        server = http_server.HttpServer(create_app(engine))
        with http_server.bound("127.0.0.1", 0) as door:
            serving = asyncio.create_task(server.serve(sockets=[door]))
            await server.listening(serving)
            port = door.getsockname()[1]
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
            for _, writer in slow:
                writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nx-slow: ")
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                asking = asyncio.create_task(client.post(CHAT, json={"messages": HELLO}))
                await gate.reached()
                async with asyncio.timeout(PATIENCE):
                    for reader, writer in slow:
                        assert await reader.read() == b""
                        writer.close()
                assert not asking.done()
                gate.open()
                assert (await asking).status_code == 200
                assert (await client.get("/health")).status_code == 200
            server.should_exit = True
            await serving


async def test_who_sends_too_much_is_told_so_and_not_cut_off() -> None:
    """Clients send all of a body before they read: a reset would be tried again, and again."""
    async with FakeEngine("Hi.") as engine:
        server = http_server.HttpServer(create_app(engine, max_body_bytes=4 * 2**20))
        with http_server.bound("127.0.0.1", 0) as door:
            serving = asyncio.create_task(server.serve(sockets=[door]))
            await server.listening(serving)
            port = door.getsockname()[1]

            def post() -> tuple[int, bytes]:
                client = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                with contextlib.closing(client):
                    client.request("POST", CHAT, b" " * (14 * 2**20))
                    reply = client.getresponse()
                    return reply.status, reply.read()

            for _ in range(5):
                status, said = await asyncio.to_thread(post)
                assert status == 413
                assert b"4194304 bytes" in said
            server.should_exit = True
            await serving


async def test_more_connections_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for a request make room, the oldest first; those that have one do not."""
    monkeypatch.setattr(http_server, "_CONNECTIONS", 20)
    monkeypatch.setattr(http_server, "_BURST", 1)
    gate = Gate()
    async with FakeEngine([gate, "Hi."], max_batch_size=32) as engine:
        server = http_server.HttpServer(create_app(engine))
        with http_server.bound("127.0.0.1", 0) as door:
            serving = asyncio.create_task(server.serve(sockets=[door]))
            await server.listening(serving)
            port = door.getsockname()[1]
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx2.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=PATIENCE
            ) as client:
                first = asyncio.create_task(client.post(CHAT, json={"messages": HELLO}))
                await gate.reached()
                idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
                for _, writer in idle[::2]:
                    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nx-slow: ")
                async with asyncio.timeout(PATIENCE):
                    for reader, _ in idle[:80]:
                        with contextlib.suppress(ConnectionError):
                            assert await reader.read() == b""
                assert (await client.get("/health")).status_code == 200
                assert len(server.server_state.connections) <= 21

                asking = [
                    asyncio.create_task(client.post(CHAT, json={"messages": HELLO}))
                    for _ in range(19)
                ]
                await until(lambda: engine.stats().running == 20)
                assert (await client.get("/health")).status_code == 503
                gate.open()
                assert {(await task).status_code for task in (first, *asking)} == {200}
                assert (await client.get("/health")).status_code == 200
                for _, writer in idle:
                    writer.close()
            server.should_exit = True
            await serving
