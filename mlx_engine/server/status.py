"""The server on itself: models, health, metrics, and a page."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.routing import BaseRoute, Route

from mlx_engine.outputs import EngineState
from mlx_engine.server.access import Scope
from mlx_engine.server.api import encode
from mlx_engine.server.failures import Failure
from mlx_engine.server.metrics import CONTENT_TYPE
from mlx_engine.server.openai_values import error_body, new_id
from mlx_engine.server.reply import JSON, ClientGone, Headers, Receive, Reply, Send
from mlx_engine.server.site import Site

Told = tuple[int, bytes, Headers]  # status, body, headers

_PAGE = """<!doctype html><meta charset="utf-8"><title>mlx-engine</title>
<style>:root {{ color-scheme: light dark }} body {{ font-family: system-ui; margin: 2rem }}</style>
<h1>mlx-engine</h1><p>Models:</p><ul>{models}</ul><p>Endpoints:</p><ul>{paths}</ul>
"""


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


def status_routes(site: Site, paths: Sequence[str]) -> Iterator[BaseRoute]:
    """The routes.

    Args:
        paths: of the APIs, behind their base.
    """

    def models(scope: Scope) -> Told:
        entries = [_entry(site, name) for name in site.engines]
        ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"], "has_more": False}
        return 200, encode({"object": "list", "data": entries, **ends}), JSON

    def model(scope: Scope) -> Told:
        name, _ = site.engine(scope["path_params"]["model"])
        return 200, encode(_entry(site, name)), JSON

    def health(scope: Scope) -> Told:
        states = {name: engine.state for name, engine in site.engines.items()}
        well = all(state is EngineState.RUNNING for state in states.values())
        told = {"status": "ok" if well else "unavailable", "models": states}
        return 200 if well else 503, encode(told), JSON

    def metrics(scope: Scope) -> Told:
        return 200, site.metrics.text(), [(b"content-type", CONTENT_TYPE)]

    def page(scope: Scope) -> Told:
        shown = _PAGE.format(
            models=_items(list(site.engines)), paths=_items(["/v1" + p for p in paths])
        )
        return 200, shown.encode(), [(b"content-type", b"text/html; charset=utf-8")]

    for base in ("/v1", ""):
        yield Route(f"{base}/models", _Page(site, models), methods=["GET"])
        yield Route(f"{base}/models/{{model:path}}", _Page(site, model), methods=["GET"])
    yield Route("/health", _Page(site, health, keyed=False), methods=["GET"])
    yield Route("/metrics", _Page(site, metrics), methods=["GET"])
    yield Route("/", _Page(site, page), methods=["GET"])


def _entry(site: Site, name: str) -> dict[str, Any]:
    """A model, in a form that clients of OpenAI's and of Anthropic's API both read."""
    return {
        "id": name,
        "object": "model",
        "created": site.created,
        "owned_by": "mlx-engine",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(site.created, UTC).isoformat(),
        "context_length": site.engines[name].context_length,
    }


def _items(texts: Sequence[str]) -> str:
    return "".join(f"<li><code>{html.escape(text)}</code></li>" for text in texts)
