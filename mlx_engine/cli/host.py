"""``mlx-engine host``: one engine for several programs.

Exit codes: 0 after SIGTERM, 130 after Ctrl-C, drained or not. While the model is loaded, the
first of them ends the load, the second one the process. If the engine fails for good, the exit
code is 1: whoever supervises this can start it anew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from typing import Any

from mlx_engine.cli.leaving import EXIT_INTERRUPTED
from mlx_engine.cli.options import engine_options
from mlx_engine.cli.output import ProgressBar, say
from mlx_engine.engine.batched import BatchedEngine
from mlx_engine.engine.local import LocalEngine
from mlx_engine.engine.simple import SimpleEngine
from mlx_engine.errors import MLXEngineError
from mlx_engine.outputs import EngineState, ShutdownReport
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.signals import SignalHandlers, install_signal_handlers

_OF_THE_HOST = ("max_clients", "cache_folder")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; the exit code."""
    bar = ProgressBar()
    try:
        with asyncio.Runner() as runner:
            return runner.run(_serve(args, bar))
    finally:
        bar.clear()


async def _serve(args: argparse.Namespace, bar: ProgressBar) -> int:
    kind = BatchedEngine if args.engine == "batched" else SimpleEngine
    engine = kind(**engine_options(args), on_progress=bar)
    own = {name: value for name, value in vars(args).items() if name in _OF_THE_HOST}
    host = EngineHost(engine, args.socket, **own)
    program = _Program(engine, host, args.drain)
    with install_signal_handlers(program, timeout=args.drain) as handlers:
        program.handlers = handlers
        try:
            async with engine:
                bar.clear()
                async with host:
                    say(f"serving {args.model} on {host.path}; stop with Ctrl-C")
                    await _end(engine, handlers)
        except MLXEngineError:  # EngineStopped, or what the load ran into while it was stopped
            if handlers.received is None:
                raise
            await handlers.wait()
    return 0 if handlers.received is signal.SIGTERM else EXIT_INTERRUPTED


async def _end(engine: LocalEngine, handlers: SignalHandlers[ShutdownReport]) -> None:
    """Wait for a signal and what it does, or until the engine has failed for good.

    Raises:
        EngineDead: it has.
    """
    signalled = asyncio.ensure_future(handlers.wait())
    failed = asyncio.ensure_future(engine.failed())
    try:
        ends: set[asyncio.Future[Any]] = {signalled, failed}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if signalled.done():
            signalled.result()
        else:
            raise failed.result()
    finally:
        signalled.cancel()
        failed.cancel()


class _Program:
    """The program that signals shut down."""

    def __init__(self, engine: LocalEngine, host: EngineHost, drain: float | None) -> None:
        self.handlers: SignalHandlers[ShutdownReport] | None = None
        self._engine = engine
        self._host = host
        self._drain = drain
        self._loading = False  # at the first signal
        self._told = False

    async def shutdown(self, timeout: float | None) -> ShutdownReport:
        """Stop the load, or drain."""
        if self._loading and self.handlers is not None:
            # The load is stuck in native code, for one. Nothing is lost but time.
            received = self.handlers.received
            os._exit(EXIT_INTERRUPTED if received is signal.SIGINT else 0)
        self._loading = self._engine.state is EngineState.STARTING
        pending = self._host.pending
        if pending and timeout != 0:
            limit = "" if self._drain is None else f" up to {self._drain:g} s"
            say(f"waiting{limit} for {_count(pending)}; another signal aborts what is left")
        report = await self._host.shutdown(timeout)
        if report.aborted and not (self._loading or self._told):
            self._told = True
            count = len(report.aborted)
            say(f"{_count(count)} {'was' if count == 1 else 'were'} aborted")
        return report


def _count(requests: int) -> str:
    return "a request in flight" if requests == 1 else f"{requests} requests in flight"
