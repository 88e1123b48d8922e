"""An API, as the rest of the server sees it: a body becomes ``Asked``, answers become bytes.

To add one, write a class with these methods, and a line in ``app.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from mlx_engine.outputs import GenerationChunk
from mlx_engine.server.answers import Answer
from mlx_engine.server.asked import Asked, Fields
from mlx_engine.server.failures import Failure
from mlx_engine.server.field_table import Table


class Events(Protocol):
    """The events of one streamed answer, as bytes in the format of server-sent events.

    Calls come in this order: ``begin``, then ``chunk`` and ``pulse`` in any, then ``end`` or
    ``fail``. Each may give no bytes.
    """

    def begin(self, prompt_tokens: int, cached_tokens: int) -> bytes:
        """First events, before all others; the counts are 0 as long as nobody knows them."""

    def chunk(self, index: int, chunk: GenerationChunk) -> bytes:
        """Events for a chunk of answer number ``index``."""

    def pulse(self) -> bytes:
        """A sign of life to this API's clients, between any two events."""

    def end(self, answers: Sequence[Answer]) -> bytes:
        """Last events, after all chunks."""

    def fail(self, failure: Failure) -> bytes:
        """Last events of a request that has failed."""


class Api(Protocol):
    """An endpoint of an API that answers with a model's words.

    Attributes:
        name: in logs and metrics.
        table: the fields of its requests.
        counts_first: whether its streams begin with the token counts of the prompt.
    """

    name: str
    table: Table
    counts_first: bool

    def read(self, fields: Fields) -> Asked:
        """The request that a body is.

        Raises:
            InvalidRequest: it is not acceptable. What the engine checks may be left to that.
        """

    def whole(self, asked: Asked, answers: Sequence[Answer], model: str) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def events(self, asked: Asked, model: str) -> Events:
        """The writer of one that is streamed."""

    def error(self, failure: Failure, request_id: str) -> dict[str, Any]:
        """The body of an error."""


def encode(value: object) -> bytes:
    """JSON of anything that has a form in it."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # half a surrogate pair, out of a model's JSON
        return json.dumps(value).encode()


def event(value: object, name: str | None = None) -> bytes:
    """One event, with its name where an API has names."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return b"%bdata: %b\n\n" % (head, encode(value))
