"""One engine, many programs: the host, and the clients at its socket."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    EngineDead,
    EngineNotStarted,
    EngineState,
    EngineStopped,
    GenerationError,
    GenerationResult,
    InvalidRequest,
    RequestLimits,
    SimpleEngine,
)
from mlx_engine.remote.remote_engine import RemoteEngine
from mlx_engine.remote.serving import client_requests
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.wire.messages import CacheFile, Done, ErrorReply, Shutdown, Stopped
from tests.conftest import ROOT
from tests.guard import GUARD, Gate
from tests.remote.hosting import (
    ENDLESS,
    PROMPT,
    Stranger,
    client,
    endless,
    free,
    generate,
    hosted,
    running,
    short_folder,
)
from tests.remote.lives import watch_closely
from tests.waiting import PATIENCE, expire, until

pytestmark = pytest.mark.anyio
LOG = "mlx_engine.host"


# ── clients ─────────────────────────────────────────────────────────────────────────────────


async def test_two_clients_share_an_engine_and_get_the_tokens_that_it_gives_here(
    engine: BaseEngine, host: EngineHost
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    here = await engine.generate(PROMPT, max_tokens=30)
    chat_here = await engine.chat(messages, max_tokens=12)
    async with client(host) as one, client(host) as two:
        assert host.clients == 2
        assert (one.has_chat_template, one.context_length) == (True, engine.context_length)
        answers = await asyncio.gather(
            *(remote.generate(PROMPT, max_tokens=30) for remote in (one, two) * 3)
        )
        assert [answer.tokens for answer in answers] == [here.tokens] * 6
        assert [answer.text for answer in answers] == [here.text] * 6
        assert (await two.chat(messages, max_tokens=12)).tokens == chat_here.tokens
        async with one.stream_chat(messages, max_tokens=12) as stream:
            tokens = [token async for chunk in stream for token in chunk.tokens]
        assert tuple(tokens) == stream.result.tokens == chat_here.tokens
        batch = await one.generate_batch([PROMPT, [999999], "x"], max_tokens=30)
        assert isinstance(batch[0], GenerationResult)
        assert batch[0].tokens == here.tokens
        assert isinstance(batch[1], InvalidRequest)
        assert isinstance(batch[2], GenerationResult)
        assert one.stats().finished == engine.stats().finished
        assert one.check_health().healthy
    await until(lambda: host.clients == 0)
    assert engine.state is EngineState.RUNNING, "clients stop themselves, not the engine"
    assert (await engine.generate(PROMPT, max_tokens=30)).tokens == here.tokens


async def test_a_prompt_cache_is_saved_and_loaded_for_a_client_in_the_hosts_folder(
    engine: BaseEngine, tmp_path: Path
) -> None:
    async with hosted(engine, cache_folder=tmp_path) as host, client(host) as remote:
        await remote.generate(PROMPT * 30, max_tokens=3)
        assert await remote.save_prompt_cache("cache") == 1
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o600
        assert await remote.load_prompt_cache("cache") == 1
        with pytest.raises(InvalidRequest, match="no such file"):
            await remote.load_prompt_cache("none")


async def test_what_a_client_may_not_ask_is_an_error_with_the_name_of_the_option(
    host: EngineHost, remote: RemoteEngine
) -> None:
    with pytest.raises(InvalidRequest, match="does not import functions"):
        await remote.generate(PROMPT, logits_processors=["os:system"])
    with pytest.raises(InvalidRequest, match="func"):
        await remote.run_blocking(print)
    with pytest.raises(InvalidRequest, match=r"^decode"):
        await remote.generate(PROMPT, decode="fast")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"^prefill"):
        await remote.generate_batch([PROMPT], prefill=3)  # type: ignore[arg-type]
    assert (await remote.generate(PROMPT, max_tokens=1)).tokens
    assert host.clients == 1


async def test_a_host_has_its_own_limits_whatever_its_clients_have(tiny_path: Path) -> None:
    endless = RequestLimits(**{field.name: None for field in fields(RequestLimits)})
    user, tool = {"role": "user", "content": ""}, {"function": {"name": "f"}}
    async with (
        BatchedEngine(tiny_path, limits=RequestLimits(messages=3)) as engine,
        hosted(engine) as host,
        RemoteEngine(host.path, limits=endless) as remote,
    ):
        for option, ask in (
            ("stop", lambda: remote.generate(PROMPT, stop=["x"] * 1000)),
            ("messages", lambda: remote.chat([user] * 4)),
            (
                "logit_bias",
                lambda: remote.generate(PROMPT, logit_bias=dict.fromkeys(range(20_000), 1)),
            ),
            ("tools", lambda: remote.chat([user], tools=[tool] * 2000)),
        ):
            with pytest.raises(InvalidRequest, match=rf"^{option}: .*\d+ .*RequestLimits\."):
                await ask()
        for ask in (  # what is larger still is not even decoded
            lambda: remote.generate(PROMPT, stop=["x"] * 400_000),
            lambda: remote.chat([user], tools=[tool] * 1_000_000),
            lambda: remote.generate([1] * 2_200_000),
        ):
            with pytest.raises(InvalidRequest, match=r"[\d,]+ "):
                await ask()
        assert (await remote.chat([user] * 3, max_tokens=1)).tokens


async def test_a_cancelled_request_leaves_the_engine_before_the_caller_knows(
    host: EngineHost, remote: RemoteEngine
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            at_work = asyncio.create_task(expire(limit, lambda: host.engine.stats().running))
            await remote.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True)
    await at_work
    await free(host)
    stream = remote.stream_generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True)
    read = 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit, stream:
            at_work = asyncio.create_task(expire(limit, lambda: read > 3))
            async for _ in stream:
                read += 1
    await at_work
    await free(host)
    assert stream.result.finish_reason == "cancelled"
    assert len(stream.result.tokens) > 3
    assert host.engine.stats().cancelled == remote.stats().cancelled == 2


async def test_a_clients_shutdown_drains_its_own_requests_only(host: EngineHost) -> None:
    async with client(host) as staying, client(host) as leaving:
        other = endless(staying)
        await running(host)
        short = asyncio.create_task(leaving.generate(PROMPT, max_tokens=20, ignore_eos=True))
        await running(host, 2)
        shutdown = asyncio.create_task(leaving.shutdown(10 * PATIENCE))
        await until(lambda: leaving.state is EngineState.DRAINING)
        if isinstance(host.engine, SimpleEngine):  # where it waits for the other one
            other.cancel()
        report = await shutdown
        assert len((await short).tokens) == 20
        assert (report.finished, report.aborted) == (("req-1",), ())
        assert leaving.state is EngineState.STOPPED
        assert leaving.last_exit is not None
        assert leaving.last_exit.kind == "graceful"
        with pytest.raises(EngineStopped):
            await leaving.generate(PROMPT)
        await leaving.start()
        assert len((await leaving.generate(PROMPT, max_tokens=2)).tokens) == 2 or other.done()
        other.cancel()
        await asyncio.wait({other})
        assert (await staying.generate(PROMPT, max_tokens=2)).tokens


async def test_stop_aborts_what_a_client_has_in_flight(host: EngineHost) -> None:
    async with client(host) as remote:
        task = endless(remote)
        await running(host)
        report = await remote.stop()
        with pytest.raises(EngineStopped):
            await task
        assert report.aborted == ("req-1",)
    await free(host)


async def test_a_leaving_client_gets_no_new_requests(host: EngineHost) -> None:
    async with Stranger.at(host, hello=True) as stranger:
        await stranger.say(generate(1))
        await running(host)
        await stranger.say(Shutdown(None), generate(2, 1), CacheFile(3, "save", "/none"))
        await stranger.say(Shutdown(float("nan")))
        *_, two, three, one, stopped = await stranger.end()
    assert isinstance(two, ErrorReply)
    assert isinstance(three, ErrorReply)
    assert two.kind == three.kind == "EngineStopped"
    assert isinstance(one, Done)
    assert one.result.finish_reason == "cancelled"
    assert isinstance(stopped, Stopped)


KILLED = """
import asyncio, sys
from mlx_engine.remote.remote_engine import RemoteEngine

