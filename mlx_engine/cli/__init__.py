"""The ``mlx-engine`` command: arguments -> engine call -> print.

    generate    one answer, streamed to standard output
    chat        a conversation in the terminal
    host        a model for several programs, on a Unix socket
    serve       models by HTTP, to clients of OpenAI's API and to agents
    launch      a coding agent on such a server
    info        what a model is, without loading its weights
    selftest    whether cancelling is safe, on this machine and with this model
    extract-mtp a model's MTP head, out of its original checkpoint
    help        the guide, a topic at a time

Standard output carries the answer and nothing else; all the rest goes to standard error.
Exit codes: 0 fine, 1 the model or the engine failed, 2 the arguments are not acceptable,
130 after Ctrl-C, 141 when the reader of a pipe has gone away.

Its files:

    command.py           one run, from its arguments to its exit code
    options.py           the arguments
    parser.py            ... and what is said if they are others
    other_words.py       ... which other commands have
    flags.py             arguments out of the fields of the library's values
    serve_options.py     those of serve
    sampling_options.py  those that say how tokens are chosen
    constraint.py        and what the answer must be
    values.py            their values, out of their text
    generate.py          a command: one answer
    chat.py              a command: a conversation
    host.py              a command: one engine for several programs
    serve.py             a command: models by HTTP
    http_server.py       the connections of clients
    served_models.py     which ones, and how large they are
    launch.py            a command: a coding agent on such a server
    info.py              a command: what a model is
    memory_table.py      and what it takes
    selftest.py          a command: whether cancelling is safe
    extract_mtp.py       a command: a model's MTP head, into a file
    help.py              a command: the guide
    guide.py             the topics of the guide, out of their files
    output.py            what is written, and where to
    interrupts.py        Ctrl-C while there is something to stop
    leaving.py           and as long as there is nothing
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from mlx_engine.cli import leaving


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, as the last thing that its process does; returns the exit code.

    Args:
        argv: the arguments, by default those of the process.

    Raises:
        SystemExit: by argparse, for ``--help``, ``--version`` and arguments that it refuses.
    """
    # Before all that takes time to import, of which Ctrl-C would print a traceback; and not
    # taken back, or it would while the interpreter exits.
    leaving.install(sys.argv[1:] if argv is None else argv)
    code: int = import_module("mlx_engine.cli.command").run(argv)
    return code
