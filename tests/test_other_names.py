"""What people type, and what they are told to write."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine import (
    BatchedOptions,
    ChatOptions,
    ChatRequestOptions,
    EngineOptions,
    InvalidRequest,
    SamplingOptions,
    SamplingParams,
    SimpleEngine,
    other_names,
)
from mlx_engine.checks import unknown_option
from mlx_engine.testing import FakeEngine, FakeOptions

HI = [{"role": "user", "content": "hi"}]

TYPED = {
    "temp": "write temperature=",
    "stream": "call stream_generate() or stream_chat()",
    "n": "engine.map([prompt] * n",
    "system": '{"role": "system"',
    "model": "SimpleEngine(model)",
    "stop_sequences": "write stop=",
    "enable_thinking": "write thinking=True or False",
    "response_format": "write output=",
    "sampler": "temperature, top_p",
    "max_new_tokens": "write max_tokens=",
    "num_predict": "write max_tokens=",
    "max_completion_tokens": "write max_tokens=",
    "max_output_tokens": "write max_tokens=",
    "top_n_tokens": "write logprobs=",
    "top_logprobs": "write logprobs=",
    "functions": "write tools=",
    "function_call": "write tool_choice=",
    "time_limit": "write timeout=",
    "random_seed": "write seed=",
    "repeat_penalty": "write repetition_penalty=",
    "guided_json": "write output=",
    "reasoning_effort": "chat_template_kwargs",
    "n_ctx": "SimpleEngine(model, context_length=...)",
    "max_batch_size": "BatchedEngine(model, max_batch_size=...)",
    "concurrency": "of map()",
    "Temperature": "write temperature=",
    "maxTokens": "write max_tokens=",
    "timeout_ms": "write timeout=",
    "presence": "write presence_penalty=",
    "history": "chat(messages)",
    "min_tokens": "no answer has a least length",
    "echo": "the answer alone",
    "json": "AnyJSON()",
    "cancel_token": "stream.cancel()",
    "on_chunk": "async for",
    "tool_coice": "did you mean 'tool_choice'?",
    "stop_sequnces": "write stop=",
    "modle": "SimpleEngine(model)",
    "max_batchsize": "BatchedEngine(model, max_batch_size=...)",
    "store": "known are",
    "type": "known are",
}


@pytest.mark.parametrize("name", TYPED)
def test_what_people_type_at_a_chat(name: str) -> None:
    engine = FakeEngine()
    with pytest.raises(InvalidRequest) as refused:
        engine.stream_chat(HI, **{name: 1})  # type: ignore[arg-type]
    assert refused.value.option == name
    assert TYPED[name] in str(refused.value)


@pytest.mark.parametrize("name", ["tools", "tool_choice", "thinking", "tools_choice", "thinkng"])
def test_what_is_of_chats_is_not_of_plain_prompts(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"is an option of chat\(\) and stream_chat\(\)"):
        FakeEngine().stream_generate("a", **{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("temperature", "generate(..., temperature=...)"),
        ("max_tokens", "generate(..., max_tokens=...)"),
        ("timeout", "generate(..., timeout=...)"),
        ("n_ctx", "write context_length="),
        ("draft_model", "write decode="),
        ("device", "MLX chooses the device"),
        ("lora_path", "write adapter_path="),
        ("cache_size", "write prompt_cache_bytes="),
        ("batch_size", "BatchedEngine(model, max_batch_size=...)"),
        ("revison", "did you mean 'revision'?"),
        ("max_batch", "BatchedEngine(model, max_batch_size=...)"),
        ("temperture", "generate(..., temperature=...)"),
        ("kind", "ProcessEngine(model, engine='batched')"),
        ("num_replicas", "EngineManager(model, replicas=N)"),
        ("tool_parser", "write tool_format="),
        ("cache_dir", "HF_HOME"),
        ("zzz", "known are"),
    ],
)
def test_what_people_type_at_an_engine(name: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SimpleEngine("demo", **{name: 1})  # type: ignore[arg-type]
    assert said in str(refused.value)


def test_the_nearest_spelling_is_still_found() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'max_tokens'"):
        SamplingParams.of(max_tokns=5)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="generate"):
        SamplingParams.of(timeout=5)  # type: ignore[call-arg]


def test_the_names_are_those_of_the_options() -> None:
    def names(kind: Any) -> set[str]:
        return set(kind.__annotations__)

    assert names(ChatOptions) == other_names.OF_CHATS
    assert names(SamplingOptions) == other_names.OF_SAMPLING
    shared = {"max_wait", "prefill", "decode", "on_progress"}
    rest = names(ChatRequestOptions) - names(ChatOptions) - names(SamplingOptions) - shared
    assert rest == other_names.OF_REQUESTS
    assert names(EngineOptions) - shared == other_names.OF_ENGINES
    assert names(BatchedOptions) - names(EngineOptions) == other_names.OF_BATCHED


def test_no_option_of_ours_is_told_to_be_another() -> None:
    ours = {*ChatRequestOptions.__annotations__, *BatchedOptions.__annotations__}
    ours |= other_names.OF_MAP
    assert not ours & (other_names._SAME.keys() | other_names._INSTEAD.keys())
    assert set(other_names._SAME.values()) <= ours | {*FakeOptions.__annotations__}


def test_a_name_that_nobody_knows_is_answered_quickly_and_shortly() -> None:
    said = str(unknown_option("x" * 10**6, ["max_tokens"]))
    assert len(said) < 200
