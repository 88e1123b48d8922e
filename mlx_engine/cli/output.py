"""Output of the command: answers to standard output, all the rest to standard error."""

from __future__ import annotations

import sys

from tqdm import tqdm

from mlx_engine.cli.parser import PROGRAM
from mlx_engine.core.stream import GenerationStream
from mlx_engine.outputs import GenerationChunk, GenerationResult, Progress, ToolCallDelta

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def say(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"{PROGRAM}: {message}\n")
    sys.stderr.flush()


class ProgressBar:
    """A progress callback that draws one bar at a time, if standard error is a terminal.

    Attributes:
        converted: whether the demo model was made ready: this is the first run with it.
    """

    def __init__(self) -> None:
        self.converted = False
        self._shown = sys.stderr.isatty()
        self._bar: _Bar | None = None
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        """Show how far it has come."""
        self.converted |= progress.phase == "convert"
        if not self._shown:
            return
        if self._phase != progress.phase:
            self.clear()
        if self._bar is None:
            if _too_short(progress):
                return
            self._bar = _new_bar(progress)
            self._phase = progress.phase
        self._bar.total = progress.total
        self._bar.update(progress.done - self._bar.n)

    def clear(self) -> None:
        """Remove the bar from the screen; text may follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def loaded(bar: ProgressBar) -> None:
    """The model is there: remove the bar, and say what to expect of the demo, the first time."""
    bar.clear()
    if bar.converted:
        say("note: the demo model is ready; on a CPU it writes 4 to 10 tokens in a second")


def _too_short(progress: Progress) -> bool:
    """A prefill that is over after one chunk; the last token is left to the decoding."""
    return (
        progress.phase in ("score", "prefill")
        and progress.total is not None
        and progress.done >= progress.total - 1
    )


class _Bar(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # no thread of tqdm's own


def _new_bar(progress: Progress) -> _Bar:
    unit = " tokens" if progress.phase in ("score", "prefill") else "B"
    return _Bar(
        desc=progress.phase,
        total=progress.total,
        unit=unit,
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
    )


class AnswerPrinter:
    """Streams one answer to standard output.

    On a terminal reasoning and tool calls are shown dimmed, calls as their names and arguments;
    elsewhere they are left out, so that what a pipe or a file gets is the answer.

    Args:
        bar: cleared before anything is printed.
        silent: print nothing.

    Attributes:
        text: the content printed so far.
    """

    def __init__(self, bar: ProgressBar, *, silent: bool = False) -> None:
        self.text = ""
        self._bar = bar
        self._silent = silent
        self._terminal = sys.stdout.isatty()
        self._dim = False
        self._last = "\n"

    def __call__(self, chunk: GenerationChunk) -> None:
        """Print what the chunk adds."""
        content = chunk.segment == "content"
        text = chunk.text if chunk.segment != "tool_call" else self._of_call(chunk.tool_call)
        if self._silent or not text or not (content or self._terminal):
            return
        self._bar.clear()
        if self._dim == content:
            self._switch()
        self._write(text)
        if content:
            self.text += text
        sys.stdout.flush()

    def end(self) -> None:
        """Finish the line, whole answer or not. Any number of times."""
        self._bar.clear()
        if self._dim:
            self._switch()
        if self._last != "\n":
            self._write("\n")
        sys.stdout.flush()

    def _of_call(self, delta: ToolCallDelta | None) -> str:
        """The text of what a chunk adds to a call: each is a line, its name and its arguments."""
        if delta is None:
            return ""
        begins = delta.id is not None and self._dim and self._last != "\n"
        name = "" if delta.name is None else f"{delta.name} "
        error = "" if delta.error is None else f" [{delta.error}]"
        return "\n" * begins + name + delta.arguments + error

    def _switch(self) -> None:
        """Between content and the rest: each begins a line of its own."""
        if self._last != "\n":
            self._write("\n")
        self._dim = not self._dim
        sys.stdout.write(_DIM if self._dim else _PLAIN)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        self._last = text[-1]


async def print_answer(stream: GenerationStream, printer: AnswerPrinter) -> GenerationResult:
    """Print a stream as it comes; the whole result."""
    async with stream:
        async for chunk in stream:
            printer(chunk)
    return stream.result


def remark(result: GenerationResult, *, verbose: bool, whole: bool = False) -> None:
    """Remark on an answer; ``whole``: all of the result has been printed."""
    for note in result.notes:
        say(f"note: {note}")
    if result.finish_reason == "length" and not whole:
        tokens = result.usage.completion_tokens
        say(f"note: cut after {tokens} tokens, by --max-tokens or the end of the context")
    if result.finish_reason == "timeout" and not whole:
        say(f"note: cut after {result.usage.completion_tokens} tokens, by --timeout")
    if verbose:
        say_statistics(result)


def say_statistics(result: GenerationResult) -> None:
    """Tokens, and where the time went."""
    usage, timings = result.usage, result.timings
    say(
        f"{usage.prompt_tokens} prompt tokens ({timings.prompt_tokens_per_second:.1f} tok/s), "
        f"{usage.completion_tokens} tokens ({timings.tokens_per_second:.1f} tok/s), "
        f"first token after {timings.time_to_first_token:.2f} s, "
        f"finish reason {result.finish_reason}"
    )
    if timings.draft_tokens:
        say(f"{timings.accepted_tokens} of {timings.draft_tokens} proposed tokens were accepted")
    if usage.kept_tokens is not None:
        say(f"{usage.kept_tokens} of {usage.prompt_tokens} prompt tokens were prefilled")
