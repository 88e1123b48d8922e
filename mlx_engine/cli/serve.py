"""``mlx-engine serve``: models by HTTP, to clients of OpenAI's and Anthropic's APIs.

Exit codes: those of ``host``. Each engine has a process of its own, which is started again if it
crashes. Only when that does not help any more does the server end, if it has no other model.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mlx_engine.checks import integer
from mlx_engine.cli.leaving import EXIT_INTERRUPTED
from mlx_engine.cli.options import sampling_params
from mlx_engine.cli.output import ProgressBar, say
from mlx_engine.cli.parser import PROGRAM
from mlx_engine.cli.serve_options import KEYS_VARIABLE
from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import EngineDead, InvalidRequest, MLXEngineError
from mlx_engine.extras import installing
from mlx_engine.outputs import EngineState, ShutdownReport
from mlx_engine.remote.signals import SignalHandlers, install_signal_handlers

try:
    from mlx_engine.cli.http_server import HttpServer, bound
    from mlx_engine.cli.served_models import memory_for_weights, served_models
    from mlx_engine.server import LOOPBACK, create_app
    from mlx_engine.server.models import Models
except ModuleNotFoundError as error:
    raise InvalidRequest("serve", f"needs {error.name}: {installing('server')}") from error

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
        with asyncio.Runner() as runner, bound(args.host, args.port) as door:
            return runner.run(_serve(args, keys, door, bar))
    finally:
        bar.clear()


async def _serve(
    args: argparse.Namespace, keys: list[str], door: socket.socket, bar: ProgressBar
) -> int:
    most = vars(args).get("max_models")
    app = create_app(
        served_models(args, bar),
        api_keys=keys,
        hosts=_hosts(args),
        defaults=replace(sampling_params(args), max_tokens=None),
        idle_timeout=vars(args).get("idle_timeout"),
        max_loaded_models=None if most is None else integer("max_models", most, low=1),
        memory_bytes=memory_for_weights() if most is None else None,
    )
    models: Models = app.state.models
    if not args.quiet:
        _log_requests()
    server = HttpServer(app)
    program = _Program(models, server, args.drain)
    with install_signal_handlers(program, timeout=args.drain) as handlers:
        program.handlers = handlers
        serving = asyncio.create_task(server.serve(sockets=[door]))
        try:
            await server.listening(serving)  # clients that come while it loads wait for that
            await models.preload()
            bar.clear()
            if handlers.received is None:
                say(_greeting(door, keys, models.names))
                await _end(models, serving)
        except MLXEngineError:  # what a load that is stopped may run into
            if handlers.received is None:
                raise
        finally:
            server.should_exit = True
            await serving
            await (models.shutdown(0) if handlers.received is None else handlers.wait())
    return EXIT_INTERRUPTED if handlers.received is signal.SIGINT else 0


async def _end(models: Models, serving: asyncio.Task[None]) -> None:
    """Wait until the server has ended, or the only model for good.

    Raises:
        EngineDead: it has.
    """
    only = next(iter(models)) if len(list(models)) == 1 else None
    while not serving.done():
        await asyncio.wait({serving}, timeout=1)
        engine = None if only is None else only.engine
        if isinstance(engine, BaseEngine) and engine.state is EngineState.FAILED:
            engine.check_running()
            raise EngineDead("the engine has failed")


class _Program:
    """The program that signals shut down."""

    def __init__(self, models: Models, server: HttpServer, drain: float | None) -> None:
        self.handlers: SignalHandlers[ShutdownReport] | None = None
        self._models = models
        self._server = server
        self._drain = drain
        self._loading = False  # at the first signal

    async def shutdown(self, timeout: float | None) -> ShutdownReport:
        """Stop what loads, take no more requests and let those in flight finish."""
        if self._loading and self.handlers is not None:
            received = self.handlers.received
            os._exit(EXIT_INTERRUPTED if received is signal.SIGINT else 0)
        self._loading = any(model.state == "loading" for model in self._models)
        self._server.should_exit = True
        if (pending := len(self._server.server_state.tasks)) and timeout != 0:
            limit = "" if self._drain is None else f" up to {self._drain:g} s"
            say(f"waiting{limit} for requests in flight ({pending}); another signal aborts them")
        report = await self._models.shutdown(timeout)
        asyncio.get_running_loop().call_later(_LAST_WORDS, self._leave)
        return report

    def _leave(self) -> None:
        """Wait for nobody any more: not for bodies that do not come, nor for who does not read."""
        self._server.cut()
        asyncio.get_running_loop().call_later(_LAST_WORDS, self._force)

    def _force(self) -> None:
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
