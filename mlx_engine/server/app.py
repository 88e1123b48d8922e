"""``create_app``: the application, and its routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_engine.checks import flag, integer, number
from mlx_engine.engine.interface import Engine
from mlx_engine.params import SamplingParams
from mlx_engine.server.access import Access
from mlx_engine.server.anthropic import Messages
from mlx_engine.server.api import Api
from mlx_engine.server.chat_completions import ChatCompletions
from mlx_engine.server.completions import Completions
from mlx_engine.server.endpoint import Endpoint
from mlx_engine.server.failures import Failure, Kind
from mlx_engine.server.metrics import Metrics
from mlx_engine.server.openai_values import error_body
from mlx_engine.server.responses import Responses
from mlx_engine.server.site import Site, by_name
from mlx_engine.server.status import status_routes
from mlx_engine.server.token_count import TokenCount

# Each API, and its path behind the base, which ends in /v1 or does not.
_APIS: tuple[tuple[str, Api], ...] = (
    ("/chat/completions", ChatCompletions()),
    ("/completions", Completions()),
    ("/responses", Responses()),
    ("/messages", Messages()),
)
_COUNTS: tuple[tuple[str, Api], ...] = (
    ("/messages/count_tokens", Messages("messages.count_tokens")),
)


def create_app(
    engine: Engine | Mapping[str, Engine],
    *,
    api_keys: Collection[str] = (),
    hosts: Collection[str] | None = None,
    defaults: SamplingParams | None = None,
    max_body_bytes: int = 32 * 2**20,
    body_seconds: float = 60.0,
    max_requests_per_client: int = 64,
    keep_alive_seconds: float = 10.0,
    patience_seconds: float = 300.0,
    steady_prompts: bool = True,
    owns_engines: bool = False,
) -> Starlette:
    """Make an ASGI application that serves engines by the APIs of OpenAI and Anthropic.

        app = create_app(BatchedEngine("demo"), owns_engines=True)  # uvicorn module:app

    A client that closes its connection cancels its request: queued, in prefill or in decode, its
    work has left MLX before the application is done with it.

    Args:
        engine: any engine, which goes by the name of its model; or several by their names.
        api_keys: of which clients need one; without any, everybody is let in who can connect.
        hosts: names by which clients may call the server, ``mlx_engine.server.LOOPBACK`` for one
            that only this machine can reach; ``None`` takes all.
        defaults: for what requests leave open; ``max_tokens`` by default is what the context holds.
        max_body_bytes: of a request.
        body_seconds: that the body of a request may take to come.
        max_requests_per_client: in work or waiting; a client is a key, or else an address.
        keep_alive_seconds: of silence, after which streams get a sign of life.
        patience_seconds: for which a client may read nothing of what it is sent.
        steady_prompts: whether what agents put in front of their prompts anew each time, such as
            numbers of sessions, is taken out, so that the prompt cache has the rest.
        owns_engines: whether the engines are started and stopped with the application.

    Raises:
        InvalidRequest: an argument is not acceptable.
    """
    engines = by_name(engine)
    most = integer("max_requests_per_client", max_requests_per_client, low=1)
    site = Site(
        engines=engines,
        access=Access(api_keys, hosts, most),
        metrics=Metrics(engines),
        defaults=replace(SamplingParams(), max_tokens=None) if defaults is None else defaults,
        max_body_bytes=integer("max_body_bytes", max_body_bytes, low=1),
        body_seconds=_seconds("body_seconds", body_seconds),
        keep_alive_seconds=_seconds("keep_alive_seconds", keep_alive_seconds),
        patience_seconds=_seconds("patience_seconds", patience_seconds),
        steady_prompts=flag("steady_prompts", steady_prompts),
    )
    return Starlette(
        routes=list(_routes(site)),
        lifespan=_lifespan(engines) if owns_engines else None,
        exception_handlers={HTTPException: _no_such_thing},
    )


def _routes(site: Site) -> Iterator[BaseRoute]:
    for base in ("/v1", ""):
        for path, api in _APIS:
            yield Route(base + path, Endpoint(site, api), methods=["POST"])
        for path, api in _COUNTS:
            yield Route(base + path, TokenCount(site, api), methods=["POST"])
    yield from status_routes(site, [path for path, _ in (*_APIS, *_COUNTS)])


def _lifespan(engines: Mapping[str, Engine]) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for each in dict.fromkeys(engines.values()):
                await stack.enter_async_context(each)
            yield

    return lifespan


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """An error of Starlette's own, in the form in which clients read errors."""
    assert isinstance(error, HTTPException)
    kind: Kind = "method" if error.status_code == 405 else "not_found"
    said = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return JSONResponse(
        error_body(Failure(kind, said), ""), error.status_code, headers=dict(error.headers or {})
    )


def _seconds(option: str, value: float) -> float:
    return number(option, value, low=0, above=True, endless=True, what="seconds")
