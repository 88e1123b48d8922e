"""The application around its APIs: access, errors, limits, and what it tells of itself."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from mlx_engine import (
    ContextLengthExceeded,
    EngineBusy,
    EngineDead,
    EngineState,
    EngineStopped,
    GenerationError,
    InvalidRequest,
    ModelLoadError,
)
from mlx_engine.agents import AGENTS
from mlx_engine.server import LOOPBACK, create_app
from mlx_engine.testing import FakeEngine, Gate
from tests.server.asgi import CHAT, Client, ask
from tests.waiting import until

pytestmark = pytest.mark.anyio

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine("Hi.", max_batch_size=4, context_length=100, model="org/tiny") as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine: FakeEngine) -> Any:
    return create_app(engine)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/models", "/v1/models/org/tiny"])
async def test_a_base_may_have_v1_or_not_and_slashes_too_many(app: Any, path: str) -> None:
    """As people write it into settings, and clients put it together."""
    method = "GET" if "models" in path else "POST"
    mounted = Starlette(routes=[Mount("/llm", app)])
    for same in (path, path[3:], f"/{path}", f"{path}/", f"/v1{path}", f"//v1//v1{path}//"):
        assert (await ask(app, HELLO, same, method=method)).status == 200
        assert (await ask(mounted, HELLO, f"/llm{same}", method=method)).status == 200


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b"", 400, "body"),
        (b"{", 400, "body"),
        (b"\xff\xfe", 400, "body"),
        (b'{"messages": "\\ud800"', 400, "body"),
        (b'{"a":' + b"[" * 100_000, 400, "body"),
        (b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "messages"),
        (b"[]", 400, "body"),
        (b'"x"', 400, "body"),
        ({}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "Hello"}, 400, "messages"),
        ({"messages": [1]}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages"),
        ({"messages": [{"role": "owl", "content": "hoo"}]}, 400, "messages"),
        ({**HELLO, "stream": "yes"}, 400, "stream"),
        ({**HELLO, "stream_options": 1}, 400, "stream_options"),
        ({**HELLO, "n": 0}, 400, "n"),
        ({**HELLO, "n": 1_000}, 400, "n"),
        ({**HELLO, "n": "two"}, 400, "n"),
        ({**HELLO, "seed": -2}, 400, "seed"),
        ({**HELLO, "seed": "x", "n": 2}, 400, "seed"),
        ({**HELLO, "temperature": "hot"}, 400, "temperature"),
        ({**HELLO, "max_tokens": -2}, 400, "max_tokens"),
        ({**HELLO, "thinking": {"type": "deep"}}, 400, "thinking"),
        ({**HELLO, "tool_choice": "required"}, 400, "tool_choice"),
        ({**HELLO, "tool_choice": "any", "tools": [{"type": "web_search"}]}, 400, "tool_choice"),
        ({**HELLO, "tool_choice": {"type": "function", "function": {}}}, 400, "tool_choice"),
        ({**HELLO, "grammar": 'root ::= "a"'}, 400, "grammar"),
        ({**HELLO, "guided_grammar": "x"}, 400, "guided_grammar"),
        ({**HELLO, "structured_outputs": {"grammar": "x"}}, 400, "structured_outputs"),
        ({**HELLO, "structured_outputs": {"json": {}, "regex": "a"}}, 400, "structured_outputs"),
        (
            {**HELLO, "guided_json": {}, "response_format": {"type": "json_object"}},
            400,
            "guided_json",
        ),
        (
            {**HELLO, "response_format": {"type": "json_object", "schema": 1}},
            400,
            "response_format",
        ),
        ({**HELLO, "max_tokens": "many"}, 400, "max_tokens"),
        ({**HELLO, "stop": ["a"] * 100}, 400, "stop"),
        ({**HELLO, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({**HELLO, "top_logprobs": 2}, 400, "top_logprobs"),
        ({**HELLO, "logprobs": True, "top_logprobs": 200}, 400, "top_logprobs"),
        ({**HELLO, "tools": {}}, 400, "tools"),
        ({**HELLO, "tools": [1]}, 400, "tools"),
        ({**HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
        ({**HELLO, "response_format": {"type": "xml"}}, 400, "response_format"),
        ({**HELLO, "response_format": {"type": "json_schema"}}, 400, "response_format"),
        ({**HELLO, "response_format": "json"}, 400, "response_format"),
        ({**HELLO, "reasoning_effort": "utmost"}, 400, "reasoning_effort"),
        ({**HELLO, "chat_template_kwargs": {"tools": 1}}, 400, "chat_template_kwargs"),
        ({**HELLO, "model": 7}, 400, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests(app: Any, body: Any, status: int, named: str, stream: bool) -> None:
    if isinstance(body, dict):
        body = {"stream": stream, **body}
    reply = await ask(app, body)
    assert reply.status == status
    assert reply.json["error"]["param"] == named
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert len(reply.data) < 2_000


async def test_an_image_is_refused_by_its_name(app: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    reply = await ask(app, {"messages": [{"role": "user", "content": [image]}]})
    assert reply.status == 400
    assert "image_url" in reply.json["error"]["message"]


async def test_a_prompt_that_is_too_long_is_told_in_the_words_that_agents_know(app: Any) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 200}], "stream": True}
    error = (await ask(app, body)).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 100 tokens" in error["message"]


async def test_more_tokens_than_are_left_means_all_that_are_left(
    app: Any, engine: FakeEngine
) -> None:
    for limit in (97, 32_000):
        assert (await ask(app, {**HELLO, "max_tokens": limit})).status == 200
        assert (await ask(app, {**HELLO, "max_completion_tokens": limit})).status == 200
    assert engine.requests[-1].params.max_tokens is None


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (EngineBusy("full", retry_after=3.2), 429, "4"),
        (EngineDead("gone"), 503, "2"),
        (EngineStopped("stopping"), 503, "2"),
        (GenerationError("no memory left"), 500, None),
        (ModelLoadError("no file"), 500, None),
        (InvalidRequest("messages", "no"), 400, None),
        (
            ContextLengthExceeded("p", prompt_tokens=9, max_tokens=None, context_length=4),
            400,
            None,
        ),
        (RuntimeError("a secret"), 500, None),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_errors_before_the_first_token_have_their_status(
    error: Exception, status: int, retry: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for stream in (False, True):
        async with FakeEngine([error]) as engine:
            reply = await ask(create_app(engine), {**HELLO, "stream": stream})
        assert reply.status == status
        assert reply.headers.get("retry-after") == retry
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}


async def test_an_error_after_the_first_token_is_an_event() -> None:
    async with FakeEngine(["Hi", GenerationError("no memory left")]) as engine:
        transport = httpx2.ASGITransport(app=create_app(engine))
        http = httpx2.AsyncClient(transport=transport)
        async with openai.AsyncOpenAI(
            base_url="http://x/v1", api_key="any", http_client=http, max_retries=0
        ) as client:
            stream = await client.chat.completions.create(
                model="fake", stream=True, messages=[{"role": "user", "content": "Hello"}]
            )
            with pytest.raises(openai.APIError, match="no memory left"):
                async for _ in stream:
                    pass


async def test_what_nobody_thought_of_tells_nothing_of_itself(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(engine, "stream_chat", fail)
    for stream in (False, True):
        reply = await ask(create_app(engine), {**HELLO, "stream": stream})
        assert reply.status == 500
        assert b"secret" not in reply.data
    assert "a secret" in caplog.text


async def test_signs_of_life_come_from_the_moment_that_a_request_is_in() -> None:
    gate = Gate()
    async with FakeEngine([gate, "Hi."]) as engine:
        app = create_app(engine, keep_alive_seconds=0.005)
        client = Client(app, CHAT, {**HELLO, "stream": True})
        task = asyncio.create_task(client.run())
        await until(lambda: client.data.count(b"data: ") > 4)
        gate.open()
        await task
    first, *others = [event["choices"][0]["delta"] for event in client.events[:-1]]
    assert first == {"role": "assistant", "content": ""}
    assert others[:3] == [{}, {}, {}]
    assert client.events[-1] == "[DONE]"


async def test_keys(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlx_engine.server")
    app = create_app(engine, api_keys=["one", "two"])
    for headers in (
        {},
        {"authorization": "Bearer onf"},
        {"authorization": "Basic one"},
        {"x-api-key": ""},
        {"x-api-key": "\xff"},
    ):
        for path, method in ((CHAT, "POST"), ("/metrics", "GET"), ("/v1/models", "GET")):
            reply = await ask(app, HELLO, path, method=method, headers=headers)
            assert reply.status == 401
            assert reply.json["error"]["code"] == "invalid_api_key"
    for headers in (
        {"authorization": "bearer two"},
        {"x-api-key": "one"},
        {"x-api-key": "another server's", "authorization": "Bearer two"},
        {"x-api-key": "one", "authorization": "Bearer another-server's"},
    ):
        assert (await ask(app, HELLO, headers=headers)).status == 200
    assert (await ask(app, None, "/health", method="GET")).status == 200
    assert "onf" not in caplog.text


async def test_the_page_tells_nothing_that_needs_a_key(engine: FakeEngine) -> None:
    app = create_app(engine, api_keys=["secret"])
    page = await ask(app, None, "/", method="GET", headers={"host": "<b>:1"})
    assert page.status == 200
    assert b"tiny" not in page.data
    assert b"secret" not in page.data
    assert b"<b>" not in page.data
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert (await ask(app, None, "/status", method="GET")).status == 401
    mounted = Starlette(routes=[Mount("/llm", app)])
    assert b"http://localhost:8080/llm\n" in (await ask(mounted, None, "/llm/", method="GET")).data


async def test_the_page_loads_nothing_from_elsewhere(app: Any) -> None:
    page = (await ask(app, None, "/", method="GET")).data.decode()
    addresses = set(re.findall(r"https?://[^/\s\"'&<]*", page))
    assert addresses == {"http://localhost:8080"}
    assert not re.findall(r"(?:src|href)=(?!\"data:,)", page)


@pytest.mark.parametrize("keys", ["one", [""], ["\xe9"]])
async def test_keys_that_are_none(engine: FakeEngine, keys: Any) -> None:
    with pytest.raises(InvalidRequest, match="api_keys"):
        create_app(engine, api_keys=keys)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8080"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"host": "LocalHost:1"}, 200),
        ({"host": "evil.example:8080"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "["}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "app://desktop"}, 200),
    ],
)
async def test_names_of_the_host(engine: FakeEngine, headers: Any, status: int) -> None:
    app = create_app(engine, hosts=LOOPBACK)
    assert (await ask(app, HELLO, headers=headers)).status == status
    assert (await ask(app, None, "/v1/models", method="GET", headers=headers)).status == status


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"\ud83d", "\ufffd"),
        (r"a\uDE00b", "a\ufffdb"),
        (r"\ud83d\ud83d\ude00\ude00", "\ufffd\U0001f600\ufffd"),
        (r"\ud83dA", "\ufffdA"),
        (r"\\ud83d\ud83d", "\\ud83d\ufffd"),
        (r"\\\ud83d\n", "\\\ufffd\n"),
    ],
)
async def test_half_a_surrogate_pair_is_a_sign_that_says_so(
    app: Any, engine: FakeEngine, escaped: str, text: str
) -> None:
    """An agent that has cut a text within one has it in its conversation from then on."""
    body = f'{{"messages": [{{"role": "user", "content": "{escaped}"}}]}}'
    assert (await ask(app, body.encode())).status == 200
    assert engine.requests[-1].messages == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("many", "count"),
    [("[],", 2**18), ("{},", 2**18), ('{"a": [1]},', 2**17), ("1,", 2**22), ('"",', 2**22)],
)
async def test_a_body_of_more_values_than_a_request_needs_is_refused(
    app: Any, many: str, count: int
) -> None:
    """Millions of objects take seconds to make, in which nobody else's stream goes on."""
    reply = await ask(app, b'{"messages": [], "x": [%b0]}' % (many.encode() * count))
    assert reply.status == 400
    assert reply.json["error"]["param"] == "body"
    text = {**HELLO, "x": many * 2**18}  # in a text they are none
    assert (await ask(app, text)).status == 200


