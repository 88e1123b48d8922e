"""The fields of each API's requests, and what becomes of them: a table.

The endpoints take from it which fields they may leave alone, ``openapi`` describes requests by it,
and the guide's table is made of it; a test sees that the endpoints take exactly what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_engine.checks import options_of
from mlx_engine.params import SamplingParams

Schema = Mapping[str, Any]
Effect = Literal["honoured", "refused", "quiet"]

_TEXT: Schema = {"type": "string"}
_WORDS: Schema = {"type": "string", "minLength": 1}
_FLAG: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_OPEN: Schema = {"type": "integer", "minimum": -1}  # -1 leaves it open
_OBJECT: Schema = {"type": "object"}
_OBJECTS: Schema = {"type": "array", "items": _OBJECT}
_SOME: Schema = {**_OBJECTS, "minItems": 1}
_TEXTS: Schema = {"type": "array", "items": _TEXT}


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """A field.

    Attributes:
        schema: its values, in JSON Schema.
        note: what becomes of it, in words.
        effect: ``honoured``, ``refused`` if it asks for anything, or ``quiet``: it changes nothing
            here, and that is not said. Fields that are not in the table are ignored, and named in a
            header of the response.
    """

    schema: Schema = field(default_factory=dict)
    note: str = ""
    effect: Effect = "honoured"


Table = Mapping[str, FieldSpec]


def quiet(table: Table) -> frozenset[str]:
    """Names of fields that change nothing, and that nobody needs to be told of."""
    return frozenset(name for name, spec in table.items() if spec.effect == "quiet")


def taken(table: Table) -> frozenset[str]:
    """Names of fields that are looked at."""
    return frozenset(table) - quiet(table)


def _sampling(**schemas: Schema) -> dict[str, FieldSpec]:
    """Fields of ``SamplingParams`` under the same names."""
    helps = options_of(SamplingParams)
    return {name: FieldSpec(schema, helps[name].help) for name, schema in schemas.items()}


def _quiet(*names: str) -> dict[str, FieldSpec]:
    return {name: FieldSpec(effect="quiet") for name in names}


_USER = "whose request it is: users of a key have their turns one after another"
_NOT_CALLED = "none is called where text must have a form, which is said, too"
_LIMIT = "tokens of the answer; clamped to what is left, which is what -1 asks for"
_EFFORT: Schema = {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max"]}
_STREAM = {"stream": FieldSpec(_FLAG, "as events")}
_MODEL = {"model": FieldSpec(_TEXT, "by its name, an alias, or its last part")}
_FORMAT = {
    "response_format": FieldSpec(
        _OBJECT, "`json_schema` and `json_object`; the answer is bound by it"
    ),
    "structured_outputs": FieldSpec(_OBJECT, "as vLLM has it: `json`, `regex`, `choice`"),
    **{f"guided_{name}": FieldSpec({}, "the same") for name in ("json", "regex", "choice")},
    "json_schema": FieldSpec(_OBJECT, "as llama-server has it"),
    **dict.fromkeys(("guided_grammar", "grammar"), FieldSpec(_TEXT, effect="refused")),
}
_VARIABLES = {"chat_template_kwargs": FieldSpec(_OBJECT, "variables of the template")}
_OWN = _sampling(
    top_k=_OPEN,
    min_p=_NUMBER,
    repetition_penalty=_NUMBER,
    xtc_probability=_NUMBER,
    xtc_threshold=_NUMBER,
    stop_token_ids={"type": "array", "items": _COUNT},
    ignore_eos=_FLAG,
)
_SAMPLING = {
    **_sampling(temperature=_NUMBER, top_p=_NUMBER, presence_penalty=_NUMBER),
    **_sampling(frequency_penalty=_NUMBER, seed=_OPEN),
    "logit_bias": FieldSpec(_OBJECT, "token id -> value added"),
    "stop": FieldSpec(_either(_TEXT, _TEXTS), "strings that end the answer"),
    **_OWN,
}
SAMPLING = tuple(_SAMPLING)
_OPENAI_SAMPLING = {
    **_SAMPLING,
    "max_completion_tokens": FieldSpec(_OPEN, _LIMIT),
    "max_tokens": FieldSpec(_OPEN, "the same, if that is not there"),
    **_FORMAT,
}
_OPENAI = {
    **_MODEL,
    **_STREAM,
    "user": FieldSpec(_TEXT, _USER),
    "safety_identifier": FieldSpec(_TEXT, "the same, and goes first"),
}
_OPENAI_QUIET = _quiet(
    *("store", "metadata", "prompt_cache_key", "service_tier", "prompt_cache_retention"),
    *("client_metadata", "modalities", "verbosity"),
)
_USAGE = {"stream_options": FieldSpec(_OBJECT, "`include_usage`")}
_N = {"n": FieldSpec({"type": "integer", "minimum": 1, "maximum": 64}, "answers")}
_TOP: Schema = {"type": "integer", "minimum": 0, "maximum": 20}
_LOGPROBS = {
    "logprobs": FieldSpec(_FLAG, "of the tokens of the content"),
    "top_logprobs": FieldSpec(_TOP, "best ones at each place"),
}
_TOOLS = {
    "tools": FieldSpec(
        _OBJECTS, f"functions; those of other types are skipped, which is said; {_NOT_CALLED}"
    ),
    "tool_choice": FieldSpec(_either(_TEXT, _OBJECT), "forced calls are forced"),
    "parallel_tool_calls": FieldSpec(_FLAG, "`false`: one call at most"),
}

CHAT: Table = {
    **_OPENAI,
    "messages": FieldSpec(_SOME, "text in all shapes; images are refused by name"),
    **_OPENAI_SAMPLING,
    **_N,
    **_LOGPROBS,
    **_TOOLS,
    "reasoning_effort": FieldSpec(_EFFORT, "the model's switch, and a limit of tokens"),
    "reasoning": FieldSpec(_OBJECT, "`effort`, the same"),
    "thinking": FieldSpec(_either(_FLAG, _OBJECT), "the model's switch, `budget_tokens`"),
    "enable_thinking": FieldSpec(_FLAG, "the model's switch"),
    "max_reasoning_tokens": FieldSpec(_COUNT, "after which reasoning is closed"),
    "continue_final_message": FieldSpec(_FLAG, "the answer goes on with the last message"),
    **_VARIABLES,
    **_USAGE,
    **_OPENAI_QUIET,
}
COMPLETIONS: Table = {
    **_OPENAI,
    "prompt": FieldSpec(
        _either(_WORDS, {"type": "array", "minItems": 1}), "text, token ids, or a list of either"
    ),
    **_OPENAI_SAMPLING,
    **_N,
    "logprobs": FieldSpec({"type": "integer", "minimum": 0, "maximum": 20}, "of each token"),
    **_USAGE,
    "echo": FieldSpec(_FLAG, effect="refused"),
    "suffix": FieldSpec(_TEXT, effect="refused"),
    **_OPENAI_QUIET,
    **_quiet("best_of"),
}
RESPONSES: Table = {
    **_OPENAI,
    "input": FieldSpec(_either(_WORDS, _SOME), "text, or items"),
    "instructions": FieldSpec(_TEXT, "a system message before them"),
    **_OPENAI_SAMPLING,
    "max_output_tokens": FieldSpec(_OPEN, _LIMIT),
    "top_logprobs": FieldSpec(_TOP, "best ones at each place"),
    "include": FieldSpec(_TEXTS, "reasoning to be sent back; log-probabilities"),
    **_TOOLS,
    "reasoning": FieldSpec(_OBJECT, "`effort`; see `reasoning_effort`"),
    "text": FieldSpec(_OBJECT, "`format`, as `response_format`"),
    "truncation": FieldSpec(_TEXT, "only `disabled`; what else is asked is said to be ignored"),
    **_VARIABLES,
    "store": FieldSpec(_FLAG, "`false`: its items are not kept for an `item_reference`"),
    "previous_response_id": FieldSpec(_TEXT, "nothing is kept", "refused"),
    "conversation": FieldSpec(_either(_TEXT, _OBJECT), "nothing is kept", "refused"),
    "prompt": FieldSpec(_OBJECT, "nothing is kept", "refused"),
    "background": FieldSpec(_FLAG, "nothing is kept", "refused"),
    **{name: spec for name, spec in _OPENAI_QUIET.items() if name != "store"},
    **_quiet("stream_options", "max_tool_calls"),
}
MESSAGES: Table = {
    **_MODEL,
    **_STREAM,
    "messages": FieldSpec(_SOME, "blocks of all kinds of text; images are refused by name"),
    "system": FieldSpec(_either(_TEXT, _OBJECTS), "the system message"),
    "max_tokens": FieldSpec(_OPEN, _LIMIT),
    **_SAMPLING,
    "stop_sequences": FieldSpec(_TEXTS, "strings that end the answer"),
    "tools": FieldSpec(
        _OBJECTS, f"functions; the server's own tools are skipped, which is said; {_NOT_CALLED}"
    ),
    "tool_choice": FieldSpec(_OBJECT, "forced calls are forced; `disable_parallel_tool_use`"),
    "thinking": FieldSpec(_OBJECT, "the model's switch, `budget_tokens`, `display`"),
    "output_config": FieldSpec(_OBJECT, "`format`, `effort`"),
    "output_format": FieldSpec(_OBJECT, "as `output_config.format`"),
    "metadata": FieldSpec(_OBJECT, f"`user_id`, {_USER}"),
    **_quiet("service_tier", "safeguards", "inference_geo", "speed", "cache_control", "betas"),
    **_quiet("diagnostics"),
}
