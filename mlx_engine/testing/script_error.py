"""Mistakes of a test's script."""

from __future__ import annotations


class ScriptError(AssertionError):
    """A mistake of a script: it has no answer to what was asked, or one that no model could give,
    or what makes the answers has failed; or a test waits at a gate to which nobody comes.

    A failure of the test, and so no ``MLXEngineError``: an application that does something about
    those, and asks again, does not hide it. Whatever became of it there, the end of the engine's
    ``async with`` raises it again.
    """


def mistake(problem: str, cause: BaseException | None = None) -> ScriptError:
    """The error of a mistake that ``cause`` has shown."""
    error = ScriptError(problem)
    error.__cause__ = cause
    return error
