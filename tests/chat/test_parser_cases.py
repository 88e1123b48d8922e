"""What models emit, and what a caller must get, however the text is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_engine.chat.formats import choose_format
from tests.chat.answers import cuts, parse, random_cuts, told

_DATA = json.loads(Path(__file__).with_name("cases.json").read_text())
_THINKING = {"open": "<think>\n", "closed": "<think>\n\n</think>\n\n"}
_FORMATS = {
    "command-r7b": ("command-a", "command"),
    "deepseek-v3.1": ("deepseek-v3.1", "think"),
    "glm-4.7": ("glm", "think"),
    "gpt-oss": ("harmony", None),
    "kimi-k2": ("kimi-k2", "think"),
    "lfm2.5": ("lfm2", "think"),
    "llama-3.1": ("llama-3", None),
    "llama-4": ("llama-4", None),
    "minimax-m3": ("minimax-m3", "think"),
    "ministral": ("mistral", "mistral-think"),
    "mistral-small-3.2": ("mistral", None),
    "qwen3": ("hermes", "think"),
    "qwen3-coder": ("qwen3-coder", None),
    "qwen3.5": ("qwen3-coder", "think"),
    "seed-oss": ("seed-oss", "seed-think"),
}


@pytest.mark.parametrize("case", _DATA["cases"], ids=lambda case: case["family"])
def test_an_answer_comes_out_right_however_it_is_cut(case: dict[str, Any]) -> None:
    tools, reasoning = _FORMATS[case["family"]]
    form = choose_format(None, tool_format=tools, reasoning_format=reasoning)
    given = [_DATA["tools"][name] for name in case["tools"]]
    prefix = _THINKING.get(case.get("thinking", ""), "")
    output = case["output"]
    whole = parse(form, output, given, prefix)

    assert whole.content.strip() == case["text"].strip()
    assert whole.reasoning.strip() == case["reasoning"].strip()
    calls = [[call.name, call.arguments if call.ok else "error"] for call in whole.calls]
    assert calls == case["calls"]
    for parts in (cuts(output, 1), cuts(output, 3), *(random_cuts(output, n) for n in range(5))):
        assert told(parse(form, parts, given, prefix)) == told(whole)


def test_the_id_that_a_model_gives_is_the_calls_id() -> None:
    case = next(case for case in _DATA["cases"] if "[CALL_ID]" in case["output"])
    form = choose_format("[TOOL_CALLS]")
    answer = parse(form, case["output"], [_DATA["tools"]["get_weather"]])
    assert answer.calls[0].id == "abcdefghi"
