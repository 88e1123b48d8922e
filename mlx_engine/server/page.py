"""The page at ``/``: what is served, numbers of now, and how each agent is pointed at it."""

from __future__ import annotations

import html
from functools import cache
from importlib.resources import files

from mlx_engine.agents import AGENTS
from mlx_engine.server.access import Scope
from mlx_engine.server.reply import Headers
from mlx_engine.server.site import Site

# Fields of ``EngineStats`` that it shows.
SHOWN = (
    *("running", "finished", "cancelled", "failed", "rejected", "prompt_tokens", "cached_tokens"),
    *("completion_tokens", "kv_bytes"),
)
PAGE_HEADERS: Headers = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # Nothing is loaded from anywhere, and nobody else's page shows it in a frame.
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        b"connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
]
_CONTEXT = 32_768  # tokens, where no model is there to say how many


@cache
def _template() -> str:
    return (files("mlx_engine.server") / "page.html").read_text("utf-8")


def page_of(site: Site, scope: Scope) -> bytes:
    """The page. It names no model to somebody who would need a key to know of it.

    Args:
        scope: of the request, which was checked: the addresses of the page are those it came by.
    """
    host = dict(reversed(scope["headers"])).get(b"host", b"localhost").decode("latin-1")
    places = {
        "base": f"{scope.get('scheme', 'http')}://{host}{scope.get('root_path', '')}",
        "model": "MODEL" if site.access.keyed else next(iter(site.models.names)),
        "context": str(_context(site)),
        "key": "KEY" if site.access.keyed else "local",
        "folder": "FOLDER",
    }
    agents = "".join(
        f"<details><summary>{html.escape(name)}</summary>"
        f"<pre>{html.escape(chr(10).join(agent.commands_for(**places)))}</pre></details>"
        for name, agent in AGENTS.items()
    )
    base = html.escape(places["base"])
    return _template().replace("{{agents}}", agents).replace("{{base}}", base).encode()


def _context(site: Site) -> int:
    engine = next(iter(site.models)).engine
    return (None if engine is None else engine.context_length) or _CONTEXT