async def test_a_mark_of_byte_order_is_none_of_the_body(app: Any, engine: FakeEngine) -> None:
    """Windows puts one before what it writes as UTF-8."""
    body = json.dumps(HELLO).encode()
    assert (await ask(app, b"\xef\xbb\xbf" + body)).status == 200
    assert (await ask(app, b"\xef\xbb\xbf\xef\xbb\xbf" + body)).status == 400


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/messages/count_tokens"])
async def test_a_compressed_body_is_refused_by_that_name(app: Any, path: str) -> None:
    """And not as bad JSON, which it is not."""
    body = gzip.compress(json.dumps(HELLO).encode())
    reply = await ask(app, body, path, headers={"content-encoding": "gzip"})
    assert reply.status == 400
    assert "is compressed" in reply.json["error"]["message"]
    assert (await ask(app, HELLO, path, headers={"content-encoding": "Identity"})).status == 200


async def test_a_body_that_says_that_it_is_too_large_is_not_read(engine: FakeEngine) -> None:
    app = create_app(engine, max_body_bytes=200)
    for declared in ("201", "9" * 5_000):
        client = Client(app, CHAT, HELLO, headers={"content-length": declared})
        await client.run()
        assert client.status == 413
        assert client._given
    for declared in ("", "-1", "x", "\xb2", "200"):
        assert (await ask(app, HELLO, headers={"content-length": declared})).status == 200


