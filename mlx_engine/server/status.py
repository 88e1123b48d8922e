"""The server on itself: models, health, metrics, and a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.routing import BaseRoute, Route

from mlx_engine.server.access import Scope
from mlx_engine.server.api import Api, encode
from mlx_engine.server.failures import Failure
from mlx_engine.server.metrics import CONTENT_TYPE
from mlx_engine.server.models import Model
from mlx_engine.server.openai_values import error_body, new_id
from mlx_engine.server.openapi import openapi
from mlx_engine.server.page import PAGE_HEADERS, SHOWN, page_of
from mlx_engine.server.reply import JSON, ClientGone, Headers, Receive, Reply, Send
from mlx_engine.server.site import Site

Told = tuple[int, bytes, Headers]  # status, body, headers


class _Page:
    """An ASGI application for one ``GET``."""

    def __init__(self, site: Site, tell: Callable[[Scope], Told], *, keyed: bool = True) -> None:
        self._site = site
        self._tell = tell
        self._keyed = keyed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request_id = new_id("req_")
        try:
            self._site.access.check(scope, keyed=self._keyed)
            status, body, headers = self._tell(scope)
        except Failure as failure:
            status, headers = failure.status, JSON + failure.headers
            body = encode(error_body(failure, request_id))
        try:
            await Reply(send, request_id).whole(status, body, headers)
        except ClientGone:
            pass


def status_routes(site: Site, apis: Sequence[tuple[str, Api]]) -> Iterator[BaseRoute]:
    """The routes.

    Args:
        apis: by their paths, behind their base.
    """
    models = site.models

    def listed(scope: Scope) -> Told:
        entries = [_entry(site, name, model) for name, model in models.names.items()]
        ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"], "has_more": False}
        return 200, encode({"object": "list", "data": entries, **ends}), JSON

    def one(scope: Scope) -> Told:
        return 200, encode(_entry(site, *models.find(scope["path_params"]["model"]))), JSON

    def health(scope: Scope) -> Told:
        states = {name: model.state for name, model in models.names.items()}
        well = any(model.is_well for model in models)
        waits = "loading" in states.values()
        told = {"status": "ok" if well else "loading" if waits else "unavailable", "models": states}
        return 200 if well else 503, encode(told), JSON

    def metrics(scope: Scope) -> Told:
        return 200, site.metrics.text(), [(b"content-type", CONTENT_TYPE)]

    def numbers(scope: Scope) -> Told:
        told = {"seconds": int(time.time()) - site.created, "models": list(map(_numbers, models))}
        return 200, encode(told), [*JSON, (b"cache-control", b"no-store")]

    def page(scope: Scope) -> Told:
        return 200, page_of(site, scope), PAGE_HEADERS

    def described(scope: Scope) -> Told:
        return 200, encode(openapi(apis, scope.get("root_path", ""))), JSON

    for base in ("/v1", ""):
        yield Route(f"{base}/models", _Page(site, listed), methods=["GET"])
        yield Route(f"{base}/models/{{model:path}}", _Page(site, one), methods=["GET"])
    yield Route("/health", _Page(site, health, keyed=False), methods=["GET"])
    yield Route("/metrics", _Page(site, metrics), methods=["GET"])
    yield Route("/status", _Page(site, numbers), methods=["GET"])
    yield Route("/openapi.json", _Page(site, described, keyed=False), methods=["GET"])
    # A browser cannot send a key with the address of a page; it tells nothing that needs one.
    yield Route("/", _Page(site, page, keyed=False), methods=["GET"])


def _entry(site: Site, name: str, model: Model) -> dict[str, Any]:
    """A model, in a form that clients of OpenAI's and of Anthropic's API both read."""
    engine = model.engine
    context = None if engine is None else engine.context_length
    return {
        "id": name,
        "object": "model",
        "created": site.created,
        "owned_by": "mlx-engine",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(site.created, UTC).isoformat(),
        "lifecycle": "active",
        # Each of these is where some client looks for the size of the context.
        **dict.fromkeys(
            ("context_length", "max_model_len", "max_input_tokens", "max_tokens"), context
        ),
        "state": model.state,
    }


def _numbers(model: Model) -> dict[str, Any]:
    """Numbers of a model, for the page."""
    told: dict[str, Any] = {"name": model.name, "state": model.state}
    if (engine := model.engine) is None:
        return told
    stats = engine.stats()
    numbers = {name: getattr(stats, name) for name in SHOWN}
    waiting = stats.waiting + model.turns.waiting
    cache = stats.prompt_cache.nbytes
    return {**told, **numbers, "waiting": waiting, "prompt_cache_bytes": cache}
