"""``mlx-engine serve``: a model by HTTP, to clients of OpenAI's and Anthropic's APIs.

Exit codes: those of ``host``. The engine has a process of its own, which is started again if it
crashes; only when that does not help any more does the server end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mlx_engine.checks import integer
from mlx_engine.cli.leaving import EXIT_INTERRUPTED
from mlx_engine.cli.options import PROGRAM, engine_options, sampling_params
from mlx_engine.cli.output import ProgressBar, say
from mlx_engine.cli.serve_options import KEYS_VARIABLE
from mlx_engine.engine.base import BaseEngine
from mlx_engine.engine.batched import BatchedEngine
from mlx_engine.engine.simple import SimpleEngine
from mlx_engine.errors import EngineDead, InvalidRequest, MLXEngineError
from mlx_engine.outputs import EngineState, ShutdownReport
from mlx_engine.remote.replicas.manager import EngineManager
from mlx_engine.remote.signals import SignalHandlers, install_signal_handlers

try:
    import uvicorn

    from mlx_engine.server import LOOPBACK, create_app
    from mlx_engine.server.site import by_name
except ModuleNotFoundError as error:
    raise InvalidRequest(
        "serve", f"needs {error.name}: pip install 'mlx-engine[server]'"
    ) from error

_LAST_WORDS = 2.0  # seconds for answers to be sent once the engine is done with them


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; the exit code."""
    keys = _keys(vars(args).get("api_key_file"))
    if not keys and not _is_loopback(args.host):
        raise InvalidRequest(
            "host",
            f"{args.host} can be reached from other machines: give keys that clients need, with "
            f"--api-key-file or in ${KEYS_VARIABLE}",
        )
    bar = ProgressBar()
    try:
        with asyncio.Runner() as runner, _bound(args.host, args.port) as door:
            return runner.run(_serve(args, keys, door, bar))
    finally:
        bar.clear()


async def _serve(
    args: argparse.Namespace, keys: list[str], door: socket.socket, bar: ProgressBar
) -> int:
    engine = _engine(args, bar)
    names = vars(args).get("served_names")
    engines = dict.fromkeys(names, engine) if names else by_name(engine)
    app = create_app(
        engines,
        api_keys=keys,
        hosts=_hosts(args),
        defaults=replace(sampling_params(args), max_tokens=None),
    )
    if not args.quiet:
        _log_requests()
    server = _Server(
        uvicorn.Config(app, lifespan="off", ws="none", log_config=None, server_header=False)
    )
    program = _Program(engine, server, args.drain)
    with install_signal_handlers(program, timeout=args.drain) as handlers:
        program.handlers = handlers
        try:
            async with engine:
                bar.clear()
                serving = asyncio.create_task(server.serve(sockets=[door]))
                try:
                    await server.listening(serving)
                    say(_greeting(door, keys, engines))
                    await _end(engine, serving)
                finally:
                    server.should_exit = True
                    await serving
        except MLXEngineError:  # EngineStopped, or what the load ran into while it was stopped
            if handlers.received is None:
                raise
            await handlers.wait()
    return EXIT_INTERRUPTED if handlers.received is signal.SIGINT else 0


def _engine(args: argparse.Namespace, bar: ProgressBar) -> BaseEngine:
    options = engine_options(args)
    if not args.in_process:
        return EngineManager(**options, engine=args.engine, on_progress=bar)
    kind = BatchedEngine if args.engine == "batched" else SimpleEngine
    return kind(**options, on_progress=bar)


async def _end(engine: BaseEngine, serving: asyncio.Task[None]) -> None:
    """Wait until the server has ended, or the engine for good.

    Raises:
        EngineDead: it has.
    """
    while not serving.done():
        await asyncio.wait({serving}, timeout=1)
        if engine.state is EngineState.FAILED:
            engine.check_running()
            raise EngineDead("the engine has failed")


class _Server(uvicorn.Server):
    """A server that leaves signals to the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing of that."""
        yield

    async def listening(self, serving: asyncio.Task[None]) -> None:
        """Wait until clients can connect, or it has ended."""
        while not (self.started or serving.done()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


class _Program:
    """The program that signals shut down."""

    def __init__(self, engine: BaseEngine, server: _Server, drain: float | None) -> None:
        self.handlers: SignalHandlers[ShutdownReport] | None = None
        self._engine = engine
        self._server = server
        self._drain = drain
        self._loading = False  # at the first signal

    async def shutdown(self, timeout: float | None) -> ShutdownReport:
        """Stop the load, or take no more requests and let those in flight finish."""
        if self._loading and self.handlers is not None:
            received = self.handlers.received
            os._exit(EXIT_INTERRUPTED if received is signal.SIGINT else 0)
        self._loading = self._engine.state is EngineState.STARTING
        self._server.should_exit = True
        if (pending := len(self._server.server_state.tasks)) and timeout != 0:
            limit = "" if self._drain is None else f" up to {self._drain:g} s"
            say(f"waiting{limit} for requests in flight ({pending}); another signal aborts them")
        report = await self._engine.shutdown(timeout)
        asyncio.get_running_loop().call_later(_LAST_WORDS, self._leave)
        return report

    def _leave(self) -> None:
        self._server.force_exit = True


def _keys(path: str | None) -> list[str]:
    """Keys, out of a file and the environment, which others inherit no more."""
    found = re.split(r"[\s,]+", os.environ.pop(KEYS_VARIABLE, ""))
    if path is not None:
        try:
            found += Path(path).read_text("utf-8").split()
        except (OSError, ValueError) as error:
            raise InvalidRequest("api_key_file", f"cannot be read: {error}") from error
    return [key for key in found if key]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(args: argparse.Namespace) -> list[str] | None:
    """Names that clients may call the server by; ``None`` is any."""
    allowed = vars(args).get("allowed_hosts", [])
    if not _is_loopback(args.host) and not allowed:
        return None
    return [*LOOPBACK, args.host, *allowed]


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has its address, before a model is loaded in vain; nobody can connect yet."""
    integer("port", port, low=0, high=65_535)
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        door = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidRequest("host", f"{host}, port {port}: {error}") from error
    with door:
        try:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
        except OSError as error:
            raise InvalidRequest(
                "port", f"cannot listen on {host}, port {port}: {error}"
            ) from error
        yield door


def _greeting(door: socket.socket, keys: list[str], models: Iterable[str]) -> str:
    host, port = door.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    needs = f"with one of {len(keys)} keys" if len(keys) > 1 else "with a key" if keys else "no key"
    return f"serving {' and '.join(models)} on {where} ({needs}); stop with Ctrl-C"


def _log_requests() -> None:
    """Have a line for each request on standard error."""
    log = logging.getLogger("mlx_engine.server")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