async def test_limits(engine: FakeEngine) -> None:
    app = create_app(engine, max_body_bytes=200)
    assert (await ask(app, HELLO)).status == 200
    reply = await ask(app, {**HELLO, "more": "x" * 200})
    assert reply.status == 413

    gate = Gate()
    async with FakeEngine([gate, "Hi."], max_batch_size=4) as held:
        app = create_app(held, max_requests_per_client=1)
        task = asyncio.create_task(ask(app, HELLO))
        await gate.reached()
        reply = await ask(app, HELLO)
        assert reply.status == 429
        assert reply.headers["retry-after"] == "1"
        gate.open()
        assert (await task).status == 200
        assert (await ask(app, HELLO)).status == 200


async def test_a_body_that_does_not_come(engine: FakeEngine) -> None:
    client = Client(create_app(engine, body_seconds=0.01), CHAT, HELLO)
    client._given.clear()
    await client.run()
    assert client.status == 408


async def test_models_are_told_to_both_kinds_of_clients(app: Any) -> None:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app)) as http:
        theirs = openai.AsyncOpenAI(base_url="http://here/v1", api_key="any", http_client=http)
        models = await theirs.models.list()
        assert [model.id for model in models.data] == ["org/tiny"]
        assert (await theirs.models.retrieve("org/tiny")).object == "model"
        with pytest.raises(openai.NotFoundError):
            await theirs.models.retrieve("gpt-5")
        other = anthropic.AsyncAnthropic(base_url="http://here", api_key="any", http_client=http)
        async for model in other.models.list():
            assert model.display_name == "org/tiny"
            assert model.created_at.year >= 2024
            assert model.lifecycle == "active"
            assert model.max_input_tokens == 100


