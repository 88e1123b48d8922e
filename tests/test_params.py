"""SamplingParams: values that cannot be wrong."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from mlx_engine import InvalidRequest, SamplingParams
from mlx_engine.params import SamplingOptions


def test_defaults_are_those_of_mlx_lm() -> None:
    from importlib import import_module

    generate = import_module("mlx_lm.generate")  # the package has a function of that name
    params = SamplingParams()
    assert params.temperature == generate.DEFAULT_TEMP
    assert params.top_p == generate.DEFAULT_TOP_P
    assert params.min_p == generate.DEFAULT_MIN_P
    assert params.top_k == generate.DEFAULT_TOP_K
    assert params.xtc_probability == generate.DEFAULT_XTC_PROBABILITY
    assert params.xtc_threshold == generate.DEFAULT_XTC_THRESHOLD
    assert params.max_tokens == 256, "the default of mlx_lm.stream_generate"


def test_keywords_and_fields_are_the_same() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SamplingOptions.__annotations__) == fields


def test_keywords_go_before_params() -> None:
    params = SamplingParams(max_tokens=5, temperature=0.5)
    changed = SamplingParams.of(params, temperature=1.0)
    assert (changed.max_tokens, changed.temperature) == (5, 1.0)
    assert params.temperature == 0.5
    assert SamplingParams.of(params) is params
    assert SamplingParams.of() == SamplingParams()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("stop_tokens", "stop_token_ids")],
)
def test_an_unknown_option_names_the_closest(wrong: str, right: str) -> None:
    with pytest.raises(InvalidRequest, match=f"did you mean '{right}'") as caught:
        SamplingParams.of(None, **{wrong: 1})  # type: ignore[misc]
    assert caught.value.option == wrong
    with pytest.raises(InvalidRequest, match="known are max_tokens"):
        SamplingParams.of(None, qqq=1)  # type: ignore[call-arg]


def test_params_of_another_type_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="params: must be a SamplingParams, not dict"):
        SamplingParams.of({"max_tokens": 3})  # type: ignore[arg-type]


BAD: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", "10"),
    ("max_tokens", True),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", float("nan")),
    ("temperature", 1e-320),
    ("logit_bias", {1: 1e300}),
    ("temperature", float("inf")),
    ("top_p", -0.1),
    ("top_p", 1.01),
    ("top_k", -1),
    ("top_k", 2.0),
    ("min_p", 1.5),
    ("xtc_probability", 2),
    ("xtc_threshold", 0.6),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("presence_penalty", "x"),
    ("frequency_penalty", float("nan")),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {"-1": 1.0}),
    ("logit_bias", {"1.0": 1.0}),
    ("logit_bias", {"": 1.0}),
    ("logit_bias", {" 1": 1.0}),
    ("logit_bias", {"\u0661": 1.0}),
    ("logit_bias", {"9" * 5000: 1.0}),
    ("logit_bias", {"1": 1.0, 1: 2.0}),
    ("logit_bias", {1: None}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: "x"}),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 0.5),
    ("stop", [""]),
    ("stop", ""),
    ("stop", [1]),
    ("stop", 5),
    ("stop_token_ids", 5),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [-2]),
    ("ignore_eos", "yes"),
    ("logprobs", -1),
    ("logprobs", 101),
    ("logprobs", True),
    ("logits_processors", [5]),
    ("logits_processors", print),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.option == name
    assert isinstance(caught.value, ValueError)
    assert repr(value) in str(caught.value) or isinstance(value, list | dict)


def test_good_values_are_normalised_and_copied() -> None:
    stop = ["a", "b"]
    bias = {3: 1}
    params = SamplingParams(stop=stop, logit_bias=bias, temperature=1, stop_token_ids=range(3))
    stop.append("c")
    bias[4] = 2
    assert params.stop == ("a", "b")
    assert params.logit_bias == {3: 1.0}
    assert isinstance(params.temperature, float)
    assert params.stop_token_ids == (0, 1, 2)
    assert SamplingParams(stop="one").stop == ("one",)
    assert SamplingParams(max_tokens=None).max_tokens is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 3  # type: ignore[misc]


def test_numpy_numbers_are_numbers() -> None:
    import numpy as np

    params = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5))  # type: ignore[arg-type]
    assert (params.max_tokens, params.temperature) == (5, 0.5)
    assert type(params.max_tokens) is int


def test_params_travel() -> None:
    params = SamplingParams(stop=["x"], seed=3, logit_bias={1: 2.0})
    assert pickle.loads(pickle.dumps(params)) == params


def test_none_is_the_default_of_every_option() -> None:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    every: dict[str, Any] = dict.fromkeys(names)
    assert SamplingParams(**every) == SamplingParams(max_tokens=None)
    others = SamplingParams(temperature=1, top_k=5, stop="x", logit_bias={1: 2}, ignore_eos=True)
    assert SamplingParams.of(others, **every) == SamplingParams(max_tokens=None)
    assert SamplingParams.of(others, temperature=None) == dataclasses.replace(
        others, temperature=SamplingParams().temperature
    )


def test_a_bias_as_json_has_it_is_the_same_bias() -> None:
    params = SamplingParams(logit_bias={"123": -100, "0": 1, "007": 2})  # type: ignore[dict-item]
    assert params.logit_bias == {123: -100.0, 0: 1.0, 7: 2.0}
    assert all(type(token) is int for token in params.logit_bias)
    assert SamplingParams(logit_bias=None) == SamplingParams(logit_bias={})  # type: ignore[arg-type]


def test_a_nucleus_of_nothing_is_greedy() -> None:
    assert SamplingParams(top_p=0, temperature=1).greedy
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(top_p=0.1, temperature=1).greedy