async def main():
    async with RemoteEngine(sys.argv[1]) as engine:
        async with engine.stream_generate([1, 2, 3], max_tokens=16000, ignore_eos=True) as stream:
            async for chunk in stream:
                print("a token", flush=True)
asyncio.run(main())
"""


async def test_a_client_that_is_killed_has_its_request_cancelled(
    host: EngineHost, remote: RemoteEngine
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, host.path, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert await process.stdout.readline()
    assert host.clients == 2
    assert host.pending == 1
    process.send_signal(signal.SIGKILL)
    await free(host)
    assert host.clients == 1
    assert host.engine.stats().cancelled == 1
    assert (await remote.generate(PROMPT, max_tokens=4)).tokens
    await process.communicate()


async def test_a_client_that_is_dropped_unstopped_warns_and_leaves(host: EngineHost) -> None:
    remote = RemoteEngine(host.path)
    await remote.start()
    with pytest.warns(ResourceWarning, match="without being stopped"):
        del remote
    await until(lambda: host.clients == 0)


# ── the host ────────────────────────────────────────────────────────────────────────────────


async def test_a_draining_host_lets_requests_finish_and_takes_no_new_ones(
    host: EngineHost, remote: RemoteEngine, gate: Callable[[str, int], Gate]
) -> None:
    stop = gate("model", 20)
    task = asyncio.create_task(remote.generate(PROMPT, max_tokens=300, ignore_eos=True))
    await running(host)
    shutdown = asyncio.create_task(host.shutdown(10 * PATIENCE))
    await until(lambda: remote.state is EngineState.DRAINING)
    assert not os.path.exists(host.path), "another host may take its place at once"
    with pytest.raises(EngineStopped):
        await remote.generate(PROMPT)
    with pytest.raises(EngineDead, match="no such socket"):
        await RemoteEngine(host.path).start()
    stop.go()
    assert len((await task).tokens) == 300
    report = await shutdown
    assert len(report.finished) == 1
    assert report.aborted == ()
    await until(lambda: remote.state is EngineState.STOPPED)
    assert remote.last_exit is not None
    assert remote.last_exit.kind == "graceful"
    assert host.engine.state is EngineState.STOPPED
    assert await host.shutdown(0) == report


async def test_the_earliest_deadline_of_a_host_aborts_and_clients_are_told(
    host: EngineHost, remote: RemoteEngine
) -> None:
    task = endless(remote)
    await running(host)
    draining = asyncio.create_task(host.shutdown(None))
    await until(lambda: remote.state is EngineState.DRAINING)
    assert not draining.done()
    report = await host.shutdown(0)
    assert len(report.aborted) == 1
    assert await draining == report
    with pytest.raises(EngineStopped):
        await task


async def test_a_cancelled_shutdown_closes_everything_all_the_same(
    host: EngineHost, remote: RemoteEngine
) -> None:
    task = endless(remote)
    await running(host)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await host.shutdown(None)
    assert host.clients == 0
    assert host.engine.state is EngineState.STOPPED
    with pytest.raises(EngineStopped):
        await task


async def test_a_host_that_goes_away_is_a_dead_engine_until_it_is_back(tiny_path: Path) -> None:
    with short_folder() as folder:
        path = folder / "socket"
        command = [
            sys.executable,
            "-m",
            "mlx_engine",
            "host",
            str(tiny_path),
            "--socket",
            str(path),
        ]
        remote = RemoteEngine(path)
        with pytest.raises(EngineDead, match=f"no engine is hosted at {path}.*--socket {path}"):
            await remote.start()
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, stderr=asyncio.subprocess.PIPE
            )
            assert process.stderr is not None
            assert b"serving" in await process.stderr.readline()
            await remote.start()
            task = endless(remote)
            await until(lambda: remote.stats().running)
            process.kill()
            with pytest.raises(EngineDead, match=r"its host closed the connection|broke"):
                await task
            assert remote.state is EngineState.FAILED
            assert not remote.check_health().healthy
            await remote.stop()
            await process.communicate()
            with pytest.raises(EngineDead, match="any more, its host has ended"):
                await remote.start()


async def test_clients_learn_that_the_engine_has_failed(tiny_path: Path) -> None:
    def lost(name: str) -> None:
        if name == "model":
            raise RuntimeError("the device is lost")

    async with BatchedEngine(tiny_path) as engine, hosted(engine) as host, client(host) as remote:
        GUARD.hook = lost
        try:
            with pytest.raises((GenerationError, EngineDead), match="the device is lost"):
                await remote.generate("a")
        finally:
            GUARD.hook = None
        await until(lambda: remote.state is EngineState.FAILED, "the client knows")
        with pytest.raises(EngineDead, match="its engine has failed"):
            await remote.generate("a")


async def test_what_cannot_be_told_of_an_answer_is_told_its_caller(
    host: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unspeakable(number: int, result: GenerationResult) -> None:
        raise ValueError("no words for it")

    async with client(host) as remote:
        with monkeypatch.context() as patched:
            patched.setattr(client_requests, "result_to_wire", unspeakable)
            with pytest.raises(GenerationError, match="no words for it"):
                await remote.generate("a", max_tokens=2)
        await free(host)
        assert (await remote.generate("a", max_tokens=2)).tokens


async def test_a_host_that_is_stopped_is_noticed(host: EngineHost) -> None:
    async with RemoteEngine(host.path) as remote:
        task = endless(remote)
        await running(host)
        host._beating.cancel()  # type: ignore[union-attr]
        await watch_closely(remote, silence=0.5)
        with pytest.raises(EngineDead, match=r"no sign of life.*connection to its host was closed"):
            await task
        await free(host)


async def test_an_engine_that_does_not_run_is_not_hosted(tiny_path: Path) -> None:
    with short_folder() as folder:
        host = EngineHost(SimpleEngine(tiny_path), folder / "socket")
        with pytest.raises(EngineNotStarted):
            await host.start()
        await host.stop()
        with pytest.raises(EngineStopped):
            await host.start()
        elsewhere = RemoteEngine(folder / "socket")
        with pytest.raises(InvalidRequest, match=r"^engine: must be SimpleEngine or Batched"):
            EngineHost(elsewhere, folder / "other")  # type: ignore[arg-type]
        assert list(folder.iterdir()) == []
