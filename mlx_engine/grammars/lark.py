"""Grammars in llguidance's variant of Lark, as far as they are looked at before the compiler."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from mlx_engine.grammars.json_schema import enforceable
from mlx_engine.grammars.json_values import copied, dumped
from mlx_engine.grammars.pattern import MOST_DEMANDED, Demand, demanded, written_out
from mlx_engine.grammars.problem import problem

LONGEST = 2**16  # characters

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|\#[^\n]*)
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?!/)(?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\\[])+/[imslux]*)
    |(?P<json>%(?:json|regex|llguidance)\b\s*)
    |(?P<name>[A-Za-z_][\w-]*)
    |(?P<range>~\s*(\d{1,18})(\s*\.\.\s*\d+)?)
    |(?P<count>\{\s*(\d{0,18})\s*(,\s*\d*\s*)?\})
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_FLAGS = "imslux"
_NUMBER = re.compile(r"\d+")
_READ = json.JSONDecoder()

Token = tuple[str, str]


def checked_lark(text: str) -> str:
    """A grammar as it is compiled: schemas in it are those that are enforced as they stand.

    Raises:
        InvalidRequest: it has no start, or demands more than a compiler should go through.
    """
    if len(text) > LONGEST:
        raise problem((), f"has {len(text)} characters; {LONGEST} are the most of a grammar")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise problem((), f"is not valid Unicode text ({error})") from error
    tokens = [*_tokens(text)]
    rules = _rules(tokens)
    if "start" not in rules:
        raise problem((), "a grammar needs a rule 'start', as in 'start: \"yes\" | \"no\"'")
    demands: dict[str, int] = {}
    for name in rules:
        _demand(name, rules, demands, frozenset())
    for name, demand in demands.items():
        if demand > MOST_DEMANDED:
            raise problem(
                (name,),
                f"demands about {demand} characters by its counts, of which {MOST_DEMANDED} are "
                "the most; repeat by '*' or '+'",
            )
    return "".join(token for _, token in tokens)


def slashed(pattern: str) -> str:
    """A regular expression as Lark has it, between slashes."""
    out, place = [], 0
    while place < len(pattern):
        char = pattern[place]
        step = pattern[place : place + 2] if char == "\\" else char
        place += len(step)
        out.append("\\/" if step == "/" else "\\n" if step == "\n" else step)
    return f"/{''.join(out)}/"


def _rules(tokens: list[Token]) -> dict[str, list[Token]]:
    """The rules of a grammar, each with what it is made of."""
    rules: dict[str, list[Token]] = {}
    body: list[Token] = []
    tokens = [token for token in tokens if token[0] != "space"]
    for at, (kind, token) in enumerate(tokens):
        ahead = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        # A rule's own options follow its name in brackets.
        if kind == "name" and (ahead == ":" or (ahead == "[" and _heads(tokens, at + 1))):
            body = rules.setdefault(token, [])
        elif token in ("&", "~"):
            raise problem(
                (), f"{token!r} between terminals cannot be bounded in time; write one regex"
            )
        else:
            body.append((kind, token))
    return rules


def _heads(tokens: list[Token], at: int) -> bool:
    """Whether brackets at a place are a rule's options: a colon follows them."""
    for place in range(at, min(at + 40, len(tokens) - 1)):
        if tokens[place][1] == "]":
            return tokens[place + 1][1] == ":"
    return False


def _tokens(text: str) -> Iterator[Token]:
    place = 0
    while (found := _TOKEN.match(text, place)) is not None:
        kind, token = str(found.lastgroup), found[0]
        place = found.end()
        if kind == "json":
            try:
                value, place = _READ.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                raise problem((), f"{token.strip()} is not followed by JSON ({error})") from error
            written = enforceable(copied(value)) if token.startswith("%json") else dumped(value)
            yield kind, f"{token.strip()} {written}"
        else:
            yield kind, token


def _demand(
    name: str, rules: dict[str, list[Token]], demands: dict[str, int], above: frozenset[str]
) -> int:
    """Characters that a terminal demands, or a rule in one of its parts."""
    if name in demands or name not in rules or name in above:
        return demands.get(name, 1)
    if len(above) > 100:
        raise problem((name,), "terminals are nested deeper than 100 levels")
    demand, most = Demand(), 0
    terminal = name == name.upper()
    for kind, token in rules[name]:
        part = 1
        if kind == "string":
            part = written_out(len(token)) if terminal else 1
        elif kind == "regex":
            part = demanded(token.rstrip(_FLAGS)[1:-1])
        elif kind == "name" and token == token.upper():
            part = _demand(token, rules, demands, above | {name})
        most = max(most, part)
        if not terminal:
            continue
        if kind in ("string", "regex", "name"):
            demand.add(part)
        elif kind in ("count", "range"):
            numbers = _NUMBER.findall(token)
            demand.repeat(int(numbers[0]) if numbers else 0)
        elif token == "(":
            demand.begin()
        elif token == ")":
            demand.end()
        elif token == "|":
            demand.otherwise()
    demands[name] = max(most, demand.total) if terminal else most
    return demands[name]
