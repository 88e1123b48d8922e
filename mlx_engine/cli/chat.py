"""``mlx-engine chat``: a conversation in the terminal.

The event loop runs while the engine works and rests while the user types, so a line is read
in the main thread: Ctrl-C and Ctrl-D work there as in any terminal, and no thread is left
behind in a blocking read.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable
from functools import partial

from mlx_engine.cli import interrupts
from mlx_engine.cli.options import chat_options, engine_options, sampling_params
from mlx_engine.cli.output import AnswerPrinter, ProgressBar, loaded, print_answer, remark, say
from mlx_engine.cli.values import time_limit
from mlx_engine.core.stream import GenerationStream
from mlx_engine.engine.simple import SimpleEngine
from mlx_engine.errors import ContextLengthExceeded, GenerationError
from mlx_engine.outputs import GenerationResult

try:
    import readline  # noqa: F401 - input() then edits lines and has a history
except ImportError:  # not part of every build of Python
    pass

_HELP = "Ctrl-C stops an answer, Ctrl-D or /exit ends, /reset forgets the conversation"

Message = dict[str, str]


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends; the exit code."""
    params = sampling_params(args)
    options = {**chat_options(args), **time_limit(args)}
    bar = ProgressBar()
    engine = SimpleEngine(**engine_options(args), on_progress=bar)
    with asyncio.Runner() as runner:
        try:
            interrupts.run(runner, engine.start())
            loaded(bar)
        finally:
            bar.clear()
        try:
            # Ctrl-C between an answer and the next prompt belongs to neither.
            with interrupts.on_ctrl_c(interrupts.do_nothing):
                stream = partial(engine.stream_chat, params=params, **options)
                _talk(Conversation(stream, args.system, bar), runner, args.verbose)
        finally:
            runner.run(engine.stop())
    return 0


def _talk(conversation: Conversation, runner: asyncio.Runner, verbose: bool) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        say(_HELP)
    while (line := _read_line("> " if terminal else "")) is not None:
        match line.strip():
            case "":
                pass
            case "/exit":
                return
            case "/reset":
                conversation.turns.clear()
                say("the conversation is forgotten")
            case _:
                result = conversation.ask(line, runner)
                if result is not None:
                    remark(result, verbose=verbose)


def _read_line(prompt: str) -> str | None:
    """A line of input; ``None`` at its end."""
    try:
        with interrupts.on_ctrl_c(signal.default_int_handler):
            return input(prompt)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        say(_HELP)
        return ""
    except EOFError:
        if prompt:
            sys.stderr.write("\n")
        return None


class Conversation:
    """Messages to and fro.

    Args:
        stream: the engine's ``stream_chat``, with all options.
        system: message, apart from the turns.
        bar: told of the prefill.

    Attributes:
        turns: messages of user and assistant, in turn; the system message is kept apart.
    """

    def __init__(
        self, stream: Callable[..., GenerationStream], system: str | None, bar: ProgressBar
    ) -> None:
        self._stream = stream
        self._bar = bar
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Message] = []

    def ask(self, text: str, runner: asyncio.Runner) -> GenerationResult | None:
        """Print the answer, and remember it as far as it was printed.

        Ctrl-C ends the answer, an error of this request too: then ``None``. A question
        without any answer is forgotten, since templates want user and assistant in turn.
        """
        question = {"role": "user", "content": text}
        printer, before = AnswerPrinter(self._bar), len(self.turns)
        result: GenerationResult | None = None
        try:
            work = self._answer(question, printer)
            result = interrupts.run(runner, work, again=interrupts.do_nothing)
        except KeyboardInterrupt:
            pass
        except (ContextLengthExceeded, GenerationError) as error:
            printer.end()
            say(f"error: {error}")
        finally:
            printer.end()
        if len(self.turns) < before:
            say("note: the conversation no longer fits the context: its oldest part is forgotten")
        if printer.text:
            self.turns += [question, {"role": "assistant", "content": printer.text}]
        return result

    async def _answer(self, question: Message, printer: AnswerPrinter) -> GenerationResult:
        """Answer the question; the oldest turns are dropped as far as they do not fit."""
        before = self.turns
        while True:
            messages = [*self._system, *self.turns, question]
            stream = self._stream(messages, on_progress=self._bar)
            try:
                return await print_answer(stream, printer)
            except ContextLengthExceeded:
                if not self.turns:
                    self.turns = before  # not even the question alone fits
                    raise
                self.turns = self.turns[2:]
