"""The package's shape: small files, short functions, docstrings that begin with their subject."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

FILES = sorted((ROOT / "mlx_engine").rglob("*.py"))
LONGEST_FILE = 400  # lines
LONGEST_FUNCTION = 60  # lines, without its docstring
MEDIAN = 130  # lines of a file, at most
NO_SUBJECT = re.compile(r"(It|What|Those|Of)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """All of these kinds, each with the place where it is."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, kinds):
                yield f"{file.relative_to(ROOT / 'mlx_engine')}:{getattr(node, 'lineno', 1)}", node


def lines(file: Path) -> int:
    return len(file.read_text("utf-8").splitlines())


def code_lines(function: Function) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return length
    first = function.body[0]
    assert first.end_lineno is not None
    return length - (first.end_lineno - first.lineno + 1)


def test_no_file_is_long() -> None:
    lengths = {str(file.relative_to(ROOT / "mlx_engine")): lines(file) for file in FILES}
    long = {name for name, length in lengths.items() if length > LONGEST_FILE}
    assert not long
    assert statistics.median(lengths.values()) < MEDIAN


def test_no_function_is_long() -> None:
    long = {
        f"{place.partition(':')[0]}:{node.name}"
        for place, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, Function) and code_lines(node) > LONGEST_FUNCTION
    }
    assert not long


def test_docstrings_begin_with_their_subject() -> None:
    found = [
        f"{place}: {docstring.splitlines()[0]}"
        for place, node in nodes(ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, Documented)
        and (docstring := ast.get_docstring(node)) is not None
        and NO_SUBJECT.match(docstring)
    ]
    assert not found, "\n".join(found)
