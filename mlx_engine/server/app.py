"""``create_app``: the application, and its routes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_engine.checks import flag, integer, integer_or_none, number
from mlx_engine.core.drain import clean_up
from mlx_engine.params import SamplingParams
from mlx_engine.server.access import Access
from mlx_engine.server.addresses import Addresses
from mlx_engine.server.anthropic import Messages
from mlx_engine.server.anthropic_events import error_body as anthropic_error
from mlx_engine.server.api import Api
from mlx_engine.server.arguments import no_others
from mlx_engine.server.body import Bodies
from mlx_engine.server.chat_completions import ChatCompletions
from mlx_engine.server.completions import Completions
from mlx_engine.server.endpoint import Endpoint
from mlx_engine.server.failures import Failure, Kind
from mlx_engine.server.metrics import Metrics
from mlx_engine.server.models import Models
from mlx_engine.server.openai_values import error_body, new_id
from mlx_engine.server.responses import Responses
from mlx_engine.server.served import Given, by_name
from mlx_engine.server.site import Site
from mlx_engine.server.status import status_routes
from mlx_engine.server.token_count import TokenCount


@no_others
def create_app(
    engine: Given | Mapping[str, Given],
    *,
    api_keys: Collection[str] = (),
    hosts: Collection[str] | None = None,
    defaults: SamplingParams | None = None,
    max_body_bytes: int = 32 * 2**20,
    body_seconds: float = 60.0,
    max_requests_per_client: int = 64,
    idle_timeout: float | None = None,
    max_loaded_models: int | None = None,
    memory_bytes: int | None = None,
    keep_alive_seconds: float = 10.0,
    patience_seconds: float = 300.0,
    steady_prompts: bool = True,
    owns_engines: bool = False,
) -> Starlette:
    """Make an ASGI application that serves engines by the APIs of OpenAI and Anthropic.

        app = create_app(BatchedEngine("demo"), owns_engines=True)  # uvicorn module:app

    A client that closes its connection cancels its request: queued, in prefill or in decode, its
    work has left MLX before the application is done with it.

    Several models, each loaded when it is asked for:

        app = create_app({
            "small": lambda: ProcessEngine("mlx-community/..."),
            "large": lambda: ProcessEngine("mlx-community/..."),
        }, idle_timeout=600, max_loaded_models=1)

    What it has loaded itself it stops with its lifespan, ``app.router.lifespan_context(app)``: an
    application that mounts this one enters that within its own.

    Args:
        engine: any engine, which goes by the name of its model; or several models by their names,
            each an engine, a function that makes one, or a ``ServedModel``. What is made here is
            loaded when a request asks for it, which waits for that; a load that fails is a 503.
        api_keys: of which clients need one; without any, everybody is let in who can connect.
        hosts: names by which clients may call the server, ``mlx_engine.server.LOOPBACK`` for one
            that only this machine can reach; ``None`` takes all.
        defaults: for what requests leave open; ``max_tokens`` by default is what the context holds.
        max_body_bytes: of a request; of all that are on their way, four times as many.
        body_seconds: that the body of a request may take to come.
        max_requests_per_client: in work or waiting, and as many whose bodies are on their way, of
            which the first gives way to one more; a client is a key, or else an address.
        idle_timeout: seconds after which what was loaded here is unloaded, if nobody asks for it.
        max_loaded_models: of those loaded here, in memory at once. One that is asked for beyond
            that takes the place of the one used least recently, when that has no requests.
        memory_bytes: the same for all of them together, as far as their sizes are known.
        keep_alive_seconds: of silence, after which streams get a sign of life.
        patience_seconds: for which a client may read nothing of what it is sent.
        steady_prompts: whether what agents put in front of their prompts anew each time, such as
            numbers of sessions, is taken out, so that the prompt cache has the rest.
        owns_engines: whether the engines are started and stopped with the application.

    Raises:
        InvalidRequest: an argument is not acceptable.
    """
    models = Models(
        by_name(engine, owned=flag("owns_engines", owns_engines)),
        idle_timeout=None if idle_timeout is None else _seconds("idle_timeout", idle_timeout),
        max_loaded=integer_or_none("max_loaded_models", max_loaded_models, low=1),
        memory_bytes=integer_or_none("memory_bytes", memory_bytes, low=1),
    )
    most = integer("max_requests_per_client", max_requests_per_client, low=1)
    site = Site(
        models=models,
        access=Access(api_keys, hosts, most),
        metrics=Metrics(models),
        defaults=replace(SamplingParams(), max_tokens=None) if defaults is None else defaults,
        bodies=Bodies(
            integer("max_body_bytes", max_body_bytes, low=1),
            most,
            _seconds("body_seconds", body_seconds),
        ),
        keep_alive_seconds=_seconds("keep_alive_seconds", keep_alive_seconds),
        patience_seconds=_seconds("patience_seconds", patience_seconds),
        steady_prompts=flag("steady_prompts", steady_prompts),
    )
    app = Starlette(
        routes=list(_routes(site)),
        middleware=[Middleware(Addresses)],
        lifespan=partial(_lifespan, models),
        exception_handlers={HTTPException: _no_such_thing},
    )
    app.state.models = models
    return app


def apis() -> dict[str, Api]:
    """Each API, by its path behind the base, which ends in /v1 or does not."""
    return {
        "/chat/completions": ChatCompletions(),
        "/completions": Completions(),
        "/responses": Responses(),
        "/messages": Messages(),
    }


def _routes(site: Site) -> Iterator[BaseRoute]:
    answered = apis()
    counts: dict[str, Api] = {"/messages/count_tokens": Messages("messages.count_tokens")}
    for base in ("/v1", ""):
        for path, api in answered.items():
            yield Route(base + path, Endpoint(site, api), methods=["POST"])
        for path, api in counts.items():
            yield Route(base + path, TokenCount(site, api), methods=["POST"])
    yield from status_routes(site, (*answered.items(), *counts.items()))


@contextlib.asynccontextmanager
async def _lifespan(models: Models, app: Starlette) -> AsyncIterator[None]:
    try:
        await models.preload()
        yield
    finally:
        await clean_up(sys.exception(), partial(models.shutdown, 0))


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """An error of Starlette's own, in the form in which clients read errors."""
    assert isinstance(error, HTTPException)
    kind: Kind = "method" if error.status_code == 405 else "path"
    path = request.url.path[:200]
    said = {"method": "another method is needed here", "path": "there is nothing here"}[kind]
    said = f"{request.method} {path}: {said}; /openapi.json lists what there is"
    failure = Failure(kind, said)
    request_id = new_id("req_")
    body = anthropic_error if "/messages" in path else error_body
    headers = {**(error.headers or {}), "request-id": request_id, "x-request-id": request_id}
    return JSONResponse(body(failure, request_id), error.status_code, headers=headers)


def _seconds(option: str, value: float) -> float:
    return number(option, value, low=0, above=True, endless=True, what="seconds")