async def test_what_it_tells_of_itself(app: Any, engine: FakeEngine) -> None:
    await ask(app, HELLO)
    page = (await ask(app, None, "/", method="GET")).data.decode()
    assert "export ANTHROPIC_BASE_URL=http://localhost:8080\n" in page
    assert "export ANTHROPIC_MODEL=org/tiny\n" in page
    for agent in AGENTS.values():
        assert f"\n{agent.command}" in page or f">{agent.command}" in page
    (model,) = (await ask(app, None, "/status", method="GET")).json["models"]
    assert (model["name"], model["state"], model["running"]) == ("org/tiny", "running", 0)
    assert model["completion_tokens"] == engine.stats().completion_tokens
    metrics = (await ask(app, None, "/metrics", method="GET")).data.decode()
    assert f'mlx_engine_finished_total{{model="org/tiny"}} {engine.stats().finished}.0' in metrics
    assert 'mlx_engine_http_requests_total{ending="200",endpoint="chat.completions"}' in metrics
    health = await ask(app, None, "/health", method="GET")
    assert health.json == {"status": "ok", "models": {"org/tiny": "running"}}


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/v1/embeddings", "POST", 404), (CHAT, "GET", 405), ("/nothing", "GET", 404)],
)
async def test_what_is_not_there(app: Any, path: str, method: str, status: int) -> None:
    """It is no model that is missing: clients look for another one then."""
    reply = await ask(app, None, path, method=method)
    assert reply.status == status
    assert path in reply.json["error"]["message"]
    assert reply.json["error"]["code"] == ("unknown_url" if status == 404 else None)


@pytest.mark.parametrize(
    ("path", "method", "kind"),
    [
        ("/v1/messages", "GET", "invalid_request_error"),
        ("/messages/batches", "POST", "not_found_error"),
        ("/v1/messages/count_tokens/x", "POST", "not_found_error"),
    ],
)
async def test_what_is_not_there_has_the_form_of_its_api(
    app: Any, path: str, method: str, kind: str
) -> None:
    reply = await ask(app, None, path, method=method)
    assert reply.status == (404 if kind == "not_found_error" else 405)
    assert reply.json["type"] == "error"
    assert reply.json["error"]["type"] == kind
    assert reply.json["request_id"] == reply.headers["request-id"]


