"""Signals in a program that serves: the first one drains, the second one aborts."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from mlx_engine import BaseEngine, EngineState, EngineStopped, InvalidRequest, SimpleEngine
from mlx_engine.remote.signals import install_signal_handlers
from tests.remote.hosting import ENDLESS, PROMPT
from tests.waiting import PATIENCE, turns, until

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _signals_are_as_they_were() -> Iterator[None]:
    """A shell that runs the tests in the background would have SIGINT ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number in numbers:
        signal.signal(number, before[number])


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


class Fake:
    """Something with a shutdown; it ends when it is told to, or with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.timeouts: list[float | None] = []
        self.end = asyncio.Event()
        self._error = error

    async def shutdown(self, timeout: float | None) -> str:
        self.timeouts.append(timeout)
        if timeout == 0:
            self.end.set()
        await self.end.wait()
        if self._error is not None:
            raise self._error
        return "report"


async def test_the_first_signal_drains_an_engine(engine: BaseEngine) -> None:
    task = asyncio.create_task(engine.generate(PROMPT, max_tokens=200, ignore_eos=True))
    await until(lambda: engine.stats().running)
    with install_signal_handlers(engine) as handlers:
        assert handlers.received is None
        send(signal.SIGTERM)
        report = await handlers.wait()
    assert handlers.received is signal.SIGTERM
    assert len((await task).tokens) == 200
    assert (len(report.finished), report.aborted) == (1, ())
    assert engine.state is EngineState.STOPPED


async def test_the_second_signal_aborts(engine: BaseEngine) -> None:
    task = asyncio.create_task(engine.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True))
    await until(lambda: engine.stats().running)
    with install_signal_handlers(engine, timeout=None) as handlers:
        waiting = asyncio.create_task(handlers.wait())
        send(signal.SIGTERM)
        await until(lambda: engine.state is EngineState.DRAINING)
        await turns()
        assert not task.done()
        send(signal.SIGINT)
        report = await waiting
    assert handlers.received is signal.SIGTERM, "the one that began it"
    assert len(report.aborted) == 1
    with pytest.raises(EngineStopped):
        await task


async def test_a_signal_while_the_engine_starts_stops_the_start(tiny_engine: BaseEngine) -> None:
    with install_signal_handlers(tiny_engine) as handlers:
        starting = asyncio.create_task(tiny_engine.start())
        await asyncio.sleep(0)
        send(signal.SIGTERM)
        with pytest.raises(EngineStopped):
            await starting
        await handlers.wait()
    assert tiny_engine.state is EngineState.STOPPED


async def test_from_the_second_signal_on_they_do_what_they_did_before() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    fake = Fake()
    handlers = install_signal_handlers(fake, timeout=5)
    for count in (1, 2):
        send(signal.SIGTERM)
        await until(lambda count=count: len(fake.timeouts) == count)  # type: ignore[misc]
    assert fake.timeouts == [5, 0]
    assert seen == []
    send(signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert await handlers.wait() == "report"
    handlers.remove()
    assert fake.timeouts == [5, 0]


async def test_handlers_are_put_back_once() -> None:
    mine = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, mine)
    sigterm = signal.getsignal(signal.SIGTERM)
    with install_signal_handlers(Fake()):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is not sigterm
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is sigterm


async def test_what_the_parent_has_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with install_signal_handlers(Fake()) as handlers:
        send(signal.SIGINT)
        await turns()
        assert handlers.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


async def test_other_signals_may_be_chosen() -> None:
    fake = Fake()
    with install_signal_handlers(fake, timeout=0, signals=[signal.SIGUSR2]) as handlers:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        send(signal.SIGUSR2)
        assert await handlers.wait() == "report"
    assert fake.timeouts == [0]


async def test_cancelling_the_wait_does_not_stop_the_shutdown() -> None:
    fake = Fake()
    with install_signal_handlers(fake) as handlers:
        send(signal.SIGTERM)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await handlers.wait()
        fake.end.set()
        assert await handlers.wait() == "report"


async def test_an_error_of_the_shutdown_is_raised_by_wait(caplog: pytest.LogCaptureFixture) -> None:
    with install_signal_handlers(Fake(OSError("disk")), timeout=0) as handlers:
        waiting = asyncio.create_task(handlers.wait())
        await asyncio.sleep(0)
        send(signal.SIGTERM)
        with pytest.raises(OSError, match="disk"):
            await waiting
    assert caplog.records == []


async def test_an_error_of_the_shutdown_is_logged_if_nobody_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with install_signal_handlers(Fake(OSError("disk")), timeout=0) as handlers:
        send(signal.SIGTERM)
        await until(lambda: caplog.records)
        assert "the shutdown that a signal began has failed" in caplog.text
        assert "disk" in caplog.text
        with pytest.raises(OSError, match="disk"):
            await handlers.wait()


async def test_arguments_that_cannot_be() -> None:
    with pytest.raises(InvalidRequest, match="timeout"):
        install_signal_handlers(Fake(), timeout=-1)


def test_another_thread_is_told_what_to_do() -> None:
    errors: list[str] = []

    async def install() -> None:
        try:
            install_signal_handlers(SimpleEngine("none"))
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=lambda: asyncio.run(install()))
    thread.start()
    thread.join(PATIENCE)
    assert "signals arrive in the main thread" in errors[0]
    with pytest.raises(RuntimeError, match="a running asyncio event loop"):
        install_signal_handlers(SimpleEngine("none"))
