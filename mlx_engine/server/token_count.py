"""Anthropic's ``/v1/messages/count_tokens``: a request that is counted, and not answered."""

from __future__ import annotations

from mlx_engine.errors import InvalidRequest
from mlx_engine.server.access import Scope
from mlx_engine.server.asked import Asked
from mlx_engine.server.connected import do_while_connected
from mlx_engine.server.endpoint import Endpoint, Exchange
from mlx_engine.server.models import Model
from mlx_engine.server.reply import Receive, Send


class TokenCount(Endpoint):
    """An ASGI application that counts the tokens of what an API's requests ask."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await _Counting(self._site, self._api, receive, send).run(scope)


class _Counting(Exchange):
    """One request and its count, for which the model's turn is not waited for."""

    async def _answer(self, asked: Asked, name: str, model: Model) -> str:
        counts: list[int] = []
        if not (messages := asked.messages):  # which would be an empty plain prompt
            raise InvalidRequest("messages", "must not be empty")

        async def count() -> None:
            async with self._site.models.use(model) as engine:
                counts.append(await engine.count_tokens(messages, **asked.chat_options(engine)))

        await do_while_connected(self._receive, count)
        await self._reply.json(200, {"input_tokens": counts[0]})
        return "200"
