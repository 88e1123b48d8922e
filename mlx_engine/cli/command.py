"""One run of the command, from its arguments to its exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from mlx_engine.cli.flags import spelled
from mlx_engine.cli.leaving import EXIT_INTERRUPTED
from mlx_engine.cli.options import parse
from mlx_engine.cli.output import say
from mlx_engine.engine.late import import_mlx
from mlx_engine.errors import InvalidRequest, MLXEngineError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 128 + 13  # what a shell shows for a process that SIGPIPE ended


def run(argv: Sequence[str] | None) -> int:
    """Run one command; returns the exit code."""
    args = parse(argv)
    _quiet_libraries()
    _prepare_streams()
    try:
        # Only now, and here, where Ctrl-C ends the process at once; --help comes without.
        needs_none = args.command in ("help", "launch")
        if not needs_none and not (args.command == "serve" and not args.in_process):
            import_mlx()
        code: int = import_module(f"mlx_engine.cli.{args.command.replace('-', '_')}").run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except InvalidRequest as error:
        return _fail(spelled(error), EXIT_USAGE)
    except MLXEngineError as error:
        return _fail(str(error), EXIT_FAILED)
    except BrokenPipeError:
        _abandon_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:  # the disk behind standard output is full, for one
        return _fail(str(error), EXIT_FAILED)
    return code


def _fail(message: str, code: int) -> int:
    say(f"error: {' '.join(message.splitlines())}")
    return code


def _quiet_libraries() -> None:
    """Keep the remarks of transformers and the Hub off the terminal, unless asked for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _prepare_streams() -> None:
    """A byte that is no text, or a character that the terminal lacks, ends nothing."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        elif name != "stderr":
            stream.reconfigure(errors="replace")


def _abandon_output() -> None:
    """Nobody reads: let what is still in the buffers go nowhere, without a complaint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
