"""``mlx-engine serve``: a real process, a real model, real sockets and signals."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from mlx_engine.cli import serve
from mlx_engine.cli.options import parse, sampling_params
from mlx_engine.errors import InvalidRequest
from tests.remote.test_host_command import started_as
from tests.waiting import PATIENCE

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
    with serve._bound("127.0.0.1", 0) as door:
        door.listen()
        port = door.getsockname()[1]
        with pytest.raises(InvalidRequest, match="cannot listen"):
            serve.run(parse(["serve", "--port", str(port)]))


def test_what_requests_leave_open_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "serve --temperature 0.7 --top-p 0.9 --served-name a --served-name b"
    args = parse(line.split())
    assert sampling_params(args).temperature == 0.7
    assert args.served_names == ["a", "b"]
    assert args.model == "demo"
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