async def test_what_was_ignored_is_said(app: Any) -> None:
    body = {
        **HELLO,
        "user": "ann",
        "store": False,
        "prediction": {"type": "content"},
        "stream_options": {"include_usage": True, "include_obfuscation": False, "each": True},
        "tools": [{"type": "web_search"}, {"type": "namespace", "tools": []}],
        "evil\r\nx-injected": 1,
    }
    reply = await ask(app, body)
    assert reply.status == 200
    said = reply.headers["x-mlx-engine-ignored"]
    for word in ("prediction", "web_search", "namespace", "stream_options.each"):
        assert word in said
    for word in ("user", "store", "usage", "obfuscation", "\r", "\n"):
        assert word not in said


@pytest.mark.parametrize("name", ["", " ", "x ", " x", "x" * 1_000 + " y", "\x7f", "\t", "\u00e9"])
@pytest.mark.parametrize("stream", [True, False])
async def test_any_name_of_a_field_can_be_said(app: Any, name: str, stream: bool) -> None:
    """A header that begins or ends with a space is none; servers drop the connection then."""
    for body in ({**HELLO, name: 1}, {**HELLO, name: 1, " ": 1}):
        reply = await ask(app, {**body, "stream": stream})
        assert reply.status == 200
        assert "x-mlx-engine-ignored" in reply.headers


async def test_functions_cannot_be_imported_from_outside(app: Any, engine: FakeEngine) -> None:
    reply = await ask(app, {**HELLO, "logits_processors": ["os:system"]})
    assert reply.status == 200
    assert not engine.requests[-1].params.logits_processors


async def test_several_models(engine: FakeEngine) -> None:
    async with FakeEngine("I am the other.") as other:
        app = create_app({"one": engine, "two": other})
        for model in ("", "gpt-5"):
            assert (await ask(app, {**HELLO, "model": model})).status == 404
        reply = await ask(app, {**HELLO, "model": "two"})
        assert reply.json["choices"][0]["message"]["content"] == "I am the other."


async def test_it_starts_and_stops_engines_that_are_its_own() -> None:
    engine = FakeEngine("Hi.")
    app = create_app(engine, owns_engines=True)
    health = await ask(app, None, "/health", method="GET")
    assert health.status == 503
    async with app.router.lifespan_context(app):
        assert engine.state is EngineState.RUNNING
    assert engine.state is EngineState.STOPPED


async def test_it_can_be_mounted(app: Any) -> None:
    whole = Starlette(routes=[Mount("/llm", app)])
    assert (await ask(whole, HELLO, "/llm" + CHAT)).status == 200


async def test_a_request_is_a_line_in_the_log_without_its_prompt(
    app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlx_engine.server")
    reply = await ask(app, HELLO)
    (line,) = [record.getMessage() for record in caplog.records if "server" in record.name]
    assert reply.headers["x-request-id"] in line
    assert "chat.completions: 200" in line
    assert "Hello" not in line
    assert json.dumps(reply.json["usage"]["prompt_tokens"]) in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"api_key": "k"}, r"write api_keys=\[...\]"),
        ({"host": "::"}, "that is the server's, .*: uvicorn.run\\(app, host=...\\)"),
        ({"port": 80}, "uvicorn.run\\(app, port=...\\)"),
        ({"model": "demo"}, "the first argument is the engine"),
        ({"temperature": 1}, "write defaults=SamplingParams\\(temperature=...\\)"),
        ({"max_new_tokens": 1}, "write defaults=SamplingParams\\(max_tokens=...\\)"),
        ({"max_batch_size": 2}, "an option of the engine: BatchedEngine\\(model, max_batch_size"),
        ({"idle_time": 2}, r"of create_app\(\); did you mean 'idle_timeout'\?"),
    ],
    ids=str,
)
def test_arguments_of_others(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{next(iter(options))}: .*{said}"):
        create_app(FakeEngine(), **options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("demo", r"must be an engine, such as BatchedEngine\('demo'\), or a mapping of names "),
        ({"a": "demo"}, r"BatchedEngine\('demo'\)"),
        (["demo"], r"BatchedEngine\(model\), or a mapping .*, not \['demo'\]"),
        (None, "not None"),
        (FakeEngine, r"not a class: write FakeEngine\(model\)"),
    ],
    ids=str,
)
def test_what_is_no_engine(given: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^engine: .*{said}"):
        create_app(given)


def test_its_signature_is_its_own() -> None:
    names = [*inspect.signature(create_app).parameters]
    assert names[:2] == ["engine", "api_keys"]
    assert "options" not in names
