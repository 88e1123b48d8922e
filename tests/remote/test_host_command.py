"""``mlx-engine host``: real processes, and real signals."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mlx_engine import EngineDead, EngineStopped, GenerationError
from mlx_engine.cli.flags import spelled
from mlx_engine.cli.options import engine_options, parse
from mlx_engine.errors import InvalidRequest
from mlx_engine.remote.remote_engine import RemoteEngine
from tests.conftest import ROOT
from tests.remote.hosting import ENDLESS, PROMPT, short_folder
from tests.stuck import StuckModel
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def path() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder / "socket"


class Command:
    """The command, and what it says on standard error."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            return (await self.process.stderr.readline()).decode()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def end(self) -> tuple[int, str]:
        """Exit code, and the rest of what it says."""
        async with asyncio.timeout(PATIENCE):
            output, errors = await self.process.communicate()
        assert output == b""
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode()


@asynccontextmanager
async def started(*args: object) -> AsyncIterator[Command]:
    async with started_as("-m", "mlx_engine", "host", *map(str, args)) as command:
        yield command


@asynccontextmanager
async def started_as(*args: str) -> AsyncIterator[Command]:
    """What this interpreter does with these arguments."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *args),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Command(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# The command, as a shell's "&" in a script starts it.
IN_BACKGROUND = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "os.execv(sys.executable, [sys.executable, '-m', 'mlx_engine', *sys.argv[1:]])"
)


async def test_a_host_in_the_background_takes_ctrl_c(tiny_path: Path, path: Path) -> None:
    arguments = ("host", str(tiny_path), "--socket", str(path))
    async with started_as("-c", IN_BACKGROUND, *arguments) as host:
        assert "serving" in await host.line()
        host.send(signal.SIGINT)
        assert await host.end() == (130, "")
    assert list(path.parent.iterdir()) == []


async def test_sigterm_lets_requests_finish_and_is_no_failure(tiny_path: Path, path: Path) -> None:
    async with started(tiny_path, "--socket", path) as host:
        assert await host.line() == (
            f"mlx-engine: serving {tiny_path} on {path}; stop with Ctrl-C\n"
        )
        async with RemoteEngine(path) as one, RemoteEngine(path) as two:
            answers = await asyncio.gather(*(e.generate(PROMPT, max_tokens=20) for e in (one, two)))
            assert answers[0].tokens == answers[1].tokens
            async with one.stream_generate(PROMPT, max_tokens=1000, ignore_eos=True) as stream:
                asked = False
                async for _ in stream:
                    if not asked:
                        host.send(signal.SIGTERM)
                        asked = True
            assert len(stream.result.tokens) == 1000
            assert await host.end() == (
                0,
                "mlx-engine: waiting up to 30 s for a request in flight; "
                "another signal aborts what is left\n",
            )
    assert list(path.parent.iterdir()) == []


# The command, with a model that fails once there is a file.
LOST = """
import sys
from pathlib import Path
from mlx_lm.models import llama
from mlx_engine.cli import main

def call(self, *args, whole=llama.Model.__call__, **kwargs):
    if Path(sys.argv[1]).exists():
        raise RuntimeError("the device is lost")
    return whole(self, *args, **kwargs)

