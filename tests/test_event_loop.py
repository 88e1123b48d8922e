"""Everything that is awaited needs asyncio, and says so where there is another event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    EngineManager,
    EngineState,
    ProcessEngine,
    RemoteEngine,
    SimpleEngine,
    install_signal_handlers,
)
from mlx_engine.questions import PromptQuestion
from mlx_engine.requests import TextPrompt
from mlx_engine.testing import FakeEngine, Gate

USER = [{"role": "user", "content": "hi"}]

ENGINES: dict[str, Callable[[], BaseEngine]] = {
    "fake": FakeEngine,
    "fake batched": lambda: FakeEngine(max_batch_size=2),
    "simple": lambda: SimpleEngine("demo"),
    "batched": lambda: BatchedEngine("demo"),
    "process": lambda: ProcessEngine("demo"),
    "manager": lambda: EngineManager("demo"),
    "remote": lambda: RemoteEngine("/tmp/nobody-is-there"),
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "start": lambda e: e.start(),
    "restart": lambda e: e.restart(),
    "stop": lambda e: e.stop(),
    "shutdown": lambda e: e.shutdown(5),
    "__aenter__": lambda e: e.__aenter__(),
    "__aexit__": lambda e: e.__aexit__(None, None, None),
    "generate": lambda e: e.generate("hi"),
    "chat": lambda e: e.chat(USER),
    "generate_batch": lambda e: e.generate_batch(["a", "b"]),
    "warm": lambda e: e.warm("hi"),
    "count_tokens": lambda e: e.count_tokens("hi"),
    "render_chat": lambda e: e.render_chat(USER),
    "encode": lambda e: e.encode("hi"),
    "decode": lambda e: e.decode([1]),
    "answer": lambda e: e.answer(PromptQuestion("count_tokens", TextPrompt("hi"))),
    "save_prompt_cache": lambda e: e.save_prompt_cache("/tmp/x"),
    "load_prompt_cache": lambda e: e.load_prompt_cache("/tmp/x"),
    "run_blocking": lambda e: e.run_blocking(print),
    "wait_exit": lambda e: e.wait_exit(),
    "failed": lambda e: e.failed(),
    "scale": lambda e: e.scale(2),
}
STREAMS: dict[str, Callable[[Any], Any]] = {
    "entered": lambda e: e.stream_generate("hi").__aenter__(),
    "read": lambda e: anext(aiter(e.stream_chat(USER))),
}


def in_another_loop(work: Coroutine[Any, Any, object]) -> object:
    """Run it up to its first suspension, as a loop that is not asyncio's would."""
    try:
        return work.send(None)
    except StopIteration as over:
        return over.value
    finally:
        work.close()


def awaited(what: Any) -> Coroutine[Any, Any, object]:
    async def run() -> object:
        return await what

    return run()


@pytest.mark.parametrize("name", ENGINES)
def test_all_that_is_awaited_names_asyncio(name: str) -> None:
    engine = ENGINES[name]()
    public = {
        method
        for method, function in inspect.getmembers(type(engine), inspect.iscoroutinefunction)
        if not method.startswith("_") or method in ("__aenter__", "__aexit__")
    }
    assert public <= CALLS.keys()
    for method in [*public, *STREAMS]:
        if method == "run_blocking" and name in ("process", "manager", "remote"):
            continue  # is refused in any loop
        with pytest.raises(RuntimeError, match=r"asyncio.*trio") as caught:
            in_another_loop(awaited((CALLS | STREAMS)[method](engine)))
        assert "\n" not in str(caught.value)
        assert engine.state is EngineState.CREATED


def test_a_running_engine_is_none_the_worse_for_it() -> None:
    engine = FakeEngine("a b")

    async def ask() -> str:
        return (await engine.generate("hi")).text

    with asyncio.Runner() as runner:
        runner.run(engine.start())
        for method in CALLS.keys() - {"wait_exit", "scale", "start", "__aenter__"}:
            with pytest.raises(RuntimeError, match=r"asyncio.*trio"):
                in_another_loop(awaited(CALLS[method](engine)))
        assert engine.state is EngineState.RUNNING
        assert runner.run(ask()) == "a b"
        assert engine.stats().running == engine.stats().waiting == 0
        runner.run(engine.stop())


def test_a_stream_that_was_never_started_is_closed_in_any_loop() -> None:
    stream = FakeEngine().stream_generate("hi")
    assert in_another_loop(awaited(stream.aclose())) is None


def test_gates_and_signal_handlers_name_asyncio_too() -> None:
    with pytest.raises(RuntimeError, match=r"asyncio.*trio"):
        in_another_loop(awaited(Gate().reached()))
    with pytest.raises(RuntimeError, match=r"asyncio.*trio"), install_signal_handlers(FakeEngine()):
        pass
