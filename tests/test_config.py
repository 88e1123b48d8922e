"""An engine's options, which are written once: what else knows of them has all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest

from mlx_engine import (
    MTP,
    BatchedEngine,
    DraftModel,
    EngineManager,
    InvalidRequest,
    ProcessEngine,
    RayEngine,
    RequestLimits,
    SimpleEngine,
    SpecPrefill,
    ToolFormat,
)
from mlx_engine.cli.options import engine_options, parse
from mlx_engine.config import (
    BatchConfig,
    BatchedOptions,
    EngineConfig,
    EngineOptions,
    ModelConfig,
    QueueConfig,
)
from mlx_engine.remote.wire.messages import Configure, decode_from_client, encode
from mlx_engine.remote.wire.options import options_from_wire, options_to_wire, settled
from mlx_engine.strategies import Strategies
from mlx_engine.testing import FakeEngine

SIMPLE = (ModelConfig, QueueConfig, Strategies)
DEFAULTS = {
    field.name: field.default
    for part in (*SIMPLE, BatchConfig)
    for field in fields(part)
    if field.default is not MISSING
} | {"limits": RequestLimits()}
TAKERS: list[Callable[..., object]] = [
    BatchedEngine,
    ProcessEngine,
    RayEngine,
    EngineManager,
    EngineManager.on_ray,
]

GIVEN: dict[str, Any] = {
    "revision": "r",
    "adapter_path": Path("adapters"),
    "trust_remote_code": True,
    "context_length": 100,
    "tool_format": ToolFormat("<call>", "</call>"),
    "reasoning_format": "none",
    "kv_bits": 4,
    "kv_group_size": 32,
    "quantized_kv_start": 5,
    "prefill_step_size": 3,
    "prompt_cache_bytes": 0,
    "memory": 0.5,
    "prefill": SpecPrefill("d", keep=0.3),
    "decode": DraftModel("d", 5),
    "queue_limit": 3,
    "max_wait": 2.5,
    "limits": RequestLimits(messages=3),
}
BOUNDED = {"max_kv_size": 8}
OF_A_BATCH = {
    "max_batch_size": 2,
    "max_decode_pause_ms": None,
    "kv_cache_memory_bytes": 9,
}


def names(*parts: type[Any]) -> set[str]:
    return {field.name for part in parts for field in fields(part)} - {"model"}


def test_type_checkers_know_every_option_and_its_type() -> None:
    parts = {name: hint for part in (*SIMPLE, BatchConfig) for name, hint in hints(part).items()}
    known = hints(BatchedOptions)
    assert hints(EngineOptions).keys() == names(*SIMPLE) | {"limits"}
    assert known.keys() == names(*SIMPLE, BatchConfig) | {"limits"}
    for name in known.keys() - {"limits", "decode", "adapter_path"}:  # those are wider
        assert set(get_args(known[name])) == set(get_args(parts[name])), name


def hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


@pytest.mark.parametrize("make", [SimpleEngine, *TAKERS], ids=lambda make: make.__qualname__)
def test_signatures_show_every_option_with_its_default(make: Callable[..., object]) -> None:
    shown = inspect.signature(make).parameters
    expected = hints(EngineOptions if make is SimpleEngine else BatchedOptions).keys()
    assert next(iter(shown)) == "model"
    assert {name: shown[name].default for name in expected} == {
        name: DEFAULTS[name] for name in expected
    }
    assert all(one.kind is one.KEYWORD_ONLY for one in list(shown.values())[1:])


@pytest.mark.parametrize(
    ("make", "parts"), [(SimpleEngine, SIMPLE), (BatchedEngine, (BatchConfig,))]
)
def test_constructors_explain_every_option_and_name_its_default(
    make: Any, parts: tuple[type[Any], ...]
) -> None:
    told = inspect.getdoc(make.__init__) or ""
    explained = {line.strip().partition(":")[0] for line in told.splitlines()}
    assert names(*parts) <= explained
    for name in names(*parts):
        if not isinstance(default := DEFAULTS[name], bool | NoneType):
            text = told[told.index(f" {name}: ") :].partition(":")[2]
            shown = f'``"{default}"``' if isinstance(default, str) else f"{default:g}"
            assert f"{shown} by default" in " ".join(text.split())[:200]


def test_the_command_has_every_option() -> None:
    line = """host m --socket s --revision r --adapter-path a --trust-remote-code --context-length 9
    --kv-bits 4 --kv-group-size 32 --quantized-kv-start 5 --prefill-step-size 3 --max-kv-size 8
    --prompt-cache-bytes 0 --memory 8GB --max-wait 2.5 --max-batch-size 2 --limit messages=3
    --queue-limit 3 --tool-format hermes --reasoning-format none
    --max-decode-pause-ms none --kv-cache-memory-bytes 9 --draft-model d --prefill-draft d"""
    given = engine_options(parse(line.split()))
    assert given.keys() == {"model", *hints(BatchedOptions)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("simple", {}),
        ("simple", GIVEN),
        ("simple", BOUNDED),
        ("batched", OF_A_BATCH),
        ("batched", {"decode": "auto", "prefill": SpecPrefill()}),
        ("simple", {"decode": MTP(2, head=Path("head"))}),
    ],
)
def test_an_engine_elsewhere_gets_the_same_options(kind: Any, options: dict[str, Any]) -> None:
    assert GIVEN.keys() | BOUNDED.keys() | OF_A_BATCH.keys() == hints(BatchedOptions).keys()
    config = settled(EngineConfig.of(kind, "m", options))
    assert config.options().keys() == options.keys()
    travelled = decode_of(options_to_wire(config))
    assert EngineConfig.of(kind, "m", options_from_wire(travelled)) == plain(config)


def decode_of(options: dict[str, Any]) -> dict[str, Any]:
    configure = decode_from_client(encode([Configure("simple", "m", options, [], 0.25)]))[0]
    found: dict[str, Any] = configure.options  # type: ignore[union-attr]
    return found


def plain(config: EngineConfig) -> EngineConfig:
    """With paths as strings, as they travel."""
    decode = config.strategies.decode
    if isinstance(decode, MTP) and decode.head is not None:
        decode = replace(decode, head=str(decode.head))
    return replace(config, strategies=replace(config.strategies, decode=decode))


@pytest.mark.parametrize("make", [SimpleEngine, *TAKERS], ids=lambda make: make.__qualname__)
def test_a_wrong_name_is_refused_with_the_right_one(make: Callable[..., object]) -> None:
    with pytest.raises(InvalidRequest, match=r"^contxt_length: .*mean 'context_length'"):
        make("demo", contxt_length=100)
    with pytest.raises(InvalidRequest, match=r"^zzz: there is no such option of a .*; known are"):
        make("demo", zzz=100)


def test_what_is_for_a_batch_is_refused_elsewhere() -> None:
    for make in (SimpleEngine, ProcessEngine):
        with pytest.raises(InvalidRequest, match=r"^max_batch_size: .*engine='batched'"):
            make("demo", max_batch_size=2)  # type: ignore[call-arg]


def test_paths_go_to_another_process_as_absolute_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "draft", "adapters"):
        (tmp_path / name).mkdir()
    (tmp_path / "head.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"adapter_path": "adapters", "prefill": SpecPrefill("draft")}

    def there(**more: Any) -> EngineConfig:
        return settled(EngineConfig.of("simple", "model", {**options, **more}))

    config = there(decode=DraftModel(Path("draft"), 3))
    assert config.model.model == str(tmp_path / "model")
    assert config.model.adapter_path == str(tmp_path / "adapters")
    assert config.strategies.prefill == SpecPrefill(str(tmp_path / "draft"))
    assert config.strategies.decode == DraftModel(str(tmp_path / "draft"), 3)
    same = config.strategies.of_request(SpecPrefill("draft", keep=0.5), "default")
    assert same.prefill == SpecPrefill("draft", keep=0.5)
    headed = there(decode=MTP(2, head="head.safetensors"), prefill=SpecPrefill("no/folder"))
    assert headed.strategies.decode == MTP(2, head=str(tmp_path / "head.safetensors"))
    assert headed.strategies.prefill == SpecPrefill("no/folder")  # an id of the hub


def test_paths_that_are_no_text_cannot_go_to_another_process() -> None:
    SimpleEngine("demo", adapter_path="a\udc80")
    with pytest.raises(InvalidRequest, match=r"^adapter_path: cannot go to another process"):
        ProcessEngine("demo", adapter_path="a\udc80")
    with pytest.raises(InvalidRequest, match=r"^model: cannot go to another process"):
        ProcessEngine("a\udc80")


@pytest.mark.parametrize("option", ["prefill", "decode"])
@pytest.mark.parametrize(
    "make", [FakeEngine, lambda: SimpleEngine("demo"), lambda: ProcessEngine("demo")]
)
def test_the_default_of_a_request_has_one_name(make: Callable[[], Any], option: str) -> None:
    engine = make()
    chat = [{"role": "user", "content": "hi"}]
    for ask, prompt in ((engine.stream_generate, "hi"), (engine.stream_chat, chat)):
        ask(prompt, **{option: "default"})
        with pytest.raises(InvalidRequest, match=f'^{option}: .* write {option}="default"$'):
            ask(prompt, **{option: "as engine"})
