"""A parser of arguments whose errors are one line, which says what to write."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from mlx_engine.cli import other_words

PROGRAM = "mlx-engine"
_REQUIRED, _NO_CHOICE = "the following arguments are required", "invalid choice"


class Parser(argparse.ArgumentParser):
    """A parser of the command, or of one of its commands.

    Attributes:
        command: whose it is; empty at the top.
        rest: the argument that takes all words which are left, if there is one.
    """

    def __init__(self, *, command: str = "", rest: str | None = None, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.command = command
        self.rest = rest
        self.commands: dict[str, Parser] = {}
        self._given: list[str] = []
        self._places: Any = None  # has no public type
        self._siblings: dict[str, Parser] = {}

    def add(self, name: str, *, rest: str | None = None, **options: Any) -> Parser:
        """Add a command."""
        if self._places is None:
            self._places = self.add_subparsers(dest="command", metavar="COMMAND", required=True)
        made: Parser = self._places.add_parser(name, command=name, rest=rest, **options)
        made._siblings = self.commands
        self.commands[name] = made
        return made

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all of them: nothing is left, or it is an error."""
        self._given = list(args)
        if self.commands and (problem := other_words.no_command(args, self.commands)) is not None:
            self.error(problem)
        parsed, left = super().parse_known_args(args, namespace)
        if self.commands:
            return parsed, left
        self._refuse(self._unknown(left))
        if left and self.rest is not None:  # a list is not taken up again behind an option
            vars(parsed)[self.rest] += left
        elif left:
            self.error(other_words.too_many(self.command, self._words(parsed), left))
        return parsed, []

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and end with the code for that."""
        if _REQUIRED in message or _NO_CHOICE in message:  # it was taken for an unknown one's value
            self._refuse(self._unknown(self._given))
        if message.startswith(_REQUIRED):
            flags = self.flags()
            names = message.removeprefix(f"{_REQUIRED}: ").split(", ")
            missing = " and ".join(flags.get(name, name) for name in names)
            message = f"{self.command} needs {missing}; '{self.prog} --help' tells of it"
        self.exit(2, f"{PROGRAM}: error: {' '.join(message.splitlines())}\n")

    def flags(self) -> dict[str, str]:
        """Its options, and how each is written."""
        written = dict[str, str]()
        for action in self._actions:
            value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
            written |= {flag: f"{flag}{value}" for flag in action.option_strings}
        return written

    def _unknown(self, words: Iterable[str]) -> str | None:
        """The first of them that looks like an option and is none."""
        known = self.flags()
        for word in words:
            if word == "--" or (self._hands_on and not word.startswith("-")):
                break
            if _is_option(word) and word.partition("=")[0] not in known:
                return word
        return None

    @property
    def _hands_on(self) -> bool:
        """Whether what comes behind its first word is for another program."""
        return any(action.nargs == argparse.REMAINDER for action in self._actions)

    def _refuse(self, option: str | None) -> None:
        if option is not None:
            others = {name: parser.flags() for name, parser in self._siblings.items()}
            said = other_words.no_option(option, self.command, self.flags(), others)
            self.error(f"{self.command} has no option {said}")

    def _words(self, parsed: argparse.Namespace) -> list[str]:
        dests = [action.dest for action in self._actions if not action.option_strings]
        return [word for dest in dests if isinstance(word := vars(parsed).get(dest), str)]


def _is_option(word: str) -> bool:
    if not word.startswith("-") or word == "-" or " " in word:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False
