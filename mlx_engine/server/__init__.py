"""An HTTP server around engines: the APIs of OpenAI and Anthropic. Nothing of generation is here.

    app = create_app(engine)

For endpoints of an application's own there are ``StreamingAnswer`` and ``while_connected``, which
cancel their work when the client goes away.

It needs the extra ``server``. Its files, a request's way from top to bottom:

    app.py               create_app: routes
    addresses.py         paths, as clients mean them
    status.py            models, health, metrics, numbers
    page.py              the page at /, page.html
    openapi.py           what is there, in OpenAPI
    field_table.py       the fields of each API, and what becomes of them
    endpoint.py          a request, from its body to the end of its answer
    body.py              its body
    json_body.py         ... the JSON that it is
    connected.py         its work, cancelled when its client goes away
    own_endpoint.py      ... that of an endpoint which is not one of these
    volatile.py          its text that spoils the prompt cache
    token_count.py       one that is counted, and not answered
    anthropic.py         an API: Anthropic's messages
    anthropic_events.py  its events, token counts and errors
    anthropic_input.py   its conversations -> the engine's
    chat_completions.py  an API: OpenAI's chats
    completions.py       an API: OpenAI's plain prompts
    responses.py         an API: OpenAI's responses, without state
    response_events.py   ... the events of one
    response_output.py   ... its items
    response_input.py    ... items -> messages
    response_tools.py    ... tools
    kept.py              ... items that clients name by their ids
    openai_values.py     what OpenAI's APIs have in common
    given_constraint.py  the form that an answer is to have
    call_deltas.py       tool calls in a stream
    api.py               what an API is
    answers.py           the engine's streams
    turns.py             whose answer is next
    asked.py             what a request asks for, whichever API it came by
    reply.py             the response, events and signs of life
    site.py              what all endpoints share
    models.py            models by their names, loaded when asked for
    model_stay.py        one of them, as long as it is in memory
    served.py            models as they are given
    arguments.py         ... and what else may be
    access.py            keys, host names, limits of a client
    metrics.py           numbers for Prometheus
    failures.py          errors, and their status
"""

from mlx_engine.extras import installing

try:
    from mlx_engine.server.access import LOOPBACK
    from mlx_engine.server.app import create_app
    from mlx_engine.server.own_endpoint import StreamingAnswer, while_connected
    from mlx_engine.server.served import ServedModel
except ModuleNotFoundError as error:
    if (error.name or "").startswith("mlx_engine"):
        raise
    told = f"mlx_engine.server needs {error.name}: {installing('server')}"
    raise ModuleNotFoundError(told, name=error.name) from error

__all__ = ["LOOPBACK", "ServedModel", "StreamingAnswer", "create_app", "while_connected"]