llama.Model.__call__ = call
sys.exit(main(sys.argv[2:]))
"""


async def test_a_host_whose_engine_has_failed_ends(
    tiny_path: Path, tmp_path: Path, path: Path
) -> None:
    lost = tmp_path / "lost"
    arguments = ("-c", LOST, str(lost), "host", str(tiny_path), "--socket", str(path))
    async with started_as(*arguments) as host, asyncio.timeout(PATIENCE):
        assert "serving" in await host.line()
        async with RemoteEngine(path) as remote:
            assert (await remote.generate(PROMPT, max_tokens=2)).tokens
            lost.touch()
            with pytest.raises((GenerationError, EngineDead), match="the device is lost"):
                await remote.generate(PROMPT)
            code, said = await host.end()
        assert code == 1
        assert said.startswith("mlx-engine: error: the engine has failed: ")
        assert "the device is lost" in said
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["simple", "batched"])
async def test_a_second_signal_aborts_and_ctrl_c_has_its_own_exit_code(
    tiny_path: Path, path: Path, kind: str
) -> None:
    async with started(tiny_path, "--socket", path, "--engine", kind, "--drain", "none") as host:
        await host.line()
        async with RemoteEngine(path) as remote:
            task = asyncio.create_task(remote.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True))
            await until(lambda: remote.stats().running)
            host.send(signal.SIGINT)
            assert "waiting for a request in flight" in await host.line()
            host.send(signal.SIGINT)
            with pytest.raises(EngineStopped):
                await task
            assert await host.end() == (
                130,
                "mlx-engine: a request in flight was aborted\n",
            )
    assert list(path.parent.iterdir()) == []


async def test_the_time_to_drain_is_limited(tiny_path: Path, path: Path) -> None:
    async with started(tiny_path, "--socket", path, "--drain", "0.2") as host:
        await host.line()
        async with RemoteEngine(path) as remote:
            task = asyncio.create_task(remote.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True))
            await until(lambda: remote.stats().running)
            host.send(signal.SIGTERM)
            with pytest.raises(EngineStopped):
                await task
            code, _ = await host.end()
    assert code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_ends_an_idle_host_at_once(
    tiny_path: Path, path: Path, number: signal.Signals, code: int
) -> None:
    async with started(tiny_path, "--socket", path) as host:
        await host.line()
        host.send(number)
        assert await host.end() == (code, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_ends_the_load_and_a_second_one_a_load_that_is_stuck(
    tiny_path: Path, tmp_path: Path, path: Path, number: signal.Signals, code: int
) -> None:
    for stuck in (False, True):
        model = StuckModel(tiny_path, tmp_path / f"stuck {stuck}")
        async with started(model.path, "--socket", path) as host:
            await until(lambda model=model: model.is_read)  # type: ignore[misc]
            host.send(number)
            if stuck:
                await asyncio.sleep(0.3)  # two signals at once would be one
                assert host.process.returncode is None
                host.send(number)
            else:
                model.go_on()
            assert await host.end() == (code, "")
        model.close()
        assert list(path.parent.iterdir()) == []


async def test_what_is_wrong_is_told_before_the_model_is_loaded(path: Path) -> None:
    path.touch()
    async with started("./there/is/none", "--socket", path) as host:
        async with asyncio.timeout(PATIENCE):
            line = await host.line()
        assert line.startswith(f"mlx-engine: error: argument --socket: {path} exists and is not")
        assert await host.end() == (2, "")
    path.unlink()
    async with started("./there/is/none", "--socket", path) as host:
        assert "./there/is/none" in await host.line()
        assert await host.end() == (1, "")
    assert list(path.parent.iterdir()) == []


def test_the_options_of_the_queue_are_passed_on() -> None:
    args = parse(["host", "m", "--socket", "s", "--queue-limit", "3", "--max-batch-size", "5"])
    assert (args.engine, args.drain, args.model) == ("batched", 30.0, "m")
    assert engine_options(args) == {"model": "m", "queue_limit": 3, "max_batch_size": 5}
    assert engine_options(parse(["host", "--socket", "s"])) == {"model": "demo"}
    line = "host --socket s --max-wait 2.5 --max-decode-pause-ms none --kv-cache-memory-bytes 9"
    assert engine_options(parse(line.split())) == {
        "model": "demo",
        "max_wait": 2.5,
        "max_decode_pause_ms": None,
        "kv_cache_memory_bytes": 9,
    }
    assert parse(["host", "--socket", "s", "--max-clients", "2"]).max_clients == 2
    assert parse(["host", "--socket", "s", "--cache-folder", "d"]).cache_folder == "d"
    assert parse(["host", "--socket", "s", "--drain", "none"]).drain is None
    assert spelled(InvalidRequest("queue_limit", "no")) == "argument --queue-limit: no"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("host", "--socket"),
        ("host --socket s --drain -1", "--drain"),
        ("host --socket s --drain nan", "--drain"),
        ("host --socket s --engine fast", "--engine"),
        ("host --socket s --engine simple --max-batch-size 3", "--max-batch-size"),
        ("host --socket s --engine simple --max-decode-pause-ms 3", "--max-decode-pause-ms"),
        ("host --socket s --max-tokens 3", "--max-tokens"),
    ],
)
def test_arguments_that_cannot_be_are_named(
    line: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(line.split())
    assert named in capsys.readouterr().err.splitlines()[-1]
