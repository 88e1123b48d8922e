"""Numbers of all kinds, in every option that takes one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_engine import (
    MTP,
    BatchedEngine,
    DraftModel,
    EngineManager,
    InvalidRequest,
    ProcessEngine,
    RestartPolicy,
    SamplingParams,
    SimpleEngine,
    SpecPrefill,
    Watchdog,
)
from mlx_engine.checks import shown
from mlx_engine.testing import FakeEngine, assert_cancellation_safe

GIANT = 10**400  # no float can hold it
ENDLESS = 10**5000  # Python does not even write it out


def fake_timeout(timeout: Any) -> None:
    asyncio.run(FakeEngine().shutdown(timeout))


def fake_priority(priority: Any) -> None:
    FakeEngine(max_batch_size=2).stream_generate("hi", priority=priority)


def process_priority(priority: Any) -> None:
    ProcessEngine("demo", engine="batched").stream_generate("hi", priority=priority)


NUMBERS: list[tuple[Callable[..., object], str]] = [
    *(
        (SamplingParams, name)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "xtc_probability",
            "xtc_threshold",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
    ),
    (lambda logit_bias: SamplingParams(logit_bias={1: logit_bias}), "logit_bias"),
    *((Watchdog, name) for name in ("start", "prefill", "decode", "silence")),
    *((RestartPolicy, name) for name in ("window", "backoff", "max_backoff")),
    (SpecPrefill, "keep"),
    (fake_timeout, "timeout"),
    *((FakeEngine, name) for name in ("seconds_per_token", "prefill_seconds", "load_seconds")),
    (lambda max_wait: FakeEngine(max_wait=max_wait), "max_wait"),
    (lambda max_wait: SimpleEngine("demo", max_wait=max_wait), "max_wait"),
    (lambda max_wait: ProcessEngine("demo", max_wait=max_wait), "max_wait"),
    (
        lambda max_decode_pause_ms: BatchedEngine("demo", max_decode_pause_ms=max_decode_pause_ms),
        "max_decode_pause_ms",
    ),
    (lambda seconds: assert_cancellation_safe(FakeEngine, seconds=seconds), "seconds"),
]

INTEGERS: list[tuple[Callable[..., object], str]] = [
    *((SamplingParams, name) for name in ("max_tokens", "top_k", "seed", "logprobs")),
    (lambda stop_token_ids: SamplingParams(stop_token_ids=[stop_token_ids]), "stop_token_ids"),
    (lambda logit_bias: SamplingParams(logit_bias={logit_bias: 1.0}), "logit_bias"),
    (fake_priority, "priority"),
    (process_priority, "priority"),
    (lambda prompt: FakeEngine().stream_generate([1, prompt]), "prompt"),
    (lambda prompt: ProcessEngine("demo").stream_generate([prompt]), "prompt"),
    (RestartPolicy, "max_restarts"),
    (lambda replicas: EngineManager("demo", replicas=replicas), "replicas"),
    (lambda queue_limit: FakeEngine(queue_limit=queue_limit), "queue_limit"),
    (lambda max_batch_size: BatchedEngine("demo", max_batch_size=max_batch_size), "max_batch_size"),
    (lambda depth: MTP(depth), "depth"),
    (lambda num_draft_tokens: DraftModel("m", num_draft_tokens), "num_draft_tokens"),
    *((SpecPrefill, name) for name in ("threshold", "lookahead")),
    *(
        (lambda name=name, **given: SimpleEngine("demo", **given), name)
        for name in (
            "context_length",
            "max_kv_size",
            "kv_bits",
            "kv_group_size",
            "quantized_kv_start",
            "prefill_step_size",
            "prompt_cache_bytes",
        )
    ),
]


@pytest.mark.parametrize(
    "value",
    [GIANT, -GIANT, ENDLESS, Fraction(GIANT), Decimal("1e400"), Decimal("sNaN"), Decimal("NaN")],
    ids=["giant", "negative", "endless", "fraction", "decimal", "signalling", "nan"],
)
@pytest.mark.parametrize(("make", "name"), NUMBERS)
def test_a_number_that_no_float_can_hold_is_refused_by_name(
    make: Callable[..., object], name: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: ") as caught:
        make(**{name: value})
    assert caught.value.option == name
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "value",
    [GIANT, -GIANT, ENDLESS, Fraction(7, 2), Decimal(3), 2.5, "five", np.float32(1)],
    ids=["giant", "negative", "endless", "fraction", "decimal", "float", "text", "numpy"],
)
@pytest.mark.parametrize(("make", "name"), INTEGERS)
def test_what_is_no_integer_that_can_travel_is_refused_by_name(
    make: Callable[..., object], name: str, value: Any
) -> None:
    if (name, value) == ("logit_bias", "5"):  # a key of JSON
        assert SamplingParams(logit_bias={"5": 1.0}).logit_bias == {5: 1.0}
        return
    with pytest.raises(InvalidRequest, match=f"^{name}: ") as caught:
        make(**{name: value})
    assert caught.value.option == name
    assert len(str(caught.value)) < 300


def test_numbers_of_other_kinds_become_plain_ones() -> None:
    params = SamplingParams(temperature=Fraction(1, 2), top_p=Decimal("0.25"), seed=np.uint8(7))  # type: ignore[arg-type]
    assert (params.temperature, params.top_p, params.seed) == (0.5, 0.25, 7)
    assert (type(params.temperature), type(params.top_p), type(params.seed)) == (float, float, int)
    watchdog = Watchdog(start=np.float32(2), silence=Fraction(1, 2))  # type: ignore[arg-type]
    assert (type(watchdog.start), type(watchdog.silence)) == (float, float)
    policy = RestartPolicy(backoff=np.int64(1), max_restarts=np.int64(2))  # type: ignore[arg-type]
    assert (type(policy.backoff), type(policy.max_restarts)) == (float, int)
    engine = SimpleEngine("demo", kv_bits=np.int64(4), prefill_step_size=np.int32(8))  # type: ignore[arg-type]
    model = engine._config.model
    assert (type(model.kv_bits), type(model.prefill_step_size)) == (int, int)


def test_an_array_in_the_place_of_a_number_is_refused() -> None:
    for option in ("kv_bits", "prefill_step_size", "context_length"):
        with pytest.raises(InvalidRequest, match=f"^{option}: "):
            SimpleEngine("demo", **{option: np.array([4, 8])})  # type: ignore[arg-type]


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        b"x" * 10**6,
        ENDLESS,
        -ENDLESS,
        Fraction(ENDLESS),
        nested(5000),
        list(range(10**6)),
        dict.fromkeys(range(10**6)),
        tuple("abc") * 10**5,
        "\ud800",
        Broken(),
        Path("x" * 1000),
        [{"a": ["x" * 1000] * 1000}] * 1000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_can_be_shown_in_a_few_characters(value: object) -> None:
    text = shown(value)
    assert 0 < len(text) < 5000
    text.encode()  # so that the error can be sent and printed


@pytest.mark.parametrize(
    "value", ["text", "", b"x", 5, -1.5, True, None, [1, 2], (1,), (), {}, {"a": [1, {"b": 2}]}]
)
def test_what_is_short_is_shown_as_it_is(value: object) -> None:
    assert shown(value) == repr(value)
