"""The table of fields: what the endpoints take, what the description and the guide say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_engine.server.api import Api
from mlx_engine.server.app import apis, create_app
from mlx_engine.server.asked import Fields
from mlx_engine.server.field_table import quiet, taken
from mlx_engine.server.openapi import body_schema, markdown, openapi
from mlx_engine.testing import FakeEngine
from tests.conftest import ROOT
from tests.server.asgi import ask
from tests.server.test_fuzz import VALUES, app, is_answered, loop

__all__ = ["app", "loop"]  # fixtures

APIS = tuple(apis().items())
GUIDE = ROOT / "mlx_engine" / "guide" / "server.md"
TITLES = {
    "/chat/completions": "Chat completions",
    "/completions": "Completions",
    "/responses": "Responses",
    "/messages": "Messages",
}
# Bodies in which every field may be looked at, whatever the others are.
BASE: dict[str, dict[str, Any]] = {
    "/chat/completions": {"messages": [], "logprobs": True},
    "/completions": {"prompt": "Hi"},
    "/responses": {"input": "Hi"},
    "/messages": {"messages": [{"role": "user", "content": "Hi"}]},
}


_KEYS = (
    "type role content name text function parameters format schema id include_usage effort "
    "input_schema tool_use_id"
)
_WORDS = (
    "function user assistant system tool text tool_result auto json_schema json_object message "
    "enabled any input_text"
)


class Noted(Fields):
    """Fields that remember which of them were taken."""

    def __init__(self, body: object) -> None:
        super().__init__(body)
        self.taken: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return super().take(name, default)

    def options(self, names: Any) -> dict[str, Any]:
        self.taken.update(names)
        return super().options(names)


@pytest.mark.parametrize(("path", "api"), APIS)
def test_an_endpoint_takes_what_the_table_says(path: str, api: Api) -> None:
    fields = Noted(BASE[path])
    api.read(fields)
    assert fields.taken == taken(api.table)
    assert not fields.taken & quiet(api.table)


@pytest.mark.parametrize(("path", "api"), APIS)
def test_the_guide_has_the_table(path: str, api: Api) -> None:
    section = GUIDE.read_text("utf-8").split(f"### {TITLES[path]}\n\n")[1]
    assert section.startswith(markdown(api.table)), (
        "python -m tests.server.test_fields writes it anew"
    )


def test_the_description_is_one_that_clients_can_read() -> None:
    told = json.loads(json.dumps(openapi(APIS, "/llm")))
    assert told["openapi"] == "3.1.0"
    assert told["servers"] == [{"url": "/llm"}]
    chat = told["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["temperature"]["type"] == "number"
    assert schema["required"] == ["messages"]
    assert {"400", "429", "503"} < set(chat["responses"])


@pytest.mark.anyio
async def test_it_is_there_without_a_key() -> None:
    async with FakeEngine() as engine:
        served = create_app(engine, api_keys=["k"])
        reply = await ask(served, None, "/openapi.json", method="GET")
        assert set(reply.json["paths"]) >= {"/v1/messages/count_tokens", "/v1/models"}


def _values(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema of the table allows, or nearly."""
    if "anyOf" in schema:
        return st.one_of(*map(_values, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "string":
            return st.text(max_size=8)
        case "boolean":
            return st.booleans()
        case "number":
            return st.floats(-2, 2) | st.integers(-2, 2)
        case "integer":
            low, high = schema.get("minimum", 0), schema.get("maximum", 2**40)
            return st.integers(low - 1, min(high + 1, low + 70))
        case "array":
            return st.lists(_values(schema.get("items", {})), max_size=3)
        case "object":
            keys = st.sampled_from(_KEYS.split())
            words = st.sampled_from(_WORDS.split())
            return st.dictionaries(keys, words | VALUES, max_size=5)
    return VALUES


@pytest.mark.parametrize(("path", "api"), APIS)
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_body_of_the_description_is_a_failure_of_the_server(
    loop: Any, app: Any, path: str, api: Api, data: st.DataObject
) -> None:
    properties = body_schema(api.table)["properties"]
    body = dict(BASE[path]) if data.draw(st.booleans()) else {}
    for name in data.draw(st.lists(st.sampled_from(sorted(properties)), max_size=6)):
        body[name] = data.draw(_values(properties[name]))
    if path in ("/completions", "/messages") and body.get("ignore_eos"):
        body["max_tokens"] = 5  # or it has no end but the context's
    reply = loop.run_until_complete(ask(app, json.dumps(body).encode(), f"/v1{path}"))
    assert is_answered(reply), reply.data


def write() -> None:
    """Write the tables of the guide anew."""
    head = GUIDE.read_text("utf-8").partition("\n### ")[0].rstrip()
    tables = [f"### {TITLES[path]}\n\n{markdown(api.table)}" for path, api in APIS]
    GUIDE.write_text("\n".join([f"{head}\n", *tables]), "utf-8")


if __name__ == "__main__":
    write()
