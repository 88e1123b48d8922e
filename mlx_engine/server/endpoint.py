"""An endpoint that answers with a model's words: from a request's body to its answer's end."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mlx_engine.errors import InvalidRequest, renamed
from mlx_engine.server.access import Scope
from mlx_engine.server.answers import Answer, Answering
from mlx_engine.server.api import Api
from mlx_engine.server.asked import Asked, Fields
from mlx_engine.server.connected import do_while_connected
from mlx_engine.server.failures import Failure
from mlx_engine.server.models import Model
from mlx_engine.server.reply import ClientGone, EventStream, Headers, Receive, Reply, Send
from mlx_engine.server.site import Site
from mlx_engine.server.turns import Asker
from mlx_engine.server.volatile import steady

_log = logging.getLogger("mlx_engine.server")

_LONGEST = 1_000  # characters of a header


class Endpoint:
    """An ASGI application for one endpoint of an API."""

    def __init__(self, site: Site, api: Api) -> None:
        self._site = site
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await Exchange(self._site, self._api, receive, send).run(scope)


class Exchange:
    """One request and its answer."""

    def __init__(self, site: Site, api: Api, receive: Receive, send: Send) -> None:
        self._site = site
        self._api = api
        self._receive = receive
        self._id = f"req_{secrets.token_hex(12)}"
        self._reply = Reply(send, self._id)
        self._began = time.perf_counter()
        self._asker = Asker()
        self._form = ""  # the field that is the engine's ``constraint``
        self._told = ""  # of the answer, for the log

    async def run(self, scope: Scope) -> None:
        """Answer it, and tell the log and the metrics."""
        ending = "cancelled"
        try:
            ending = await self._run(scope)
        except ClientGone:
            ending = "gone"
        finally:
            seconds = time.perf_counter() - self._began
            self._site.metrics.count(self._api.name, ending, seconds)
            _log.info("%s %s: %s, %s%.2f s", self._id, self._api.name, ending, self._told, seconds)

    async def _run(self, scope: Scope) -> str:
        """Answer it; how that ended."""
        try:
            client = self._site.access.check(scope)
            self._site.access.check_place(client)
            headers = dict(scope["headers"])
            _check_encoding(headers.get(b"content-encoding", b""))
            declared = headers.get(b"content-length", b"")
            body = await self._site.bodies.read_json(self._receive, client, declared)
            with self._site.access.place(client):
                asked = self._read(body)
                if self._site.steady_prompts and isinstance(asked.messages, list):
                    asked = replace(asked, messages=steady(asked.messages))
                name, model = self._site.models.choose(asked.model)
                if name != asked.model:
                    self._reply.headers += _remarks("model", [name])
                self._reply.headers += _remarks("ignored", asked.ignored)
                self._asker = Asker(client, asked.user)
                return await self._answer(asked, name, model)
        except Exception as error:  # noqa: BLE001 - the border: the client is told
            failure, told = self._failed(error)
            if not self._reply.status:
                await self._reply.json(failure.status, told, failure.headers)
            return str(failure.status)

    def _read(self, body: object) -> Asked:
        fields = Fields(body)
        try:
            return self._api.read(fields).agreed()
        except RecursionError as error:
            raise InvalidRequest("body", "is nested too deep") from error
        finally:
            self._form = fields.form

    async def _answer(self, asked: Asked, name: str, model: Model) -> str:
        if not asked.stream:
            answering = Answering(asked, self._site.defaults, model.turns, self._asker)
            answers: list[Answer] = []

            async def wait() -> None:
                async with self._site.models.use(model) as engine:
                    answers.extend(await answering.run(engine))

            await do_while_connected(self._receive, wait)
            self._note(answers)
            notes = dict.fromkeys(note for each in answers for note in each.result.notes)
            self._reply.headers += _remarks("notes", list(notes))
            await self._reply.json(200, self._api.whole(asked, answers, name))
            return "200"
        return await self._stream(asked, name, model)

    async def _stream(self, asked: Asked, name: str, model: Model) -> str:
        events = self._api.events(asked, name)
        answering = Answering(
            asked,
            self._site.defaults,
            model.turns,
            self._asker,
            lambda index, chunk: stream.write(partial(events.chunk, index, chunk)),
            counts=self._api.counts_first,
        )
        stream = EventStream(
            self._reply,
            events,
            lambda: (answering.prompt_tokens, answering.cached_tokens),
            interval=self._site.keep_alive_seconds,
            patience=self._site.patience_seconds,
        )
        ending = "200"

        async def work() -> None:
            nonlocal ending
            try:
                async with self._site.models.use(model) as engine:
                    answers = await answering.run(engine)
                self._note(answers)
                await stream.write(partial(events.end, answers), more=False)
            except ClientGone:
                raise
            except Exception as error:  # noqa: BLE001 - the border: the client is told
                failure, told = self._failed(error)
                ending = str(failure.status)
                await stream.fail(failure, told)

        await do_while_connected(self._receive, work, stream.keep_alive)
        return ending

    def _failed(self, error: Exception) -> tuple[Failure, object]:
        """The failure that an error is, and its body."""
        if isinstance(error, ClientGone):
            raise error
        if isinstance(error, InvalidRequest) and error.option == "constraint" and self._form:
            error = renamed(error, self._form)
        failure = Failure.of(error)
        if failure.status == 500:
            _log.error("%s has failed", self._id, exc_info=error)
        return failure, self._api.error(failure, self._id)

    def _note(self, answers: Sequence[Answer]) -> None:
        usages = [answer.result.usage for answer in answers]
        self._told = (
            f"{usages[0].prompt_tokens} prompt tokens ({usages[0].cached_tokens} cached), "
            f"{sum(usage.completion_tokens for usage in usages)} tokens "
            f"({', '.join(answer.result.finish_reason for answer in answers)}), "
        )


def _check_encoding(encoding: bytes) -> None:
    """Whether a body is as it is.

    Raises:
        InvalidRequest: it is compressed.
    """
    if encoding.lower() not in (b"", b"identity"):
        said = "is compressed, by its content-encoding; send it as it is, without that header"
        raise InvalidRequest("body", said)


def _remarks(name: str, texts: Sequence[str]) -> Headers:
    """A header with some remarks, as far as that has room and characters for them."""
    if not texts:
        return []
    value = ", ".join(texts)[:_LONGEST].encode("ascii", "replace")
    printable = bytes(byte if 32 <= byte < 127 else 63 for byte in value).strip(b" ")
    return [(f"x-mlx-engine-{name}".encode(), printable)]
