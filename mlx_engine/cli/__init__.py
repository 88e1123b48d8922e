"""The ``mlx-engine`` command: arguments -> engine call -> print.

    generate    one answer, streamed to standard output
    chat        a conversation in the terminal
    host        a model for several programs, on a Unix socket
    info        what a model is, without loading its weights
    selftest    whether cancelling is safe, on this machine and with this model
    extract-mtp a model's MTP head, out of its original checkpoint

Standard output carries the answer and nothing else; all the rest goes to standard error.
Exit codes: 0 fine, 1 the model or the engine failed, 2 the arguments are not acceptable,
130 after Ctrl-C, 141 when the reader of a pipe has gone away.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from mlx_engine.cli import interrupts
from mlx_engine.cli.options import parse, spelled
from mlx_engine.cli.output import say
from mlx_engine.errors import InvalidRequest, MLXEngineError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 128 + 13  # what a shell shows for a process that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, as the last thing that its process does; returns the exit code.

    Args:
        argv: the arguments, by default those of the process.

    Raises:
        SystemExit: by argparse, for ``--help``, ``--version`` and arguments that it refuses.
    """
    args = parse(argv)
    # Not taken back: Ctrl-C while the interpreter exits would print a traceback.
    interrupts.install()
    _quiet_libraries()
    _prepare_streams()
    try:
        # Only now, since it imports MLX; --help and --version come without.
        code: int = import_module(f"mlx_engine.cli.{args.command.replace('-', '_')}").run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return interrupts.EXIT_INTERRUPTED
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
